"""What is asked of an index: one query and how sure its answer should be."""

from dataclasses import dataclass
from typing import Literal

from index.certificates.sketch import Tail

Ranking = Literal["score", "normalised"]
"""By influence (nats), or by influence over the whitened norm of the training gradient."""

Until = Literal["sketch", "calibration"]
"""The certificate at which a search stops."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to find, and how sure to be.

    Attributes:
        prompt: what the model was asked.
        completion: what it said, tokenised by itself (begin it with its space); None lets the
            model complete the prompt greedily.
        k: how many training examples to return.
        ranking: by "score" or "normalised".
        recall: recall of the exact top k to certify.
        confidence: of each certificate.
        until: the certificate that the search is to satisfy: "sketch", about this answer; or
            "calibration", about queries of the kind that the index was calibrated with, which asks
            for fewer rows. Without a calibration, or with codes that have no law, the other one.
        budget: most rows to rescore exactly because of their proxies; the sampled rows of the two
            checks below come on top.
        calibration_rows: rows drawn uniformly to check the sketch's noise for this query; without
            them a "gaussian" sketch certificate states no bound.
        audit_rows: rows drawn uniformly among those not rescored, for the audit certificate.
        damping: relative; None takes the index's own.
        documents: also score the whole documents that the answer's examples are parts of; needs the
            exact score of all their rows.
        tail: assumed law of the sketch's noise.
        seed: of the two samples; None draws one, which the answer reports.
    """

    prompt: str
    completion: str | None = None
    k: int = 10
    ranking: Ranking = "normalised"
    recall: float = 0.9
    confidence: float = 0.95
    until: Until = "sketch"
    budget: int = 1000
    calibration_rows: int = 64
    audit_rows: int = 64
    damping: float | None = None
    documents: bool = False
    tail: Tail = "gaussian"
    seed: int | None = None
