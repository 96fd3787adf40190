"""Background jobs: durable once accepted, answered once, ended by their deletion."""

import asyncio
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from estimators.model.memory import OutOfMemory
from service.errors import Conflict, NotReady, TooManyJobs, UnknownJob
from service.http.app import create_app
from service.http.job_routes import describe
from service.jobs import runner as jobs
from service.jobs import store as job_store
from service.jobs.runner import JobRunner
from service.jobs.store import APPLICATION, JobStore
from service.schemas.answers import QueryResponse
from service.schemas.queries import QueryRequest
from service.settings import Settings
from tests.commands import Command, Nursery
from tests.service_fixtures import COUNTRIES, Client, Workspace

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    made = JobStore(tmp_path / "deep" / "jobs.sqlite", 3)
    yield made
    made.close()


@pytest.fixture
def client(workspace: Workspace, tmp_path: Path) -> Iterator[Client]:
    settings = Settings(
        model=str(workspace.model),
        indexes={"default": workspace.index},
        jobs_path=tmp_path / "jobs.sqlite",
        max_jobs=4,
    )
    with Client(create_app(settings)) as started:
        yield started


def queries(count: int) -> list[dict[str, Any]]:
    words = [capital for capital, _ in COUNTRIES.values()]
    return [
        {"prompt": PROMPT, "completion": f" {words[i % len(words)]}", "k": 3, "seed": i}
        for i in range(count)
    ]


def ended(client: Client, job: str) -> dict[str, Any]:
    async def wait() -> dict[str, Any]:
        async with asyncio.timeout(60):
            while True:
                found: dict[str, Any] = (await client.http.get(f"/v1/jobs/{job}")).json()
                if found["state"] == "finished":
                    return found
                await asyncio.sleep(0.02)

    return client.run(wait)


def opened(store: JobStore) -> list[tuple[str, int, str]]:
    return [(query.job, query.number, query.request) for query in store.open_queries(10)]


# The file


def test_jobs_are_kept_in_order_with_what_came_of_them(store: JobStore) -> None:
    first, second = store.add(["a", "b", "c"], None), store.add(["d"], None)
    assert [job.id for job in store.all()] == [second.id, first.id]
    assert (first.state, first.queries, first.answered, first.failed) == ("queued", 3, 0, 0)
    assert opened(store) == [
        (first.id, 0, "a"),
        (first.id, 1, "b"),
        (first.id, 2, "c"),
        (second.id, 0, "d"),
    ]
    store.begin(first.id, 1)
    assert store.record(first.id, 1, answer="B", problem=None)
    assert store.record(first.id, 2, answer=None, problem="C")
    assert not store.record(first.id, 1, answer="again", problem=None)
    now = store.get(first.id)
    assert (now.state, now.answered, now.failed) == ("running", 1, 1)
    assert [(o.number, o.answer, o.problem) for o in store.outcomes(first.id, 0, 10)[0]] == [
        (1, "B", None),
        (2, None, "C"),
    ]
    assert store.record(first.id, 0, answer="A", problem=None)
    assert store.get(first.id).state == "finished"
    assert store.counts() == {"queued": 1, "running": 0, "finished": 1}
    store.delete(first.id)
    with pytest.raises(UnknownJob):
        store.get(first.id)
    assert not store.record(first.id, 0, answer="late", problem=None)
    assert opened(store) == [(second.id, 0, "d")]


def test_a_page_of_large_outcomes_has_few_and_says_which_is_next(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "PAGE_CHARACTERS", 100)
    job = store.add(["a", "b", "c"], None)
    for number in range(3):
        store.record(job.id, number, answer="x" * 60, problem=None)
    seen, start = [], 0
    while start is not None:
        found, following = store.outcomes(job.id, start, 10)
        seen.append([outcome.number for outcome in found])
        start = following
    assert seen == [[0, 1], [2]]


def test_a_key_gives_the_same_job_and_never_another(store: JobStore) -> None:
    job = store.add(["a"], "k")
    assert store.add(["a"], "k").id == job.id
    with pytest.raises(Conflict, match=f"used for another job, {job.id}"):
        store.add(["b"], "k")
    assert store.add(["a"], None).id != job.id


