"""Models to compare GPTB with, trained by the same objective on the same windows: GPT-2 and an LSTM.

Both offer what the window objective asks of a model: `unroll`, `empty_state` and `lm_head`.

Axes: B lanes, K steps of a window, E embedding, H cells of an LSTM layer, N layers, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel


class GPT2Baseline(GPT2LMHeadModel):
    """transformers' GPT-2 with the window as its context.

    A token attends to the tokens of its own document inside the window and nothing is carried to the next one. Its
    checkpoints and exports are those of a plain GPT-2.
    """

    def empty_state(self, lanes: int) -> torch.Tensor:
        """Nothing is carried: (lanes, 0, E)."""
        return torch.zeros((lanes, 0, self.config.n_embd), dtype=self.dtype, device=self.device)

    def unroll(
        self,
        input_ids_KB: torch.Tensor,
        state: torch.Tensor,
        reset_KB: torch.Tensor,
        recompute_every: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (K, B, E) of the final layer norm, and the state as it was.

        `recompute_every` has no meaning here and is ignored. Raises ValueError for a window beyond `n_positions`.
        """
        steps = input_ids_KB.shape[0]
        if steps > self.config.n_positions:
            raise ValueError(f"a window of {steps} columns is beyond n_positions {self.config.n_positions}")
        document_BK = reset_KB.t().cumsum(1)
        allowed_BKK = (document_BK[:, :, None] == document_BK[:, None, :]).tril()
        mask_B1KK = torch.zeros(allowed_BKK.shape, dtype=self.dtype, device=self.device)
        mask_B1KK = mask_B1KK.masked_fill(~allowed_BKK, torch.finfo(self.dtype).min)[:, None]
        # A token's position counts from its document's start, or from the window's edge when that came later.
        column_K = torch.arange(steps, device=reset_KB.device)
        start_BK = torch.where(reset_KB.t(), column_K, 0).cummax(1).values
        hidden_BKE = self.transformer(
            input_ids_KB.t(), attention_mask=mask_B1KK, position_ids=column_K - start_BK, use_cache=False
        ).last_hidden_state
        return hidden_BKE.transpose(0, 1), state


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


class LSTMBaseline(PreTrainedModel):
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (K, B, E) of the last layer and the new state (B, N, E+H); a reset sets a lane's state to zero.

        `recompute_every` is not offered here and is ignored.
        """
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
