"""What training says of the state's health: figures that are right where they are known, and the warning.

Axes: B lanes, K steps, N state vectors, E embedding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from gptb_ds.baselines import LSTMBaseline, LSTMConfig
from gptb_ds.cli import main
from gptb_ds.data.corpus import Corpus, open_corpus
from gptb_ds.data.segments import whole_pieces
from gptb_ds.distributed.world import World
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.window_model import WindowModel
from gptb_ds.state_health import DISTANCES, StateHealth, without_state
from gptb_ds.state_use import Reader
from tests.harness.models import V, random_ids, small_gptb
from tests.harness.stores import EOT, make_corpus, numbered_documents
from tests.harness.training import train


class Map(WindowModel):
    """A state of two vectors that a matrix maps, plus what the token adds; the second vector is what it outputs."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.config = GPT2Config(vocab_size=V, n_embd=len(matrix))
        self.matrix = nn.Parameter(matrix.double())
        self.wte = nn.Embedding(V, len(matrix), dtype=torch.float64)
        self.lm_head = nn.Linear(len(matrix), V, bias=False, dtype=torch.float64)

    def empty_state(self, lanes: int) -> torch.Tensor:
        return torch.zeros(lanes, 2, len(self.matrix), dtype=torch.float64)

    def unroll(self, input_ids_KB, state, reset_KB, recompute_every=0, sums=None):
        outputs = []
        for ids_B, reset_B in zip(input_ids_KB, reset_KB, strict=True):
            state_BNE = torch.where(reset_B[:, None, None], 0.0, state)
            state = state_BNE @ self.matrix + self.wte(ids_B)[:, None]
            outputs.append(state[:, 1])
        return torch.stack(outputs), state


