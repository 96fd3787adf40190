"""A trace fits the model and the index that it is served with, or is refused in a sentence."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from estimators.model.layers import plain_name
from estimators.storage import fingerprint_model, fingerprint_tensors
from index.examples import Example, ExampleStore, write_examples
from index.files import read_sealed, write_sealed
from scripts.serve import parse_of_indexes
from service.adapters import read_model
from service.checkpoints import ModelSource
from service.http.app import create_app
from service.run.errors import RunFault, RunMismatch
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import RunRecorder
from service.tracing.carried import CarriedRow, content_hash, last_weights_sha256
from service.tracing.matching import Matching
from service.tracing.trace import MANIFEST
from tests.run.served_runs import (
    ServedRun,
    build,
    facts,
    settings,
)
from tests.run.trainings import load, make_model, train

pytest_plugins = ["tests.run.served_runs"]


def test_another_model_than_the_runs_last_is_refused(served: ServedRun, tmp_path: Path) -> None:
    first = served.model.parent / "first"
    build(tmp_path / "index", first, [{"id": "a", "text": facts()[0]}])
    other = {"model": str(first), "indexes": {"default": tmp_path / "index"}}
    with pytest.raises(RunMismatch, match="ended with other weights: their SHA-256 is"):
        create_app(settings(served, **other)).state.engine.load()


def test_another_run_than_the_traced_one_is_refused(served: ServedRun, tmp_path: Path) -> None:
    other = Path(shutil.copytree(served.run, tmp_path / "run"))
    with (other / "finished.json").open("a") as file:
        file.write(" ")
    for run, told in ((other, "is not the one of the trace in"), (tmp_path, "no longer lies in")):
        with pytest.raises(RunFault, match=told):
            create_app(settings(served, runs={"default": run})).state.engine.load()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_an_adapters_last_weights_are_those_of_its_folder(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    torch.manual_seed(1)
    chosen = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(base), chosen)
    train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")])
    model.save_pretrained(tmp_path / "adapter")
    saved = read_model(
        ModelSource.of(str(tmp_path / "adapter")), dtype="auto", trust_remote_code=False
    )
    run = RecordedRun.open(tmp_path / "run")
    first = load_first_model(run)
    assert last_weights_sha256(run, first) == fingerprint_model(saved.model)
    assert fingerprint_tensors({plain_name(n): v for n, v in first.state_dict().items()}) != (
        last_weights_sha256(run, first)
    )


def test_rows_are_matched_by_their_tokens(tmp_path: Path) -> None:
    tokens = [(1, 2), (3,), (1, 2), (), (4, 5, 6), (7,)]
    examples = [
        Example(id=str(number), document="d", text="", tokens=one)
        for number, one in enumerate(tokens)
    ]
    write_examples(tmp_path / "a.arrow", examples[:4])
    write_examples(tmp_path / "b.arrow", examples[4:])
    keep = np.array([True, False, True, True, True, True])
    store = ExampleStore([tmp_path / "a.arrow", tmp_path / "b.arrow"], keep)
    read = [((4, 5, 6), "x"), ((1, 2), "0"), ((3,), "1"), ((8,), "5"), ((1, 2), "2")]
    carried = [
        CarriedRow(id=name, content=content_hash(np.array(one, dtype="<i4").tobytes()))
        for one, name in read
    ]
    matching = Matching.of(carried, store)
    totals = np.array([4.0, 1.0, 16.0, -32.0, 2.0])
    assert matching.over_index(totals).tolist() == [1.5, 1.5, 0, 4, 0]
    assert matching.lacking.tolist() == [False, False, True, True, False]
    assert (matching.unread, matching.copies, matching.changed) == (2, 2, 1)
    assert matching.lost(totals) == pytest.approx(48 / 55)
    assert matching.otherwise == 0  # it is not known what counted
    carried[0] = replace(carried[0], counted=((1, 3),))
    assert Matching.of(carried, store).otherwise == 0
    carried[0] = replace(carried[0], counted=((2, 3),))
    assert Matching.of(carried, store).otherwise == 1


def test_an_index_of_other_texts_is_refused(served: ServedRun, tmp_path: Path) -> None:
    build(tmp_path / "index", served.model, [{"id": "fact 0", "text": "The sea is wide."}])
    other = {"indexes": {"default": tmp_path / "index"}}
    with pytest.raises(RunMismatch, match="has none of the 17 rows that the run"):
        create_app(settings(served, **other)).state.engine.load()


def test_a_trace_that_is_not_whole_is_refused(served: ServedRun, trace: Path) -> None:
    manifest = read_sealed(trace / MANIFEST, "")

    def refused(match: str) -> None:
        engine = create_app(settings(served, traces={"default": trace})).state.engine
        with pytest.raises(RunMismatch, match=match):
            engine.load()

    with (trace / "rows.jsonl").open("a") as file:
        file.write("\n")
    refused("rows.jsonl is missing or was changed")
    earlier = {name: value for name, value in manifest.items() if name != "last_weights_sha256"}
    write_sealed(trace / MANIFEST, earlier)
    refused("is of an earlier version")
    (trace / MANIFEST).unlink()
    refused("no whole trace")


def test_a_trace_of_an_index_that_is_not_served_is_refused(served: ServedRun) -> None:
    with pytest.raises(ValueError, match="a trace is given for 'other', which is no index"):
        settings(served, traces={"other": served.trace})


@pytest.mark.parametrize(
    ("values", "indexes", "expected"),
    [
        (["a"], None, {"default": "a"}),
        (["a"], {"mine": Path("i")}, {"mine": "a"}),
        (["b=x", "a=y"], {"a": Path("i"), "b": Path("j")}, {"a": "y", "b": "x"}),
        (["b=x"], None, {"b": "x"}),
    ],
)
def test_a_trace_belongs_to_the_index_that_is_named(
    values: list[str], indexes: dict[str, Path] | None, expected: dict[str, str]
) -> None:
    found = parse_of_indexes("--trace", values, indexes)
    assert found == {name: Path(folder) for name, folder in expected.items()}


def test_a_trace_without_a_name_needs_a_single_index() -> None:
    with pytest.raises(ValueError, match="--trace must be NAME=FOLDER where several indexes are"):
        parse_of_indexes("--trace", ["x"], {"a": Path("i"), "b": Path("j")})
    with pytest.raises(ValueError, match="--run names 'a' twice"):
        parse_of_indexes("--run", ["a=x", "a=y"], {"a": Path("i"), "b": Path("j")})
