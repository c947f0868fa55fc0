"""Models to compare GPTB with, trained by the same objective on the same windows: GPT-2 and an LSTM.

Axes: B lanes, K steps of a window, C tokens carried from window to window, E embedding, H cells of an LSTM layer,
N layers, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from gptb_ds.model import WindowModel
from gptb_ds.model.gradient_sums import GradientSums


class GPT2Baseline(GPT2LMHeadModel, WindowModel):  # type: ignore[misc]
    """transformers' GPT-2 over the windows of a stream: a token attends to its own document, as far back as it sees.

    It sees `n_positions` tokens at most. Two keys of its configuration, which a plain GPT-2 has not, say how:
    `carried_tokens` (0): so many tokens before a window are read again with it while training. `evaluation_stride` (0 =
    as in training): in eval mode the context slides by so many tokens, so that a prediction sees at least
    `n_positions - evaluation_stride` tokens of its document, if it has them. The state is the tokens that are read
    again. Checkpoints and exports are those of a plain GPT-2.
    """

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As in `GPTBPreTrainedModel`: taken for code from outside, the residual projections would start too large.
        super()._initialize_weights(module, is_custom_code=False)

    def empty_state(self, lanes: int) -> torch.Tensor:
        """(lanes, C, 4): three digits of base 256 of each carried token, exact in every type, and its reset flag.

        (lanes, 0, E) when nothing is carried.
        """
        stride = getattr(self.config, "evaluation_stride", 0)
        carried = getattr(self.config, "carried_tokens", 0)
        if not self.training and stride:
            carried = self.config.n_positions - stride
        shape = (lanes, carried, 4) if carried else (lanes, 0, self.config.n_embd)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def unroll(
        self,
        input_ids_KB: torch.Tensor,
        state: torch.Tensor,
        reset_KB: torch.Tensor,
        recompute_every: int = 0,
        sums: GradientSums | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (K, B, E) of the final layer norm, and the tokens to carry on. Of `empty_state` it takes any length.

        Raises ValueError for a window beyond `n_positions` when nothing is carried.
        """
        steps, carried = input_ids_KB.shape[0], state.shape[1]
        if not carried:
            if steps > self.config.n_positions:
                raise ValueError(f"a window of {steps} columns is beyond n_positions {self.config.n_positions}")
            return self._read(input_ids_KB, reset_KB), state
        ids_CB, reset_CB = _from_digits(state)
        outputs = []
        stride = self.config.n_positions - carried
        for ids, reset in zip(input_ids_KB.split(stride), reset_KB.split(stride), strict=True):
            ids_TB, reset_TB = torch.cat((ids_CB, ids)), torch.cat((reset_CB, reset))
            outputs.append(self._read(ids_TB, reset_TB)[carried:])
            ids_CB, reset_CB = ids_TB[-carried:], reset_TB[-carried:]
        return torch.cat(outputs), _to_digits(ids_CB, reset_CB).to(state.dtype)

    def _read(self, input_ids_KB: torch.Tensor, reset_KB: torch.Tensor) -> torch.Tensor:
        """Outputs (K, B, E) of columns that are read together."""
        document_BK = reset_KB.t().cumsum(1)
        allowed_BKK = (document_BK[:, :, None] == document_BK[:, None, :]).tril()
        mask_B1KK = torch.zeros(allowed_BKK.shape, dtype=self.dtype, device=self.device)
        mask_B1KK = mask_B1KK.masked_fill(~allowed_BKK, torch.finfo(self.dtype).min)[:, None]
        # A token's position counts from its document's start, or from the window's edge when that came later.
        column_K = torch.arange(len(input_ids_KB), device=reset_KB.device)
        start_BK = torch.where(reset_KB.t(), column_K, 0).cummax(1).values
        hidden_BKE = self.transformer(
            input_ids_KB.t(), attention_mask=mask_B1KK, position_ids=column_K - start_BK, use_cache=False
        ).last_hidden_state
        return hidden_BKE.transpose(0, 1)


