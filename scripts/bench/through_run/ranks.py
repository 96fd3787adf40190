"""What tracing questions through fewer directions than questions leaves out."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from scripts.bench.through_run.tasks import Task
from service.tracing.basis import Basis, gram_matrix


def rank_errors(
    task: Task, influences: Float[np.ndarray, "question row"], ranks: tuple[int, ...] = (3, 6, 9)
) -> list[dict[str, Any]]:
    """Of ``etymon trace --rank``, against each question's own trace; medians over questions.

    Influences of directions are sums of those of the questions, so that none is traced anew.

    Args:
        task: whose questions were traced.
        influences: of every row on each.
        ranks: numbers of directions.
    """
    gram = gram_matrix(task.run, task.model, task.questions)
    usual = np.sqrt(np.square(influences).mean(1))
    found = []
    for rank in ranks:
        basis = Basis.of(gram, rank)
        directions = basis.weights @ influences
        traced = basis.parts @ directions
        error = np.sqrt(np.square(traced - influences).mean(1))
        said = basis.left_out * basis.norms * np.sqrt(np.square(directions).mean())
        pairs = zip(traced, influences, strict=True)
        found.append(
            {
                "rank": rank,
                "questions": len(influences),
                "left_out": float(np.median(basis.left_out)),
                "relative_error": float(np.median(error / usual)),
                "error_over_said": float(np.median(error / said)),
                "rank_correlation": float(
                    np.median([stats.spearmanr(a, b).statistic for a, b in pairs])
                ),
            }
        )
    return found
