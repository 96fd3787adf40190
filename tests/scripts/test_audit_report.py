"""The audit's page: what its plots are drawn from, that it stands alone and cannot be broken."""

import re

import numpy as np
import pytest

from scripts.audit_recall import summarise
from scripts.report.audit import residuals, rows_needed, write_report
from service.search.proxies import Proxies
from tests.search.test_evaluation import answer


def proxies(values: list[float], sigmas: list[float]) -> Proxies:
    return Proxies(
        values=np.array(values),
        sigmas=np.array(sigmas),
        relative=0.0,
        divisors=np.ones(len(values)),
        failed=np.zeros(len(values), dtype=bool),
    )


def test_rows_needed_by_hand():
    truth = np.array([5.0, 4.0, 3.0, 2.0])
    proposed = proxies([0.1, 0.9, 0.8, 0.3], [1.0] * 4)  # places 4, 1, 2, 3
    assert rows_needed(truth, proposed, 1) == [4]
    assert rows_needed(truth, proposed, 3) == [1, 2, 4]


def test_residuals_are_in_error_scales_and_leave_out_what_has_none():
    truth = np.array([1.0, 2.0, -np.inf, 4.0])
    proposed = proxies([2.0, 2.5, 0.0, 4.0], [2.0, 0.5, 1.0, 0.0])
    assert sorted(residuals(truth, proposed, 10, seed=0)) == [0.5, 1.0]


@pytest.fixture
def page(tmp_path):
    truth = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]] * 3)
    answers = [answer([0, 1], 1.0), answer([0, 2], 0.5), answer([3, 4], 0.5)]
    for one in answers:
        one.seconds.update({"scan": 0.1, "rescore": 0.4})
    report = summarise(answers, truth, [0, 1, 2, 3, 4], k=2, confidence=0.95)
    report["shares"] = {"mean": 0.314, "intervals": 3, "held": 2, "median_width": 0.1}
    report["per_query"][0]["prompt"] = "<script>alert(1)</script>"
    path = tmp_path / "report.html"
    write_report(path, report, answers, [[1, 2], [1, 3], [4, 5]], [0.1, -0.4, 1.2], 0.95)
    return path.read_text()


def test_the_page_stands_alone(page):
    assert page.count("<svg") == 4
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "default-src 'none'" in page
    assert "3 queries are too few" in page


def test_the_share_and_its_intervals_are_told(page):
    assert "carry 31.4 % of all positive influence" in page
    assert "2 of 3 intervals" in page


def test_text_of_queries_cannot_run(page):
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_wrong_statements_are_marked(page):
    assert re.search(r'class="wrong">certified, 0\.50', page)
    assert "No more statements were wrong than may be." in page
