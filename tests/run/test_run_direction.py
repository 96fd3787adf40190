"""The estimator run-direction: the run's direction over an index, also of rows it never read."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Sequence1D, collate
from estimators.rescoring import score_batch
from estimators.run.direction import DirectionPlan
from service.http.app import create_app
from service.models import load_model
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.run.recorder import RunRecorder
from service.tracing.directions import RunDirections, read_directions, trace_directions
from service.tracing.questions import AskedQuestion
from tests.run.served_runs import CONTRAST, PROMPT, TRACED, ServedRun, build, facts, settings
from tests.run.trainings import load, make_model, texts, train
from tests.service_fixtures import CONTEXT, Client

pytest_plugins = ["tests.run.served_runs"]

LIMA = {"prompt": PROMPT, "completion": " Lima", "estimator": "run-direction"}
NEW = ["Lima is the capital of Peru.", "Copper is sold in Chile.", "The capital of Peru is Lima."]


@pytest.fixture(scope="module")
def directed(served: ServedRun, tmp_path_factory: pytest.TempPathFactory) -> RunDirections:
    """Directions of the same questions as the trace, in a folder of their own."""
    folder = tmp_path_factory.mktemp("directed") / "directions"
    return _directions(served, [TRACED, CONTRAST], folder)


def _directions(served: ServedRun, asked: list[AskedQuestion], folder: Path) -> RunDirections:
    run = RecordedRun.open(served.run)
    tokenizer = load_model(str(served.model)).tokenizer
    questions = [one.encode(tokenizer, CONTEXT) for one in asked]
    plan = DirectionPlan(curvature="hessian")
    return trace_directions(run, load_first_model(run), questions, folder, {}, plan)


def client_of(served: ServedRun, folder: Path, **changes: Any) -> Client:
    return Client(create_app(settings(served, traces={"default": folder}, **changes)))


def ask(client: Client, **query: Any) -> dict[str, Any]:
    response = client.request("POST", "/v1/query", json={"k": 3, "seed": 1, **query})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def expected(served: ServedRun, found: RunDirections, question: int, text: str) -> float:
    """The inner product of the direction of the linear layers with the gradient of a text."""
    loaded = load_model(str(served.model))
    whole = found.whole(question)
    model = loaded.model
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    linear.discard("lm_head")
    model.requires_grad_(True)
    ids = torch.tensor([loaded.encode(text)])
    (loss,) = model(input_ids=ids, labels=ids).loss[None] * (ids.shape[1] - 1)
    loss.backward()
    return sum(
        float((whole[name] * parameter.grad).sum())
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] in linear
    )


def test_scores_are_the_runs_direction_times_gradients_of_the_last_model(
    served: ServedRun, directed: RunDirections
) -> None:
    with client_of(served, directed.folder) as client:
        answer = ask(client, **LIMA, k=19, direction="both", ranking="score")
        contrast = ask(client, **LIMA, against=" Oslo", k=19, ranking="score")
    scores = {result["id"]: result["score"] for result in answer["results"]}
    for number, text in enumerate(facts()[:4]):
        wanted = expected(served, directed, 0, text)
        assert scores[f"fact {number}"] == pytest.approx(wanted, rel=1e-3)
    assert contrast["results"][0]["score"] != answer["results"][0]["score"]
    assert "reading the example once an epoch" in answer["sign_and_unit"]
    assert answer["effect"] is None
    assert "what leaving out one that was read would do" in answer["effect_reason"]
    assert answer["by_gradients"]
    (note,) = answer["notes"]
    assert "of the numbers that the run trained" in note
    assert {c["type"] for c in answer["certificates"]} >= {"sketch", "audit"}


def test_rows_that_the_run_never_read_are_ranked(
    served: ServedRun, directed: RunDirections, tmp_path: Path
) -> None:
    build(tmp_path / "new", served.model, [{"id": t, "text": t} for t in NEW])
    with client_of(served, directed.folder, indexes={"default": tmp_path / "new"}) as client:
        answer = ask(client, **LIMA, ranking="score")
        refused = client.request("POST", "/v1/query", json={"k": 1, **LIMA, "estimator": "run"})
    wanted = {text: expected(served, directed, 0, text) for text in NEW}
    assert [r["id"] for r in answer["results"]] == sorted(NEW, key=wanted.__getitem__, reverse=True)
    for result in answer["results"]:
        assert result["score"] == pytest.approx(wanted[result["id"]], rel=1e-3)
    assert refused.status_code == 422
    assert "not traced" in refused.json()["detail"]


def test_a_folder_may_hold_both(served: ServedRun, trace: Path) -> None:
    _directions(served, [TRACED], trace)
    with client_of(served, trace) as client:
        assert ask(client, **LIMA)["notes"]
        exact = ask(client, **{**LIMA, "estimator": "run"})
        refused = client.request("POST", "/v1/query", json={"k": 1, **LIMA, "against": " Oslo"})
    assert exact["influences"]
    assert not exact["by_gradients"]
    assert refused.status_code == 422
    assert "ask it as a job" in refused.json()["detail"]


def test_without_directions_it_says_how_to_have_them(served: ServedRun, trace: Path) -> None:
    with client_of(served, trace) as client:
        refused = client.request("POST", "/v1/query", json={"k": 1, **LIMA})
    assert refused.status_code == 422
    assert "etymon trace --direction" in refused.json()["detail"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_directions_of_an_adapter_meet_its_own_layers(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(base), config)
    train(model, tmp_path / "out", [RunRecorder(tmp_path / "run")], adam_epsilon=1e-2)
    run = RecordedRun.open(tmp_path / "run")
    again = load_first_model(run)
    question = [(Sequence1D(tokens=(5, 9, 2, 7), first_target=2), 1.0)]
    found = trace_directions(run, again, [question], tmp_path / "directions", {})
    whole = found.whole(0)
    again.requires_grad_(False)
    layers = find_layers(again, LayerSelection(patterns=("*lora_*",))).layers
    assert set(whole) == {name for layer in layers for name in layer.parameter_names}
    direction = {layer.name: layer.part_of(whole) for layer in layers}
    tokens = tuple(texts()[3])
    batch = collate([Sequence1D(tokens=tokens)])
    score = float(score_batch(again, layers, direction, batch).total[0])
    again.requires_grad_(True)
    ids = torch.tensor([tokens])
    (again(input_ids=ids, labels=ids).loss * (len(tokens) - 1)).backward()
    named = {name.removeprefix("base_model.model."): p for name, p in again.named_parameters()}
    wanted = sum(float((value * named[name].grad).sum()) for name, value in whole.items())
    assert score == pytest.approx(wanted, rel=1e-4)


def test_manifest_tells_what_the_directions_are(directed: RunDirections) -> None:
    manifest = json.loads((directed.folder / "directions.json").read_text())
    assert manifest["plan"] == {"curvature": "hessian", "segments": None, "seed": 0}
    assert manifest["price"]["seconds"] > 0
    assert read_directions(directed.folder).files == directed.files
