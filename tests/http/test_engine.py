"""Queries under way: streams, deadlines, many at once, indexes that change meanwhile."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from index.current import CURRENT, current_folder, point_to
from index.editing import delete_rows
from index.errors import IndexMissing
from scripts import point_to as swap
from service.errors import ShuttingDown
from service.http import engine as engine_module
from service.http.app import create_app
from service.schemas.answers import CandidatesEvent, GradientEvent, ProgressEvent, QueryResponse
from service.schemas.queries import QueryRequest
from service.search import batching
from service.search.batching import Batcher, Ticket
from service.search.query import Query
from service.search.retrieval import Retriever
from service.settings import Settings
from tests.service_fixtures import Client, Workspace, corpus_rows, rounded

PROMPT = "The capital of France is"
ASKED = {"prompt": PROMPT, "completion": " Paris"}
ROWS = len(corpus_rows())
MODELS: dict[str, Any] = {
    "gradient": GradientEvent,
    "candidates": CandidatesEvent,
    "progress": ProgressEvent,
    "result": QueryResponse,
}


@pytest.fixture
def client(workspace: Workspace) -> Iterator[Client]:
    with Client(create_app(settings(workspace, {"default": workspace.index}))) as started:
        yield started


@pytest.fixture
def retriever(client: Client) -> Retriever:
    found: Retriever = client.app.state.engine.retrievers["default"]
    return found


def settings(workspace: Workspace, indexes: dict[str, Path], **changes: Any) -> Settings:
    return Settings(
        **{"model": str(workspace.model), "indexes": indexes, "reload_seconds": 0.05, **changes}
    )


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def slowly(monkeypatch: pytest.MonkeyPatch, retriever: Retriever, seconds: float) -> None:
    """Have every pass over rows take at least so long."""
    score = retriever.scorer.score

    def slow(wanted: Any) -> Any:
        time.sleep(seconds)
        return score(wanted)

    monkeypatch.setattr(retriever.scorer, "score", slow)


class Ticking:
    """A clock by which every pass over rows takes so many seconds and nothing else takes any."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, retriever: Retriever, seconds: float
    ) -> None:
        self.now = 0.0
        score = retriever.scorer.score

        def tick(wanted: Any) -> Any:
            self.now += seconds
            return score(wanted)

        monkeypatch.setattr(retriever.scorer, "score", tick)
        for module in (batching, engine_module):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic
    sleep = staticmethod(time.sleep)


# Streams


def test_a_stream_tells_each_stage_and_ends_with_the_answer(client: Client) -> None:
    asked = {**ASKED, "k": 3, "seed": 4, "tokens": True, "calibration_rows": 4, "audit_rows": 2}
    response = client.request("POST", "/v1/query/stream", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response.text)
    for name, data in told:
        MODELS[name].model_validate(data)
    names = [name for name, _ in told]
    assert names[:2] == ["gradient", "candidates"]
    assert names[-1] == "result"
    assert set(names[2:-1]) == {"progress"}
    bounds = [data["rescored_rows"] for name, data in told if name == "progress"]
    assert bounds == sorted(bounds)
    answer = told[-1][1]
    plain = client.query(**asked).json()
    assert rounded(answer) == rounded(plain)
    assert told[0][1]["measurement"] == answer["measurement"]


def test_a_refusal_known_at_once_has_its_status_and_a_later_one_is_an_event(
    client: Client,
) -> None:
    refused = client.request("POST", "/v1/query/stream", json={**ASKED, "index": "other"})
    assert refused.status_code == 404
    assert refused.headers["content-type"] == "application/problem+json"
    late = client.request("POST", "/v1/query/stream", json={**ASKED, "k": ROWS + 1})
    assert late.status_code == 200
    ((name, data),) = events(late.text)
    assert (name, data["status"], data["instance"]) == ("error", 422, "/v1/query/stream")