def _to_digits(ids_CB: torch.Tensor, reset_CB: torch.Tensor) -> torch.Tensor:
    """(B, C, 4)."""
    digits = (ids_CB % 256, ids_CB // 256 % 256, ids_CB // 65536, reset_CB.long())
    return torch.stack(digits, dim=-1).transpose(0, 1)


def _from_digits(state_BC4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, middle, high, reset = state_BC4.transpose(0, 1).long().unbind(-1)
    return low + 256 * middle + 65536 * high, reset.bool()


class LSTMConfig(PreTrainedConfig):
    """Configuration of `LSTMBaseline`: N layers over embeddings of width E."""

    model_type = "gptb_lstm"

    vocab_size: int = 50257
    n_embd: int = 768
    n_layer: int = 12
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def cells(self) -> int:
        """H = 4E/3 cells: a layer, 9EH weights with its projection, is then as large as a block of GPT-2, 12E^2."""
        return (4 * self.n_embd + 2) // 3


class LSTMBaseline(PreTrainedModel, WindowModel):
    """torch's LSTM with projections (Sak et al. 2014, arXiv 1402.1128), about as large as GPT-2's blocks."""

    config_class = LSTMConfig
    config: LSTMConfig
    base_model_prefix = "lstm_model"
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # noqa: RUF012

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(
            config.n_embd,
            config.cells,
            config.n_layer,
            proj_size=config.n_embd,
            dropout=config.dropout if config.n_layer > 1 else 0.0,
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LSTM):
            bound = self.config.cells**-0.5
            for name, parameter in module.named_parameters():
                nn.init.uniform_(parameter, -bound, bound)
                if name.startswith("bias_ih"):
                    # The forget gate starts open (Jozefowicz et al. 2015).
                    with torch.no_grad():
                        parameter[self.config.cells : 2 * self.config.cells] += 1.0

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def empty_state(self, lanes: int) -> torch.Tensor:
        """Zeros (lanes, N, E+H): outputs and cells of each layer."""
        width = self.config.n_embd + self.config.cells
        return torch.zeros((lanes, self.config.n_layer, width), dtype=self.dtype, device=self.device)

    def unroll(
        self,
        input_ids_KB: torch.Tensor,
        state: torch.Tensor,
        reset_KB: torch.Tensor,
        recompute_every: int = 0,
        sums: GradientSums | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (K, B, E) of the last layer and the new state (B, N, E+H); a reset sets a lane's state to zero."""
        x_KBE: torch.Tensor = self.drop(self.wte(input_ids_KB))
        widths = (self.config.n_embd, self.config.cells)
        outputs = []
        # By column: a reset may come in any of them.
        for x_BE, reset_B in zip(x_KBE.unbind(0), reset_KB.unbind(0), strict=True):
            state = torch.where(reset_B[:, None, None], 0.0, state).to(x_BE.dtype)
            # (B, N, E+H) -> h (N, B, E), c (N, B, H)
            h_NBE, c_NBH = (part.contiguous() for part in state.transpose(0, 1).split(widths, dim=-1))
            y_1BE, (h_NBE, c_NBH) = self.lstm(x_BE[None], (h_NBE, c_NBH))
            state = torch.cat((h_NBE, c_NBH), dim=-1).transpose(0, 1)
            outputs.append(y_1BE[0])
        return self.drop(torch.stack(outputs)), state

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Logits (B, T, V) from an empty state."""
        reset_TB = torch.zeros_like(input_ids.t(), dtype=torch.bool)
        hidden_TBE, _ = self.unroll(input_ids.t(), self.empty_state(input_ids.shape[0]), reset_TB)
        return self.lm_head(hidden_TBE.transpose(0, 1))


AutoConfig.register(LSTMConfig.model_type, LSTMConfig)
AutoModelForCausalLM.register(LSTMConfig, LSTMBaseline)
