"""The claims of docs/security.md, each shown by the test that its table names."""

import ast
import asyncio
import base64
import contextlib
import hmac
import json
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from typer.testing import CliRunner

from scripts import serve
from service.http import access, limits
from service.http import problems as errors
from service.http.app import create_app
from service.http.telemetry import Telemetry
from service.schemas.queries import QueryRequest
from service.settings import Settings
from tests.service_fixtures import Client, Workspace

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
KEY = "first-key-of-the-tests"
OTHER_KEY = "second-key-of-the-tests"
JSON = {"content-type": "application/json"}
ASKED = {"prompt": "The capital of France is"}


def settings(**changes: Any) -> Settings:
    return Settings(**{"model": "m", "indexes": {"default": Path("x")}, **changes})


def guarded(**changes: Any) -> FastAPI:
    """A small app behind the service's guards."""
    chosen = settings(**changes)
    app = FastAPI()
    errors.install(app)
    telemetry = Telemetry(chosen)
    telemetry.add_metrics_route(app)

    @app.post("/v1/query")
    async def query(body: QueryRequest) -> dict[str, Any]:
        return {"prompt": body.prompt}

    @app.post("/v1/jobs")
    async def job(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    @app.get("/v1/index")
    async def index() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/livez")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/query/stream")
    async def stream(body: QueryRequest, request: Request) -> StreamingResponse:
        async def events() -> Any:
            try:
                while not await request.is_disconnected():
                    yield b"data: {}\n\n"
                    await asyncio.sleep(0.01)
            finally:
                app.state.hung_up.set()

        return StreamingResponse(events(), media_type="text/event-stream")

    app.state.hung_up = threading.Event()
    limits.install(app, chosen)
    access.install(app, chosen)
    telemetry.install(app)
    return app


def asking(app: FastAPI) -> Client:
    client = Client(app, start=False)
    client.http.base_url = httpx.URL("http://localhost:8000")
    return client


@pytest.fixture
def client() -> Iterator[Client]:
    with asking(guarded()) as client:
        yield client


