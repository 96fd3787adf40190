"""Request ids, log lines and metrics: complete, bounded, and without anybody's text."""

import asyncio
import io
import json
import logging
import logging.config
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from prometheus_client.parser import text_string_to_metric_families
from starlette.concurrency import run_in_threadpool
from starlette.routing import Mount

from service.http import access, limits
from service.http import problems as errors
from service.http.telemetry import Telemetry, add_to_line, log, log_config
from service.schemas.answers import (
    SIGN_AND_UNIT,
    CertificateSchema,
    MeasurementSchema,
    QueryResponse,
    TermSchema,
)
from service.settings import Settings
from tests.service_fixtures import Client

KEY = "key-of-the-telemetry-tests"
SECRET = "what only the corpus says"


def settings(**changes: Any) -> Settings:
    return Settings(**{"model": "m", "indexes": {"default": Path("x")}, **changes})


def answer() -> QueryResponse:
    term = TermSchema(
        prompt=SECRET,
        completion=SECRET,
        against=None,
        weight=1.0,
        completed_by_model=False,
        log_probability=-1.0,
        against_log_probability=None,
        completion_tokens=1,
    )
    certificate = CertificateSchema(
        type="audit",
        direction="proponents",
        status="certified",
        recall_lower_bound=0.9,
        recall_target=0.9,
        confidence=0.95,
        scope="",
        probability_over="",
        assumptions=[],
        observed={},
        sentence=".",
    )
    return QueryResponse(
        measurement=MeasurementSchema(value=-1.0, terms=[term]),
        index="default",
        estimator="ekfac",
        parameters={"damping": 0.1},
        estimator_sha256="",
        by_gradients=True,
        influences=True,
        notes=[],
        sign_and_unit=SIGN_AND_UNIT,
        effect=None,
        effect_reason=None,
        ranking="score",
        results=[],
        documents=[],
        certificates=[certificate, certificate],
        shares=[],
        partial=False,
        rescored_rows=40,
        sampled_rows=2,
        rows=1000,
        seed=1,
        seconds={"gradient": 0.02, "scan": 2.0},
    )


def watched(**changes: Any) -> FastAPI:
    """A small app with everything that watches it."""
    chosen = settings(**changes)
    app = FastAPI()
    errors.install(app)
    telemetry = app.state.telemetry = Telemetry(chosen)
    telemetry.add_metrics_route(app)

    @app.get("/v1/examples/{example_id:path}")
    async def example(example_id: str) -> dict[str, str]:
        log.info("looking", place="task")
        await run_in_threadpool(log.info, "looking", place="thread")
        return {"id": example_id}

    @app.post("/v1/query")
    async def query() -> None:
        await run_in_threadpool(telemetry.observe_answer, answer())

    @app.get("/livez")
    async def live() -> None:
        pass

    @app.get("/refuse")
    async def refuse() -> None:
        telemetry.refused("overloaded")
        raise errors.Overloaded("Too many.")

    @app.get("/fail")
    async def fail() -> None:
        raise KeyError(SECRET)

    @app.get("/stream")
    async def stream(broken: bool = False) -> StreamingResponse:
        async def pieces() -> Any:
            yield b"12345"
            await asyncio.sleep(0)
            if broken:
                raise KeyError(SECRET)
            add_to_line(rescored_rows=7)
            yield b"678"

        return StreamingResponse(pieces())

    @app.get("/wait")
    async def wait() -> None:
        await asyncio.Event().wait()

    app.router.routes.append(Mount("/page", app=_page))
    limits.install(app, chosen)
    access.install(app, chosen)
    telemetry.install(app)
    return app


async def _page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


class Logged:
    """Log lines as ``log_config`` writes them."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.text.splitlines()) if line["event"] == event]


@pytest.fixture
def logged() -> Iterator[Logged]:
    root = logging.getLogger()
    kept = (root.handlers[:], root.level)
    config = log_config()
    stream = io.StringIO()
    config["handlers"]["stderr"]["stream"] = stream
    logging.config.dictConfig(config)
    yield Logged(stream)
    root.handlers[:], root.level = kept
    for name in ("etymon", "uvicorn"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def asking(app: FastAPI) -> Client:
    client = Client(app, start=False)
    client.http.base_url = httpx.URL("http://localhost")
    return client


@pytest.fixture
def client() -> Iterator[Client]:
    with asking(watched()) as client:
        yield client


def samples(client: Client, **options: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All metrics: name and labels to value."""
    response = client.get("/metrics", **options)
    assert response.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


# Request ids


@pytest.mark.parametrize("given", ["a", "A-b_c.9", "x" * 128])
def test_a_request_id_is_taken_over(client: Client, given: str) -> None:
    for path in ("/v1/examples/x", "/nowhere", "/fail", "/refuse", "/metrics"):
        response = client.get(path, headers={"x-request-id": given})
        assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "ü", '"', "a;b", "a/b"])
