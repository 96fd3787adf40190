"""Causal architectures of transformers, tiny and random, beside autograd through their weights.

``pytest -m sweep`` tries every one that transformers can build from a config.
"""

import pytest
import torch

from scripts.bench.coverage.architectures import architectures
from scripts.bench.coverage.checks import CLOSE, check

SHARES = {
    "bloom": 0.97,
    "deepseek_v3": 0.97,
    "gpt_oss": 0.98,
    "mixtral": 0.98,
    "opt": 0.79,  # tiny models are mostly position embeddings
    "qwen2_moe": 0.97,
}
"""Least share of each that is attributed with embeddings."""

NEVER_WRONG = ("works", "refused: ", "not built: ")


@pytest.mark.parametrize("kind", SHARES)
def test_log_probabilities_and_scores_are_exact(kind):
    row = check(kind)
    assert row.status == "works"
    assert row.log_p_error < CLOSE
    assert row.score_error < CLOSE
    assert row.attributed_share_all > SHARES[kind]


@pytest.mark.sweep
@pytest.mark.parametrize("kind", architectures())
def test_every_architecture_is_exact_or_refused_by_a_sentence(kind):
    row = check(kind)
    assert row.status.startswith(NEVER_WRONG)
    assert "\n" not in row.status


def test_checks_leave_the_default_precision_alone():
    check("mixtral")
    assert torch.get_default_dtype() == torch.float32