def test_no_more_jobs_are_kept_than_may_be(store: JobStore) -> None:
    for _ in range(3):
        store.add(["a"], None)
    with pytest.raises(TooManyJobs, match="3 jobs are kept"):
        store.add(["a"], None)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"no database at all" * 100, "not a database"), (None, "version 99")],
)
def test_another_file_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "jobs.sqlite"
    if content is not None:
        path.write_bytes(content)
    else:
        database = sqlite3.connect(path)
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute("PRAGMA user_version = 99")
        database.close()
    with pytest.raises(ValueError, match=says) as caught:
        JobStore(path, 3)
    assert "ETYMON_JOBS_PATH" in str(caught.value)


# The routes


def test_a_jobs_answers_are_those_of_single_queries(client: Client) -> None:
    asked = queries(6)
    accepted = client.request("POST", "/v1/jobs", json={"queries": asked})
    assert accepted.status_code == 202
    job = accepted.json()["id"]
    assert accepted.headers["location"] == f"/v1/jobs/{job}"
    assert ended(client, job)["answered"] == 6
    pages, start = [], 0
    while start is not None:
        page = client.get(f"/v1/jobs/{job}/results", params={"start": start, "limit": 4}).json()
        pages += page["results"]
        start = page["next"]
    assert [outcome["number"] for outcome in pages] == list(range(6))
    for outcome, query in zip(pages, asked, strict=True):
        alone = client.query(**query).json()
        assert outcome["problem"] is None
        assert [r["id"] for r in outcome["answer"]["results"]] == [
            r["id"] for r in alone["results"]
        ]
        scores = [r["score"] for r in alone["results"]]
        assert [r["score"] for r in outcome["answer"]["results"]] == pytest.approx(scores, rel=1e-3)
    assert client.get("/v1/jobs").json()["jobs"][0]["id"] == job
    assert client.request("DELETE", f"/v1/jobs/{job}").status_code == 204
    assert client.get(f"/v1/jobs/{job}").status_code == 404


def test_a_query_that_cannot_be_measured_has_a_problem_as_its_result(client: Client) -> None:
    asked = [*queries(1), {"prompt": PROMPT, "completion": " "}]
    job = client.request("POST", "/v1/jobs", json={"queries": asked}).json()["id"]
    found = ended(client, job)
    assert (found["answered"], found["failed"]) == (1, 1)
    _, refused = client.get(f"/v1/jobs/{job}/results").json()["results"]
    assert refused["problem"]["status"] == 422
    assert "completion is empty" in refused["problem"]["detail"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        ({"queries": []}, {}, 422, "queries"),
        ({"queries": [{"prompt": "a"}, {"prompt": "b", "k": 10**6}]}, {}, 422, "Query 1: k is"),
        ({"queries": [{"prompt": "a", "index": "other"}]}, {}, 404, "no index 'other'"),
        ({"queries": [{"prompt": "a"}]}, {"Idempotency-Key": "a b"}, 422, "idempotency-key"),
    ],
)
def test_bad_jobs_are_refused_at_once(
    client: Client, body: Any, headers: dict[str, str], status: int, says: str
) -> None:
    response = client.request("POST", "/v1/jobs", json=body, headers=headers)
    assert response.status_code == status
    assert says in response.json()["detail"]
    assert client.get("/v1/jobs").json() == {"jobs": []}