def test_another_request_id_is_replaced(client: Client, given: str) -> None:
    headers = {b"x-request-id": given.encode()}
    first, second = (client.get("/v1/examples/x", headers=headers) for _ in range(2))
    made = [response.headers["x-request-id"] for response in (first, second)]
    assert made[0] != made[1]
    assert all(len(one) == 32 and one.isalnum() for one in made)


def test_every_response_has_its_id(client: Client) -> None:
    foreign = {"host": "evil.example"}
    odd = {"content-type": "text/plain"}
    responses = [
        client.get("/v1/examples/x", headers=foreign),
        client.request("POST", "/v1/query", content="x", headers=odd),
        client.request("PUT", "/stream"),
        client.get("/fail"),
        client.get("/stream"),
        client.get("/page/x.js"),
    ]
    assert [response.status_code for response in responses] == [421, 415, 405, 500, 200, 200]
    assert all(response.headers["x-request-id"] for response in responses)


# Log lines


def test_one_line_a_request_says_what_happened(client: Client, logged: Logged) -> None:
    client.get("/v1/examples/some/id?index=x", headers={"x-request-id": "one"})
    client.get("/stream", headers={"x-request-id": "two"})
    client.get("/nowhere/at/all", headers={"x-request-id": "three"})
    client.get("/page/app.js", headers={"x-request-id": "four"})
    client.get("/refuse", headers={"x-request-id": "five"})
    lines = logged.lines("request")
    assert [line["request_id"] for line in lines] == ["one", "two", "three", "four", "five"]
    routes = ["/v1/examples/{example_id:path}", "/stream", "unmatched", "/page", "/refuse"]
    assert [line["route"] for line in lines] == routes
    assert [line["status"] for line in lines] == [200, 200, 404, 200, 429]
    for line in lines:
        assert line["method"] == "GET"
        assert line["client"] == "127.0.0.1"
        assert line["level"] == "info"
        assert line["complete"] is True
        assert 0 <= line["seconds"] < 10
        assert line["timestamp"].endswith("Z")
    assert lines[1]["bytes"] == 8
    assert lines[1]["rescored_rows"] == 7
    assert lines[4]["refused"] == "overloaded"
    assert "rescored_rows" not in lines[2]
    assert "some/id" not in logged.text
    assert "at/all" not in logged.text


def test_probes_are_counted_but_not_logged(client: Client, logged: Logged) -> None:
    assert client.get("/livez").status_code == 200
    assert logged.text == ""
    counted = ("etymon_requests_total", (("route", "/livez"), ("status", "200")))
    assert samples(client)[counted] == 1


def test_every_line_of_a_request_has_its_id(client: Client, logged: Logged) -> None:
    for name in ("first", "second"):
        client.get("/v1/examples/x", headers={"x-request-id": name})
    found = [(line["place"], line["request_id"]) for line in logged.lines("looking")]
    assert found == [(p, n) for n in ("first", "second") for p in ("task", "thread")]
    log.info("outside")
    assert "request_id" not in logged.lines("outside")[0]
    logging.getLogger("uvicorn.error").warning("from %s", "uvicorn")
    (foreign,) = logged.lines("from uvicorn")
    assert (foreign["level"], foreign["logger"]) == ("warning", "uvicorn.error")


def test_a_querys_line_says_what_it_took(client: Client, logged: Logged) -> None:
    client.request("POST", "/v1/query")
    (line,) = logged.lines("request")
    assert (line["index"], line["rescored_rows"], line["sampled_rows"]) == ("default", 40, 2)
    assert line["stages"] == {"gradient": 0.02, "scan": 2.0}
    assert (line["results"], line["rows"], line["partial"]) == (0, 1000, False)


def test_no_text_of_prompts_or_corpus_is_logged(client: Client, logged: Logged) -> None:
    client.request("POST", "/v1/query")
    client.get("/fail")
    with pytest.raises(RuntimeError, match="broke off"):
        client.run(lambda: _raising(client.app, "/stream?broken=true"))
    client.get(f"/{SECRET}")
    client.get("/v1/examples/x", headers={"user-agent": SECRET, "referer": SECRET})
    assert len(logged.lines("request")) == 5
    failures = logged.lines("unexpected error")
    assert [line["error"] for line in failures] == ["KeyError", "KeyError"]
    for line in failures:
        assert any("test_telemetry.py" in frame for frame in line["frames"])
        assert line["request_id"]
    assert SECRET not in logged.text
    assert SECRET not in client.get("/metrics").text


async def _raising(app: FastAPI, path: str) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await client.get(path)


def test_text_is_logged_where_it_was_asked_for(logged: Logged) -> None:
    with asking(watched(log_prompts=True)) as client:
        client.request("POST", "/v1/query")
        client.get("/fail")
    (line,) = (line for line in logged.lines("request") if "terms" in line)
    assert line["terms"] == [{"prompt": SECRET, "completion": SECRET, "against": None}]
    assert SECRET in logged.lines("unexpected error")[0]["message"]