def test_a_stream_that_is_left_frees_its_place(
    client: Client, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = client.app.state.engine
    slowly(monkeypatch, retriever, 0.2)

    async def scenario() -> None:
        news = engine.stream(_request(**ASKED, k=3))
        assert (await anext(news))[0] == "gradient"
        assert engine.in_flight == 1
        await news.aclose()
        assert engine.in_flight == 0
        async with asyncio.timeout(5):
            while engine.batcher.together:
                await asyncio.sleep(0.01)

    client.run(scenario)


# Deadlines


def test_a_deadline_gives_what_is_certified_so_far(
    client: Client, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(batching, "FIRST_ROWS", 1)
    clock = Ticking(monkeypatch, retriever, 0.05)
    body = client.query(**ASKED, k=3, direction="both", deadline=0.6, documents=True).json()
    assert 0 < clock.now < 0.6
    assert body["partial"] is True
    assert 0 < body["rescored_rows"] + body["sampled_rows"] < ROWS
    assert {r["direction"] for r in body["results"]} <= {"proponents", "opponents"}
    for certificate in body["certificates"]:
        assert certificate["status"] in ("not certified", "refused", "certified")
    whole = client.query(**ASKED, k=3, deadline=60).json()
    assert whole["partial"] is False


def test_a_deadline_that_leaves_no_time_at_all_is_a_429(
    client: Client, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = client.query(**ASKED, deadline=0.01)
    assert response.status_code == 429
    assert "deadline" in response.json()["detail"]
    assert int(response.headers["retry-after"]) >= 1


# Many at once


def test_queries_together_share_their_passes_and_fail_apart(retriever: Retriever) -> None:
    passes: list[int] = []
    begin = retriever.begin

    def counted(queries: list[Query]) -> Any:
        passes.append(len(queries))
        return begin(queries)

    retriever.begin = counted  # type: ignore[method-assign]
    batcher = Batcher(most_together=4)
    blocked = threading.Event()
    batcher._begin, plain = lambda new: (blocked.wait(5), plain(new)), batcher._begin  # type: ignore
    words = ("Paris", "Lima", "Oslo", "Tokyo", "Madrid", "Accra")
    tickets = [
        Ticket(retriever=retriever, query=Query(prompt=PROMPT, completion=f" {w}", k=3, seed=1))
        for w in words
    ]
    tickets[2].query = Query(prompt=PROMPT, completion="")
    for ticket in tickets:
        batcher.submit(ticket)
    blocked.set()
    with pytest.raises(ValueError, match="completion is empty"):
        tickets[2].outcome.result(20)
    others = [ticket for i, ticket in enumerate(tickets) if i != 2]
    for ticket, answer in [(ticket, ticket.outcome.result(20)) for ticket in others]:
        alone = Retriever(retriever.index).answer(ticket.query)
        assert [r.row for r in answer.results] == [r.row for r in alone.results]
        expected = [r.score for r in alone.results]
        np.testing.assert_allclose([r.score for r in answer.results], expected, rtol=1e-3)
    assert max(passes) > 1
    batcher.close(1)
    batcher.join(5)
    with pytest.raises(ShuttingDown):
        batcher.submit(Ticket(retriever=retriever, query=Query(prompt=PROMPT)))


def test_a_long_search_is_served_however_many_short_ones_come() -> None:
    class Stub:
        def __init__(self, stage: str, rows: int) -> None:
            self.run = type("R", (), {"stage": stage, "scored_rows": rows})()
            self.held = 0

    long, short = Stub("rescore", 900), Stub("rescore", 10)
    audit = Stub("audit", 100)
    members: Any = [long, short, audit]
    assert batching._next(members, oldest=False) == [short]
    assert batching._next(members, oldest=True) == [long]
    while batching._next(members, oldest=False) != [audit]:
        assert audit.held <= batching.HELD_ROUNDS
    newcomer: Any = Stub("calibrate", 0)
    assert batching._next([*members, newcomer], oldest=True) == [newcomer]


def test_closing_refuses_what_waits_and_ends_what_is_under_way(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "ROUND_SECONDS", 0.01)
    monkeypatch.setattr(batching, "FIRST_ROWS", 1)
    slowly(monkeypatch, retriever, 0.1)
    batcher = Batcher(most_together=1)
    told: list[str] = []
    first = Ticket(
        retriever=retriever,
        query=Query(prompt=PROMPT, completion=" Paris", k=3),
        watch=lambda name, run: told.append(name),
    )
    second = Ticket(retriever=retriever, query=Query(prompt=PROMPT, completion=" Lima"))
    batcher.submit(first)
    while "candidates" not in told:
        time.sleep(0.01)
    batcher.submit(second)
    batcher.close(0.0)
    with pytest.raises(ShuttingDown):
        second.outcome.result(5)
    assert first.outcome.result(5).partial is True
    batcher.join(5)


def test_background_queries_give_way(retriever: Retriever) -> None:
    batcher = Batcher(most_together=1)
    order: list[str] = []
    gate = threading.Event()

    def ticket(name: str, *, background: bool) -> Ticket:
        made = Ticket(
            retriever=retriever,
            query=Query(prompt=PROMPT, completion=" Paris", k=2),
            background=background,
            watch=lambda stage, run: gate.wait(10) if name == "first" else None,
        )
        made.outcome.add_done_callback(lambda _: order.append(name))
        batcher.submit(made)
        return made

    waiting = [ticket("first", background=False)]
    time.sleep(0.1)
    waiting += [ticket("job", background=True), ticket("person", background=False)]
    gate.set()
    for one in waiting:
        one.outcome.result(20)
    assert order == ["first", "person", "job"]
    batcher.close(0)


# Indexes that change


def test_the_current_index_is_the_one_that_is_pointed_to(tmp_path: Path) -> None:
    assert current_folder(tmp_path) == tmp_path
    (tmp_path / "v1").mkdir()
    point_to(tmp_path, "v1")
    assert current_folder(tmp_path) == tmp_path / "v1"
    with pytest.raises(IndexMissing, match="no folder 'v2'"):
        point_to(tmp_path, "v2")
    for hostile in ("../etc", "/etc", "", ".."):
        (tmp_path / CURRENT).write_text(hostile)
        with pytest.raises(IndexMissing, match="no folder beside it"):
            current_folder(tmp_path)


def test_an_index_is_swapped_under_load_without_a_failed_query(
    workspace: Workspace, tmp_path: Path
) -> None:
    for name in ("v1", "v2"):
        shutil.copytree(workspace.index, tmp_path / name)
    gone = corpus_rows()[0]["id"]
    delete_rows(tmp_path / "v2", [gone])
    point_to(tmp_path, "v1")
    with Client(create_app(settings(workspace, {"default": tmp_path}))) as client:

        async def asks() -> list[tuple[int, int]]:
            seen = []
            while True:
                response = await client.http.post("/v1/query", json={**ASKED, "k": 2})
                seen.append((response.status_code, response.json().get("rows", 0)))
                if seen[-1][1] == ROWS - 1 or len(seen) > 500:
                    return seen

        async def scenario() -> list[list[tuple[int, int]]]:
            asking = [asyncio.create_task(asks()) for _ in range(3)]
            await asyncio.sleep(0.3)
            point_to(tmp_path, "v2")
            return await asyncio.gather(*asking)

        for seen in client.run(scenario):
            assert {status for status, _ in seen} == {200}
            rows = [count for _, count in seen]
            assert (rows[0], rows[-1]) == (ROWS, ROWS - 1)
            assert rows == sorted(rows, reverse=True)


def test_a_damaged_successor_is_not_served(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.index, tmp_path / "v1")
    shutil.copytree(workspace.index, tmp_path / "v2")
    codes = next((tmp_path / "v2").rglob("*.codes"), None) or next(
        path for path in sorted((tmp_path / "v2").rglob("*")) if path.suffix == ".arrow"
    )
    codes.write_bytes(codes.read_bytes()[:-1])
    point_to(tmp_path, "v1")
    with Client(create_app(settings(workspace, {"default": tmp_path}))) as client:
        point_to(tmp_path, "v2")
        assert client.app.state.engine.reload() == []
        assert client.query(**ASKED).status_code == 200


def _request(**fields: Any) -> QueryRequest:

    return QueryRequest(**fields)


def test_only_a_whole_index_is_pointed_to(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.index, tmp_path / "v1")
    shutil.copytree(workspace.index, tmp_path / "half", ignore=shutil.ignore_patterns("manifest*"))
    told = CliRunner().invoke(swap.app, [str(tmp_path), "v1"])
    assert json.loads(told.stdout) == {"current": str(tmp_path / "v1")}
    refused = CliRunner().invoke(swap.app, [str(tmp_path), "half"])
    assert refused.exit_code == 1
    assert "No complete index" in refused.stderr
    assert current_folder(tmp_path) == tmp_path / "v1"
