"""The recall audit as one HTML page with its plots inside, to be read and passed on as a file."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from index.certificates.calibration import SHARE, failures_allowed
from index.files import write_whole
from service.search.answer import Answer
from service.search.proxies import Proxies

INK, ACCENT, SOFT, ALARM = "#24292f", "#0b6bcb", "#9ecbf5", "#c62828"
RESIDUALS = 2000
"""Rows drawn for the plot of the proxies' errors, over all queries."""


def rows_needed(truth: Float[np.ndarray, "row"], proxies: Proxies, k: int) -> list[int]:
    """How many rows of the shortlist by proxy hold the first, second, ... of the true top k."""
    best = np.argsort(-truth, kind="stable")[:k]
    order = np.argsort(-proxies.values, kind="stable")
    places = np.empty(len(order), dtype=int)
    places[order] = np.arange(1, len(order) + 1)
    return sorted(places[best].tolist())


def residuals(
    truth: Float[np.ndarray, "row"], proxies: Proxies, count: int, seed: int
) -> list[float]:
    """Errors of random rows' proxies in units of their assumed scales."""
    scales = proxies.scales(np.where(np.isfinite(truth), truth, 0.0))
    usable = np.flatnonzero((scales > 0) & np.isfinite(truth))
    drawn = np.random.default_rng(seed).permutation(usable)[:count]
    errors: list[float] = ((proxies.values[drawn] - truth[drawn]) / scales[drawn]).tolist()
    return errors


