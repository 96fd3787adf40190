"""The HTTP API, asked as clients ask it: answers, refusals, and never a stack trace."""

import asyncio
import importlib
import inspect
import json
import pkgutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request

import estimators
import service
from estimators.model.measurement import negative_log_likelihood, next_token_logits
from estimators.model.tokens import Sequence1D, collate
from index import errors as index_errors
from index.errors import DiskFull, DuplicateIds, IndexBusy, IndexCorrupt, IndexMissing
from service.http.app import create_app
from service.http.problems import PROBLEMS, UNEXPECTED, install, problem_for
from service.schemas.answers import CertificateSchema, QueryResponse, ResultSchema
from service.schemas.indexes import ExampleResponse, IndexResponse
from service.schemas.queries import QueryRequest
from service.search.query import Query
from service.search.retrieval import Retriever
from service.search.run import Run
from service.settings import Settings
from tests.service_fixtures import (
    CONTEXT,
    EMPTY_ID,
    HOSTILE_ID,
    HOSTILE_TEXT,
    Client,
    Workspace,
    corpus_rows,
    rounded,
)

PROMPT = "The capital of France is"
ASKED = {"prompt": PROMPT, "completion": " Paris"}
ROWS = len(corpus_rows())


@pytest.fixture(scope="module")
def client(workspace: Workspace) -> Iterator[Client]:
    with started(workspace) as client:
        yield client


@pytest.fixture
def retriever(client: Client) -> Retriever:
    found: Retriever = client.app.state.engine.retrievers["default"]
    return found


def settings(workspace: Workspace, **changes: Any) -> Settings:
    return Settings(
        **{"model": str(workspace.model), "indexes": {"default": workspace.index}, **changes}
    )


def started(workspace: Workspace, **changes: Any) -> Client:
    return Client(create_app(settings(workspace, **changes)))


