"""Log-probabilities of many token sequences, with every beginning that some of them share read once.

The sequences make a prefix tree. A node is a run of tokens; its state stands for all tokens from the root to its end,
and is where its children go on.

Axes: B nodes read side by side, T tokens, S slots, E embedding, V vocabulary, R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from gptb_ds.model import AnyGPTB
from gptb_ds.model.objective import HEAD_ELEMENTS

# Columns of one call of the model: nodes that end in it are left out of the next one.
WINDOW = 64
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(eq=False)
class Node:
    """The tokens `begin` to `end` of `sequence`, and of every sequence that passes through it.

    `scored_from`: the first position that one of them wants scored. What was read: the log-probability of each token
    from there on, whether it was the likeliest, and, while children need them, the last output (E) and state (S-1, E).
    """

    parent: Node | None
    sequence: Sequence[int]
    begin: int
    end: int
    scored_from: int
    children: int = 0
    log_probs: Floats = field(default_factory=lambda: np.zeros(0))
    likeliest: Bools = field(default_factory=lambda: np.ones(0, dtype=bool))
    hidden_E: torch.Tensor | None = None
    state_SE: torch.Tensor | None = None

    def path(self) -> Iterator[Node]:
        """From here to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


def prefix_tree(sequences: Sequence[Sequence[int]], scored_from: Sequence[int]) -> list[Node]:
    """The node at which each sequence ends; their paths make the tree. No sequence may be empty.

    `scored_from`: the first position of each that is wanted. Sorted, a sequence shares its longest beginning with the
    one before it, so the tree grows at its right edge, which is the stack.
    """
    ends: dict[int, Node] = {}
    edge: list[Node] = []  # from the root to where the sequence before this one ended
    before: Sequence[int] = ()
    for index in sorted(range(len(sequences)), key=lambda i: list(sequences[i])):
        sequence = sequences[index]
        shared = _shared(before, sequence)
        while edge and edge[-1].begin >= shared:
            edge.pop()
        if edge and edge[-1].end > shared:
            lower = edge[-1]
            upper = Node(lower.parent, lower.sequence, lower.begin, shared, lower.scored_from)
            lower.parent, lower.begin = upper, shared
            edge[-1] = upper
        if len(sequence) > shared:
            edge.append(Node(edge[-1] if edge else None, sequence, shared, len(sequence), scored_from[index]))
        ends[index], before = edge[-1], sequence
    found = [ends[index] for index in range(len(sequences))]
    for node, wanted in zip(found, scored_from, strict=True):
        for above in node.path():
            above.scored_from = min(above.scored_from, wanted)
    for node in _nodes(found):
        if node.parent is not None:
            node.parent.children += 1
    return found


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _nodes(ends: Sequence[Node]) -> list[Node]:
    """All nodes of the tree, each once."""
    return list(dict.fromkeys(node for end in ends for node in end.path()))


