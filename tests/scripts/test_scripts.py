"""The commands as people run them: help, one JSON line on stdout, one sentence on failure."""

import importlib
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import typer
from fastapi import FastAPI
from rich.console import Console
from typer.testing import CliRunner

from index.manifest import Manifest
from scripts import answers, audit_recall, build_index, console, fit_estimator, query, serve, texts
from service.client import Client
from service.schemas.answers import QueryResponse
from service.settings import Settings
from tests.commands import Nursery
from tests.service_fixtures import (
    HOSTILE_TEXT,
    Workspace,
    corpus_rows,
    make_model,
)

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds for a command to start: importing torch on a busy machine takes long


def command_modules() -> list[ModuleType]:
    """Every module of scripts/ that is a command, i.e. has a typer app."""
    names = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")
    modules = [importlib.import_module(f"scripts.{name}") for name in names]
    return [m for m in modules if isinstance(getattr(m, "app", None), typer.Typer)]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that ran to its end."""

    code: int
    stdout: str
    stderr: str


def invoke(module: ModuleType, *arguments: object) -> Ended:
    """Run a command within this process."""
    environment = {"COLUMNS": "200"}
    result = CliRunner().invoke(module.app, list(map(str, arguments)), env=environment)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return Ended(code=result.exit_code, stdout=result.stdout, stderr=result.stderr)


def json_line(stdout: str) -> Any:
    """The last line, which must be one JSON document."""
    return json.loads(stdout.splitlines()[-1])


def sentence(ended: Ended) -> str:
    """What a failed command says: one error and nothing on stdout."""
    assert ended.code == 1
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    _, error, said = " ".join(ended.stderr.split()).partition("error: ")
    assert error
    assert "error: " not in said
    return said


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_model(tmp_path_factory.mktemp("scripts"))


@dataclass(frozen=True, kw_only=True)
class Built:
    """A workspace with an index, and what the two commands printed."""

    workspace: Workspace
    fitted: Ended
    indexed: Ended


@pytest.fixture(scope="module")
def built(workspace: Workspace) -> Built:
    source = ("--model", workspace.model, "--data", workspace.corpus)
    fitted = invoke(fit_estimator, *source, "--out", workspace.factors)
    columns = ("--id-column", "id", "--document-column", "document")
    small = ("--dimensions", 512, "--rank", 8, "--rows-per-shard", 7)
    places = ("--factors", workspace.factors, "--out", workspace.index)
    indexed = invoke(build_index, *source, *columns, *small, *places)
    return Built(workspace=workspace, fitted=fitted, indexed=indexed)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``serve`` reads the environment, handles signals and logs as JSON; none of it is to last."""
    for name in list(os.environ):
        if name.startswith("ETYMON_"):
            monkeypatch.delenv(name)
    numbers = (signal.SIGINT, signal.SIGTERM)
    kept = [signal.getsignal(number) for number in numbers]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("etymon", "uvicorn"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    for number, handler in zip(numbers, kept, strict=True):
        signal.signal(number, handler)


# Help


@pytest.mark.parametrize("module", command_modules(), ids=lambda module: module.__name__)
def test_help_explains_the_command(module: ModuleType) -> None:
    result = invoke(module, "--help")
    assert result.code == 0
    lines = [line for line in result.stdout.splitlines() if line.strip(" │╭╮╰╯─")]
    assert len(lines) >= 5
    assert "--help" in result.stdout


def test_the_four_steps_are_commands() -> None:
    names = {module.__name__.removeprefix("scripts.") for module in command_modules()}
    assert {"fit_estimator", "build_index", "serve", "query"} <= names


# Fit and build


def test_fit_and_build_end_with_one_json_line(built: Built) -> None:
    assert built.fitted.code == 0, built.fitted.stderr
    report = json_line(built.fitted.stdout)
    assert (report["estimator"], report["examples"]) == ("ekfac", len(corpus_rows()))
    assert 0 < report["attributed_share"] < 1
    assert "not attributed: transformer.wte" in built.fitted.stderr
    assert built.indexed.code == 0, built.indexed.stderr
    report = json_line(built.indexed.stdout)
    manifest = Manifest.read(built.workspace.index)
    assert report["rows"] == manifest.rows == len(corpus_rows())
    assert report["corpora"][0]["documents"] == len({row["document"] for row in corpus_rows()})
    assert report["failed_rows"] == 0
    assert report["bytes_per_row"] == manifest.bytes_per_row
    assert len(manifest.parts[0].shards) == 3
    for result in (built.fitted, built.indexed):
        assert len(result.stdout.splitlines()) == 1


def test_a_finished_build_is_not_repeated(built: Built) -> None:
    before = (built.workspace.index / "manifest.json").read_bytes()
    w = built.workspace
    result = invoke(
        build_index,
        *("--model", w.model, "--data", w.corpus, "--factors", w.factors, "--out", w.index),
        *("--id-column", "id", "--document-column", "document"),
        *("--dimensions", 512, "--rank", 8, "--rows-per-shard", 7),
    )
    assert result.code == 0, result.stderr
    assert (w.index / "manifest.json").read_bytes() == before


def test_examples_are_shown_with_what_counts_and_nothing_is_written(
    built: Built, tmp_path: Path
) -> None:
    w = built.workspace
    for name, text in (("a", "The bridge of Porto"), ("b", "The market of Lyon")):
        row = json.dumps({"id": name, "prompt": text[:10], "completion": text[10:]})
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    result = invoke(
        build_index,
        *("--model", w.model, "--factors", w.factors, "--out", tmp_path / "index"),
        *("--data", tmp_path / "b.jsonl", "--data", tmp_path / "[a].jsonl", "--id-column", "id"),
        *("--show", 5),
    )
    assert result.code == 0, result.stderr
    assert result.stdout == ""
    first, shown, second, last = result.stderr.splitlines()[-4:]
    assert (first[:3], second[:3]) == ("b: ", "a: ")
    assert shown.endswith("The market⟦ of Lyon⟧")
    assert last.endswith("The bridge⟦ of Porto⟧")
    assert not (tmp_path / "index").exists()


def test_a_column_of_no_role_is_one_sentence(built: Built, tmp_path: Path) -> None:
    w = built.workspace
    command = (
        *("--model", w.model, "--data", w.corpus, "--factors", w.factors),
        *("--out", tmp_path / "index"),
    )
    assert "got 'messages'" in sentence(invoke(build_index, *command, "--column", "messages"))
    told = sentence(invoke(build_index, *command, "--column", "talk=messages"))
    assert "No column can be named for 'talk'" in told


def test_slices_are_added_to_a_finished_index_and_never_taken_away(
    built: Built, tmp_path: Path
) -> None:
    w = built.workspace
    shutil.copytree(w.index, tmp_path / "index")
    command = (
        *("--model", w.model, "--data", w.corpus, "--factors", w.factors),
        *("--out", tmp_path / "index", "--id-column", "id", "--document-column", "document"),
        *("--dimensions", 512, "--rank", 8, "--rows-per-shard", 7),
    )
    before = json_line(built.indexed.stdout)["bytes_per_row"]
    assert before == 16 * (512 // 8 + 8)
    result = invoke(build_index, *command, "--slices", 20)
    assert result.code == 0, result.stderr
    assert json_line(result.stdout)["bytes_per_row"] == before + 4 * (512 // 8 + 8)
    assert Manifest.read(tmp_path / "index").sketch.slices == 20
    assert "can only be added" in sentence(invoke(build_index, *command, "--slices", 2))


def test_a_build_calibrates_and_the_audit_writes_its_page(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy of the finished index, so that the others stay as they are."""
    w = built.workspace
    index, page = tmp_path / "index", tmp_path / "audit.html"
    shutil.copytree(w.index, index)
    lines = [row["text"] for row in map(json.loads, w.corpus.read_text().splitlines())]
    asked = tmp_path / "queries.jsonl"
    halves = [(line[: len(line) // 2], line[len(line) // 2 :]) for line in lines if len(line) > 8]
    pairs = [{"prompt": start, "completion": rest} for start, rest in halves[:6]]
    asked.write_text("\n".join(map(json.dumps, pairs)))
    calibrated = invoke(
        build_index,
        *("--model", w.model, "--data", w.corpus, "--factors", w.factors, "--out", index),
        *("--id-column", "id", "--document-column", "document"),
        *("--dimensions", 512, "--rank", 8, "--rows-per-shard", 7),
        *("--calibration-queries", asked),
    )
    assert calibrated.code == 0, calibrated.stderr
    assert json_line(calibrated.stdout)["calibration_queries"] == 6
    assert "Calibrated with 6 queries" in calibrated.stderr
    audited = invoke(
        audit_recall,
        *("--model", w.model, "--index", index, "--queries", asked, "--k", 3, "--html", page),
        *("--until", "calibration"),
    )
    assert audited.code == 0, audited.stderr
    report = json_line(audited.stdout)
    statuses = {q["certificates"]["calibration"]["status"] for q in report["per_query"]}
    assert statuses == {"exhaustive"}  # the corpus is small
    assert report["certificates"]["calibration"]["violations"] == 0
    shares = report["shares"]
    assert 0 < shares["held"] == shares["intervals"] <= 6
    assert f"{shares['held']} of {shares['intervals']} intervals" in audited.stderr
    assert page.read_text().count("<svg") == 4


def test_queries_that_are_none_are_one_sentence(built: Built, tmp_path: Path) -> None:
    w = built.workspace
    broken = tmp_path / "queries.jsonl"
    for content, says in (
        ('{"question": "?"}', "Line 1 of"),
        ("what?", "is not JSON"),
        ("[]", "it has list"),
        ('{"messages": []}', "line 1 of"),
        ('{"messages": [{"role": "user"}]}', "is no turn"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "Both prompt and"),
        ("\n", "holds no query"),
    ):
        broken.write_text(content)
        result = invoke(audit_recall, "--model", w.model, "--index", w.index, "--queries", broken)
        assert says in sentence(result)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--estimator": "magic"}, "Unknown estimator 'magic'"),
        ({"--text-column": "words"}, "no column 'words'"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--model": "/nowhere"}, "Cannot load a causal language model"),
        ({"--device": "banana"}, "Cannot put the model on 'banana'"),
        ({"--dtype": "floaty"}, "floaty"),
        ({"--layers": "nothing.*"}, "No layer to attribute"),
        ({"--max-tokens": 1}, "max_tokens must be between 2 and"),
    ],
    ids=str,
)
def test_bad_choices_are_one_sentence(
    workspace: Workspace, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    options: dict[str, object] = {
        "--model": workspace.model,
        "--data": workspace.corpus,
        "--out": tmp_path / "factors",
        **changes,
    }
    result = invoke(fit_estimator, *(part for pair in options.items() for part in pair))
    assert says in sentence(result)
    assert not (tmp_path / "factors").exists()


# Serve


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ETYMON_")}
    return {**kept, "HF_HUB_OFFLINE": "1", **variables}


def test_serve_and_query_from_start_to_sigterm(built: Built) -> None:
    """The service takes its settings from the environment, as in its image."""
    indexes = json.dumps({"default": str(built.workspace.index)})
    settings = environment(ETYMON_MODEL=str(built.workspace.model), ETYMON_INDEXES=indexes)
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.main", "serve", "--port", "0"],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["indexes"] == ["default"]
        url = ready["url"]
        assert httpx.get(f"{url}/readyz").json() == {"status": "ok"}
        asked = ("The capital of France is", "--completion", " Paris")
        answered = invoke(query, *asked, "--url", url, "--k", 18)
        refused = invoke(query, "x", "--url", url, "--index", "[/red]")
        process.send_signal(signal.SIGTERM)
        rest, log = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0
    assert rest == ""
    assert f"curl -s {url}/v1/query" in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests if line["route"] == "/v1/query"] == [200, 404]
    assert "The capital" not in "".join(map(json.dumps, lines))
    assert "Traceback" not in log
    check_answered(answered)
    assert "There is no index '[/red]'; this service has default." in sentence(refused)


def check_answered(answered: Ended) -> None:
    assert answered.code == 0, answered.stderr
    assert len(answered.stdout.splitlines()) == 1
    answer = json_line(answered.stdout)
    assert len(answer["results"]) == 18
    assert HOSTILE_TEXT in {result["text"] for result in answer["results"]}
    shown = " ".join(answered.stderr.split())
    assert "The capital of France is Paris" in shown
    assert f"{answer['measurement']['value']:+.3f} nats" in shown
    for result in answer["results"]:
        assert texts.signed(result["score"]) in shown
        assert result["document"] in shown
    for certificate in answer["certificates"]:
        assert certificate["sentence"] in shown
    assert answer["shares"][0]["sentence"] in shown
    assert "18 rows" in shown
    assert "[bold]France[/bold]" in shown
    assert "\x1b" not in answered.stderr
    assert "\u202e" not in answered.stderr


def test_a_missing_index_ends_serve_with_one_sentence(built: Built, tmp_path: Path) -> None:
    model, index = built.workspace.model, f"default={tmp_path / 'nowhere'}"
    ended = invoke(serve, "--model", model, "--index", index, "--port", 0)
    assert sentence(ended).startswith("No complete index in")
    assert "Uvicorn" not in ended.stderr


def test_a_damaged_index_ends_serve_with_one_sentence(built: Built, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    model, index = built.workspace.model, f"default={folder}"
    ended = invoke(serve, "--model", model, "--index", index, "--port", 0)
    assert "manifest.json was changed after it was written" in sentence(ended)


def test_serve_listens_at_once_and_is_ready_when_all_is_loaded() -> None:
    app, begin, ready = FastAPI(), threading.Event(), threading.Event()

    @app.get("/livez")
    def live() -> None:
        pass

    server = serve.Server(
        serve.configure(app),
        load=lambda: assert_waited(begin),
        when_ready=ready.set,
        drain=lambda: None,
    )
    listener = serve.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=serve.serve, args=(server, listener))
    thread.start()
    assert httpx.get(f"{url}/livez", timeout=PATIENCE).status_code == 200
    assert server.loading
    assert not ready.is_set()
    begin.set()
    assert ready.wait(PATIENCE)
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not server.loading


def assert_waited(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


def test_sigterm_while_it_loads_ends_serve_at_once(built: Built, nursery: Nursery) -> None:
    process = nursery.start(
        "scripts.serve",
        *("--model", built.workspace.model, "--index", f"default={built.workspace.index}"),
        *("--port", 0),
        environment=environment(),
    )
    with process:
        while "startup complete" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said, log = process.stdout.read(), process.stderr.read()
        assert process.wait() == 0
    assert said == ""
    assert "Traceback" not in log


def test_flags_reach_the_service(
    built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-this-test\n")
    keys.chmod(0o600)
    runs: list[tuple[serve.Server, Sequence[socket.socket]]] = []

    def run(server: serve.Server, sockets: Sequence[socket.socket]) -> None:
        runs.append((server, sockets))
        for listener in sockets:
            listener.close()

    monkeypatch.setattr(serve.Server, "run", run)
    monkeypatch.setenv("ETYMON_MODEL", "/not/this/one")
    monkeypatch.setenv("ETYMON_MAX_K", "7")
    result = invoke(
        serve,
        *("--model", built.workspace.model, "--port", 0),
        *("--index", f"default={built.workspace.index}", "--index", f"b={built.workspace.index}"),
        *("--token-budget", 512, "--max-in-flight", 3, "--dtype", "float32", "--device", "cpu"),
        *("--keys-file", keys, "--host", "0.0.0.0", "--allowed-host", "a", "--allowed-host", "b"),
    )
    assert result.code == 0, result.stderr
    ((server, sockets),) = runs
    assert len(sockets) == 1
    engine = server.config.app.state.engine  # type: ignore[union-attr]
    assert not engine.retrievers
    engine.load()
    assert list(engine.retrievers) == ["default", "b"]
    chosen = engine.settings
    assert (chosen.token_budget, chosen.max_in_flight, chosen.max_k) == (512, 3, 7)
    assert (chosen.model, chosen.dtype) == (str(built.workspace.model), "float32")
    assert (chosen.api_keys_file, chosen.allowed_hosts) == (keys, ("a", "b"))


def test_a_taken_port_ends_serve_with_one_sentence(built: Built) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"Cannot listen on 127\.0\.0\.1, port {port} \(.+in use"
        ):
            serve.listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "ETYMON_MODEL"),
        (["--model", "m"], "ETYMON_INDEXES"),
        (["--model", "m", "--index", "folder"], "NAME=FOLDER"),
        (["--model", "m", "--index", "=folder"], "NAME=FOLDER"),
        (["--model", "m", "--index", "a=x", "--index", "a=y"], "'a' twice"),
        (["--model", "m", "--index", "a=x", "--token-budget", "0"], "ETYMON_TOKEN_BUDGET"),
        (["--model", "m", "--index", "a=x", "--host", "0.0.0.0"], "--host 0.0.0.0 can be reached"),
        (["--model", "m", "--index", "a=x", "--keys-file", "/nowhere"], "cannot be read"),
    ],
    ids=str,
)
def test_bad_settings_end_serve_with_one_sentence(arguments: list[str], says: str) -> None:
    assert says in sentence(invoke(serve, *arguments))


def test_a_missing_model_or_index_ends_serve_with_one_sentence(built: Built) -> None:
    named = ("--model", "/nowhere", "--port", 0, "--index")
    ended = invoke(serve, *named, f"a={built.workspace.index}")
    assert "model from '/nowhere': there is no such folder" in sentence(ended)
    assert "No complete index in x" in sentence(invoke(serve, *named, "a=x"))


def test_settings_come_from_flags_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETYMON_MODEL", "from/environment")
    monkeypatch.setenv("ETYMON_INDEXES", '{"default": "here"}')
    monkeypatch.setenv("ETYMON_DEVICE", "cuda")
    read = serve.read_settings(model=None, device="cpu")
    expected = Settings(model="from/environment", indexes={"default": Path("here")}, device="cpu")
    assert read == expected


@pytest.mark.parametrize("value", ["{bad", "runs/index", "[]"])
def test_indexes_that_are_no_json_object_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("ETYMON_INDEXES", value)
    with pytest.raises(ValueError, match="ETYMON_INDEXES") as caught:
        serve.read_settings(model="m")
    assert "\n" not in str(caught.value)


# Query


def hostile_answer(**explained: Any) -> dict[str, Any]:
    result = {
        "rank": 1,
        "direction": "proponents",
        "row": 0,
        "id": "odd",
        "document": "[link=http://x]odd[/link]",
        "text": HOSTILE_TEXT + " x" * 500,
        "metadata": {},
        "score": -1234.5,
        "normalised_score": 0.25,
        "proxy": 0.0,
        "gradient_norm": 1.0,
        **explained,
    }
    term = {
        "prompt": "[red]The\nprompt[/]",
        "completion": "\x9b31m[/x]",
        "against": None,
        "weight": 1.0,
        "completed_by_model": True,
        "log_probability": -1.5,
        "against_log_probability": None,
        "caution": "It [says] so.",
        "completion_tokens": 1,
    }
    certificate = {
        "type": "audit",
        "direction": "proponents",
        "status": "refused",
        "recall_lower_bound": None,
        "recall_target": 0.9,
        "confidence": 0.95,
        "scope": "",
        "probability_over": "",
        "assumptions": [],
        "observed": {},
        "sentence": "No [b]statement[/b].",
    }
    share = {
        "direction": "proponents",
        "estimate": None,
        "low": None,
        "high": None,
        "confidence": 0.0,
        "sampled": 0,
        "sentence": "No [i]share[/i].",
    }
    answer = {
        "measurement": {"value": -1.5, "terms": [term]},
        "index": "default",
        "estimator": "ekfac",
        "parameters": {"damping": 0.1},
        "estimator_sha256": "",
        "by_gradients": True,
        "sign_and_unit": "score: an estimate",
        "effect": None,
        "effect_reason": "Not measured.",
        "influences": True,
        "notes": ["A [u]note[/u]."],
        "ranking": "score",
        "results": [result],
        "documents": [],
        "certificates": [certificate],
        "shares": [share],
        "partial": False,
        "rescored_rows": 1,
        "sampled_rows": 2,
        "rows": 3000,
        "seed": 1,
        "seconds": {"scan": 0.5, "rescore": 0.25},
    }
    return QueryResponse.model_validate(answer).model_dump(mode="json")


def test_hostile_text_is_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=False)
    monkeypatch.setattr(answers, "stderr", console)
    answers.show(hostile_answer())
    shown = screen.getvalue()
    for part in (
        "[red]The prompt[/]",
        "[/x]",
        "[link=http://x]odd[/link]",
        "[/nonsense]",
        "[b]",
        "[i]",
        "It [says] so.",
        "A [u]note[/u].",
    ):
        assert part in shown
    for part in ("-1,234", "+0.25", "(the model's own)", "1 of 3,000 rows", "0.75 s", "1 token;"):
        assert part in shown
    assert {c for c in shown if not c.isprintable()} == {"\n"}
    assert "x x x" in shown
    assert shown.count("x x") < 200


def test_what_explains_a_result_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(answers, "stderr", console)
    tokens = [{"text": " for", "score": 3.0}, {"text": "\x1b[2J", "score": -1.5}]
    answer = hostile_answer(tokens=tokens, layers={"h.0": 3.0, "h.1": -1.0}, cluster=0)
    answer["results"] += [{**answer["results"][0], "rank": 2}]
    answer["partial"] = True
    answer["measurement"]["terms"][0]["against"] = " Lima"
    answers.show(answer)
    shown = screen.getvalue()
    assert "\x1b[2J" not in shown  # the corpus clears no screen
    assert "48;2;255;0;0" in shown  # the largest token is red, the other half as blue
    assert "48;2;128;128;255" in shown
    for part in (
        "+1 near-duplicates",
        "h.0 75%, h.1 25%",
        "deadline",
        "difference of log p",
        "red +",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["year>=1990", "year<=2000"], {"year": {"at_least": 1990.0, "at_most": 2000.0}}),
        (["a=x", "a=y"], {"a": {"any_of": ["x", "y"]}}),
        (["b=true", "b=3"], {"b": {"any_of": [True, "true", 3, "3"]}}),
        (["date>=1990-05"], {"date": {"at_least": "1990-05"}}),
        (["url=http://x?y=z"], {"url": {"any_of": ["http://x?y=z"]}}),
        (["a=NaN", "a=-Infinity", "a=null"], {"a": {"any_of": ["NaN", "-Infinity", "null"]}}),
        (["a>=true", f"a<={'9' * 400}"], {"a": {"at_least": "true", "at_most": "9" * 400}}),
    ],
)
def test_filters_are_read_from_conditions(conditions: list[str], expected: Any) -> None:
    assert console.parse_filters(conditions) == expected


@pytest.mark.parametrize("conditions", [["year"], ["=x"], ["a>=1", "a>=2"]])
def test_conditions_of_another_form_are_one_sentence(conditions: list[str]) -> None:
    options = [option for condition in conditions for option in ("--filter", condition)]
    assert "--filter" in sentence(invoke(query, "x", *options))


def test_printable_keeps_what_is_harmless() -> None:
    assert texts.printable("a\tb\r\nc ü 東京 [x]") == "a b  c ü 東京 [x]"
    assert texts.printable("\x1b[31m\u202e\x00\x9b") == "\ufffd[31m\ufffd\ufffd\ufffd"


def test_no_service_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said = sentence(invoke(query, "x", "--url", f"http://127.0.0.1:{port}"))
    assert f"Cannot ask the service at http://127.0.0.1:{port}" in said
    assert "etymon serve" in said


@pytest.mark.parametrize("url", ["nowhere", "ftp://x", "http://[", "http://" + "a" * 300])
def test_a_url_that_is_none_is_one_sentence(url: str) -> None:
    assert "Cannot ask the service" in sentence(invoke(query, "x", "--url", url))


def answered_by(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]
) -> None:
    made = partial(Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(query, "Client", made)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (httpx.Response(200, text="<html>"), "HTTP status 200"),
        (httpx.Response(200, json=[1]), "HTTP status 200"),
        (httpx.Response(502, text="Bad gateway"), "HTTP status 502"),
        (httpx.Response(503, json={"title": "Busy", "detail": "[/b] Wait."}), "Busy: [/b] Wait."),
    ],
    ids=["page", "list", "gateway", "problem"],
)
def test_what_is_no_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, response: httpx.Response, says: str
) -> None:
    answered_by(monkeypatch, lambda request: response)
    assert says in sentence(invoke(query, "x"))


def test_a_slow_service_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = invoke(query, "x", "--url", url, "--timeout", 0.05)
    assert "within 0.05 seconds" in sentence(result)


def test_only_what_is_given_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append({"url": str(request.url), **json.loads(request.content)})
        return httpx.Response(200, json=hostile_answer())

    answered_by(monkeypatch, answer)
    assert invoke(query, "Why?", "--url", "http://x/").code == 0
    options = ("--k", 3, "--ranking", "score", "--recall", 0.8, "--confidence", 0.9, "--budget", 50)
    invoke(query, "Why?", "--completion", " So", "--index", "i", *options)
    first, second = asked
    assert first == {"url": "http://x/v1/query", "prompt": "Why?"}
    assert second == {
        "url": "http://127.0.0.1:8000/v1/query",
        "prompt": "Why?",
        "completion": " So",
        "index": "i",
        "k": 3,
        "ranking": "score",
        "recall": 0.8,
        "confidence": 0.9,
        "budget": 50,
    }


def test_every_choice_reaches_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        assert request.headers["authorization"] == "Bearer the-key-of-the-service"
        return httpx.Response(200, json=hostile_answer())

    answered_by(monkeypatch, answer)
    monkeypatch.setenv("ETYMON_KEY", "the-key-of-the-service")
    texts = ("--against", " No", "--direction", "both", "--deadline", 2)
    texts += ("--estimator", "ekfac:damping=0.5")
    filters = ("--filter", "year>=1990", "--filter", "kind=fact")
    switches = ("--tokens", "--layers", "--clusters", "--documents", "--until", "calibration")
    switches += ("--max-new-tokens", 8, "--samples", 4, "--sample-seed", 7)
    assert invoke(query, "Why?", *texts, *filters, *switches).code == 0
    assert asked == [
        {
            "prompt": "Why?",
            "against": " No",
            "max_new_tokens": 8,
            "samples": 4,
            "sample_seed": 7,
            "direction": "both",
            "estimator": "ekfac",
            "parameters": {"damping": 0.5},
            "deadline": 2.0,
            "filters": {"year": {"at_least": 1990.0}, "kind": {"any_of": ["fact"]}},
            "tokens": True,
            "layers": True,
            "clusters": True,
            "documents": True,
            "until": "calibration",
        }
    ]


def test_a_key_that_is_none_is_one_sentence_without_it() -> None:
    said = sentence(invoke(query, "x", "--key", "secret one"))
    assert said.startswith("The key is empty or has a space")
    assert "secret" not in said


def test_watching_says_how_far_the_search_is(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"measurement": hostile_answer()["measurement"]}
    progress = {"direction": "opponents", "rescored_rows": 1500, "sampled_rows": 0, "results": []}
    progress |= {"recall_lower_bound": 0.5, "seconds": 1.0}
    told = [
        ("gradient", measured),
        ("candidates", {"rows": 9, "seconds": 0.5}),
        ("progress", progress),
        ("progress", {**progress, "recall_lower_bound": None}),
        ("result", hostile_answer()),
    ]
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in told)
    headers = {"content-type": "text/event-stream"}
    answered_by(monkeypatch, lambda request: httpx.Response(200, text=text, headers=headers))
    watched = invoke(query, "x", "--watch")
    assert json_line(watched.stdout) == hostile_answer()
    assert "opponents: 1,500 rows rescored, recall at least 50%" in watched.stderr
    assert "no bound yet" in watched.stderr
    answered_by(monkeypatch, lambda request: httpx.Response(200, text="", headers=headers))
    assert "ended its stream without an answer" in sentence(invoke(query, "x", "--watch"))


def test_each_direction_is_shown_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(answers, "stderr", Console(file=screen, width=200, force_terminal=False))
    answer = hostile_answer(document="the raising one")
    for name in ("results", "certificates"):
        answer[name].append({**answer[name][0], "direction": "opponents"})
    answer["results"][1]["document"] = "the lowering one"
    answers.show(answer)
    shown = screen.getvalue()
    places = [
        shown.index(part)
        for part in ("proponents\n", "the raising one", "opponents\n", "the lowering one")
    ]
    assert places == sorted(places)
    assert shown.count("No [b]statement[/b].") == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [(15370.2, "+15,370"), (-116.04, "-116"), (3.0, "+3.00"), (-0.25, "-0.25"), (1e-7, "+1e-07")],
)
def test_scores_are_shown_with_their_sign(value, shown):
    assert texts.signed(value) == shown
