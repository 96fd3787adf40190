"""What surrounds Bergson in the comparison of traces; Bergson itself is not installed in tests."""

import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from scripts.bench.through_run import magic
from scripts.bench.through_run.costs import measured


def test_without_bergson_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(magic, "installed", lambda _: None)
    done = CliRunner().invoke(magic.app, ["--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "error: bergson is not installed" in done.stderr
    assert not (tmp_path / "out").exists()


def test_influences_are_compared_with_those_of_the_peer() -> None:
    others = np.random.default_rng(0).normal(size=100)
    same = magic._compared(2 * others, others)
    assert same["pearson"] == pytest.approx(1)
    assert same["spearman"] == pytest.approx(1)
    assert same["top20_shared"] == 1
    assert same["largest_difference"] == pytest.approx(1)
    assert magic._compared(-others, others)["top20_shared"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the peak of a process")
def test_a_peak_is_that_of_the_work_alone() -> None:
    measured(lambda: np.ones(25_000_000))  # 200 MB, given back
    _, small = measured(lambda: np.ones(2_500_000))
    assert small.peak_mb is not None
    assert 15 < small.peak_mb < 60
    found, large = measured(lambda: float(np.ones(12_500_000).sum()))
    assert found == 12_500_000
    assert large.peak_mb is not None
    assert large.peak_mb > 90
    assert large.seconds > 0
