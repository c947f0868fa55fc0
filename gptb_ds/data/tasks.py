"""Generated tasks with known answers: `--source task:NAME?option=value&..`.

State tracking (parity, cycle5, cycle6, s3, a5, s5). A document is n inputs x1 .. xn, drawn uniformly. The target at its
EOT is the answer for the start, at x_i the answer after x_i: targets of their own, because an answer that came back as
the next input would give the state away. Every target counts.

    parity      bits; the number of ones so far, modulo 2 (NX-AI/xlstm)
    cycle5 (6)  moves -1, 0, +1 on a ring; the place modulo 5 (6) (neural_networks_chomsky_hierarchy: cycle navigation)
    s3 a5 s5    elements of the group; the running product p g with (p g)[i] = p[g[i]]: the word problem (Merrill and
                others, "The Illusion of State in State-Space Models", 2024); elements in the order of their tuples

Language (programs3, programs5, copy, recall). The answers are tokens of the document and alone count in the loss.

    programs3 (5)  n statements over 3 (5) variables with digits as values: `a = 4 ;` `a ++ ;` `a -- ;` (modulo 10),
                   `if a = 4 : b ++ ;`, `print a 5 ;`; the printed digit is the answer (after Fan and others,
                   "Addressing Some Limitations of Transformers with Feedback Memory", 2020)
    copy           n letters, `distance` blanks, a bar, the letters again
    recall         n pairs of a letter and a digit, `distance` blanks, a bar, one of the letters and its digit
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOT, UNKNOWN = "<eot>", "<unk>"
_LETTERS = [chr(ord("a") + n) for n in range(26)]
_DIGITS = [str(n) for n in range(10)]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TaskDocument:
    """A document of `tokens` (n), without its EOT.

    `targets` (n+1): what the EOT and each token are to be answered with, None: the next token. `counted` (n+1): whether
    each target counts, None: all do.
    """

    tokens: Ints
    targets: Ints | None = None
    counted: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Task:
    """A task with its options. `length`: inputs, statements, letters or pairs of a document, at least `min_length`."""

    name: str
    length: int
    min_length: int
    count: int = 10_000
    seed: int = 0
    distance: int = 0

    @property
    def is_automaton(self) -> bool:
        """Whether it has targets of its own, one at every position."""
        return self.name in _TABLES

    @property
    def table(self) -> Ints:
        """The state after each state and input of an automaton."""
        return _TABLES[self.name]()

    @property
    def symbols(self) -> list[str]:
        """The vocabulary, by id. Inputs and answers of an automaton are different symbols."""
        if self.is_automaton:
            states, inputs = self.table.shape
            return [EOT, *map(str, range(inputs)), *(f"={state}" for state in range(states)), UNKNOWN]
        return [EOT, *_LETTERS, *_DIGITS, *"=:;|_", "++", "--", "if", "print", UNKNOWN]

    def documents(self) -> Iterator[TaskDocument]:
        """The task's `count` documents, always the same for the same options."""
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode())])
        for _ in range(self.count):
            yield self.document(rng, int(rng.integers(self.min_length, self.length + 1)))

    def document(self, rng: np.random.Generator, length: int) -> TaskDocument:
        """One document of exactly this length."""
        if self.is_automaton:
            return _walk(self.table, rng, length)
        words, answers = _WRITERS[self.name](rng, length, self.distance)
        ids = {symbol: number for number, symbol in enumerate(self.symbols)}
        counted = np.zeros(len(words) + 1, dtype=np.uint8)
        counted[answers] = 1
        return TaskDocument(np.array([ids[word] for word in words]), None, counted)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A transformers tokenizer of the task's symbols, with a blank between them."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {symbol: number for number, symbol in enumerate(self.symbols)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT, unk_token=UNKNOWN)
        made.name_or_path = f"task:{self.name}"
        return made


def parse_task(spec: str) -> Task:
    """The task of `task:NAME?option=value&..`. Raises ValueError for a name or an option that there is not."""
    name, _, query = spec.removeprefix("task:").partition("?")
    if name not in DEFAULTS:
        raise ValueError(f"--source {spec}: no such generated task; choose one of {', '.join(DEFAULTS)}")
    values: dict[str, int] = dict(DEFAULTS[name])
    known = {"length", "min_length", "count", "seed", *(["distance"] if name in ("copy", "recall") else [])}
    options = parse_qsl(query, keep_blank_values=True)
    for key, value in options:
        if [name for name, _ in options].count(key) > 1:
            raise ValueError(f"--source {spec}: {key} is given more than once")
        if key not in known or not value.isdecimal():
            raise ValueError(
                f"--source {spec}: {key}={value}: options are {', '.join(sorted(known))}, with whole numbers"
            )
        values[key] = int(value)
    if "min_length=" not in query:
        values["min_length"] = min(values["min_length"], values["length"])
    most = len(_LETTERS) if name == "recall" else 1_000_000
    if not 1 <= values["min_length"] <= values["length"] <= most or values.get("count", 1) < 1:
        raise ValueError(f"--source {spec}: needs 1 <= min_length <= length <= {most:,} and count >= 1")
    return Task(name, **values)


# State tracking: tables next[state, input], state 0 is the start.