def test_hostile_input_stays_within_its_line(client: Client, logged: Logged) -> None:
    hostile = "\x1b[31m\u202e"
    client.request("A" * 200, "/v1/examples/x")
    log.info(hostile + '\n{"event": "request"}', name=hostile)
    client.get("/v1/examples/x", headers={b"x-request-id": b'x", "status": "0'})
    assert len(logged.text.splitlines()) == 3 + 2  # two lines of the example's own
    assert "\x1b" not in logged.text
    assert "\u202e" not in logged.text
    assert len(logged.lines("request")[0]["method"]) == 16


def test_a_client_that_hangs_up_is_logged_as_gone(client: Client, logged: Logged) -> None:
    async def hang_up() -> None:
        task = asyncio.create_task(client.http.get("/wait"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    client.run(hang_up)
    (line,) = logged.lines("request")
    assert (line["status"], line["complete"], line["route"]) == (499, False, "/wait")


# Metrics


def test_requests_are_counted_and_timed_by_route_and_status(client: Client) -> None:
    for path in ("/v1/examples/a", "/v1/examples/b", "/nowhere", "/fail", "/page/x", "/page/y"):
        client.get(path)
    found = samples(client)

    def labels(route: str, status: int) -> tuple[tuple[str, str], ...]:
        return (("route", route), ("status", str(status)))

    for route, status, count in (
        ("/v1/examples/{example_id:path}", 200, 2),
        ("unmatched", 404, 1),
        ("/fail", 500, 1),
        ("/page", 200, 2),
    ):
        assert found["etymon_requests_total", labels(route, status)] == count
        assert found["etymon_request_seconds_count", labels(route, status)] == count
        assert 0 < found["etymon_request_seconds_sum", labels(route, status)] < 10
    assert found["process_open_fds", ()] > 0


def test_unknown_addresses_and_methods_make_no_new_series(client: Client) -> None:
    client.get("/nowhere/0")
    client.request("METHOD0", "/v1/examples/0")
    before = len(samples(client))
    before = max(before, len(samples(client)))
    for number in range(50):
        client.get(f"/nowhere/{number}", headers={"host": "localhost"})
        client.get(f"/v1/examples/{number}")
        client.request(f"METHOD{number}", f"/v1/examples/{number}")
    one_route = 2 + 13 + 2  # of the examples' answers: counters, buckets, sum and count
    assert len(samples(client)) <= before + one_route + 2


def test_answers_are_counted_by_stage_rows_and_certificate(client: Client) -> None:
    for _ in range(2):
        client.request("POST", "/v1/query")
    found = samples(client)
    assert found["etymon_stage_seconds_sum", (("stage", "gradient"),)] == pytest.approx(0.04)
    assert found["etymon_stage_seconds_count", (("stage", "scan"),)] == 2
    assert found["etymon_rescored_rows_sum", ()] == 80
    assert found["etymon_rescored_rows_bucket", (("le", "30.0"),)] == 0
    assert found["etymon_rescored_rows_bucket", (("le", "100.0"),)] == 2
    certified = (("status", "certified"), ("type", "audit"))
    assert found["etymon_certificates_total", certified] == 4


def test_refusals_queue_and_jobs_are_told(client: Client) -> None:
    telemetry: Telemetry = client.app.state.telemetry
    queries = {"in flight": 3, "waiting": 2}
    telemetry.watch_queries(lambda: queries["in flight"], lambda: queries["waiting"])
    telemetry.set_jobs({"queued": 4, "running": 1})
    client.get("/refuse")
    found = samples(client)
    assert found["etymon_queries_refused_total", (("reason", "overloaded"),)] == 1
    assert found["etymon_queries_in_flight", ()] == 3
    assert found["etymon_queue_length", ()] == 2
    assert found["etymon_jobs", (("state", "queued"),)] == 4
    queries["waiting"] = 0
    telemetry.set_jobs({"queued": 0})
    found = samples(client)
    assert found["etymon_queue_length", ()] == 0
    assert found["etymon_jobs", (("state", "queued"),)] == 0
    assert found["etymon_jobs", (("state", "running"),)] == 1


def test_two_apps_count_apart() -> None:
    with asking(watched()) as first, asking(watched()) as second:
        first.get("/fail")
        failed = ("etymon_requests_total", (("route", "/fail"), ("status", "500")))
        assert samples(first)[failed] == 1
        assert failed not in samples(second)


def test_metrics_need_a_key_where_there_are_keys() -> None:
    with asking(watched(api_keys=(KEY,))) as client:
        assert client.get("/metrics").status_code == 401
        shown = {"authorization": f"Bearer {KEY}"}
        refused = ("etymon_requests_total", (("route", "unmatched"), ("status", "401")))
        assert samples(client, headers=shown)[refused] == 1


def test_threads_count_without_losing_any(client: Client) -> None:
    telemetry: Telemetry = client.app.state.telemetry
    threads = [
        threading.Thread(target=lambda: [telemetry.observe_answer(answer()) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(client)["etymon_rescored_rows_count", ()] == 200
