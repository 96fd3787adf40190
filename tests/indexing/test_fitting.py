"""A fit that is interrupted anywhere goes on and ends with the same bits; or says why not."""

import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from estimators.curvature import eigenbasis
from estimators.curvature import fitting as passes
from estimators.model.selection import LayerSelection
from index.errors import DiskFull, IndexBusy, IndexMismatch
from index.files import exclusive, write_whole
from scripts import fit_estimator
from service.corpus.source import CorpusSource
from service.indexing import fitting
from service.indexing.fitting import FitOptions, fit_factors
from service.models import LoadedModel, load_model
from tests.commands import Nursery
from tests.scripts.test_scripts import invoke
from tests.service_fixtures import Workspace, make_model

ROOT = Path(__file__).parents[2]
OPTIONS = FitOptions(token_budget=24)
LAYERS = LayerSelection(patterns=("*.0.mlp.*",))
SETTLE = 40


class Interrupted(Exception):
    """Stands for a kill."""


class Fit:
    """The fit of a tiny model, with everything that can be interrupted."""

    def __init__(self, workspace: Workspace) -> None:
        self.loaded: LoadedModel = load_model(str(workspace.model), layers=LAYERS)
        self.source = CorpusSource(data=str(workspace.corpus), limit=None)
        self.batches: list[str] = []

    def run(
        self,
        out: Path,
        stop_after: int | None = None,
        options: FitOptions = OPTIONS,
        interval: float = 0,
    ) -> bytes:
        """Fit; ``stop_after`` so many batches of both passes if given."""
        self.batches = []

        def progress(name: str, items: list[object]) -> Iterator[object]:
            for item in items:
                if len(self.batches) == stop_after:
                    raise Interrupted
                yield item
                self.batches.append(name)

        fit_factors(out, self.loaded, LAYERS, self.source, options, progress, interval)
        return out.read_bytes()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_model(tmp_path_factory.mktemp("fitting"))


@pytest.fixture(scope="module")
def fit(workspace: Workspace) -> Fit:
    return Fit(workspace)


@pytest.fixture(autouse=True)
def keep_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SETTLE_TOKENS", SETTLE)
    monkeypatch.setattr(fitting, "MOST_TIME_KEEPING", float("inf"))