def _ring(size: int) -> Ints:
    return np.array([[(state + move) % size for move in (-1, 0, 1)] for state in range(size)])


@cache
def _group(size: int, even: bool = False) -> Ints:
    def is_even(element: tuple[int, ...]) -> bool:
        return sum(a > b for a, b in itertools.combinations(element, 2)) % 2 == 0

    elements = [e for e in itertools.permutations(range(size)) if not even or is_even(e)]
    number = {element: n for n, element in enumerate(elements)}
    return np.array([[number[tuple(p[i] for i in g)] for g in elements] for p in elements])


_TABLES: dict[str, Callable[[], Ints]] = {
    "parity": lambda: np.array([[0, 1], [1, 0]]),
    "cycle5": lambda: _ring(5),
    "cycle6": lambda: _ring(6),
    "s3": lambda: _group(3),
    "a5": lambda: _group(5, even=True),
    "s5": lambda: _group(5),
}


def _walk(table: Ints, rng: np.random.Generator, length: int) -> TaskDocument:
    inputs = table.shape[1]
    read = rng.integers(0, inputs, length)
    state, answers = 0, [0]
    for x in read.tolist():
        state = int(table[state, x])
        answers.append(state)
    return TaskDocument(1 + read, 1 + inputs + np.array(answers))


# Language: the words of a document, and where the answers are.


def _program(variables: int, rng: np.random.Generator, length: int) -> tuple[list[str], list[int]]:
    names = _LETTERS[:variables]
    values = dict.fromkeys(names, 0)
    words: list[str] = []
    answers: list[int] = []
    for number in range(length):
        name = names[number] if number < variables else str(rng.choice(names))
        kind = "=" if number < variables else str(rng.choice(["=", "++", "--", "if", "print"]))
        digit = int(rng.integers(10))
        if kind == "=":
            values[name] = digit
            words += [name, "=", str(digit), ";"]
        elif kind == "print":
            answers.append(len(words) + 2)
            words += ["print", name, str(values[name]), ";"]
        else:
            change = kind if kind != "if" else str(rng.choice(["++", "--"]))
            other = str(rng.choice(names)) if kind == "if" else name
            if kind != "if" or values[name] == digit:
                values[other] = (values[other] + (1 if change == "++" else -1)) % 10
            words += ["if", name, "=", str(digit), ":"] if kind == "if" else []
            words += [other, change, ";"]
    return words, answers


def _copy(rng: np.random.Generator, length: int, distance: int) -> tuple[list[str], list[int]]:
    letters = [str(letter) for letter in rng.choice(_LETTERS[:8], length)]
    head = [*letters, *["_"] * distance, "|"]
    return [*head, *letters], list(range(len(head), len(head) + length))


def _recall(rng: np.random.Generator, length: int, distance: int) -> tuple[list[str], list[int]]:
    keys = [str(letter) for letter in rng.permutation(_LETTERS)[:length]]
    digits = [str(digit) for digit in rng.choice(_DIGITS, length)]
    asked = int(rng.integers(length))
    pairs = [word for pair in zip(keys, digits, strict=True) for word in pair]
    words = [*pairs, *["_"] * distance, "|", keys[asked], digits[asked]]
    return words, [len(words) - 1]


_WRITERS: dict[str, Callable[[np.random.Generator, int, int], tuple[list[str], list[int]]]] = {
    "programs3": lambda rng, length, _: _program(3, rng, length),
    "programs5": lambda rng, length, _: _program(5, rng, length),
    "copy": _copy,
    "recall": _recall,
}
DEFAULTS: dict[str, dict[str, int]] = {
    "parity": {"length": 40, "min_length": 3},
    **{name: {"length": 40, "min_length": 1} for name in ("cycle5", "cycle6", "s3", "a5", "s5")},
    **{name: {"length": 100, "min_length": 100} for name in ("programs3", "programs5")},
    "copy": {"length": 10, "min_length": 10, "distance": 20},
    "recall": {"length": 8, "min_length": 8},
}


# Scoring: documents side by side, and how far the answers are right.


def columns_of(documents: list[TaskDocument]) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """Inputs, targets and whether they count, each (T, B), of documents side by side; shorter ones end in EOT."""
    length = 1 + max(len(d.tokens) for d in documents)
    inputs, targets = (np.zeros((length, len(documents)), dtype=np.int64) for _ in range(2))
    counted = np.zeros((length, len(documents)), dtype=bool)
    for lane, d in enumerate(documents):
        inputs[1 : len(d.tokens) + 1, lane] = d.tokens
        targets[: len(d.tokens) + 1, lane] = np.append(d.tokens, 0) if d.targets is None else d.targets
        counted[: len(d.tokens) + 1, lane] = True if d.counted is None else d.counted.astype(bool)
    return inputs, targets, counted


def longest_length(right: Ints, counted: Ints, share: float, block: int = 10) -> int:
    """The longest length up to which every block of `block` positions has at least `share` right answers.

    `right` and `counted` (T): right and asked answers at each position, the first being length 0. Positions at which
    nothing is asked are passed over.
    """
    last = 0
    for start in range(0, len(right), block):
        asked = counted[start : start + block].sum()
        if asked and right[start : start + block].sum() < share * asked:
            return max(0, start - 1)
        if asked:
            last = min(start + block, len(right)) - 1
    return last
