"""Why a training example is among the results: by token, by layer, by near-duplicates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

SHINGLE_TOKENS = 3
LEAST_OVERLAP = 0.5


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the decoded text.

    A character that several tokens make up is given to the last of them.
    """
    texts, done, read = [], 0, 0  # tokens before `read` are told; decoding starts at `done`
    for end in range(1, len(tokens) + 1):
        before = tokenizer.decode(tokens[done:read])
        after = tokenizer.decode(tokens[done:end])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        done, read = read, end
    return texts


def cluster(tokens: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the near-duplicate clusters of examples, from 0 in order of their first one.

    Two are near-duplicates if at least half of the sequences of three tokens that occur in either
    occur in both (Jaccard similarity of shingles; Broder 1997), or if they have the same tokens;
    a cluster is what chains of them connect.

    Args:
        tokens: of each example.
    """
    numbers: dict[tuple[int, ...], int] = {}
    entries: list[tuple[int, int]] = []
    for place, ids in enumerate(tokens):
        width = min(SHINGLE_TOKENS, max(len(ids), 1))
        shingles = {tuple(ids[i : i + width]) for i in range(len(ids) - width + 1)}
        entries += [(place, numbers.setdefault(s, len(numbers))) for s in shingles]
    places, columns = np.array(entries, dtype=np.int64).reshape(-1, 2).T
    shape = (len(tokens), max(len(numbers), 1))
    has = sparse.csr_matrix((np.ones(len(places)), (places, columns)), shape=shape)
    shared = (has @ has.T).toarray()
    sizes = np.diag(shared)
    either = sizes[:, None] + sizes[None, :] - shared
    near = shared >= LEAST_OVERLAP * np.maximum(either, 1)
    _, labels = csgraph.connected_components(near, directed=False)
    order: dict[int, int] = {}
    return [order.setdefault(int(label), len(order)) for label in labels]
