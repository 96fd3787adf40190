"""No number says more than it knows: what users read calls nothing nats that was not measured."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SEEN = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "docs" / "openapi.json",
        *(ROOT / "service" / "http" / "page").glob("*.*"),
        *(ROOT / "service" / "schemas").glob("*.py"),
        *(ROOT / "service" / "search").glob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
        *(ROOT / "scripts" / "run").glob("*.py"),
        *(ROOT / "service" / "scaling").glob("*.py"),
        *(ROOT / "service" / "scoring").glob("*.py"),
        *(ROOT / "estimators").rglob("*.py"),
    ]
)
"""What users read: documents, the API's description, the page, commands, docstrings of scores."""

MEASURED = (
    # log-probabilities, their sums and differences
    r"log p = -5\.306 nats over 3 tokens",
    r"log p\(\w+ \| prompt\), (in )?nats",
    r"f\(q\) = log p\(completion \| prompt\)`, in nats",
    r"nats; the sum over terms of weight times log p",
    r"`{1,2}log p\(\w+ \| prompt\)`{1,2} in nats",
    r"`{1,2}f = [^`]*log p[^`]*`{1,2} (in )?\(?nats",
    r"(The|Its part of the) measured value, in nats",
    r"Of the first term, in nats",
    r"log p: 0 nats is certain; each nat less is 2\.7 times less likely",
    r"One weighted part of a measurement, in nats",
    r"the weighted sum of their log-probabilities, in nats",
    r"values: of every sequence of every query, in nats",
    r"\{(signed\(measurement\.value\)|measurement\.value:\+\.3f|answer\['measurement'\]\['value'\]"
    r":\+\.3f|signed\(nats\))\} nats",
    r"function probability\(nats, tokens\)",
    r"Math\.exp\(nats\)",
    r"Log-probabilities, in nats, beyond which a question",
    r"impossible or certain; `{1,2}value`{1,2} in nats",
    r"Its log-probability is below -200 nats",
    r"log p: 0 nats is certain",
    # derivatives of a log-probability through the run itself
    r"`{1,2}df/dw_i`{1,2}, in nats of f for a change of weight 1",
    r"each row's influence in nats of what is asked: leaving the row out changes the measured "
    r"value by minus that, \*\*to first order",
    r"Influences are in nats of what is asked: leaving a row out of the run changes it by minus "
    r"that, to first order",
    r'"influence, nats"',
    r"once in the epoch would have done to the answer, in nats and to first order",
    r"the influence in nats of f of that row, read once in the segment",
    r"(reading that row once an epoch does to f, in|through the run \(`{1,2}estimators/run/"
    r"direction\.py`{1,2}\): in) nats (and|of f,) to first order",
    r"questions which were traced through the training run, in nats",
    r"would do to the measured value, in nats to first order, by the run's own direction",
    r"the influence of every reading: question, step, row, nats",
    r'\["question", "step", "row", "nats"\]',
    r"[Ii]nfluences? (through the training run itself|of (all|some) rows), in nats",
    r"(over all its readings|of every row of the index), in nats of f",
    r"One whose scores are influences in nats",
    r"Scores are nats of (the measured value|what is asked)( already)?, to first order",
    r"scores of `run` are nats of the measured value, to first order",
    r"scores of the estimator `run` are the one kind that is nats of f, to first order",
    r"found\.values\[number\]:\+\.3f\} nats",
    # losses
    r"mean: loss in nats a token",
    r"next-token negative (log-likelihoods? of the counted tokens|log-likelihood), in nats",
    r"negative log-likelihoods over the counted tokens, in nats",
    r"Next-token negative log-likelihoods in nats, at the position that predicts",
    r"Negative log-probability of the labels, in nats",
    r"The loss of each sequence in nats",
    # changes of runs that were repeated
    r"(its top 20 left out|20 rows added), nats",
    # what a trace through shared directions leaves out of an influence
    r"left_out_nats",
    r"and \{worth\.max\(\):\.2g\} nats a row",
    # gains of a training step that was made
    r"gain, nats",
    # what a measured scale says: fields, and the sentences that show them
    r'"nats"|"Nats"|\.nats\b|\[\'nats\'\]|\bnats=(change|None)\b',
    r"nats: float|nats: change of the measured value",
    r"\{signed\(removal\.nats\)\} nats",
    r"\{removal\.nats:\+\.2g\} nats|\{change:\+\.2g\} nats",
    r'"without it, nats"',
    r"what leaving a row out would do, in nats; empty without a measured scale",
    r"one unit of score: \{effect\['nats_per_unit'\]:\.3g\} nats",
    r"One unit of score is worth (\$?\{(signed\()?effect\.nats_per_unit(\)|:\.3g)\}) nats",
    r'"nats a unit of score"',
    r"Nats a unit for so many rows together",
    r"Nats by which two measurements of a question",
    r"its influence t \(nats; leaving the row out changes f by -t\)",
    r"of each question's f, in nats",
    r"influences: through the run, in nats",
    # the scale that an answer has where it was measured, and what is said of its absence
    r"nats_per_unit|Nats Per Unit",
    r"without a measurement no answer converts scores into nats",
    r"`effect_of_removal` \(`nats`, `low`, `high`, `confidence`; null without it\)",
    r"what a unit of score is worth in nats, with an interval for another question",
    r"Numbers that Etymon does call nats were measured",
    r"what one unit of score is worth in nats",
    r"is no change of log p: nats of effect come only",
)
"""The only uses of the word, with enough around it to see of what; no score is among them."""

DENIED = (
    r"`-score / N`\. That holds at a minimum of the objective",
    r"`-score / N` was 34 times too large",
)
"""Where the textbook's prediction is named, to say what it is worth."""


def text_of(path: Path) -> str:
    """On one line, without what breaks lines: Python's joined strings, comment and list marks."""
    joined = re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
    return " ".join(joined.split())


def left_over(text: str, word: str, allowed: tuple[str, ...]) -> list[str]:
    """What surrounds each use of a word that no allowed passage holds."""
    spans = [m.span() for passage in allowed for m in re.finditer(passage, text)]
    return [
        text[max(m.start() - 60, 0) : m.end() + 40]
        for m in re.finditer(word, text)
        if not any(start <= m.start() and m.end() <= end for start, end in spans)
    ]


@pytest.mark.parametrize("path", SEEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_what_was_measured_is_in_nats(path: Path) -> None:
    assert left_over(text_of(path), r"(?i)(?<![a-z])nats(?![a-z])", MEASURED) == []


@pytest.mark.parametrize("path", SEEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_score_over_the_number_of_examples_is_a_prediction(path: Path) -> None:
    assert left_over(text_of(path), r"(?i)score`*\s*/\s*`*N\b", DENIED) == []


def test_the_search_finds_what_it_must() -> None:
    text = "scores in nats, `-score / N`; log p(completion | prompt), nats"
    assert len(left_over(text, "nats", MEASURED)) == 1
    assert len(left_over(text, r"score / N", DENIED)) == 1


@pytest.mark.parametrize("passage", [*MEASURED, *DENIED])
def test_every_allowed_passage_is_in_use(passage: str) -> None:
    assert any(re.search(passage, text_of(path)) for path in SEEN)