def test_a_full_disk_refuses_a_job_and_asks_for_patience(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(JobStore, "add", full)
    refused = client.request("POST", "/v1/jobs", json={"queries": queries(1)})
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "60"
    assert refused.json()["detail"] == "database or disk is full"


def test_an_idempotency_key_makes_it_safe_to_send_a_job_again(client: Client) -> None:
    headers = {"Idempotency-Key": "once"}
    body = {"queries": queries(1)}
    sent = [client.request("POST", "/v1/jobs", json=body, headers=headers) for _ in range(2)]
    assert sent[0].json()["id"] == sent[1].json()["id"]
    other = client.request("POST", "/v1/jobs", json={"queries": queries(2)}, headers=headers)
    assert other.status_code == 409


def test_without_a_file_there_are_no_jobs(workspace: Workspace) -> None:
    settings = Settings(model=str(workspace.model), indexes={"default": workspace.index})
    with Client(create_app(settings)) as client:
        response = client.request("POST", "/v1/jobs", json={"queries": queries(1)})
        assert response.status_code == 404
        assert "ETYMON_JOBS_PATH" in response.json()["detail"]


# The runner


class Fake:
    """An engine that is not ready at first, then answers once it is let."""

    def __init__(self, answer: QueryResponse) -> None:
        self.refusals = 1
        self.let = asyncio.Event()
        self.under_way = self.dropped = 0
        self._answer = answer

    def check(self, request: QueryRequest) -> object:
        return None

    async def answer(self, request: QueryRequest, *, background: bool) -> QueryResponse:
        assert background
        if self.refusals:
            self.refusals -= 1
            raise NotReady("The model is still being loaded.")
        self.under_way += 1
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        return self._answer


def test_what_says_nothing_of_a_query_leaves_it_open_and_deletion_drops_it(
    client: Client, store: JobStore
) -> None:
    answer = QueryResponse.model_validate(client.query(**queries(1)[0]).json())

    async def scenario() -> None:
        fake = Fake(answer)
        told: list[dict[str, int]] = []
        runner = JobRunner(store, fake, 2, lambda counts: told.append(dict(counts)), describe)
        request = QueryRequest(prompt="a").model_dump_json(exclude_unset=True)
        doomed, kept = store.add([request] * 3, None), store.add([request], None)
        running = asyncio.create_task(runner.run())
        async with asyncio.timeout(20):
            while fake.under_way < 2:
                await asyncio.sleep(0.01)
            assert store.get(doomed.id).failed == 0
            store.delete(doomed.id)
            await runner.forget(doomed.id)
            assert fake.dropped == 2
            fake.let.set()
            while store.get(kept.id).state != "finished":
                await asyncio.sleep(0.01)
        assert told[-1]["finished"] <= 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
    assert [job.queries for job in store.all()] == [1]


def start(nursery: Nursery, workspace: Workspace, jobs: Path) -> tuple[Command, str]:
    process = nursery.start(
        "scripts.serve",
        *("--model", workspace.model, "--index", f"default={workspace.index}", "--port", 0),
        environment={**os.environ, "ETYMON_JOBS_PATH": str(jobs)},
        quiet=True,
    )
    return process, json.loads(process.stdout.readline())["url"]


def test_a_job_survives_sigkill_and_each_query_is_answered_once(
    workspace: Workspace, nursery: Nursery, tmp_path: Path
) -> None:
    count = 60
    process, url = start(nursery, workspace, tmp_path / "jobs.sqlite")
    with process:
        job = httpx.post(f"{url}/v1/jobs", json={"queries": queries(count)}).json()["id"]
        deadline = time.monotonic() + 60
        while not 3 <= httpx.get(f"{url}/v1/jobs/{job}").json()["answered"] < count:
            assert time.monotonic() < deadline
        before = httpx.get(f"{url}/v1/jobs/{job}/results").json()["results"]
        process.send_signal(signal.SIGKILL)
    assert 0 < len(before) < count
    indexes = {"default": workspace.index}
    settings = Settings(
        model=str(workspace.model), indexes=indexes, jobs_path=tmp_path / "jobs.sqlite"
    )
    with Client(create_app(settings)) as restarted:
        assert ended(restarted, job)["answered"] == count
        after = restarted.get(f"/v1/jobs/{job}/results", params={"limit": count}).json()["results"]
    assert [outcome["number"] for outcome in after] == list(range(count))
    kept = {outcome["number"]: outcome for outcome in after}
    assert all(kept[outcome["number"]] == outcome for outcome in before)


# What goes wrong


def test_a_file_is_one_services_alone_and_only_its_owner_can_read_it(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "LOCK_SECONDS", 0.01)
    path = tmp_path / "deep" / "jobs.sqlite"
    store.add(["a"], None)
    with pytest.raises(ValueError, match="in use by another process"):
        JobStore(path, 3)
    assert {p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {0o600}
    store.close()
    again = JobStore(path, 3)
    assert len(again.all()) == 1
    again.close()


def test_a_database_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE precious (thing TEXT)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a database of something else"):
        JobStore(path, 3)
    assert path.read_bytes() == before


def test_a_deleted_jobs_texts_are_gone_from_the_disk(store: JobStore, tmp_path: Path) -> None:
    job = store.add(["a secret question", "another"], None)
    store.record(job.id, 0, answer="a secret answer", problem=None)
    store.delete(job.id)
    for path in (tmp_path / "deep").iterdir():
        assert b"secret" not in path.read_bytes()


def test_finding_work_does_not_read_what_is_done(store: JobStore) -> None:
    plan = store._database.execute(
        f"EXPLAIN QUERY PLAN {job_store.OPEN_QUERIES}", (2, "[]")
    ).fetchall()
    told = " ".join(row[3] for row in plan)
    assert "open_query" in told
    assert "TEMP B-TREE" not in told


class Failing:
    """An engine that does with each query what its prompt says."""

    def __init__(self, answer: QueryResponse) -> None:
        self.asked: list[str | None] = []
        self._answer = answer

    def check(self, request: QueryRequest) -> object:
        return None

    async def answer(self, request: QueryRequest, *, background: bool) -> QueryResponse:
        self.asked.append(request.prompt)
        if request.prompt == "memory":
            raise OutOfMemory("Not enough memory for one sequence of 9 tokens.")
        if request.prompt == "bug":
            raise KeyError("a secret question")
        if request.prompt == "hang":
            await asyncio.sleep(60)
        return self._answer


@pytest.fixture
def failing(client: Client, monkeypatch: pytest.MonkeyPatch) -> Failing:
    monkeypatch.setattr(jobs, "IDLE_SECONDS", 0.01)
    return Failing(QueryResponse.model_validate(client.query(**queries(1)[0]).json()))


def finish(store: JobStore, engine: Failing, *, until: int) -> None:
    """Run until so many queries were asked or all jobs are finished."""

    async def scenario() -> None:
        runner = JobRunner(store, engine, 2, lambda counts: None, describe)
        running = asyncio.create_task(runner.run())
        async with asyncio.timeout(20):
            while len(engine.asked) < until and store.counts()["finished"] < len(store.all()):
                await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())


def asks(*prompts: str) -> list[str]:
    return [f'{{"prompt":"{prompt}"}}' for prompt in prompts]


def test_no_query_keeps_those_after_it_from_being_answered(
    store: JobStore, failing: Failing, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [*asks("memory", "memory", "bug"), '{"prompt":"fine","of_another_version":1}']
    job = store.add([*bad, *asks("fine")], None)
    finish(store, failing, until=99)
    found, _ = store.outcomes(job.id, 0, 9)
    problems = [json.loads(outcome.problem or "{}") for outcome in found]
    assert [problem.get("status") for problem in problems] == [503, 503, 500, 422, None]
    assert "of_another_version" in problems[3]["detail"]
    assert found[4].answer is not None
    assert failing.asked.count("memory") == 2 * jobs.MOST_TRIES
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text + str(found)


def test_a_query_that_ends_the_process_is_given_up(store: JobStore, failing: Failing) -> None:
    job = store.add(asks("fine", "fine"), None)
    for _ in range(jobs.MOST_TRIES):
        store.begin(job.id, 0)
    finish(store, failing, until=99)
    given_up, answered = store.outcomes(job.id, 0, 9)[0]
    assert json.loads(given_up.problem or "{}")["status"] == 500
    assert answered.answer is not None


def test_an_orderly_end_counts_against_no_query(store: JobStore, failing: Failing) -> None:
    store.add(asks("hang"), None)
    for times in range(1, jobs.MOST_TRIES + 2):
        finish(store, failing, until=times)
    (left,) = store.open_queries(9)
    assert left.begun == 0


def test_a_file_that_cannot_be_written_for_a_while_loses_nothing(
    store: JobStore, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.add(asks("fine"), None)
    record, refused = store.record, [sqlite3.OperationalError("database or disk is full")] * 2

    def sometimes(*place: Any, **outcome: Any) -> bool:
        if refused:
            raise refused.pop()
        return record(*place, **outcome)

    monkeypatch.setattr(store, "record", sometimes)
    finish(store, failing, until=99)
    assert store.get(job.id).answered == 1
    assert len(failing.asked) == 3


def test_an_answer_cut_short_by_the_end_of_the_service_is_no_outcome(
    store: JobStore, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = failing._answer
    cut = whole.model_copy(update={"partial": True})
    monkeypatch.setattr(failing, "_answer", cut)
    job = store.add([*asks("fine"), '{"prompt":"hurried","deadline":9}'], None)
    finish(store, failing, until=5)
    (hurried,) = store.outcomes(job.id, 0, 9)[0]
    assert hurried.number == 1
    assert json.loads(hurried.answer or "{}")["partial"] is True
    monkeypatch.setattr(failing, "_answer", whole)
    finish(store, failing, until=99)
    assert json.loads(store.outcomes(job.id, 0, 9)[0][0].answer or "{}")["partial"] is False


def test_a_damaged_file_is_told_before_anything_is_served(
    workspace: Workspace, tmp_path: Path
) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"no database " * 300)
    indexes = {"default": workspace.index}
    with pytest.raises(ValueError, match="not a database"):
        create_app(Settings(model=str(workspace.model), indexes=indexes, jobs_path=path))