def _levels(ends: Sequence[Node]) -> list[list[Node]]:
    """All nodes, those without a parent first, then their children, and so on."""
    depth: dict[Node, int] = {}
    for end in ends:
        for number, node in enumerate(reversed(list(end.path()))):
            depth[node] = number
    levels: list[list[Node]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node, number in depth.items():
        levels[number].append(node)
    return levels


class PrefixReader:
    """Reads prefix trees with a model (in eval mode), `lanes` nodes side by side."""

    def __init__(self, model: AnyGPTB, lanes: int) -> None:
        self._model, self._lanes = model, lanes
        self.tokens_read = 0  # in all, for who wants to know what sharing saves

    def score(self, sequences: Sequence[Sequence[int]], scored_from: Sequence[int]) -> list[tuple[float, bool]]:
        """Of each sequence from its position `scored_from` (at least 1) on: log-probability, all tokens likeliest."""
        ends = prefix_tree(sequences, scored_from)
        self._read(ends, keep_ends=False)
        scores = []
        for end, first in zip(ends, scored_from, strict=True):
            parts = [(node, max(0, first - node.begin)) for node in end.path()]
            total = sum(float(node.log_probs[skip:].sum()) for node, skip in parts)
            scores.append((total, all(bool(node.likeliest[skip:].all()) for node, skip in parts)))
        return scores

    def states(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """The state (B, S-1, E) after each sequence; after an empty one the learned initial state."""
        some = [sequence for sequence in sequences if sequence]
        ends = prefix_tree(some, list(map(len, some)))
        self._read(ends, keep_ends=True)
        states = iter([_there(end.state_SE) for end in ends])
        initial_SE = self._model.transformer.initial_embeds.detach()
        return torch.stack([next(states) if sequence else initial_SE for sequence in sequences])

    @torch.no_grad()
    def _read(self, ends: Sequence[Node], keep_ends: bool) -> None:
        kept = set(ends) if keep_ends else set()
        for level in _levels(ends):
            # The longest first, so that those that have ended are the last.
            todo = sorted(level, key=lambda node: node.begin - node.end)
            for first in range(0, len(todo), self._lanes):
                self._read_batch(todo[first : first + self._lanes], kept)

    def _read_batch(self, nodes: Sequence[Node], kept: set[Node]) -> None:
        model, device = self._model, self._model.device
        # The last token of a leaf is predicted, but nothing follows it.
        goes_on = [bool(node.children) or node in kept for node in nodes]
        reads = np.array([node.end - node.begin - (not on) for node, on in zip(nodes, goes_on, strict=True)])
        order = np.argsort(-reads, kind="stable")
        nodes, reads, goes_on = [nodes[i] for i in order], reads[order], [goes_on[i] for i in order]
        rows = _Rows(model)
        for node in nodes:
            size = node.end - node.begin
            node.log_probs, node.likeliest = np.zeros(size), np.ones(size, dtype=bool)
            if node.parent is not None and node.begin >= node.scored_from:
                rows.add(_there(node.parent.hidden_E)[None], node, 0)
        state_BSE = None
        if nodes[0].parent is not None:  # all of a level have one, or none has
            state_BSE = torch.stack([_there(node.parent.state_SE) for node in nodes if node.parent is not None])
        self.tokens_read += int(reads.sum())
        for first in range(0, int(reads[0]), WINDOW):
            active = int((reads > first).sum())
            width = min(WINDOW, int(reads[0]) - first)
            ids_BT = torch.zeros((active, width), dtype=torch.int64)
            mask_BT = torch.zeros((active, width), dtype=torch.int64)
            for lane in range(active):
                begin = nodes[lane].begin + first
                part = nodes[lane].sequence[begin : begin + min(width, int(reads[lane]) - first)]
                ids_BT[lane, : len(part)], mask_BT[lane, : len(part)] = torch.tensor(part), 1
            output = model.transformer(
                ids_BT.to(device),
                None if state_BSE is None else state_BSE[:active],
                attention_mask=mask_BT.to(device),
                use_cache=False,
                return_dict=True,
            )
            hidden_BTE, state_BSE = output.last_hidden_state, output.past_hidden_states
            for lane in range(active):
                node, here = nodes[lane], min(width, int(reads[lane]) - first)
                # Output t of this call predicts token first + t + 1 of the node, if it is one of the node's.
                begin = max(0, node.scored_from - node.begin - first - 1)
                end = min(here, node.end - node.begin - first - 1)
                if begin < end:
                    rows.add(hidden_BTE[lane, begin:end], node, first + begin + 1)
                if first + here == reads[lane] and goes_on[lane]:
                    # Copies: a view would keep the whole batch.
                    node.hidden_E, node.state_SE = hidden_BTE[lane, here - 1].clone(), state_BSE[lane].clone()
            rows.score_if_many()
        rows.score()
        for node in nodes:
            if node.parent is not None:
                node.parent.children -= 1
                if not node.parent.children and node.parent not in kept:
                    node.parent.hidden_E = node.parent.state_SE = None


class _Rows:
    """Outputs of the last slot that wait for the head, and the tokens that they predict."""

    def __init__(self, model: AnyGPTB) -> None:
        self._model = model
        self._most = max(1, HEAD_ELEMENTS // model.config.vocab_size)
        self._hidden: list[torch.Tensor] = []
        self._places: list[tuple[Node, int, int]] = []
        self._count = 0

    def add(self, hidden_RE: torch.Tensor, node: Node, at: int) -> None:
        """These outputs predict the node's tokens from `at` on."""
        self._hidden.append(hidden_RE)
        self._places.append((node, at, len(hidden_RE)))
        self._count += len(hidden_RE)

    def score_if_many(self) -> None:
        if self._count >= self._most:
            self.score()

    def score(self) -> None:
        """Writes log-probabilities into the nodes."""
        if not self._count:
            return
        targets = [node.sequence[node.begin + at : node.begin + at + n] for node, at, n in self._places]
        targets_R = torch.tensor(list(itertools.chain.from_iterable(targets)), device=self._model.device)
        log_probs, likeliest = [], []
        for hidden_RE, target_R in zip(
            torch.cat(self._hidden).split(self._most), targets_R.split(self._most), strict=True
        ):
            logits_RV = self._model.logits_of(hidden_RE)
            logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
            log_probs.append(logits_RV.log_softmax(-1).gather(1, target_R[:, None])[:, 0].double())
            likeliest.append(logits_RV.argmax(-1) == target_R)
        all_log_probs, all_likeliest = torch.cat(log_probs).cpu().numpy(), torch.cat(likeliest).cpu().numpy()
        first = 0
        for node, at, n in self._places:
            node.log_probs[at : at + n] = all_log_probs[first : first + n]
            node.likeliest[at : at + n] = all_likeliest[first : first + n]
            first += n
        self._hidden, self._places, self._count = [], [], 0


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
