"""A corpus: one store, or several that train together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from gptb_ds.data.document_order import Pieces, shares_of_picks
from gptb_ds.data.documents import DocumentStore, open_store


class Corpus:
    """One or more stores that are read together.

    Without `shares` they read like one large store: every document of all of them once an epoch. With shares each store
    gives its share of the inputs (tokens and EOTs) and has epochs of its own.
    """

    def __init__(self, stores: Sequence[DocumentStore], shares: Sequence[float] | None = None) -> None:
        """`shares` are scaled to a sum of 1. Raises ValueError when the stores' tokenizers differ."""
        first = stores[0]
        for store in stores[1:]:
            if store.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ValueError(
                    f"{store.path} has the tokenizer {store.tokenizer}, {first.path} has {first.tokenizer};"
                    " a mixture needs equal tokenizers: prepare one of them again with the other's"
                )
        self.stores = tuple(stores)
        if shares is not None and not math.isfinite(sum(shares)):
            shares = [share / max(shares) for share in shares]
        self.shares = None if shares is None or len(stores) == 1 else tuple(share / sum(shares) for share in shares)
        self.tokenizer, self.tokenizer_fingerprint = first.tokenizer, first.tokenizer_fingerprint
        self.vocab_size, self.eot_id = first.vocab_size, first.eot_id
        self.num_documents = sum(store.num_documents for store in stores)
        self.num_tokens = sum(store.num_tokens for store in stores)
        self.num_bytes = sum(store.num_bytes for store in stores)
        self.fingerprint = first.fingerprint
        if len(stores) > 1:
            parts = [store.fingerprint for store in stores] + [repr(self.shares)]
            self.fingerprint = hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]

    def pieces(self, max_document_tokens: int | None) -> list[Pieces]:
        """The documents of each store, cut where they are longer. Raises ValueError as `check_cuts` does."""
        if max_document_tokens is not None:
            self.check_cuts(f"data.max_document_tokens {max_document_tokens}")
        return [Pieces(store.offsets, max_document_tokens) for store in self.stores]

    def missed_shares(self, max_document_tokens: int | None) -> list[str]:
        """What a person should know of shares that whole documents can't meet: a line for each."""
        if self.shares is None:
            return []
        found = shares_of_picks(self.pieces(max_document_tokens), self.shares)
        return [
            f"data.weights: {store.path} will be {part:.1%} of what is read, not {share:.1%}: documents of so different"
            " lengths can't be mixed more finely; set data.max_document_tokens"
            for store, share, part in zip(self.stores, self.shares, found, strict=True)
            if abs(part - share) > 0.01
        ]

    def check_cuts(self, option: str) -> None:
        """Raises ValueError when documents may not be read in parts, which `option` would do.

        Those of a task with targets of its own may not: its answers depend on everything since the start.
        """
        if any(store.targets is not None for store in self.stores):
            raise ValueError(
                f"{option}: the documents of a generated task can't be cut, because their answers depend on all that"
                " was read; leave it out, and prepare the task with a smaller length if need be"
            )

    def bytes_per_target(self, max_document_tokens: int | None = None) -> float | None:
        """Text bytes for each target (a piece's tokens and its EOT): nats per target become bits per byte by it.

        Of all documents once, or of each store's share. None: it would mean nothing, because some targets do not count
        (nobody knows how many bytes those have that do), or because the tokens of a store stand for no text.
        """
        if any(store.counted is not None or not store.num_bytes for store in self.stores):
            return None
        targets = [pieces.inputs for pieces in self.pieces(max_document_tokens)]
        shares = self.shares or [count / sum(targets) for count in targets]
        return sum(
            share * store.num_bytes / count for share, store, count in zip(shares, self.stores, targets, strict=True)
        )


def open_corpus(paths: Sequence[str | Path], shares: Sequence[float] | None = None, split: str = "train") -> Corpus:
    """Opens the stores at `paths` as one corpus, with a share of the inputs for each.

    Raises ValueError: no path, a store that does not open, shares that do not fit, tokenizers that differ.
    """
    if not paths:
        raise ValueError("data.path is empty; give a store made by gptb-ds prepare")
    if shares is not None and (len(shares) != len(paths) or not all(0 < share < math.inf for share in shares)):
        raise ValueError(f"data.weights {list(shares)}: give one number above 0 for each of {len(paths)} stores")
    return Corpus([open_store(path, split) for path in paths], shares)
