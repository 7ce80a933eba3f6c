"""The loss of documents by position: by segment, and by distance from the document's start.

Axes: P positions of a document, G groups of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]
_FIRST_DISTANCES = 16  # tokens up to here are one group; the groups after it double


def document_record(ordinal: int, nll_P: np.ndarray, segment_length: int, text_bytes: int | None) -> Record:
    """A document's sums of nats by segment and by distance, and its sizes (JSON)."""
    position_P = np.arange(len(nll_P))
    return {
        "document": ordinal,
        "tokens": len(nll_P),
        "bytes": text_bytes,
        "nats_by_segment": np.bincount(position_P // segment_length, nll_P).tolist(),
        "nats_by_distance": np.bincount(_distance_group(position_P), nll_P).tolist(),
    }


def _distance_group(position_P: np.ndarray) -> np.ndarray:
    """Position p, from 0, predicts the token at distance p + 1: 1-16, 17-32, 33-64 and so on."""
    return np.ceil(np.log2(np.maximum((position_P + 1) / _FIRST_DISTANCES, 1))).astype(int)


def summarise(records: Sequence[Record], segment_length: int) -> Record:
    """Totals and means over the records of all documents (JSON)."""
    tokens, longest = sum(record["tokens"] for record in records), max(record["tokens"] for record in records)
    nats = math.fsum(x for record in records for x in record["nats_by_segment"])
    segments = np.arange(0, longest, segment_length)
    distances = np.array([0, *(_FIRST_DISTANCES << k for k in range(longest.bit_length()))])
    distances = distances[distances < longest]
    text_bytes = sum(record["bytes"] for record in records) if all(r["bytes"] is not None for r in records) else None
    return {
        "documents": len(records),
        "tokens": tokens,
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bytes": text_bytes,
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
        "by_segment": [
            {"segment": number, **mean} for number, mean in enumerate(_means(records, "nats_by_segment", segments))
        ],
        "by_distance": [
            {"from": int(first) + 1, "to": int(last), **mean}
            for first, last, mean in zip(
                distances,
                np.append(distances[1:], longest),
                _means(records, "nats_by_distance", distances),
                strict=True,
            )
        ],
    }


def _means(records: Sequence[Record], name: str, first_G: np.ndarray) -> list[Record]:
    """Tokens and mean nats of groups of positions; first_G holds the first position of each."""
    width_G = np.diff(first_G, append=max(record["tokens"] for record in records))
    nats_G, tokens_G = np.zeros(len(first_G)), np.zeros(len(first_G), int)
    for record in records:
        nats_G[: len(record[name])] += record[name]
        tokens_G += np.clip(record["tokens"] - first_G, 0, width_G)
    return [
        {"tokens": int(count), "nats_per_token": float(total / count)}
        for count, total in zip(tokens_G, nats_G, strict=True)
    ]