@pytest.fixture(scope="module")
def whole(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The factors of a fit that nothing interrupts and that keeps nothing."""
    kept, passes.SETTLE_TOKENS = passes.SETTLE_TOKENS, SETTLE
    try:
        return fit.run(tmp_path_factory.mktemp("whole") / "factors", interval=1e9)
    finally:
        passes.SETTLE_TOKENS = kept


def is_clean(out: Path) -> bool:
    return [path.name for path in out.parent.iterdir()] == [out.name]


def test_interrupted_at_every_batch_the_bits_are_the_same(fit: Fit, whole: bytes, tmp_path: Path):
    fit.run(tmp_path / "count" / "factors")
    total = len(fit.batches)
    assert total >= 12
    saved = 0
    for stop in range(total):
        out = tmp_path / str(stop) / "factors"
        with pytest.raises(Interrupted):
            fit.run(out, stop_after=stop)
        assert not out.exists()
        assert fit.run(out) == whole
        assert is_clean(out)
        saved += total - len(fit.batches)
    # On average more than a third was kept: the settled batches, of two passes.
    assert saved > total * total / 3


def test_interrupted_again_and_again(fit: Fit, whole: bytes, tmp_path: Path):
    out = tmp_path / "factors"
    for _ in range(100):
        try:
            assert fit.run(out, stop_after=3) == whole
        except Interrupted:
            continue
        break
    assert is_clean(out)


@pytest.mark.parametrize("call", [0, 3])
def test_interrupted_in_the_eigendecomposition(
    fit: Fit, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
):
    calls = []
    decompose = eigenbasis._eigh

    def interrupted(matrix):
        calls.append(matrix)
        if len(calls) == call + 1:
            raise Interrupted
        return decompose(matrix)

    out = tmp_path / "factors"
    with monkeypatch.context() as patch:
        patch.setattr(eigenbasis, "_eigh", interrupted)
        with pytest.raises(Interrupted):
            fit.run(out)
    assert fit.run(out) == whole
    assert "covariances" not in fit.batches


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_while_writing(
    fit: Fit, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
):
    out = tmp_path / "factors"

    def write(path: Path, content: bytes) -> None:
        if path != out:
            return write_whole(path, content)
        if when == "after":
            write_whole(path, content)
        (tmp_path / ".factors.123.tmp").write_bytes(content[:100])  # what a kill leaves behind
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "write_whole", write)
        with pytest.raises(Interrupted):
            fit.run(out)
    assert fit.run(out) == whole
    assert fit.batches == []
    assert is_clean(out)


def interrupt(fit: Fit, out: Path) -> Path:
    with pytest.raises(Interrupted):
        fit.run(out, stop_after=9)
    return out.with_name("factors.partial") / "sums.safetensors"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_budget": 80}, "token_budget: 24 -> 80"),
        ({"labels": "empirical"}, "labels: sampled -> empirical"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"estimator": "kfac"}, "estimator: ekfac -> kfac"),
        ({"examples": 10}, "examples: 18 -> 10"),
    ],
    ids=str,
)
def test_another_fit_is_refused_with_both_values(
    fit: Fit, whole: bytes, tmp_path: Path, change: dict[str, object], says: str
):
    out = tmp_path / "factors"
    interrupt(fit, out)
    with pytest.raises(IndexMismatch, match=says):
        fit.run(out, options=replace(OPTIONS, **change))
    assert fit.run(out) == whole


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    "damage", [flip, lambda content: content[:-1], lambda content: content[:30], lambda _: b""]
)
def test_a_damaged_checkpoint_is_told_and_not_used(
    fit: Fit,
    whole: bytes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
):
    out = tmp_path / "factors"
    path = interrupt(fit, out)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="service.indexing.fitting"):
        assert fit.run(out) == whole
    assert "damaged" in caplog.text
    assert fit.batches.count("covariances") == fit.batches.count("eigenvalues")


def test_two_fits_of_one_file_are_refused(fit: Fit, tmp_path: Path):
    out = tmp_path / "factors"
    with (
        exclusive(out.with_name("factors.partial")),
        pytest.raises(IndexBusy, match=r"Another process is writing to .*factors\.partial"),
    ):
        fit.run(out)
    assert not out.exists()


def test_a_full_disk_costs_only_the_checkpoint(
    fit: Fit,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    out = tmp_path / "factors"

    def write(path: Path, content: bytes) -> None:
        if path != out:
            raise DiskFull("No room.")
        write_whole(path, content)

    monkeypatch.setattr(fitting, "write_whole", write)
    with caplog.at_level(logging.WARNING, logger="service.indexing.fitting"):
        assert fit.run(out) == whole
    assert "without this checkpoint: No room." in caplog.text
    assert is_clean(out)


def test_nothing_is_written_before_the_interval_is_over(fit: Fit, tmp_path: Path):
    out = tmp_path / "factors"
    with pytest.raises(Interrupted):
        fit.run(out, stop_after=9, interval=1e9)
    assert list(tmp_path.iterdir()) == []


def arguments(workspace: Workspace, out: Path) -> list[str]:
    source = ["--model", str(workspace.model), "--data", str(workspace.corpus)]
    small = ["--token-budget", "20", "--checkpoint-seconds", "0", "--out", str(out)]
    return [*source, *small]


def test_a_killed_command_goes_on_if_it_is_repeated(
    workspace: Workspace,
    nursery: Nursery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """The command as people run it, with its own intervals; SIGKILL in the second pass."""
    monkeypatch.undo()
    out = tmp_path / "factors"
    with nursery.start("scripts.fit_estimator", *arguments(workspace, out)) as child:
        for line in child.stderr:
            if line.startswith("eigenvalues: 4 of"):
                child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    assert invoke(fit_estimator, *arguments(workspace, out)).code == 0
    assert "Going on with an interrupted fit" in caplog.text
    assert is_clean(out)
    again = tmp_path / "uninterrupted" / "factors"
    assert invoke(fit_estimator, *arguments(workspace, again)).code == 0
    assert out.read_bytes() == again.read_bytes()
