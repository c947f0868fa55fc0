"""`gptb-ds train` from a trained decoder begins at that decoder's loss with a context, and resumes as any run does.

Axes: B predictions, T tokens of a text, C recent tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gptb_ds.data.documents import open_store
from tests.harness.training import TINY, file_checksums, metrics, rewind, train

C, SLOTS, EOT, V = 4, 8, 1, 259
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"bos_token_id": EOT, "eos_token_id": EOT}
DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SIZES, **IDS, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, **IDS, num_key_value_heads=1, intermediate_size=64, tie_word_embeddings=False)
    ),
}


def texts(store: Path, split: str) -> list[torch.Tensor]:
    """Each document with what a slot of a recent token holds before it begins: the end of text."""
    opened = open_store(store, split)
    documents = (opened.document(i) for i in range(opened.num_documents))
    return [torch.tensor([EOT] * (C + 1) + document.tolist() + [EOT]) for document in documents]


def loss_at_context(model: PreTrainedModel, store: Path) -> float:
    """Mean over the held-out text when each prediction sees the C + 1 tokens before it."""
    windows_BT = torch.cat([text.unfold(0, C + 2, 1) for text in texts(store, "validation")])
    with torch.no_grad():
        logits_BV = model(windows_BT[:, :-1]).logits[:, -1]
    return float(F.cross_entropy(logits_BV, windows_BT[:, -1]))


@pytest.fixture(scope="module", params=DECODERS)
def decoder(
    request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    """A decoder that is trained here on the store's text, and its folder."""
    torch.manual_seed(0)
    model = DECODERS[request.param]()
    windows_BT = torch.cat([text.unfold(0, C + 2, 1) for text in texts(store, "train")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        ids = windows_BT[torch.randint(len(windows_BT), (64,))]
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("decoder") / request.param
    model.eval().save_pretrained(folder)
    return model, folder


def keys(folder: Path) -> dict[str, object]:
    """All sizes are the folder's."""
    return {
        "model__backbone": folder,
        "model__init_from": folder,
        "model__num_slots": SLOTS,
        "model__recent_tokens": C,
        "optim__lr": 1e-3,
        "train__updates": 6,
        "run__eval_every": 6,
        "run__save_every": 3,
        "run__eval_tokens": 1_000_000,
    }


def evaluated(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.slow
def test_a_run_from_a_decoder(
    decoder: tuple[PreTrainedModel, Path], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = decoder
    for key in ("model.n_layer", "model.n_head", "model.n_embd"):
        monkeypatch.delitem(TINY, key)
    warm = tmp_path / "warm"
    said = train(warm, store, **keys(folder)).text(0)
    count = sum(1 for _ in model.parameters())
    assert f"{folder}: {count} tensors loaded; new: transformer.initial_embeds, transformer.state_gate" in said
    wanted = loss_at_context(model, store)
    first, last = evaluated(warm)
    train(tmp_path / "cold", store, **{key: value for key, value in keys(folder).items() if key != "model__init_from"})
    cold = evaluated(tmp_path / "cold")[-1]
    print(
        f"decoder at context {C + 1}: {wanted:.4f}; the run's first loss: {first:.4f}; after 6 updates {last:.4f}, from"
        f" nothing {cold:.4f}"
    )
    assert abs(first / wanted - 1) < 0.01
    assert wanted < 0.6 * float(torch.tensor(float(V)).log()) and last < cold - 0.5
    again = rewind(warm, tmp_path / "again", 3)
    assert "resuming from" in train(again, store, **keys(folder)).text(0)
    assert metrics(again) == metrics(warm) and file_checksums(again, 6) == file_checksums(warm, 6)