def write_report(
    path: Path,
    report: dict[str, Any],
    answers: Sequence[Answer],
    needed: Sequence[Sequence[int]],
    errors: Sequence[float],
    confidence: float,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the file.
        report: of ``audit_recall.summarise``.
        answers: that were audited.
        needed: ``rows_needed`` of each query; empty if only a sample of the rows was scored.
        errors: ``residuals`` of all queries; empty if the proxies have no error scale.
        confidence: of each certificate.
    """
    plots = {
        "bounds": (
            _svg(lambda ax: _bounds(ax, report)),
            "Certificate against truth. Each point is a query: the recall that a certificate "
            "stated at least (across) and the recall the answer had (up). A point below the line "
            "is a statement that was wrong.",
        ),
        "cost": (
            _svg(lambda ax: _cost(ax, answers)),
            "What an answer cost, by stage: median seconds, and the range of nine in ten.",
        ),
    }
    if needed:
        caption = (
            f"Recall of the true top {report['k']} within so many rows of the shortlist, before "
            f"any are rescored: mean over queries, and the band within which nine of ten lie. "
            f"{_tolerance(len(needed))}"
        )
        plots["curve"] = (_svg(lambda ax: _curve(ax, needed, report["rows"])), caption)
    if errors:
        plots["errors"] = (
            _svg(lambda ax: _errors(ax, errors)),
            "Errors of random rows' proxies in units of the scale that the sketch certificate "
            "assumes, against a normal law. Points above the line on the right, or below it on "
            "the left, err more than assumed.",
        )
    order = [name for name in ("curve", "bounds", "errors", "cost") if name in plots]
    page = _TEMPLATE.render(
        report=report,
        confidence=confidence,
        share=SHARE,
        sentence=_sentence(report),
        plots=[plots[name] for name in order],
        document=json.dumps(report, indent=1),
    )
    write_whole(path, page.encode())


def _sentence(report: dict[str, Any]) -> str:
    wrong = [name for name, counts in report["certificates"].items() if counts["beyond_chance"]]
    if wrong:
        return (
            f"The {' and '.join(wrong)} certificate failed more often than its confidence allows."
        )
    if report["compared_rows"] < report["rows"]:
        return "Only a sample of the rows was compared, so that no certificate could be judged."
    return "No more statements were wrong than may be."


def _tolerance(queries: int) -> str:
    allowed = failures_allowed(queries, SHARE, 0.95)
    if allowed < 0:
        return f"{queries} queries are too few to say anything of {SHARE:.0%} of such queries."
    return (
        f"The dashed line is reached by at least {SHARE:.0%} of queries of this kind, with 95 % "
        f"confidence."
    )


def _svg(draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "audit", "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = figure.add_subplot()
        ax.spines[["top", "right"]].set_visible(False)
        draw(ax)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue().partition("<svg")[2].join(("<svg", ""))


def _curve(ax: Axes, needed: Sequence[Sequence[int]], rows: int) -> None:
    k = len(needed[0])
    counts = np.unique(np.geomspace(1, rows, 200).astype(int))
    found = np.stack([np.searchsorted(one, counts, side="right") / k for one in needed])
    low, high = np.quantile(found, (0.05, 0.95), axis=0, method="inverted_cdf")
    ax.fill_between(counts, low, high, color=SOFT, linewidth=0, label="nine of ten queries")
    ax.plot(counts, found.mean(0), color=ACCENT, label="mean")
    allowed = failures_allowed(len(needed), SHARE, 0.95)
    if allowed >= 0:
        ax.plot(counts, np.sort(found, axis=0)[allowed], "--", color=INK, label="tolerance limit")
    ax.set(xscale="log", xlabel="rows of the shortlist", ylabel=f"recall of the top {k}")
    ax.set_ylim(0, 1.02)
    ax.legend(frameon=False, loc="lower right")


def _bounds(ax: Axes, report: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    for name, colour in zip(report["certificates"], (ACCENT, "#e08a00", "#5b8c2a"), strict=False):
        points = [
            (query["certificates"][name]["bound"], query["recall"])
            for query in report["per_query"]
            if query["certificates"][name]["bound"] is not None
        ]
        if points:
            x, y = np.array(points).T + generator.uniform(-0.008, 0.008, (2, len(points)))
            ax.scatter(x, y, s=14, alpha=0.6, color=colour, label=name, linewidth=0)
    ax.plot([0, 1], [0, 1], color=ALARM, linewidth=1)
    ax.set(xlabel="recall stated", ylabel="recall found", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.legend(frameon=False, loc="lower right")


def _errors(ax: Axes, errors: Sequence[float]) -> None:
    values = np.sort(errors)
    expected = stats.norm.ppf((np.arange(len(values)) + 0.5) / len(values))
    reach = float(max(abs(expected[0]), abs(values[0]), abs(values[-1])))
    ax.plot([-reach, reach], [-reach, reach], color=ALARM, linewidth=1, label="as assumed")
    ax.scatter(expected, values, s=8, color=ACCENT, linewidth=0, label="measured")
    ax.set(xlabel="normal law", ylabel="error in scales")
    ax.legend(frameon=False, loc="upper left")


def _cost(ax: Axes, answers: Sequence[Answer]) -> None:
    stages = list(answers[0].seconds)
    times = np.array([[answer.seconds.get(stage, 0.0) for stage in stages] for answer in answers])
    middle = np.median(times, axis=0)
    low, high = np.quantile(times, (0.05, 0.95), axis=0)
    ax.barh(stages, middle, color=SOFT)
    ax.errorbar(
        middle, stages, xerr=[middle - np.minimum(low, middle), np.maximum(high, middle) - middle],
        fmt="none", ecolor=INK, elinewidth=1,
    )  # fmt: skip
    ax.invert_yaxis()
    ax.set_xlabel("seconds")


_TEMPLATE = jinja2.Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Recall audit</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; background: #fff; margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .3rem .6rem;
  border-bottom: 1px solid #d0d7de; vertical-align: top; } td.n, th.n { text-align: right; }
figure { margin: 2rem 0; } svg { max-width: 100%; height: auto; } figcaption { color: #57606a; }
.wrong { color: #c62828; font-weight: 600; } .scroll { overflow-x: auto; }
pre { background: #f6f8fa; padding: .6rem; overflow-x: auto; font-size: 13px; }
</style>
</head>
<body>
<h1>Recall audit</h1>
<p{% if report.violations_beyond_chance %} class="wrong"{% endif %}>{{ sentence }}
{{ "{:,}".format(report.queries) }} queries for their top {{ report.k }} of
{{ "{:,}".format(report.rows) }} rows were compared with exact scores of
{% if report.compared_rows == report.rows %}every row{% else -%}
{{ "{:,}".format(report.compared_rows) }} of them{% endif %}: mean recall
{{ "%.3f"|format(report.mean_recall) }}, lowest {{ "%.2f"|format(report.lowest_recall) }}, with
{{ "%.0f"|format(report.median_rescored_rows) }} rows rescored a query (median). Recall is against
the exact estimator's own ranking, not against what caused the model's words.</p>
<div class="scroll"><table>
<tr><th>certificate</th><th class="n">certified</th><th class="n">refused</th>
<th class="n">statements that were wrong</th><th class="n">may be wrong</th></tr>
{% for name, counts in report.certificates.items() %}
<tr><td>{{ name }}</td><td class="n">{{ counts.certified }} of {{ report.queries }}</td>
<td class="n">{{ counts.refused }}</td>
<td class="n{% if counts.beyond_chance %} wrong{% endif %}">{{ counts.violations }}</td>
<td class="n">{{ counts.allowed_violations }}</td></tr>
{% endfor %}
</table></div>
<p>The sketch certificate and the audit each speak of one answer, at
{{ "%.0f"|format(100 * confidence) }} % confidence. The calibration speaks of at least
{{ "%.0f"|format(100 * share) }} % of queries of the kind that the index was calibrated with.
"May be wrong" is what 99.9 % of audits stay within if each statement fails as often as it may.</p>
{% if report.shares %}
<p>The results carry {{ "%.1f"|format(100 * report.shares.mean) }} % of all positive influence
(mean). {{ report.shares.held }} of {{ report.shares.intervals }} intervals around this share held
the truth.</p>
{% endif %}
{% for svg, caption in plots %}
<figure role="img" aria-label="{{ caption }}">{{ svg|safe }}<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
<h2>Queries</h2>
<div class="scroll"><table>
<tr><th>prompt and completion</th><th class="n">recall</th><th class="n">rows rescored</th>
{% for name in report.certificates %}<th>{{ name }}</th>{% endfor %}</tr>
{% for query in report.per_query %}
<tr><td>{{ query.prompt }}<b>{{ query.completion }}</b></td>
<td class="n">{{ "%.2f"|format(query.recall) }}</td>
<td class="n">{{ "{:,}".format(query.rescored_rows) }}</td>
{% for name in report.certificates %}{% set c = query.certificates[name] %}
<td{% if c.held is sameas false %} class="wrong"{% endif %}>{{ c.status }}
{%- if c.bound is not none %}, {{ "%.2f"|format(c.bound) }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<details><summary>All figures as JSON</summary><pre>{{ document }}</pre></details>
</body>
</html>
"""
)
