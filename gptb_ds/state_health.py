"""The health of the state while a run trains: its norm, its worth, and how far back a gradient and a disturbance reach.

Axes: B lanes of this rank, T columns, N state vectors of a lane, D their elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.segments import segment_windows, whole_pieces
from gptb_ds.data.window import Window
from gptb_ds.distributed.world import World
from gptb_ds.model.recurrence import SlotRecurrence
from gptb_ds.model.window_model import WindowModel

MOST_DOCUMENTS, MOST_COLUMNS = 64, 64
DISTANCES = (2, 4, 8, 16, 32)
IGNORED_BELOW = 0.01  # nats a target: a state that is worth less is ignored


@contextmanager
def without_state(model: WindowModel) -> Iterator[None]:
    """Inside, the state's slots start every step from the initial state; recent tokens are carried as ever."""
    recurrences = [module for module in model.modules() if isinstance(module, SlotRecurrence)]
    carried = [getattr(module.config, "carry", "outputs") for module in recurrences]
    try:
        for module in recurrences:
            module.config.carry = "nothing"
        yield
    finally:
        for module, carry in zip(recurrences, carried, strict=True):
            module.config.carry = carry


class StateHealth:
    """Measures a model's state on the beginnings of long held-out documents, always the same ones."""

    def __init__(self, corpus: Corpus, world: World, *, most_tokens: int, max_tokens: int | None = None) -> None:
        """`most_tokens`: lanes times columns, over all ranks, whose activations fit their memory, as an update's do.

        `max_tokens`: the held-out tokens that documents are taken from.
        """
        self._world = world
        self._has_classes = all(store.targets is not None for store in corpus.stores)
        self._vocab = corpus.vocab_size
        pieces = whole_pieces(corpus, max_tokens)
        columns = min(MOST_COLUMNS, max(1, most_tokens // 4), pieces.longest)
        chosen = pieces.first(max(1, min(MOST_DOCUMENTS, most_tokens // columns)))
        # All have all columns; not for the sake of a short one that all would be cut to its length.
        chosen = chosen.first(int((2 * chosen.count >= columns).sum()))
        columns = min(columns, int(chosen.count[-1]))
        # With fewer documents than ranks some are measured twice.
        ranks = min(world.size, len(chosen.count))
        self._own = slice(world.rank % ranks, None, ranks)
        own = chosen.of_rank(world.rank % ranks, ranks)
        self._columns = next(segment_windows(corpus, own, len(own.count), columns)).columns
        self._documents = len(chosen.count)

    @torch.no_grad()
    def measure(self, model: WindowModel) -> dict[str, float | None]:
        """The figures of a metrics line, alike on all ranks, which all call it. `model` must be in eval mode.

        `state_norm`: root mean square of the state's elements. `state_worth`: by how many nats a target the loss is
        higher without it (`without_state`); `state_swapped`: with the state of another document at the same step, which
        looks as the model expects it but says nothing of this one. `state_gradient_D`: the gradient of a loss with
        respect to the state D steps before, beside that of one step before. `state_lyapunov`: the largest Lyapunov
        exponent, the logarithm of what a small disturbance grows by a step, from the growth of a random vector under
        the transposed Jacobians. `state_spread`, of tasks: of states with the same answer, their spread within over
        that between answers.
        None: there is no such number.
        """
        window = self._columns.to(self._world.device)
        # cuDNN takes gradients of an LSTM in training mode only, and refuses them here; torch's own kernels give them.
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            carried, states, losses_TB, last_loss_B = _read(model, window)
            gradients = _norms_before(last_loss_B.sum(), states)
            # Of its own stream, as evaluation touches none of the run's, and the same on any ranks.
            shape = (self._documents, *states[-1].shape[1:])
            direction = torch.randn(shape, generator=torch.Generator().manual_seed(1))[self._own].to(states[-1])
            growth = _norms_before((states[-1] * direction).sum(), states)
        without_TB, swapped_TB = _losses_without_state(model, window), _losses_swapped(model, window, carried)
        weights_TB = torch.ones_like(losses_TB) if window.loss_weights is None else window.loss_weights.double()
        states_TBD = torch.stack([state.detach().flatten(1) for state in states]).double()
        exponents = _exponents(growth)
        sums = [
            ((without_TB - losses_TB) * weights_TB).sum(),
            ((swapped_TB - losses_TB) * weights_TB).sum(),
            weights_TB.sum(),
            states_TBD.square().sum(),
            torch.tensor(float(states_TBD.numel()), device=losses_TB.device, dtype=torch.float64),
            exponents.sum(),
            torch.tensor(float(len(exponents)), device=losses_TB.device, dtype=torch.float64),
            gradients[:1].square().sum(),
            *(gradients[d - 1 : d].square().sum() for d in DISTANCES),
        ]
        worth, swapped, counted, squares, elements, logs, known, near, *far = self._world.sum(
            torch.stack(sums)
        ).tolist()
        found = {"state_norm": _ratio(squares, elements, 0.5), "state_worth": _ratio(worth, counted)}
        # A document alone on a rank has none to change with.
        found["state_swapped"] = _ratio(swapped, counted) if self._documents >= 2 * self._world.size else None
        found["state_lyapunov"] = _ratio(logs, known)
        for d, square in zip(DISTANCES, far, strict=True):
            found[f"state_gradient_{d}"] = _ratio(square, near, 0.5) if d <= len(gradients) else None
        if self._has_classes:
            found["state_spread"] = self._spread(states_TBD, window.targets)
        return found

    def _spread(self, states_TBD: torch.Tensor, targets_TB: torch.Tensor) -> float | None:
        """Root of the sum of squares within answers over that between them."""
        states_RD, answers_R = states_TBD.flatten(0, 1), targets_TB.flatten()
        by_answer = states_RD.new_zeros(self._vocab, states_RD.shape[1] + 2)
        ones_R1 = states_RD.new_ones(len(states_RD), 1)
        by_answer.index_add_(0, answers_R, torch.cat((states_RD, states_RD.square().sum(1, True), ones_R1), dim=1))
        sums, squares, counts = self._world.sum(by_answer).split((states_RD.shape[1], 1, 1), dim=1)
        means = sums / counts.clamp(min=1)
        between = float((counts * (means - sums.sum(0) / counts.sum()).square()).sum())
        within = float(squares.sum() - (counts * means.square()).sum())
        return _ratio(max(within, 0.0), between, 0.5)


def _state_of(model: WindowModel, carried: torch.Tensor) -> torch.Tensor:
    """What is state of all that is carried: not the recent tokens, which come last."""
    recent = getattr(model.config, "recent_tokens", 0)
    return carried[:, : carried.shape[1] - recent]


def _read(
    model: WindowModel, window: Window
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What is carried after each column, and the state (B, N, E) in it; losses (T, B), and the last column's (B).

    Only the last column's losses have a gradient.
    """
    carried = model.empty_state(window.lanes)
    carries, states, losses = [], [], []
    for ids_1B, targets_B, reset_1B in zip(
        window.input_ids.split(1), window.targets.unbind(0), window.reset.split(1), strict=True
    ):
        hidden_1BE, carried = model.unroll(ids_1B, carried, reset_1B)
        # A view of what is carried has no gradient of its own: the state is taken out, and put back.
        state = _state_of(model, carried)
        carried = torch.cat((state, carried[:, state.shape[1] :]), dim=1)
        carries.append(carried.detach())
        states.append(state)
        losses.append(F.cross_entropy(model.logits_of(hidden_1BE)[0].float(), targets_B, reduction="none"))
    return carries, states, torch.stack([loss.detach().double() for loss in losses]), losses[-1]


def _norms_before(value: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
    """Norms (T-1, B) of the gradient of `value` with respect to the states before the last, the nearest first."""
    before = states[-2::-1]
    if not before or not value.requires_grad:
        return value.new_zeros((0, len(states[-1])), dtype=torch.float64)
    found = torch.autograd.grad(value, before, retain_graph=True, allow_unused=True)
    zero = torch.zeros_like(states[0])
    return torch.stack([(zero if g is None else g).double().flatten(1).norm(dim=1) for g in found]).detach()


def _exponents(norms_TB: torch.Tensor) -> torch.Tensor:
    """The logarithm of the growth a step, of each lane whose vector neither vanishes nor overflows.

    The first quarter is left out: a random vector turns to the direction that grows most in it.
    """
    first, last = len(norms_TB) // 4, len(norms_TB) - 1
    if last <= first:
        return norms_TB.new_zeros(0)
    logs = (norms_TB[last].log() - norms_TB[first].log()) / (last - first)
    return logs[logs.isfinite()]


def _losses_without_state(model: WindowModel, window: Window) -> torch.Tensor:
    """The losses (T, B) of the same columns when nothing but recent tokens is carried."""
    is_gptb = any(isinstance(module, SlotRecurrence) for module in model.modules())
    reset_TB = window.reset if is_gptb else torch.ones_like(window.reset)
    with without_state(model):
        hidden_TBE, _ = model.unroll(window.input_ids, model.empty_state(window.lanes), reset_TB)
    pairs = zip(hidden_TBE, window.targets, strict=True)
    return torch.stack([F.cross_entropy(model.logits_of(h).float(), t, reduction="none") for h, t in pairs]).double()


def _losses_swapped(model: WindowModel, window: Window, carries: list[torch.Tensor]) -> torch.Tensor:
    """The losses (T, B) of the same columns when each is read with the state that the document before it has then."""
    losses = []
    for column, carried in enumerate([model.empty_state(window.lanes), *carries[:-1]]):
        state = _state_of(model, carried)
        other = torch.cat((state.roll(1, dims=0), carried[:, state.shape[1] :]), dim=1)
        now = slice(column, column + 1)
        hidden_1BE, _ = model.unroll(window.input_ids[now], other, window.reset[now])
        logits_BV = model.logits_of(hidden_1BE)[0].float()
        losses.append(F.cross_entropy(logits_BV, window.targets[column], reduction="none"))
    return torch.stack(losses).double()


def _ratio(above: float, below: float, power: float = 1.0) -> float | None:
    return float((above / below) ** power) if below else None