def problem(response: httpx.Response, status: int) -> str:
    """The detail of a problem document, after checking its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert set(document) == {"type", "title", "status", "detail", "instance"}
    assert document["status"] == status
    assert response.headers["x-request-id"]
    detail: str = document["detail"]
    assert detail.endswith(".")
    return detail


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """The app behind uvicorn as ``scripts.serve`` runs it, on this port."""
    root = logging.getLogger()
    kept = (root.handlers[:], root.level)
    server = serve.Server(
        serve.configure(app), load=lambda: None, when_ready=lambda: None, drain=lambda: None
    )
    listener = serve.listen("127.0.0.1", 0)
    port: int = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until_it_answers(port)
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        root.handlers[:], root.level = kept
        for name in ("etymon", "uvicorn"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    assert not thread.is_alive()


def wait_until_it_answers(port: int) -> None:
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError("it does not answer")


def sent_raw(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that comes back until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):  # it may close before all is sent
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                received += piece
    return received


# Keys


@pytest.fixture(scope="module")
def service(workspace: Workspace) -> Iterator[Client]:
    """The whole service with a key."""
    chosen = settings(
        model=str(workspace.model), indexes={"default": workspace.index}, api_keys=(KEY,)
    )
    with Client(create_app(chosen)) as client:
        yield client


def test_every_route_but_the_probes_asks_for_a_key(service: Client) -> None:
    paths = {getattr(route, "path", "") for route in service.app.routes}
    assert {"/v1/query", "/metrics", "/openapi.json"} <= paths
    for path in sorted(paths | {"/", "/nowhere", "/v1/examples/x", "/page/app.js"}):
        for method in ("GET", "POST", "DELETE"):
            response = service.request(method, path)
            if path in ("/livez", "/readyz"):
                assert response.status_code in (200, 405)
            else:
                assert "key" in problem(response, 401)
                challenges = response.headers.get_list("www-authenticate")
                assert [c.partition(" ")[0] for c in challenges] == ["Basic", "Bearer"]
                assert 'realm="Etymon"' in challenges[0]
    allowed = service.get("/v1/index", headers={"authorization": f"Bearer {KEY}"})
    assert allowed.status_code == 200


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_a_key_comes_as_bearer_or_as_basic_password() -> None:
    with asking(guarded(api_keys=(KEY, OTHER_KEY))) as client:
        right = [
            f"Bearer {KEY}",
            f"bearer  {OTHER_KEY}",
            basic("anyone", KEY),
            basic("", OTHER_KEY),
            basic("ü", KEY),
        ]
        for shown in right:
            answer = client.get("/v1/index", headers={"authorization": shown})
            assert answer.status_code == 200, shown
        wrong = [
            "",
            "Bearer",
            "Bearer ",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            f"Bearer {KEY},{OTHER_KEY}",
            KEY,
            f"Token {KEY}",
            basic(KEY, ""),
            basic("x", KEY + "x"),
            "Basic !!!",
            "Basic " + base64.b64encode(b"\xff:\xff").decode(),
            f"Basic {KEY}",
        ]
        for shown in wrong:
            detail = problem(client.get("/v1/index", headers={"authorization": shown}), 401)
            assert KEY not in detail
        latin = {b"authorization": b"Bearer \xff\xfe"}
        problem(client.request("GET", "/v1/index", headers=latin), 401)


def test_all_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return first == second

    monkeypatch.setattr(hmac, "compare_digest", compare)
    with asking(guarded(api_keys=(KEY, OTHER_KEY))) as client:
        for shown, status in ((KEY, 200), (OTHER_KEY, 200), ("short", 401)):
            compared.clear()
            response = client.get("/v1/index", headers={"authorization": f"Bearer {shown}"})
            assert response.status_code == status
            assert len(compared) == 2
            assert {len(digest) for pair in compared for digest in pair} == {32}


def test_keys_come_from_the_environment_and_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the page\n{OTHER_KEY}\n\n  {KEY}  \n")
    file.chmod(0o600)
    both = set(access.read_keys(settings(api_keys=(KEY, OTHER_KEY))))
    assert len(both) == 2
    for given in (f"{KEY}, {OTHER_KEY}", json.dumps([KEY, OTHER_KEY])):
        monkeypatch.setenv("ETYMON_API_KEYS", given)
        assert set(access.read_keys(settings())) == both
    monkeypatch.delenv("ETYMON_API_KEYS")
    monkeypatch.setenv("ETYMON_API_KEYS_FILE", str(file))
    assert set(access.read_keys(settings())) == both
    monkeypatch.setenv("ETYMON_ALLOWED_HOSTS", "etymon.example, second.example")
    assert settings().allowed_hosts == ("etymon.example", "second.example")


def test_unfit_keys_are_refused_without_being_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for unfit in ("short-key", "a key with many spaces", "clé-clé-clé-clé-clé"):
        with pytest.raises(ValueError, match=r"Key 2 \(of ETYMON_API_KEYS\)") as caught:
            access.install(FastAPI(), settings(api_keys=(KEY, unfit)))
        assert unfit not in str(caught.value)
    for unfit in ('["secret-secret-secret', '["secret-secret-secret", 1]'):
        monkeypatch.setenv("ETYMON_API_KEYS", unfit)
        with pytest.raises(ValueError, match="ETYMON_API_KEYS") as caught:
            serve.read_settings(model="m", indexes={"a": Path("x")})
        assert "secret" not in str(caught.value)
    monkeypatch.delenv("ETYMON_API_KEYS")
    with pytest.raises(ValueError, match="cannot be read"):
        access.read_keys(settings(api_keys_file=tmp_path / "none"))
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        access.read_keys(settings(api_keys_file=empty))
    assert KEY not in repr(settings(api_keys=(KEY,)))


def test_a_file_of_keys_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    for mode, warnings in ((0o600, 0), (0o644, 1)):
        file.chmod(mode)
        caplog.clear()
        access.read_keys(settings(api_keys_file=file))
        assert len(caplog.records) == warnings
        assert KEY not in caplog.text


def test_keys_are_never_logged(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(guarded(api_keys=(KEY,))) as port:
        url = f"http://127.0.0.1:{port}"
        encoded = basic("user", KEY)
        for shown in (f"Bearer {KEY}", encoded, f"Bearer {OTHER_KEY}", f"Token {OTHER_KEY}"):
            httpx.get(f"{url}/v1/index", headers={"authorization": shown})
        httpx.get(f"{url}/v1/index?key={KEY}")
        httpx.get(f"{url}/{KEY}")
        httpx.get(f"http://user:{KEY}@127.0.0.1:{port}/v1/index")
        sent_raw(port, f"GET / HTTP/1.1\r\nHost: x\r\nBad {KEY}\r\n\r\n".encode())
    logged = "".join(capfd.readouterr())
    assert logged.count('"event": "request"') >= 7
    for secret in (KEY, OTHER_KEY, encoded.partition(" ")[2]):
        assert secret not in logged


# Other machines, other sites


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "etymon.example", "127.0.0.1.x.y"])
def test_without_keys_only_this_machine_may_ask(host: str) -> None:
    arguments = ["--model", "m", "--index", "a=x", "--host", host, "--port", "0"]
    ended = CliRunner().invoke(serve.app, arguments)
    assert ended.exit_code == 1
    assert ended.stdout == ""
    said = " ".join(ended.stderr.split())
    assert f"--host {host} can be reached from others; give --keys-file FILE" in said
    serve.check_exposure(host, settings(api_keys=(KEY,)))
    for own in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        serve.check_exposure(own, settings())


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil@localhost", "", "["],
)
def test_a_rebound_host_name_is_refused(client: Client, host: str) -> None:
    for path in ("/v1/index", "/metrics", "/openapi.json", "/"):
        response = client.get(path, headers={"host": host})
        assert "ETYMON_ALLOWED_HOSTS" in problem(response, 421)
    assert client.get("/livez", headers={"host": host}).status_code == 200


def test_this_machines_and_allowed_names_are_answered() -> None:
    with asking(guarded(allowed_hosts=("Etymon.example",))) as client:
        for host in ("localhost", "127.0.0.1:80", "[::1]:8000", "[::1]", "LOCALHOST:1"):
            assert client.get("/v1/index", headers={"host": host}).status_code == 200
        for host in ("etymon.example", "etymon.example:8000"):
            assert client.get("/v1/index", headers={"host": host}).status_code == 200
    with asking(guarded(api_keys=(KEY,))) as client:
        named = {"host": "anything.example", "authorization": f"Bearer {KEY}"}
        assert client.get("/v1/index", headers=named).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "",
    ],
)
def test_forms_of_other_sites_are_refused(client: Client, kind: str) -> None:
    body = json.dumps(ASKED)
    response = client.request("POST", "/v1/query", content=body, headers={"content-type": kind})
    assert "application/json" in problem(response, 415)
    typed = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.request("POST", "/v1/query", content=body, headers=typed).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "odd"])
def test_pages_of_other_sites_change_nothing(client: Client, site: str) -> None:
    headers = {"sec-fetch-site": site}
    for method, path in (("POST", "/v1/query"), ("DELETE", "/v1/jobs/x"), ("POST", "/livez")):
        response = client.request(method, path, json=ASKED, headers=headers)
        assert "another origin" in problem(response, 403)
    assert client.get("/v1/index", headers=headers).status_code == 200
    for own in ("same-origin", "none"):
        own_page = {"sec-fetch-site": own}
        response = client.request("POST", "/v1/query", json=ASKED, headers=own_page)
        assert response.status_code == 200


def test_responses_are_kept_from_other_pages_and_caches(client: Client) -> None:
    other_page = {"origin": "http://evil.example"}
    for response in (
        client.get("/v1/index", headers=other_page),
        client.get("/nowhere"),
        client.get("/v1/index", headers={"host": "evil.example"}),
        client.query(**ASKED),
    ):
        for name, value in access.RESPONSE_HEADERS.items():
            assert response.headers[name] == value
        assert not [name for name in response.headers if name.startswith("access-control")]


# Sizes and times


def test_a_large_body_is_refused_by_its_announced_size(client: Client) -> None:
    content = b'{"prompt": "' + b"x" * (2**20 - 14) + b'"}'
    assert len(content) == 2**20
    assert client.request("POST", "/v1/query", content=content, headers=JSON).status_code == 200
    response = client.request("POST", "/v1/query", content=content + b" ", headers=JSON)
    assert "1048577 bytes; this service takes at most 1,048,576" in problem(response, 413)
    assert response.headers["connection"] == "close"
    job = client.request("POST", "/v1/jobs", content=content + b" ", headers=JSON)
    assert job.json() == {"bytes": 2**20 + 1}
    for odd in ("-1", "1e3", "\uff19", "9" * 5000):
        headers = {**JSON, "content-length": odd.encode()}
        response = client.request("POST", "/v1/query", content=b"{}", headers=headers)
        problem(response, 413)


def test_a_large_body_is_refused_while_it_streams() -> None:
    head = b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    piece = b"1000\r\n" + b"[" * 4096 + b"\r\n"
    with serving(guarded(max_body_bytes=10_000)) as port:
        begin = time.monotonic()
        # Sixteen MB: many times what is read before the service has closed the connection.
        chunked = sent_raw(port, head, b"Transfer-Encoding: chunked\r\n\r\n", piece * 4000)
        announced = sent_raw(port, head, b"Content-Length: 999999999\r\n\r\n", b"[" * 10_000)
        seconds = time.monotonic() - begin
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    assert chunked.startswith(b"HTTP/1.1 413 ")
    assert b"larger than 10,000 bytes" in chunked
    assert announced.startswith(b"HTTP/1.1 413 ")
    assert seconds < 10


def test_a_slow_body_is_refused_after_its_time() -> None:
    head = (
        b"POST /v1/query HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n"
    )
    with serving(guarded(body_seconds=0.3)) as port:
        begin = time.monotonic()
        received = sent_raw(port, head, b"{", b'"', b"p", pause=0.1)
        seconds = time.monotonic() - begin
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"not complete after 0.3 seconds" in received
    assert 0.3 <= seconds < 10


def test_a_client_that_hangs_up_within_its_body_is_let_go(client: Client) -> None:
    arriving = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return arriving.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/query",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", b"100"),
        ],
    }
    client.run(lambda: client.app(scope, receive, send))
    assert sent[0]["status"] == 499


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
def test_compressed_bodies_are_refused(client: Client, encoding: str) -> None:
    headers = {**JSON, "content-encoding": encoding}
    response = client.request("POST", "/v1/query", content=b"{}", headers=headers)
    assert encoding in problem(response, 415)
    plain = {**JSON, "content-encoding": "identity"}
    content = json.dumps(ASKED)
    response = client.request("POST", "/v1/query", content=content, headers=plain)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"prompt":' * 100_000, 400, "nested too deeply"),
        (b'{"prompt": "a", "filters": ' + b"[" * 900 + b"]" * 900 + b"}", 422, "filters"),
        (b"{", 400, "not JSON"),
        (b"{'prompt': 1}", 400, "not JSON"),
        (b"\xff\xfe\xfd", 400, "not UTF-8"),
        (b'{"prompt": "a\xff"}', 400, "not UTF-8"),
        (b'{"prompt": "a\\ud800"}', 422, "prompt"),
        (b'{"prompt": "a", "\\ud800\\udc00\\udfff": 1}', 422, "unicode"),
        (b'{"prompt": "a", "filters": {"\\ud800": 1}}', 422, "filters"),
        (b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}', 422, "Extra inputs"),
        (b'{"prompt": "a", "recall": NaN}', 422, "recall"),
        (b'{"prompt": "a", "deadline": Infinity}', 422, "deadline"),
        (b'{"prompt": "a", "deadline": -Infinity}', 422, "deadline"),
        (b'{"prompt": "a", "k": 1e400}', 422, "k: "),
        (b'{"prompt": "a", "k": ' + b"9" * 5000 + b"}", 400, "too many digits"),
        (b'{"prompt": "a", "k": ' + b"9" * 400 + b"}", 200, ""),
        (b'{"prompt": "a", "prompt": "b"}', 200, ""),
        (b"\x00", 400, "not JSON"),
        (b"null", 422, "The body"),
    ],
    ids=lambda value: ascii(value[:40]) if isinstance(value, bytes) else "",
)
def test_odd_json_is_refused_and_never_an_error_of_the_service(
    client: Client, body: bytes, status: int, says: str
) -> None:
    response = client.request("POST", "/v1/query", content=body, headers=JSON)
    if status == 200:
        assert response.status_code == 200
    else:
        detail = problem(response, status)
        assert says in detail
        assert len(detail) < 300


def test_deeply_nested_json_does_not_end_the_process() -> None:
    """On uvicorn's own stack, not the test's."""
    with serving(guarded()) as port:
        url = f"http://127.0.0.1:{port}/v1/query"
        for body in (b"[" * 1_000_000, b'{"a":' * 200_000):
            response = httpx.post(url, content=body, headers=JSON)
            assert "nested too deeply" in problem(response, 400)
        assert httpx.post(url, json=ASKED).status_code == 200


def test_large_heads_are_refused() -> None:
    with serving(guarded()) as port:
        head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: "
        fits = sent_raw(port, head + b"x" * 8000 + b"\r\nConnection: close\r\n\r\n")
        large = sent_raw(port, head + b"x" * 2**15 + b"\r\nConnection: close\r\n\r\n")
        address = sent_raw(port, b"GET /" + b"x" * 2**15 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        endless = sent_raw(port, head, *[b"x" * 4096] * 8, pause=0.02)
    assert fits.startswith(b"HTTP/1.1 200 ")
    for refused in (large, address):
        assert refused.startswith(b"HTTP/1.1 431 ")
        assert b"of at most 16,384" in refused
    assert endless.startswith(b"HTTP/1.1 400 ")


def test_connections_without_a_whole_head_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.4)
    with serving(guarded()) as port:
        begin = time.monotonic()
        assert sent_raw(port) == b""
        assert (
            sent_raw(port, *[b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"] * 3, pause=0.05) == b""
        )
        assert 0.8 <= time.monotonic() - begin < 10
        request = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        begin = time.monotonic()
        answered = sent_raw(port, request, request, b"GET", pause=0.1)
        assert answered.count(b"HTTP/1.1 200 ") == 2
        assert time.monotonic() - begin < 4  # less than uvicorn's own timeout between requests
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/query/stream", json=ASKED) as stream:
            received = 0
            for piece in stream.iter_bytes():
                received += len(piece)
                if time.monotonic() - begin > 1.2:
                    break
        assert received > 100


def test_streams_pass_the_guards_and_see_their_client_hang_up() -> None:
    app = guarded()
    with serving(app) as port:
        url = f"http://127.0.0.1:{port}/v1/query/stream"
        with httpx.stream("POST", url, json=ASKED) as response:
            assert response.status_code == 200
            pieces = response.iter_bytes()  # kept: the connection is closed with it
            assert next(pieces).startswith(b"data: {}")
            assert not app.state.hung_up.is_set()
        assert app.state.hung_up.wait(10)


# What requests can reach


@pytest.mark.parametrize(
    "path",
    [
        "/v1/examples/../../../../etc/passwd",
        "/v1/examples/..%2F..%2F..%2F..%2Fetc%2Fpasswd",
        "/v1/examples//etc/passwd",
        "/v1/examples/%2Fetc%2Fpasswd%00",
        "/v1/examples/x?index=../../etc",
        "/../etc/passwd",
        "/page/..%2F..%2Fservice%2Fapp.py",
    ],
)
def test_ids_and_addresses_lead_to_no_file(service: Client, path: str) -> None:
    response = service.get(path, headers={"authorization": f"Bearer {KEY}"})
    problem(response, 404)
    assert "root:" not in response.text


def test_requests_cannot_choose_models_files_or_code() -> None:
    assert settings().trust_remote_code is False
    for field in ("model", "trust_remote_code", "path", "device", "api_keys", "url"):
        assert field not in QueryRequest.model_fields
        with pytest.raises(ValueError, match="Extra inputs"):
            QueryRequest.model_validate({"prompt": "a", field: True})


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_in_the_packages_runs_data_as_code() -> None:
    modules = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
    functions = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    scanned = 0
    for package in ("estimators", "index", "service", "scripts"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            scanned += 1
            for node in ast.walk(tree):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {name.partition(".")[0] for name in names} & modules, path
            for name, call in calls(tree):
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert name not in functions, f"{path}:{call.lineno}"
                assert given.get("shell", "False") == "False", f"{path}:{call.lineno}"
                assert given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
                if name == "torch.load":
                    assert given.get("weights_only") == "True", f"{path}:{call.lineno}"
    assert scanned > 50


# The page of claims


def test_every_claim_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 25
    missing = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert not missing


def test_every_test_here_is_a_claim() -> None:
    here = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), flags=re.MULTILINE))
    assert here - set(re.findall(r"test_security\.py::(\w+)", PAGE)) == {
        "test_every_claim_names_a_test_that_exists",
        "test_every_test_here_is_a_claim",
    }


def test_limits_in_the_page_are_those_of_the_code() -> None:
    for sentence in (
        f"{serve.HEADER_SECONDS:g} seconds",
        f"{limits.HEAD_BYTES // 1024} KiB",
        f"{serve.CONNECTIONS} connections",
        f"{access.SHORTEST_KEY} characters",
    ):
        assert sentence in PAGE
    assert sys.getrecursionlimit() <= 10_000
