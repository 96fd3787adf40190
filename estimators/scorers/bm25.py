"""BM25 over the corpus' words (Robertson et al. 1994), by the bm25s library."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import bm25s
import numpy as np
from jaxtyping import Float, Int

from estimators.grounds import Grounds, Parameter, Questions

TOKENS = {"stopwords": None, "show_progress": False}


class BM25:
    """Lexical similarity of question and example; says nothing of influence, a baseline.

    Scores are positive where a word is shared, 0 elsewhere, without unit.

    Args:
        texts: gives one a row; called when the first question is asked.
    """

    parameters: ClassVar[Mapping[str, Parameter]] = {}

    def __init__(self, texts: Callable[[], Sequence[str]]) -> None:
        self._texts = texts

    @classmethod
    def open(cls, grounds: Grounds) -> Self:
        """Every index has what it needs: texts."""
        return cls(grounds.examples.texts)

    @cached_property
    def _index(self) -> Any:
        index = bm25s.BM25()
        index.index(bm25s.tokenize(list(self._texts()), **TOKENS), show_progress=False)
        return index

    def score(
        self, questions: Questions, rows: Int[np.ndarray, "row"], values: Mapping[str, float]
    ) -> Float[np.ndarray, "question row"]:
        """Scores of some rows."""
        chosen: np.ndarray = self.propose(questions)[:, rows]
        return chosen

    def propose(self, questions: Questions) -> Float[np.ndarray, "question row"]:
        """Scores of all rows for the words of prompt and completion, summed over a question."""
        found = []
        for texts in questions.texts:
            found.append(sum(weight * self.scores(text) for text, weight in texts))
        return np.stack(found)

    def scores(self, query: str) -> Float[np.ndarray, "row"]:
        """Scores of all rows; 0 where no word is shared."""
        words = bm25s.tokenize([query], return_ids=False, **TOKENS)[0]
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self._index.scores["num_docs"], dtype=np.float32)
        scores: np.ndarray = self._index.get_scores(known)
        return scores