def turning(growth: float) -> torch.Tensor:
    """A rotation of the plane that also stretches by `growth`."""
    turn = torch.tensor([[math.cos(1.0), math.sin(1.0)], [-math.sin(1.0), math.cos(1.0)]])
    return growth * turn


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Seven documents of 39 tokens: 40 inputs, all in the sample."""
    return make_corpus(tmp_path_factory.mktemp("health"), numbered_documents([39] * 7, V), vocab=V)


def health(corpus: Corpus, **options: int) -> StateHealth:
    return StateHealth(corpus, World(), most_tokens=options.pop("most_tokens", 10_000), **options)


@pytest.mark.parametrize("growth", [0.5, 0.97, 1.2])
def test_a_linear_map_has_the_exponent_and_the_gradients_of_its_matrix(corpus: Corpus, growth: float):
    found = health(corpus).measure(Map(turning(growth)).eval())
    assert found["state_lyapunov"] == pytest.approx(math.log(growth))
    for distance in DISTANCES:
        assert found[f"state_gradient_{distance}"] == pytest.approx(growth ** (distance - 1))


def test_the_exponent_is_that_of_the_direction_that_grows_most(corpus: Corpus):
    found = health(corpus).measure(Map(torch.diag(torch.tensor([0.3, 0.9, 0.2]))).eval())
    assert found["state_lyapunov"] == pytest.approx(math.log(0.9), abs=0.01)


@pytest.mark.parametrize("carry", ["outputs", "shift"])
def test_the_worth_is_what_evaluate_finds_for_a_state_that_is_reset_at_every_token(corpus: Corpus, carry: str):
    model = small_gptb(torch.float64, carry=carry)
    reader = Reader(WindowObjective(model).eval(), corpus, World(), 4, 8)
    reset, carried = (reader.score(whole_pieces(corpus), "wholes", None, every) for every in (1, None))
    found = health(corpus).measure(model)
    # The health's losses are taken in float32.
    assert found["state_worth"] == pytest.approx(reset.loss - carried.loss, abs=1e-6)
    assert model.config.carry == carry


def test_another_documents_state_costs_what_a_plain_loop_says(corpus: Corpus):
    model = small_gptb(torch.float64)
    # In the order in which pieces of one length are read.
    order = torch.from_numpy(whole_pieces(corpus).start).argsort().argsort().tolist()
    documents = [[EOT, *numbered_documents([39] * 7, V)[number]] for number in order]
    states = [[None] for _ in documents]
    differences = []
    for document, own in zip(documents, states, strict=True):
        for token in document[:-1]:
            own.append(model(torch.tensor([[token]]), past_hidden_states=own[-1]).past_hidden_states)
    for number, document in enumerate(documents):
        for at, (token, target) in enumerate(zip(document, [*document[1:], EOT], strict=True)):
            given = (states[number][at], states[number - 1][at])
            logits = [model(torch.tensor([[token]]), past_hidden_states=state).logits[0, 0] for state in given]
            right, wrong = (x.log_softmax(-1)[target].item() for x in logits)
            differences.append(right - wrong)
    found = health(corpus).measure(model)
    assert found["state_swapped"] == pytest.approx(sum(differences) / len(differences), abs=1e-6)


def test_the_norm_is_that_of_the_states_of_all_steps(corpus: Corpus):
    model = small_gptb(torch.float64, recent_tokens=2)
    with torch.no_grad():  # as they are drawn, every output has a norm of one
        model.transformer.ln_f.weight.copy_(torch.arange(16))
    states = []
    for document in numbered_documents([39] * 7, V):
        state = None
        for token in [EOT, *document]:
            state = model(torch.tensor([[token]]), past_hidden_states=state).past_hidden_states
            states.append(state[0, :3].detach())
    found = health(corpus).measure(model)
    assert found["state_norm"] == pytest.approx(torch.stack(states).square().mean().sqrt().item())


def test_a_state_that_is_not_carried_is_worth_nothing(corpus: Corpus):
    found = health(corpus).measure(small_gptb(torch.float64, carry="nothing", recent_tokens=2))
    assert found["state_worth"] == found["state_swapped"] == 0
    assert found["state_lyapunov"] is None
    assert found["state_gradient_8"] is None


def test_without_a_state_nothing_but_the_recent_tokens_is_known():
    """The stateless twin: the same answer whatever came before the last C tokens, as `model.carry nothing` has it."""
    twin, model = (small_gptb(torch.float64, carry=carry, recent_tokens=2) for carry in ("nothing", "outputs"))
    ids, other = random_ids(3, 9), random_ids(3, 9, seed=1)
    other[:, -3:] = ids[:, -3:]
    torch.testing.assert_close(twin(ids).logits[:, -1], twin(other).logits[:, -1])
    assert not torch.allclose(model(ids).logits[:, -1], model(other).logits[:, -1])
    assert not torch.allclose(twin(ids).logits[:, -2], twin(other).logits[:, -2])
    with without_state(model):
        torch.testing.assert_close(model(ids).logits, twin(ids).logits)
    assert not torch.allclose(model(ids).logits, twin(ids).logits)


def test_no_gradient_of_an_lstm_is_asked_of_cudnn(corpus: Corpus):
    """It gives one in training mode only: a run on a GPU ended at its first evaluation."""
    model = LSTMBaseline(LSTMConfig(vocab_size=V, n_embd=8, n_layer=1)).eval()
    asked = set()
    model.lstm.register_forward_hook(lambda *_: asked.add((torch.is_grad_enabled(), torch.backends.cudnn.enabled)))
    found = health(corpus).measure(model)
    assert asked == {(True, False), (False, True)}
    assert found["state_norm"] is not None


def test_measuring_leaves_no_gradients_and_moves_no_random_stream(corpus: Corpus):
    model = small_gptb(torch.float64)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = (health(corpus, most_tokens=100).measure(model) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parity") / "store"
    assert main(["prepare", "--source", "task:parity?length=30&count=400", "--out", str(out)]) == 0
    return out


def test_the_spread_is_that_of_the_states_with_the_same_answer(parity: Path):
    corpus = open_corpus([parity], None, "validation")
    model = small_gptb(torch.float64, vocab_size=corpus.vocab_size)
    pieces = whole_pieces(corpus)
    pieces = pieces.first(int((2 * pieces.count >= pieces.longest).sum()))
    columns = int(pieces.count[-1])
    assert len(pieces.count) > 5
    found = health(corpus).measure(model)
    by_answer: dict[int, list[torch.Tensor]] = {}
    store = corpus.stores[0]
    for start in pieces.start.tolist():
        state = None
        for at in range(start, start + columns):
            token = 0 if at == start else int(store.tokens[at])
            state = model(torch.tensor([[token]]), past_hidden_states=state).past_hidden_states.detach()
            by_answer.setdefault(int(store.targets[at]), []).append(state.flatten())
    groups = [torch.stack(states) for states in by_answer.values()]
    mean = torch.cat(groups).mean(0)
    within = sum(float((group - group.mean(0)).square().sum()) for group in groups)
    between = sum(len(group) * float((group.mean(0) - mean).square().sum()) for group in groups)
    assert found["state_spread"] == pytest.approx(math.sqrt(within / between))


def test_a_run_writes_the_figures_and_warns_of_a_state_that_is_ignored(parity: Path, tmp_path: Path):
    """Without `rebias` no token ever reaches the state."""
    often = {"run__eval_every": 10, "run__eval_tokens": 200}
    job = train(tmp_path / "run", parity, model__rebias=False, train__updates=30, **often)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["update"] for line in evaluations] == [0, 10, 20, 30]
    assert all(0 < line["state_norm"] < 10 and line["state_spread"] > 1 for line in evaluations)
    # The state says at which step it is, and whose reset begins: without it the loss is higher. With another it is not.
    assert evaluations[-1]["state_worth"] > 0.1
    assert evaluations[-1]["state_swapped"] == pytest.approx(0, abs=1e-6)
    assert job.text().count("the state is being ignored") == 1
