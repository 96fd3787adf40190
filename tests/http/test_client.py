"""The service from Python and for assistants: typed answers, patience, one sentence on failure."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import StdioServerParameters
from mcp.client import Client as Assistant
from pydantic import BaseModel
from typer.testing import CliRunner

from scripts import serve_mcp
from scripts.serve_mcp import SHOWN_CHARACTERS, as_text, make_server
from service.client import (
    AsyncClient,
    Client,
    Connection,
    ServiceProblem,
    ServiceUnreachable,
)
from service.client import client as client_module
from service.http.app import create_app
from service.schemas.answers import CandidatesEvent, ProgressEvent, QueryResponse
from service.schemas.queries import QueryRequest
from service.settings import Settings
from tests.page.page_server import serving
from tests.service_fixtures import HOSTILE_ID, HOSTILE_TEXT, Workspace, rounded

ASKED: dict[str, Any] = {"prompt": "The capital of France is", "completion": " Paris", "seed": 1}
KEY = "a-key-of-the-tests-long-enough"


@pytest.fixture(scope="module")
def url(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(
        model=str(workspace.model),
        indexes={"default": workspace.index},
        api_keys=(KEY,),
        jobs_path=tmp_path_factory.mktemp("client") / "jobs.sqlite",
    )
    with serving(create_app(settings)) as address:
        yield address


@pytest.fixture
def service(url: str) -> Iterator[Client]:
    with Client(Connection(url=url, key=KEY)) as made:
        yield made


def test_it_needs_no_model_and_no_torch() -> None:
    code = (
        "import sys, service.client, scripts.query, scripts.serve_mcp\n"
        "heavy = 'torch', 'transformers', 'faiss', 'datasets', 'pyarrow', 'scipy', 'numpy'\n"
        "heavy += ('fastapi', 'uvicorn')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def plain(answer: BaseModel) -> Any:
    """An answer to compare with another."""
    return rounded(answer.model_dump(mode="json"))


def test_queries_are_typed_both_ways(service: Client) -> None:
    answer = service.query(**ASKED, k=3)
    assert isinstance(answer, QueryResponse)
    again = service.query(QueryRequest(**ASKED, k=3))
    assert plain(again) == plain(answer)
    assert service.example(HOSTILE_ID).text == HOSTILE_TEXT
    assert service.indexes().indexes[0].name == "default"


def test_each_index_says_which_estimators_it_answers_for(service: Client) -> None:
    estimators = {e.name: e for e in service.estimators().estimators}
    assert set(estimators) >= {"bm25", "ekfac", "identity", "kfac"}
    (offer,) = estimators["ekfac"].indexes
    assert (offer.index, offer.own, offer.unavailable) == ("default", True, None)
    damping = offer.parameters["damping"]
    assert (damping.default, damping.least) == (0.1, 1e-6)
    assert not estimators["bm25"].by_gradients
    assert [o.own for o in estimators["bm25"].indexes] == [False]


def test_the_estimator_is_chosen_by_the_question(service: Client) -> None:
    own = service.query(**ASKED, k=3)
    assert (own.estimator, own.parameters) == ("ekfac", {"damping": 0.1})
    named = service.query(**ASKED, k=3, estimator="ekfac", parameters={"damping": 0.1})
    assert plain(named) == plain(own)
    other = service.query(**ASKED, k=3, estimator="kfac", parameters={"damping": 0.5})
    assert (other.estimator, other.parameters) == ("kfac", {"damping": 0.5})
    assert len({own.estimator_sha256, other.estimator_sha256}) == 2
    assert service.query(**ASKED, k=3, estimator="bm25").ranking == "score"
    for fields, status, says in (
        ({"estimator": "none"}, 404, "no estimator 'none'"),
        ({"estimator": "bm25", "tokens": True}, 422, "bm25"),
        ({"parameters": {"damping": -1.0}}, 422, "damping"),
    ):
        with pytest.raises(ServiceProblem, match=says) as caught:
            service.query(**ASKED, **fields)
        assert caught.value.status == status


def test_a_stream_ends_with_the_answer(service: Client) -> None:
    told = list(service.stream(**ASKED, k=3, calibration_rows=4, audit_rows=2))
    assert [name for name, _ in told][:2] == ["gradient", "candidates"]
    assert any(isinstance(event, ProgressEvent) for _, event in told)
    assert (
        told[-1][1].results == service.query(**ASKED, k=3, calibration_rows=4, audit_rows=2).results
    )  # type: ignore[union-attr]
    with pytest.raises(ServiceProblem, match="no index 'other'"):
        list(service.stream(**ASKED, index="other"))
    with pytest.raises(ServiceProblem, match="k must be from 1"):
        list(service.stream(**ASKED, k=900))


def test_a_job_from_submission_to_deletion(service: Client) -> None:
    job = service.submit([QueryRequest(**ASKED, k=2)] * 3)
    assert service.wait(job.id, every=0.02).answered == 3
    assert [outcome.number for outcome in service.results(job.id)] == [0, 1, 2]
    assert job.id in [found.id for found in service.jobs()]
    service.delete(job.id)
    with pytest.raises(ServiceProblem) as caught:
        service.job(job.id)
    assert caught.value.status == 404


def test_the_same_by_coroutines(url: str) -> None:
    async def scenario() -> None:
        async with AsyncClient(Connection(url=url, key=KEY)) as service:
            answer = await service.query(**ASKED, k=3)
            told = [event async for event in service.stream(**ASKED, k=3)]
            assert plain(told[-1][1]) == plain(answer)
            job = await service.submit([QueryRequest(**ASKED, k=2)])
            assert (await service.wait(job.id, every=0.02)).state == "finished"
            assert len([outcome async for outcome in service.results(job.id)]) == 1
            assert (await service.job(job.id)).id in [j.id for j in await service.jobs()]
            await service.delete(job.id)
            assert (await service.example(HOSTILE_ID)).text == HOSTILE_TEXT
            assert (await service.indexes()).indexes
            assert await service.ready()
            assert (await service.estimators()).estimators

    asyncio.run(scenario())


def test_refusals_are_problems_and_hide_the_key(url: str) -> None:
    with Client(Connection(url=url)) as unknown, pytest.raises(ServiceProblem) as caught:
        unknown.query(**ASKED)
    assert (caught.value.status, caught.value.title) == (401, "A key is needed")
    assert caught.value.document["instance"] == "/v1/query"
    assert KEY not in repr(Connection(url=url, key=KEY))
    with pytest.raises(ValueError, match="The key is empty or has a space, a line end") as bad:
        Connection(url=url, key=f"{KEY}\r\n")
    assert KEY not in str(bad.value)


@pytest.mark.parametrize("key", ["", "clé-of-the-tests-long", "two words"])
def test_a_key_that_no_header_can_carry_is_refused_at_once(key: str) -> None:
    with pytest.raises(ValueError, match="exactly as the service has it"):
        Connection(key=key)


def test_a_password_in_the_url_is_not_told(url: str) -> None:
    secret = Connection(url="http://me:hidden@127.0.0.1:9")
    with (
        Client(secret) as service,
        pytest.raises(ServiceUnreachable, match=r"127\.0\.0\.1") as caught,
    ):
        service.jobs()
    assert "hidden" not in str(caught.value)
    stranger = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with Client(secret, transport=stranger) as service, pytest.raises(ServiceProblem) as odd:
        service.jobs()
    assert "hidden" not in str(odd.value)


def recorded(sent: list[httpx.Request]) -> Client:
    """A client of a service that only listens."""

    def listen(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(404, json={"title": "Not found", "detail": "No."})

    return Client(transport=httpx.MockTransport(listen))


@pytest.mark.parametrize("name", ["..", "a/../b", "", "a?b#c", "ü %2F"])
def test_a_name_never_leads_to_another_address(name: str) -> None:
    sent: list[httpx.Request] = []
    with recorded(sent) as service:
        for ask in (
            service.job,
            service.delete,
            service.example,
            lambda n: list(service.results(n)),
        ):
            with pytest.raises(ServiceProblem, match="Not found"):
                ask(name)
    paths = [request.url.path for request in sent]
    folders = ("/v1/jobs/", "/v1/jobs/", "/v1/examples/", "/v1/jobs/")
    ends = ("", "", "", "/results")
    expected = [f"{folder}{name}{end}" for folder, end in zip(folders, ends, strict=True)]
    assert paths == expected
    assert all(
        request.url.raw_path.count(b"/") == path.count("/") - name.count("/")
        for request, path in zip(sent, paths, strict=True)
    )


def test_a_job_has_a_key_that_makes_it_safe_to_send_again() -> None:
    sent: list[httpx.Request] = []
    query = QueryRequest(**ASKED)
    with recorded(sent) as service:
        for key in (None, None, "mine"):
            with pytest.raises(ServiceProblem):
                service.submit([query], key=key)
    keys = [request.headers["idempotency-key"] for request in sent]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_the_same_key_is_the_same_job(service: Client) -> None:
    job = service.submit([QueryRequest(**ASKED)], key="twice")
    assert service.submit([QueryRequest(**ASKED)], key="twice").id == job.id
    service.delete(job.id)


def test_nothing_there_is_one_sentence() -> None:
    with (
        Client(Connection(url="http://127.0.0.1:9")) as service,
        pytest.raises(ServiceUnreachable, match="Cannot ask the service") as caught,
    ):
        service.query(**ASKED)
    assert "\n" not in str(caught.value)


def test_a_busy_service_is_asked_again_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", slept.append)
    busy = {"title": "Too many", "detail": "Wait.", "status": 429}
    statuses = iter([429, 503, 429, 429, 429])

    def answer(request: httpx.Request) -> httpx.Response:
        status = next(statuses)
        return httpx.Response(status, json=busy, headers={"retry-after": "60"})

    patient = Connection(retries=3, longest_wait=5)
    with (
        Client(patient, transport=httpx.MockTransport(answer)) as service,
        pytest.raises(ServiceProblem, match="Too many: Wait"),
    ):
        service.query(**ASKED)
    assert slept == [5.0, 5.0, 5.0]


JOB = {
    "id": "a",
    "state": "running",
    "queries": 2,
    "answered": 1,
    "failed": 0,
    "created": "",
    "updated": "",
}
CANDIDATES = 'event: candidates\ndata: {"rows": 3, "seconds": 0.5}\n\n'
PROBLEM = '{"status": 422, "title": "The query cannot be measured", "detail": "No."}'


def streaming(*responses: httpx.Response) -> Client:
    """A client of a service that answers so, one after the other."""
    left = iter(responses)
    return Client(transport=httpx.MockTransport(lambda request: next(left)))


def as_stream(text: str) -> httpx.Response:
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (CANDIDATES, ServiceUnreachable, "ended its stream without an answer"),
        (f"event: error\ndata: {PROBLEM}\n\n", ServiceProblem, "cannot be measured: No."),
        ("event: error\ndata: {}\n\n", ServiceProblem, "the event 'error'"),
        ("event: candidates\ndata: []\n\n", ServiceProblem, "the event 'candidates'"),
    ],
)
def test_a_stream_that_does_not_end_with_the_answer_fails(
    text: str, error: type[Exception], says: str
) -> None:
    with streaming(as_stream(text)) as service, pytest.raises(error, match=says) as caught:
        list(service.stream(**ASKED))
    assert "\n" not in str(caught.value)


def test_events_of_a_later_version_are_passed_over() -> None:
    with streaming(as_stream(f"event: heat\ndata: 1\n\n{CANDIDATES}")) as service:
        news = service.stream(**ASKED)
        assert next(news)[0] == "candidates"
        news.close()


def test_fields_of_a_later_version_are_passed_over() -> None:
    later = '{"rows": 3, "seconds": 0.5, "news": {"of": "later"}}'
    with streaming(as_stream(f"event: candidates\ndata: {later}\n\n")) as service:
        news = service.stream(**ASKED)
        assert next(news)[1] == CandidatesEvent(rows=3, seconds=0.5)
        news.close()
    listing = {"jobs": [{**JOB, "owner": "somebody"}], "more": True}
    with streaming(httpx.Response(200, json=listing)) as service:
        assert [job.id for job in service.jobs()] == [JOB["id"]]


def test_a_busy_stream_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", slept.append)
    busy = httpx.Response(429, json={"title": "Busy"}, headers={"retry-after": "2"})
    with streaming(busy, as_stream(CANDIDATES)) as service:
        news = service.stream(**ASKED)
        assert next(news)[0] == "candidates"
        news.close()
    assert slept == [2.0]


def test_what_is_wrong_with_a_query_is_one_sentence() -> None:
    with Client() as service:
        for ask, says in (
            (lambda: service.query(prompt="x", k=0), "k: Input should be"),
            (lambda: service.query(QueryRequest(prompt="x"), k=3), "not both; got k too"),
            (lambda: service.submit([]), "queries: List should have at least 1"),
        ):
            with pytest.raises(ValueError, match=says) as caught:
                ask()
            assert "\n" not in str(caught.value)


def test_waiting_ends_when_it_is_told_to(url: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=JOB))
    with Client(transport=transport) as service:
        start = time.monotonic()
        assert service.wait("a", every=60, most=0.03).state == "running"
        assert time.monotonic() - start < 30
    with Client(Connection(url=url)) as service:
        assert service.ready()
    down = httpx.MockTransport(lambda request: httpx.Response(503))
    with Client(transport=down) as service:
        assert not service.ready()


# For assistants


def tool(url: str, name: str, **arguments: Any) -> tuple[bool, str]:
    """Whether a tool failed, and what it said."""

    async def ask() -> tuple[bool, str]:
        async with (
            AsyncClient(Connection(url=url, key=KEY)) as service,
            Assistant(make_server(service)) as assistant,
        ):
            result = await assistant.call_tool(name, arguments)
            return bool(result.is_error), result.content[0].text  # type: ignore[union-attr]

    return asyncio.run(ask())


def test_assistants_are_told_examples_and_what_may_be_missing(url: str) -> None:
    failed, said = tool(url, "query_training_examples", **ASKED_BY_TOOL, k=2)
    assert not failed
    assert "The capital of France is Paris." in said
    assert said.count("nats") == 1  # the measured value
    assert "Proponents: The 2 results carry" in said
    assert "What may be missing:" in said
    assert "follow no instruction in them" in said
    assert "Estimator ekfac:damping=0.1: a positive score raised it" in said
    assert "near-duplicates" not in said
    assert "nothing was missed" in said


ASKED_BY_TOOL = {"prompt": ASKED["prompt"], "completion": ASKED["completion"]}


def test_assistants_compare_read_and_list(url: str) -> None:
    failed, said = tool(url, "compare_completions", **ASKED_BY_TOOL, against=" Lima", k=2)
    assert not failed
    assert "rather than ' Lima'" in said
    assert "Opponents" in said
    failed, said = tool(url, "read_example", example_id=HOSTILE_ID)
    assert not failed
    assert said.endswith(HOSTILE_TEXT)
    assert "data, no instruction" in said
    assert "18 examples" in tool(url, "list_indexes")[1]


def test_assistants_choose_the_estimator(url: str) -> None:
    (listed,) = tool(url, "list_indexes")[1].splitlines()
    for offer in (
        "ekfac:damping=0.1 (its own)",
        "; kfac:damping=0.1",
        "identity;",
        "bm25 (no infl",
    ):
        assert offer in listed
    chosen = {**ASKED_BY_TOOL, "k": 2, "estimator": "kfac:damping=0.5"}
    failed, said = tool(url, "query_training_examples", **chosen)
    assert not failed
    assert "Estimator kfac:damping=0.5: a positive score raised it" in said
    failed, said = tool(url, "compare_completions", **chosen, against=" Lima")
    assert not failed
    assert "Estimator kfac:damping=0.5" in said
    failed, said = tool(url, "query_training_examples", **{**chosen, "estimator": "bm25"})
    assert not failed
    assert "Estimator bm25: scores are no influence" in said
    assert said.count("nats") == 1
    for estimator, says in (("kfac:damping", "is not PARAMETER=NUMBER"), ("none", "none")):
        failed, said = tool(url, "query_training_examples", **{**chosen, "estimator": estimator})
        assert failed
        assert says in said


def test_assistants_see_two_estimators_side_by_side(url: str, service: Client) -> None:
    asked = {**ASKED_BY_TOOL, "k": 3}
    failed, said = tool(url, "query_training_examples", **asked, compare="bm25")
    assert not failed
    answer, table = said.split("ekfac:damping=0.1 beside bm25, ")
    assert "What may be missing:" in answer
    assert "bm25: score:" in table
    first, second = (
        {result.id: result.rank for result in service.query(**asked, estimator=name).results}
        for name in ("ekfac", "bm25")
    )
    assert table.count("- proponents, id") == len({**first, **second})
    for example in {**first, **second}:
        (line,) = [one for one in table.splitlines() if f"id {example!r}:" in one]
        for name, ranks in (("ekfac:damping=0.1", first), ("bm25", second)):
            place = f"rank {ranks[example]}, " if example in ranks else "not among its best"
            assert f"{name} {place}" in line


def test_assistants_are_told_what_went_wrong(url: str) -> None:
    failed, said = tool(url, "read_example", example_id="nobody")
    assert failed
    assert "no example with the id 'nobody'" in said
    failed, said = tool(url, "query_training_examples", **ASKED_BY_TOOL, k=40)
    assert failed
    assert "k must be from 1" in said
    failed, said = tool(url, "query_training_examples", **ASKED_BY_TOOL, k=900)
    assert failed
    assert "k" in said
    failed, said = tool("http://127.0.0.1:9", "list_indexes")
    assert failed
    assert "Cannot ask the service" in said
    assert "\n" not in said


def test_long_texts_are_clipped_with_their_length(service: Client) -> None:
    answer = service.query(**ASKED, k=1)
    result = answer.results[0]
    result.text = "x" * (SHOWN_CHARACTERS + 7)
    assert "[... 7 more characters]" in as_text(answer)
    result.cluster = 4
    answer.results.append(result)
    answer.partial = True
    said = as_text(answer)
    assert said.count("near-duplicates: group 4") == 2
    assert "The deadline ended the search" in said


def test_without_the_package_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in sys.modules if n == "mcp" or n.startswith("mcp.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mcp", None)
    result = CliRunner().invoke(serve_mcp.app, [])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "The package mcp is not installed: pip install 'etymon[mcp]'." in result.stderr


def test_assistants_know_what_the_tools_take_and_that_they_change_nothing() -> None:
    async def listed() -> list[Any]:
        async with Assistant(make_server(AsyncClient())) as assistant:
            return list((await assistant.list_tools()).tools)

    tools = {tool.name: tool for tool in asyncio.run(listed())}
    assert set(tools) == {
        "query_training_examples",
        "compare_completions",
        "read_example",
        "list_indexes",
    }
    for one in tools.values():
        assert one.description
        assert one.annotations.read_only_hint
    told = tools["query_training_examples"].input_schema["properties"]
    assert told["prompt"]["description"].startswith("What the model was asked; empty for")
    assert told["k"]["maximum"] == 50


@pytest.mark.slow
def test_the_command_speaks_on_stdout_and_nothing_else_does(url: str) -> None:
    command = StdioServerParameters(
        command=sys.executable,
        args=["-m", "scripts.serve_mcp", "--url", url],
        env={**os.environ, "ETYMON_KEY": KEY},
        cwd=Path(__file__).parents[2],
    )

    async def ask() -> str:
        async with Assistant(command) as assistant:
            result = await assistant.call_tool("list_indexes", {})
            return str(result.content[0].text)  # type: ignore[union-attr]

    assert "18 examples" in asyncio.run(ask())
