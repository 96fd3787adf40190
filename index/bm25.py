"""BM25 over the corpus' words (Robertson et al. 1994), by the bm25s library."""

from collections.abc import Sequence

import bm25s
import numpy as np
from jaxtyping import Float


class BM25:
    """Lexical scores of every row for a query text; positive, without unit.

    Args:
        texts: one a row.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._tokens = {"stopwords": None, "show_progress": False}
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(list(texts), **self._tokens), show_progress=False)

    def scores(self, query: str) -> Float[np.ndarray, "row"]:
        """Scores of all rows; 0 where no word is shared."""
        words = bm25s.tokenize([query], return_ids=False, **self._tokens)[0]
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self._index.scores["num_docs"], dtype=np.float32)
        scores: np.ndarray = self._index.get_scores(known)
        return scores