def problem(response: httpx.Response, status: int) -> str:
    """The detail of a problem document, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert set(document) == {"type", "title", "status", "detail", "instance"}
    assert document["status"] == status
    assert document["instance"] == response.request.url.path
    detail = document["detail"]
    assert isinstance(detail, str)
    assert detail.endswith(".")
    assert "\n" not in detail
    assert "Traceback" not in response.text
    assert 'File "' not in response.text
    return detail


# Answers


def test_a_given_completion_is_answered_in_full(client: Client, retriever: Retriever) -> None:
    response = client.query(**ASKED, k=ROWS)
    assert response.status_code == 200
    body = response.json()
    assert set(body) == set(QueryResponse.model_fields)
    (term,) = body["measurement"]["terms"]
    assert (term["prompt"], term["completion"], term["against"]) == (PROMPT, " Paris", None)
    assert term["completed_by_model"] is False
    assert body["measurement"]["value"] == term["log_probability"]
    assert body["partial"] is False
    assert "positive" in body["sign_and_unit"]
    assert "no change of log p" in body["sign_and_unit"]
    assert body["effect"] is None
    assert "was not measured" in body["effect_reason"]
    (share,) = body["shares"]
    assert share["direction"] == "proponents"
    assert share["low"] == share["estimate"] == share["high"] == pytest.approx(1)  # all are shown
    assert body["rows"] == ROWS
    assert all(seconds >= 0 for seconds in body["seconds"].values())
    results = body["results"]
    assert [result["rank"] for result in results] == list(range(1, ROWS + 1))
    assert {result["row"] for result in results} == set(range(ROWS))
    assert min(result["score"] for result in results) < 0 < max(r["score"] for r in results)
    rows = corpus_rows()
    for result in results:
        assert set(result) == set(ResultSchema.model_fields)
        row = rows[result["row"]]
        assert (result["id"], result["document"]) == (row["id"], row["document"])
        assert result["text"] == row["text"]
        assert result["metadata"] == {"licence": "none"}
        if result["gradient_norm"]:
            expected = result["score"] / result["gradient_norm"]
            assert result["normalised_score"] == pytest.approx(expected)
    values = [result["normalised_score"] for result in results]
    assert values == sorted(values, reverse=True)


def test_the_log_probability_is_the_models_own(client: Client, retriever: Retriever) -> None:
    loaded = retriever.loaded
    before, after = loaded.encode(PROMPT), loaded.encode(" Paris")
    ids = torch.tensor([before + after])
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    steps = torch.log_softmax(logits.double(), dim=-1)[len(before) - 1 : -1]
    expected = steps.gather(1, torch.tensor(after)[:, None]).sum().item()
    (term,) = client.query(**ASKED).json()["measurement"]["terms"]
    assert term["completion_tokens"] == len(after)
    assert term["log_probability"] == pytest.approx(expected, abs=1e-4)


def test_scores_are_slopes_of_the_training_losses(client: Client, retriever: Retriever) -> None:
    """Along the query's direction log p falls, and each example's loss rises by its score."""
    results = client.query(**ASKED, k=ROWS, ranking="score").json()["results"]
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    asked = retriever.loaded.encode_query(PROMPT, " Paris")
    directions, _ = retriever.directions(asked)
    examples = [Sequence1D(tokens=retriever.index.examples.tokens(r["row"])) for r in results]
    layers = retriever.loaded.coverage.layers
    model = retriever.loaded.model
    step = 1e-5  # times directions of size 100: float32 rounding and curvature are both small

    def losses(factor: float) -> torch.Tensor:
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            for layer in layers:
                layer.add_to_weights(factor * directions[layer.name])
            batch = collate([asked, *examples])
            with torch.no_grad():
                return negative_log_likelihood(next_token_logits(model, batch), batch).double()
        finally:
            model.load_state_dict(kept)

    slopes = (losses(step) - losses(-step)) / (2 * step)
    assert slopes[0] > 0
    largest = max(map(abs, scores))
    assert slopes[1:].numpy() == pytest.approx(np.array(scores), rel=0.02, abs=0.005 * largest)


def test_the_model_completes_a_prompt_without_completion(
    client: Client, retriever: Retriever, capfd: pytest.CaptureFixture[str]
) -> None:
    body = client.query(prompt=PROMPT, k=3).json()
    (term,) = body["measurement"]["terms"]
    assert term["completed_by_model"] is True
    assert term["completion"] == retriever.loaded.complete(PROMPT)
    assert term["completion"].strip()
    assert "complete" in body["seconds"]
    assert capfd.readouterr().err == ""


def test_both_certificates_are_reported_apart_and_in_full(client: Client) -> None:
    body = client.query(**ASKED, k=2, budget=4, calibration_rows=4, audit_rows=4, seed=5).json()
    assert [certificate["type"] for certificate in body["certificates"]] == ["sketch", "audit"]
    for certificate in body["certificates"]:
        assert set(certificate) == set(CertificateSchema.model_fields)
        assert certificate["recall_target"] == 0.9
        assert certificate["sentence"].endswith(".")
        assert certificate["probability_over"]
        assert certificate["status"] in ("certified", "not certified", "refused")
        bound = certificate["recall_lower_bound"]
        assert bound is None if certificate["status"] == "refused" else 0 <= bound <= 1
    assert 0 <= body["rescored_rows"] <= 4
    assert 4 <= body["sampled_rows"] <= 8
    assert body["seed"] == 5


def test_everything_scored_is_called_exhaustive(client: Client) -> None:
    body = client.query(**ASKED, k=2, budget=ROWS, audit_rows=ROWS).json()
    assert [c["status"] for c in body["certificates"]] == ["exhaustive", "exhaustive"]
    assert body["rescored_rows"] + body["sampled_rows"] == ROWS


def test_a_budget_of_its_own_certifies_whatever_it_takes(client: Client) -> None:
    asked = {**ASKED, "k": 2, "recall": 1.0, "calibration_rows": 4, "audit_rows": 0, "seed": 5}
    short = client.query(**asked, budget=2).json()
    if short["rows_to_certify"] is not None:
        assert short["rows_to_certify"] >= 1
        assert short["seconds_to_certify"] > 0
    whole = client.query(**asked, budget="auto").json()
    assert whole["certificates"][0]["status"] in ("certified", "exhaustive")
    assert whole["rows_to_certify"] is None
    assert whole["seconds_to_certify"] is None
    spent = client.query(**asked, budget=4, patience=None).json()
    assert spent["rescored_rows"] == 4


def test_the_same_seed_gives_the_same_answer(client: Client) -> None:
    asked = {**ASKED, "k": 2, "budget": 3, "calibration_rows": 3, "audit_rows": 3, "seed": 11}
    first, second = client.query(**asked).json(), client.query(**asked).json()
    assert rounded(first) == rounded(second)


def test_queries_at_the_same_time_get_the_answers_they_get_alone(client: Client) -> None:
    questions = [
        {**ASKED, "completion": f" {word}", "seed": 1} for word in ("Paris", "Lima", "Oslo")
    ]
    alone = [client.query(**question).json()["results"] for question in questions]

    async def at_once() -> list[Any]:
        posts = (client.http.post("/v1/query", json=question) for question in questions)
        return [response.json()["results"] for response in await asyncio.gather(*posts)]

    for together, by_itself in zip(client.run(at_once), alone, strict=True):
        assert [result["id"] for result in together] == [result["id"] for result in by_itself]
        scores = [result["score"] for result in by_itself]
        assert [r["score"] for r in together] == pytest.approx(scores, rel=1e-4, abs=1e-4)


def test_the_index_page_says_what_is_attributed_and_what_is_not(client: Client) -> None:
    response = client.get("/v1/index")
    assert response.status_code == 200
    (found,) = response.json()["indexes"]
    assert set(found) == set(IndexResponse.model_fields)
    assert found["name"] == "default"
    (corpus,) = found["corpora"]
    assert (corpus["rows"], corpus["source"]) == (ROWS, "corpus.jsonl")
    assert (found["rows"], found["deleted_rows"]) == (ROWS, 0)
    assert found["failed_rows"] == []
    estimator = found["estimator"]
    skipped = {module["name"]: module["share"] for module in estimator["skipped"]}
    assert {"transformer.wte", "transformer.wpe", "transformer.ln_f"} <= set(skipped)
    assert all(module["reason"] for module in estimator["skipped"])
    assert 0 < estimator["attributed_share"] < 1
    assert estimator["attributed_share"] + sum(skipped.values()) == pytest.approx(1)


def test_the_sketchs_seed_is_told_to_nobody(client: Client, retriever: Retriever) -> None:
    (found,) = client.get("/v1/index").json()["indexes"]
    assert retriever.index.manifest.sketch.seed == 1
    assert set(found["sketch"]) == {
        *("dimensions", "rank", "entries", "components", "noise", "slices")
    }


@pytest.mark.parametrize("row", corpus_rows(), ids=lambda row: ascii(row["id"]))
def test_examples_are_found_by_any_id(client: Client, row: dict[str, str]) -> None:
    response = client.get(f"/v1/examples/{quote(row['id'], safe='')}")
    assert response.status_code == 200
    body = response.json()
    assert set(body) == set(ExampleResponse.model_fields)
    assert {name: body[name] for name in ("id", "document", "text")} == {
        name: row[name] for name in ("id", "document", "text")
    }
    assert body["metadata"] == {"licence": row["licence"]}
    assert (body["tokens"] == 0) == (row["id"] == EMPTY_ID)


def test_slashes_in_an_id_need_no_escape(client: Client) -> None:
    response = client.get("/v1/examples/facts/France%23capital", params={"index": "default"})
    assert response.json()["text"] == "The capital of France is Paris."


def test_hostile_text_comes_back_as_it_was_read(client: Client) -> None:
    response = client.get(f"/v1/examples/{quote(HOSTILE_ID, safe='')}")
    assert response.json()["text"] == HOSTILE_TEXT
    assert "\x1b" not in response.text


def test_several_indexes_are_served_by_name(workspace: Workspace) -> None:
    folders = {"first": workspace.index, "second": workspace.index}
    with started(workspace, indexes=folders) as client:
        assert [i["name"] for i in client.get("/v1/index").json()["indexes"]] == list(folders)
        assert client.query(**ASKED, index="second").json()["index"] == "second"
        assert "first, second" in problem(client.query(**ASKED), 404)


# Health


def test_alive_at_once_and_ready_once_loaded(workspace: Workspace) -> None:
    with Client(create_app(settings(workspace)), start=False) as unloaded:
        assert unloaded.get("/livez").json() == {"status": "ok"}
        refusals = [
            unloaded.get("/readyz"),
            unloaded.get("/v1/index"),
            unloaded.get("/v1/examples/x"),
            unloaded.query(**ASKED),
        ]
        for refused in refusals:
            assert "loaded" in problem(refused, 503)
            assert int(refused.headers["retry-after"]) >= 1
        unloaded.app.state.engine.load()
        assert unloaded.get("/readyz").json() == {"status": "ok"}


def test_what_is_loaded_is_not_loaded_again_at_startup(workspace: Workspace) -> None:
    app = create_app(settings(workspace))
    app.state.engine.load()
    loaded = dict(app.state.engine.retrievers)
    with Client(app):
        assert app.state.engine.retrievers == loaded


def test_startup_fails_with_the_reason(workspace: Workspace, tmp_path: Path) -> None:
    with (
        pytest.raises(IndexMissing, match=r"No complete index in .*nowhere"),
        started(workspace, indexes={"default": tmp_path / "nowhere"}),
    ):
        pass


# Refusals


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"index": "other"}, 404, "no index 'other'; this service has default"),
        ({"completion": ""}, 422, "The completion is empty"),
        ({"completion": " \n"}, 422, "The completion is empty"),
        ({"completion": " Paris" * CONTEXT}, 422, f"the model reads {CONTEXT} at most"),
        ({"prompt": "Paris " * CONTEXT, "completion": None}, 422, f"context of {CONTEXT}"),
        ({"prompt": "x" * 20_001}, 422, "20,001 characters; this service accepts at most 20,000"),
        ({"completion": "x" * 20_001}, 422, "20,001 characters"),
        ({"k": 0}, 422, "k: "),
        ({"k": -3}, 422, "k: "),
        ({"k": ROWS + 1}, 422, f"k must be from 1 to {ROWS}"),
        ({"k": 1001}, 422, "k is 1,001; this service accepts at most 1,000"),
        ({"k": "3"}, 422, "k: "),
        ({"k": True}, 422, "k: "),
        ({"k": 2.5}, 422, "k: "),
        ({"k": None}, 422, "k: "),
        ({"k": 5, "budget": 4}, 422, "at least k = 5, got 4"),
        ({"budget": 10**9}, 422, "1,000,000,000 rows"),
        ({"budget": "all"}, 422, "budget"),
        ({"patience": -1}, 422, "patience: "),
        ({"calibration_rows": -1}, 422, "calibration_rows: "),
        ({"calibration_rows": 10_001}, 422, "calibration_rows is 10,001 rows"),
        ({"audit_rows": 10_001}, 422, "audit_rows is 10,001 rows"),
        ({"ranking": "best"}, 422, "ranking: "),
        ({"recall": 0}, 422, "recall: "),
        ({"recall": 1.01}, 422, "recall: "),
        ({"confidence": 1}, 422, "confidence: "),
        ({"confidence": 0}, 422, "confidence: "),
        ({"parameters": {"damping": 0}}, 422, "'damping' of 'ekfac' must be from"),
        ({"parameters": {"damping": 1e300}}, 422, "'damping' of 'ekfac' must be from"),
        ({"seed": -1}, 422, "seed: "),
        ({"seed": 2**62}, 422, "seed: "),
        ({"prompt": 3}, 422, "prompt: "),
        ({"completion": ["Paris"]}, 422, "completion: "),
        ({"question": "why"}, 422, "question: "),
    ],
    ids=str,
)
def test_bad_queries_are_refused_with_the_reason(
    client: Client, fields: dict[str, Any], status: int, says: str
) -> None:
    assert says in problem(client.query(**{**ASKED, **fields}), status)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "The body is not JSON"),
        (b"", 422, "The body: "),
        (b"[]", 422, "The body: "),
        (b"null", 422, "The body: "),
        (b"{}", 422, "give a prompt, or a batch"),
        (b'{"prompt": "a", "batch": [{"prompt": "b"}]}', 422, "either a batch or prompt"),
        (b'{"prompt": "a", "filters": {"licence": {}}}', 422, "give any_of, at_least or at_most"),
        (b"\xff", 400, "The body is not UTF-8"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt": "a\\ud800"}', 422, "prompt: "),
        (b'{"prompt": "a", "recall": NaN}', 422, "recall: "),
        (b'{"prompt": "a", "parameters": {"damping": Infinity}}', 422, "damping"),
        (b'{"prompt": "a", "k": ' + b"9" * 5000 + b"}", 400, "too many digits"),
    ],
    ids=lambda value: ascii(value[:24]) if isinstance(value, bytes) else None,
)
def test_bad_bodies_are_refused_with_the_reason(
    client: Client, body: bytes, status: int, says: str
) -> None:
    headers = {"content-type": "application/json"}
    response = client.request("POST", "/v1/query", content=body, headers=headers)
    assert says in problem(response, status)


def test_many_errors_are_not_all_listed(client: Client) -> None:
    detail = problem(client.query(**ASKED, **{f"odd{i}": 1 for i in range(200)}), 422)
    assert "and 195 more" in detail
    assert len(detail) < 500


def test_a_body_that_is_not_called_json_is_refused(client: Client) -> None:
    content = json.dumps(ASKED)
    headers = {"content-type": "text/plain"}
    response = client.request("POST", "/v1/query", content=content, headers=headers)
    assert "send JSON as application/json" in problem(response, 415)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/v1/query", 405, "use POST"),
        ("DELETE", "/v1/index", 405, "use GET"),
        ("PUT", "/v1/jobs", 405, "use GET, POST"),
        ("POST", "/v1/examples/x", 405, "use GET"),
        ("GET", "/nowhere", 404, "nothing at /nowhere"),
        ("GET", "/v2/query", 404, "/openapi.json"),
        ("GET", "/v1/examples/nobody", 404, "no example with the id 'nobody'"),
        ("GET", "/v1/examples/", 404, "no example with the id ''"),
        ("GET", f"/v1/examples/{EMPTY_ID}?index=other", 404, "no index 'other'"),
    ],
)
def test_bad_addresses_are_refused_with_the_reason(
    client: Client, method: str, path: str, status: int, says: str
) -> None:
    response = client.request(method, path)
    assert says in problem(response, status)
    assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize("completion", [" Paris", None])
def test_a_model_with_nan_weights_is_a_refusal(
    client: Client, retriever: Retriever, completion: str | None
) -> None:
    weight = retriever.loaded.coverage.layers[0].module.weight
    assert isinstance(weight, torch.Tensor)
    kept = weight.clone()
    try:
        weight[0, 0] = torch.nan
        detail = problem(client.query(prompt=PROMPT, completion=completion), 422)
    finally:
        weight.copy_(kept)
    assert "not finite" in detail
    assert client.query(**ASKED).status_code == 200


class Held:
    """A retriever that answers only once it is released."""

    def __init__(self, retriever: Retriever) -> None:
        self.asked: list[Query] = []
        self.release = threading.Event()
        self._retriever = retriever

    def __getattr__(self, name: str) -> Any:
        return getattr(self._retriever, name)

    def begin(self, queries: list[Query]) -> list[Run | Exception]:
        self.asked += queries
        assert self.release.wait(20)
        return self._retriever.begin(queries)

    async def until_asked(self) -> None:
        async with asyncio.timeout(20):
            while not self.asked:
                await asyncio.sleep(0.005)


@pytest.fixture
def hold(workspace: Workspace) -> Iterator[Callable[[int], tuple[Client, Held]]]:
    clients: list[tuple[Client, Held]] = []

    def start(max_in_flight: int) -> tuple[Client, Held]:
        client = started(workspace, max_in_flight=max_in_flight).__enter__()
        retrievers = client.app.state.engine.retrievers
        held = Held(retrievers["default"])
        retrievers["default"] = held
        clients.append((client, held))
        return client, held

    yield start
    for client, held in clients:
        held.release.set()
        client.__exit__(None, None, None)


def test_one_query_too_many_is_refused_at_once(
    hold: Callable[[int], tuple[Client, Held]],
) -> None:
    client, held = hold(1)

    async def scenario() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        first = asyncio.create_task(client.http.post("/v1/query", json=ASKED))
        await held.until_asked()
        refused = await client.http.post("/v1/query", json=ASKED)  # while the first is held
        alive = await client.http.get("/readyz")
        held.release.set()
        return refused, alive, await first

    refused, alive, first = client.run(scenario)
    assert "1 queries are under way" in problem(refused, 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert alive.status_code == 200
    assert first.status_code == 200
    assert client.query(**ASKED).status_code == 200
    assert len(held.asked) == 2


def test_a_query_whose_client_hung_up_is_not_computed(
    hold: Callable[[int], tuple[Client, Held]],
) -> None:
    client, held = hold(2)
    arriving = [
        {"type": "http.request", "body": json.dumps(ASKED).encode(), "more_body": False},
        {"type": "http.disconnect"},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return arriving.pop(0) if len(arriving) > 1 else arriving[0]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/query",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }

    async def scenario() -> httpx.Response:
        first = asyncio.create_task(client.http.post("/v1/query", json=ASKED))
        await held.until_asked()
        second = asyncio.create_task(client.app(scope, receive, send))
        await second  # told that its client has gone while it waits
        held.release.set()
        return await first

    assert client.run(scenario).status_code == 200
    assert len(held.asked) == 1
    assert sent[0]["status"] == 499
    assert client.query(**ASKED).status_code == 200


def test_an_unexpected_error_tells_nothing_of_itself(
    client: Client, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(queries: list[Query]) -> list[Run | Exception]:
        raise ZeroDivisionError("secret of /srv/etymon")

    monkeypatch.setattr(retriever, "begin", fail)
    response = client.query(**ASKED)
    assert "log" in problem(response, 500)
    assert "secret" not in response.text
    assert "ZeroDivisionError" not in response.text


# Errors to problems


OF_CLIENTS = ("service.client", "service.client.connection")
NEEDING_MORE = ("service.sign_kernel",)
"""Needs Triton, and defines no error."""


def raised_by_us() -> list[type[Exception]]:
    """Every exception class that these packages define, but for those of clients."""
    modules, others = [index_errors], {*OF_CLIENTS, *NEEDING_MORE}
    for package in (service, estimators):
        names = (
            info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        )
        modules += [importlib.import_module(name) for name in names if name not in others]
    return sorted(
        {
            found
            for module in modules
            for _, found in inspect.getmembers(module, inspect.isclass)
            if issubclass(found, Exception) and found.__module__ == module.__name__
        },
        key=lambda kind: kind.__name__,
    )


def test_every_error_of_ours_has_a_problem() -> None:
    kinds = raised_by_us()
    assert {DuplicateIds, DiskFull, IndexBusy, *PROBLEMS} - {sqlite3.OperationalError} <= set(kinds)
    assert [kind.__name__ for kind in kinds if problem_for(kind()) is UNEXPECTED] == []


@pytest.mark.parametrize("kind", raised_by_us(), ids=lambda kind: kind.__name__)
def test_every_error_becomes_its_document(kind: type[Exception]) -> None:
    app = FastAPI()
    install(app)

    @app.get("/fail")
    async def fail(request: Request) -> None:
        raise kind("It went wrong.")

    expected = problem_for(kind())
    with Client(app, start=False) as client:
        response = client.get("/fail")
    assert problem(response, expected.status) == "It went wrong."
    assert response.json()["title"] == expected.title
    after = response.headers.get("retry-after")
    assert after == (None if expected.retry_after is None else str(expected.retry_after))


def test_a_damaged_index_found_while_answering_is_a_503(
    client: Client, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(queries: list[Query]) -> list[Run | Exception]:
        raise IndexCorrupt("The codes hold NaN.")

    monkeypatch.setattr(retriever, "begin", fail)
    assert problem(client.query(**ASKED), 503) == "The codes hold NaN."


# Description


def test_openapi_names_every_route_and_resolves(client: Client) -> None:
    document = client.get("/openapi.json").json()
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert described == {
        ("/v1/query", "post"),
        ("/v1/query/stream", "post"),
        ("/v1/estimators", "get"),
        ("/v1/jobs", "post"),
        ("/v1/jobs", "get"),
        ("/v1/jobs/{job_id}", "get"),
        ("/v1/jobs/{job_id}", "delete"),
        ("/v1/jobs/{job_id}/results", "get"),
        ("/v1/index", "get"),
        ("/v1/examples/{example_id}", "get"),
        ("/v1/suggestions", "get"),
        ("/livez", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    }
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    assert all(operation["description"] for operation in operations)
    schemas = document["components"]["schemas"]
    assert set(schemas["QueryRequest"]["properties"]) == set(QueryRequest.model_fields)
    references = set(_references(document))
    assert references
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= set(
        schemas
    )


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
