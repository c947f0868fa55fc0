"""A corpus of several stores that train together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from gptb_ds.data.documents import DocumentStore, open_store
from gptb_ds.data.lanes import Pieces


class Mixture:
    """Several stores as one corpus, with the attributes of a store.

    Without `weights` it reads like one large store: every document of all stores once an epoch. With weights each store
    gives its share of the inputs (tokens and EOTs) and has epochs of its own.
    """

    def __init__(self, stores: Sequence[DocumentStore], weights: Sequence[float] | None) -> None:
        first = stores[0]
        for store in stores[1:]:
            if store.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ValueError(
                    f"{store.path} has the tokenizer {store.tokenizer}, {first.path} has {first.tokenizer};"
                    " a mixture needs equal tokenizers: prepare one of them again with the other's"
                )
        self.stores = tuple(stores)
        self.weights = None if weights is None else tuple(w / sum(weights) for w in weights)
        self.path, self.split = first.path, first.split
        self.tokenizer, self.tokenizer_fingerprint = first.tokenizer, first.tokenizer_fingerprint
        self.vocab_size, self.eot_id = first.vocab_size, first.eot_id
        self.num_documents = sum(store.num_documents for store in stores)
        self.num_tokens = sum(store.num_tokens for store in stores)
        self.num_bytes = sum(store.num_bytes for store in stores)
        parts = [store.fingerprint for store in stores] + [repr(self.weights)]
        self.fingerprint = hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]


def bytes_per_target(
    stores: Sequence[DocumentStore], max_document_tokens: int | None = None, weights: Sequence[float] | None = None
) -> float:
    """Text bytes for each target (a piece's tokens and its EOT), by which nats per target become bits per byte.

    Of all documents once, or of `weights`, the share of the targets that each store gives (their sum is 1).
    """
    targets = [Pieces(store.offsets, max_document_tokens).inputs for store in stores]
    if weights is None:
        weights = [count / sum(targets) for count in targets]
    return sum(w * store.num_bytes / count for w, store, count in zip(weights, stores, targets, strict=True))


def open_corpus(
    paths: Sequence[str | Path], weights: Sequence[float] | None = None, split: str = "train"
) -> DocumentStore | Mixture:
    """Opens the stores at `paths`: one store as it is, several as a mixture with a share of the inputs for each.

    Raises ValueError: no path, a store that does not open, weights that do not fit, tokenizers that differ.
    """
    if not paths:
        raise ValueError("data.path is empty; give a store made by gptb-ds prepare")
    if weights is not None and (len(weights) != len(paths) or not all(0 < w < math.inf for w in weights)):
        raise ValueError(f"data.weights {list(weights)}: give one number above 0 for each of {len(paths)} stores")
    stores = [open_store(path, split) for path in paths]
    return stores[0] if len(stores) == 1 else Mixture(stores, weights)
