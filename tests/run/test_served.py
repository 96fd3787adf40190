"""Traces that are served: matched to an index, looked up at once, refused where they do not fit."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from estimators.model.tokens import Sequence1D
from index.files import read_sealed, write_sealed
from scripts import query
from scripts.serve_mcp import as_text
from service.client import ServiceProblem
from service.client.comparing import compare
from service.http.app import create_app
from service.run.folder import RecordedRun
from service.run.loading import load_first_model
from service.schemas.answers import QueryResponse
from service.tracing import asking
from service.tracing.basis import trace_by_basis
from service.tracing.served import MORE
from service.tracing.trace import MANIFEST
from service.tracing.walk import as_json
from tests.run.served_runs import (
    CONTEXT,
    CONTRAST,
    MISSING,
    PROMPT,
    TRACED,
    TWICE,
    ServedRun,
    facts,
    settings,
)
from tests.service_fixtures import Client

pytest_plugins = ["tests.run.served_runs"]

LIMA = {"prompt": PROMPT, "completion": " Lima"}
OSLO = {"prompt": PROMPT, "completion": " Oslo"}
LIMA_TOKENS = [(Sequence1D(tokens=(5, 6, 7), first_target=2), 1.0)]
NEVER = (sys.executable, "-c", "import sys; sys.stdin.read()")
"""In place of the worker: takes its order and never answers."""


@pytest.fixture(scope="module")
def client(served: ServedRun) -> Iterator[Client]:
    with Client(create_app(settings(served))) as started:
        yield started


def ask(client: Client, **asked: Any) -> dict[str, Any]:
    response = client.request("POST", "/v1/query", json={"estimator": "run", **asked})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refusal(client: Client, **asked: Any) -> str:
    response = client.request("POST", "/v1/query", json={"estimator": "run", **asked})
    assert response.status_code == 422, response.text
    found: str = response.json()["detail"]
    return found


def by_text(served: ServedRun, number: int) -> dict[str, float]:
    """What the trace says of each fact and of the row that the index lacks."""
    texts = [*facts(), MISSING]
    return dict(zip(texts, served.found.totals[number].tolist(), strict=True))


# What was traced


def test_a_traced_question_is_answered_with_every_row(client: Client, served: ServedRun) -> None:
    answer = ask(client, **LIMA, k=19, direction="both", budget=1, audit_rows=0)
    expected = by_text(served, 0)
    scores = {r["id"]: r["score"] for r in answer["results"]}
    for number, text in enumerate(facts()):
        shared = 2 if text == TWICE else 1
        assert scores[f"fact {number}"] == pytest.approx(expected[text] / shared, rel=1e-5)
    assert scores["again"] == pytest.approx(expected[TWICE] / 2, rel=1e-5)
    assert scores["other"] == scores["another"] == 0
    assert {c["status"] for c in answer["certificates"]} == {"exhaustive"}
    assert [share["estimate"] for share in answer["shares"]] == [1, 1]
    assert (answer["rescored_rows"], answer["sampled_rows"], answer["rows"]) == (19, 0, 19)


def test_its_share_is_exact_and_its_scores_are_nats_to_first_order(
    client: Client, served: ServedRun
) -> None:
    answer = ask(client, **LIMA, k=3)
    raised = [value for text, value in by_text(served, 0).items() if text != MISSING and value > 0]
    best = sorted(raised, reverse=True)[:3]
    assert answer["results"][0]["score"] == pytest.approx(best[0], rel=1e-5)
    (share,) = answer["shares"]
    assert share["estimate"] == share["low"] == pytest.approx(sum(best) / sum(raised), rel=1e-5)
    assert "every row was scored exactly" in share["sentence"]
    assert "in nats of the measured value to first order" in answer["sign_and_unit"]
    assert answer["influences"]
    assert not answer["by_gradients"]
    assert answer["effect"]["nats_per_unit"] == answer["effect"]["low"] == 1
    assert "nats of the measured value already" in answer["effect"]["measured_by"]
    first = answer["results"][0]
    assert first["effect_of_removal"]["nats"] == -first["score"]
    assert first["normalised_score"] is None
    assert "etymon replay --weights trains without them" in answer["removals"][0]["sentence"]


def test_rows_that_only_one_side_has_are_told(client: Client, served: ServedRun) -> None:
    unread, lacking, copies = ask(client, **LIMA)["notes"]
    sizes = {text: abs(value) for text, value in by_text(served, 0).items()}
    lost = sizes[MISSING] / sum(sizes.values())
    assert unread.startswith("The run never read 2 of the 19 rows of the index")
    assert lacking.startswith("1 of the 17 rows that the run read are not in the index")
    assert f"{lost:.1%} of all influence on this question" in lacking
    assert copies.startswith("2 rows of the index have the same tokens as others")
    (index,) = client.request("GET", "/v1/index").json()["indexes"]
    told = {name: value for name, value in index["trace"].items() if name != "notes"}
    assert told == {"questions": 2, "run_rows": 17, "lacking_rows": 1, "unread_rows": 2}
    assert index["trace"]["notes"][0] == unread


def test_an_answer_says_what_shared_directions_left_out(served: ServedRun, tmp_path: Path) -> None:
    run = RecordedRun.open(served.run)
    tokenizer = AutoTokenizer.from_pretrained(served.model)
    questions = [one.encode(tokenizer, CONTEXT) for one in (TRACED, CONTRAST)]
    trace_by_basis(run, load_first_model(run), questions, tmp_path / "trace", {}, rank=1)
    with Client(create_app(settings(served, traces={"default": tmp_path / "trace"}))) as started:
        told = " ".join(ask(started, **LIMA)["notes"])
    left_out = read_sealed(tmp_path / "trace" / MANIFEST, "")["left_out"][0]
    assert left_out > 1e-3
    assert f"which leave out {left_out:.1%} of the norm of its gradient." in told


def test_a_question_is_known_by_its_tokens_and_weights_however_it_is_spelt(client: Client) -> None:
    contrast = ask(client, **LIMA, against=" Oslo", k=5)
    parts = [{**OSLO, "weight": -1}, {**LIMA, "weight": 0.5}, {**LIMA, "weight": 0.5}]
    spelt = ask(client, batch=parts, k=5)
    assert [r["score"] for r in spelt["results"]] == [r["score"] for r in contrast["results"]]
    assert "not traced" in refusal(client, batch=[{**LIMA, "weight": 2}])


def test_filters_leave_exact_shares_of_what_is_left(client: Client) -> None:
    only = {"id": {"any_of": ["fact 1", "fact 3", "other"]}}
    answer = ask(client, **LIMA, k=3, filters=only)
    assert {r["id"] for r in answer["results"]} == set(only["id"]["any_of"])
    assert answer["certificates"][0]["status"] == "exhaustive"


def test_its_order_can_be_rescored_by_another_estimator(client: Client) -> None:
    answer = ask(client, **LIMA, estimator="ekfac", proposer="run", k=3, budget=5)
    assert answer["by_gradients"]
    assert answer["notes"] == []


def test_its_scores_cannot_be_split(client: Client) -> None:
    assert "cannot be split" in refusal(client, **LIMA, tokens=True)


# Beside another estimator's answer


def test_two_answers_are_shown_side_by_side(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(connection: Any, question: dict[str, Any], *, watch: bool) -> QueryResponse:
        response = client.request("POST", "/v1/query", json=question)
        if response.status_code != 200:
            raise ServiceProblem(response.json())
        return QueryResponse.model_validate(response.json())

    monkeypatch.setattr(query, "ask", asked)
    lima = [PROMPT, "--completion", " Lima", "--k", "4", "--tokens", "--compare", "run"]
    ended = CliRunner().invoke(query.app, lima)
    assert ended.exit_code == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    first, second = ([r["row"] for r in answer["results"]] for answer in told["answers"])
    assert [answer["estimator"] for answer in told["answers"]] == ["ekfac", "run"]
    assert [r["ranks"] for r in told["rows"]] == [
        *([first.index(row) + 1, second.index(row) + 1] for row in first if row in second),
        *([first.index(row) + 1, None] for row in first if row not in second),
        *([None, second.index(row) + 1] for row in second if row not in first),
    ]
    both = len(set(first) & set(second))
    assert "ekfac beside run, proponents" in ended.stderr
    assert f"{both} of {8 - both} rows are among the best of both" in " ".join(ended.stderr.split())
    assert "The run never read 2 of the 19 rows" in " ".join(ended.stderr.split())
    refused = CliRunner().invoke(query.app, [*lima[:2], " Oslo", *lima[3:]])
    assert refused.exit_code == 1
    assert "This question was not traced" in " ".join(refused.stderr.split())


def test_answers_to_different_questions_are_not_compared(client: Client) -> None:
    answers = [
        QueryResponse.model_validate(ask(client, **one, estimator="ekfac")) for one in (LIMA, OSLO)
    ]
    with pytest.raises(ValueError, match="about different questions"):
        compare(*answers)


def test_an_assistant_is_told_what_its_scores_are(client: Client) -> None:
    told = as_text(QueryResponse.model_validate(ask(client, **LIMA, k=2)))
    assert "in nats of the measured value to first order" in told
    assert "The run never read 2 of the 19 rows" in told
    assert "normalised" not in told


# What was not traced


def test_an_untraced_question_is_refused_with_its_price(client: Client) -> None:
    told = refusal(client, **OSLO)
    assert "This question was not traced through the run; ask it as a job (POST /v1/jobs)" in told
    assert "tracing it takes about 1 s, " in told
    assert "trainings" in told


def test_without_the_run_it_says_what_is_missing(served: ServedRun, trace: Path) -> None:
    manifest = read_sealed(trace / MANIFEST, "")
    write_sealed(trace / MANIFEST, {**manifest, "run": "/gone"})
    with Client(create_app(settings(served, traces={"default": trace}))) as started:
        told = refusal(started, **OSLO)
        assert "no longer lies in /gone; start the service with --run FOLDER" in told
        assert ask(started, **LIMA)["results"]
    moved = {"traces": {"default": trace}, "runs": {"default": served.run}}
    with Client(create_app(settings(served, **moved))) as started:
        assert "ask it as a job" in refusal(started, **OSLO)


def test_an_index_without_a_trace_says_how_to_have_one(served: ServedRun) -> None:
    with Client(create_app(settings(served, traces={}))) as started:
        assert "etymon serve --trace FOLDER" in refusal(started, **LIMA)
        offers = started.request("GET", "/v1/estimators").json()["estimators"]
        (run,) = [offer for offer in offers if offer["name"] == "run"]
        assert run["influences"]
        assert not run["by_gradients"]
        assert "etymon trace" in run["indexes"][0]["unavailable"]
        assert started.request("GET", "/v1/index").json()["indexes"][0]["trace"] is None


# As a job


def submit(client: Client, *asked: dict[str, Any]) -> str:
    queries = [{"estimator": "run", "k": 3, **one} for one in asked]
    response = client.request("POST", "/v1/jobs", json={"queries": queries})
    assert response.status_code == 202, response.text
    job: str = response.json()["id"]
    return job


def outcomes(client: Client, job: str) -> list[dict[str, Any]]:
    async def wait() -> list[dict[str, Any]]:
        async with asyncio.timeout(300):
            while (await client.http.get(f"/v1/jobs/{job}")).json()["state"] != "finished":
                await asyncio.sleep(0.1)
        response = await client.http.get(f"/v1/jobs/{job}/results")
        found: list[dict[str, Any]] = response.json()["results"]
        return found

    return client.run(wait)


def test_a_job_traces_its_questions_together_and_keeps_them(
    served: ServedRun, trace: Path, tmp_path: Path
) -> None:
    kept = settings(served, traces={"default": trace}, jobs_path=tmp_path / "jobs.sqlite")
    with Client(create_app(kept)) as client:
        other = {"prompt": PROMPT, "completion": " Accra"}
        found = outcomes(client, submit(client, OSLO, LIMA, other, {"prompt": "", "batch": None}))
        assert [one["problem"] for one in found[:3]] == [None] * 3
        assert len(list((trace / MORE).iterdir())) == 1
        oslo, lima = (ask(client, **one, k=19, direction="both") for one in (OSLO, LIMA))
        contrast = ask(client, **LIMA, against=" Oslo", k=19, direction="both")
        scores = [{r["id"]: r["score"] for r in a["results"]} for a in (lima, oslo, contrast)]
        largest = max(map(abs, scores[0].values()))
        for row, score in scores[2].items():
            assert scores[0][row] - scores[1][row] == pytest.approx(score, abs=1e-3 * largest)
        (index,) = client.request("GET", "/v1/index").json()["indexes"]
        assert index["trace"]["questions"] >= 4


def test_a_job_goes_on_after_the_service_ended_while_it_traced(
    served: ServedRun, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "jobs.sqlite"
    kept = settings(served, traces={"default": trace}, jobs_path=path, jobs_together=1)
    begun: list[Any] = []
    create = asyncio.create_subprocess_exec

    async def watched(*arguments: Any, **options: Any) -> Any:
        begun.append(await create(*NEVER, **options))
        return begun[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", watched)
    with Client(create_app(kept)) as client:
        job = submit(client, OSLO)

        async def started() -> None:
            async with asyncio.timeout(180):
                while not begun:
                    await asyncio.sleep(0.05)

        client.run(started)
        assert ask(client, **LIMA)["results"]
        (found,) = outcomes(client, submit(client, LIMA))  # other jobs go on
        assert found["problem"] is None
    assert begun[0].returncode is not None
    monkeypatch.undo()
    with Client(create_app(kept)) as client:
        (found,) = outcomes(client, job)
        assert found["problem"] is None


def test_a_job_whose_run_is_gone_says_so_once_a_query(
    served: ServedRun, trace: Path, tmp_path: Path
) -> None:
    manifest = read_sealed(trace / MANIFEST, "")
    write_sealed(trace / MANIFEST, {**manifest, "run": "/gone"})
    kept = settings(served, traces={"default": trace}, jobs_path=tmp_path / "jobs.sqlite")
    with Client(create_app(kept)) as client:
        for one in outcomes(client, submit(client, OSLO, {**LIMA, "against": " Accra"})):
            assert "start the service with --run FOLDER" in one["problem"]["detail"]


def test_a_process_that_traces_ends_with_its_service(served: ServedRun, tmp_path: Path) -> None:
    order = {"run": str(tmp_path), "source": None, "out": str(tmp_path / "out"), "questions": []}
    process = subprocess.Popen(
        asking.WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=asking.ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    assert "There is no recorded run in" in json.loads(process.stdout.readline())["error"]
    process.communicate()
    order = {**order, "run": str(served.run), "questions": [as_json(LIMA_TOKENS)]}
    left = subprocess.run(
        asking.WORKER, input=json.dumps(order) + "\n", text=True, cwd=asking.ROOT, check=False
    )
    assert left.returncode == 1
    assert not (tmp_path / "out" / MANIFEST).exists()
