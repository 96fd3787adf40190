"""Ways to ask over HTTP: conversations, the model's own completions, questions to begin with."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp.client import Client as Assistant
from typer.testing import CliRunner

from index.examples import Example, ExampleStore, write_examples
from scripts import query
from scripts.serve_mcp import make_server
from service.client import AsyncClient, Connection
from service.client import Client as Asking
from service.http.app import create_app
from service.http.suggestions import LONGEST, beginning, suggest
from service.schemas.queries import QueryRequest
from service.settings import Settings
from tests.page.page_server import serving
from tests.service_fixtures import Client, Workspace, corpus_rows

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'pope' %}{{ raise_exception('No pope here') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = [{"role": "user", "content": "The capital of France?"}]
SAID = {"role": "assistant", "content": "Paris"}
WRITTEN = f"user: {TURNS[0]['content']}\nassistant:"
LIMITS = {"k": 3, "seed": 1}


@pytest.fixture(scope="module")
def chatting(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a chat template, which the index does not ask about."""
    folder = tmp_path_factory.mktemp("chatting") / "model"
    shutil.copytree(workspace.model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def settings(workspace: Workspace, chatting: Path) -> Settings:
    return Settings(
        model=str(chatting),
        indexes={"default": workspace.index},
        jobs_path=chatting.parent / "jobs.sqlite",
    )


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    with Client(create_app(settings)) as started:
        yield started


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    alone = settings.model_copy(update={"jobs_path": settings.jobs_path.with_name("other.sqlite")})  # type: ignore[union-attr]
    with serving(create_app(alone)) as address:
        yield address


def term(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    (found,) = response.json()["measurement"]["terms"]
    return dict(found)


def test_a_conversation_is_asked_in_place_of_a_prompt(client: Client) -> None:
    for fields in (
        {"messages": TURNS, "completion": " Paris"},
        {"messages": [*TURNS, SAID]},
        {"batch": [{"messages": [*TURNS, SAID]}]},
    ):
        found = term(client.query(**fields, **LIMITS))
        assert (found["prompt"], found["completion"]) == (WRITTEN, " Paris")
        assert not found["completed_by_model"]
    own = term(client.query(messages=TURNS, max_new_tokens=5, **LIMITS))
    assert own["completed_by_model"]
    assert own["completion_tokens"] <= 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "The list of messages is empty; give the turns"),
        ({"messages": TURNS, "prompt": "x"}, "Both prompt and messages are given"),
        ({"messages": TURNS, "prompt": ""}, "Both prompt and messages are given"),
        ({"messages": [*TURNS, SAID], "completion": " x"}, "last message is the assistant's and"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "refuses this conversation: No pope"),
        ({"messages": [SAID]}, "holds nothing but an assistant's turn"),
        ({"messages": [*TURNS, {**SAID, "content": " "}]}, "The completion is empty"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not JSON|surrogate"),
        ({"messages": TURNS, "batch": [{"prompt": "x"}]}, "either a batch or messages, not both"),
        ({"batch": [{}]}, "Neither prompt nor messages are given"),
        ({"messages": [{"role": "user", "content": "x" * 15_000}] * 2}, "at most 20,000"),
        ({"prompt": "x", "samples": 2, "completion": " y"}, "gives a completion; leave one"),
        ({"prompt": "x", "samples": 65}, "samples: "),
        ({"batch": [{"prompt": "x"}] * 5, "samples": 20}, "batch times samples is 100 completions"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens: "),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_what_is_no_question_is_refused_in_a_sentence(
    client: Client, fields: dict[str, Any], says: str
) -> None:
    body = json.dumps(fields)
    headers = {"content-type": "application/json"}
    response = client.request("POST", "/v1/query", content=body, headers=headers)
    assert response.status_code == 422
    detail = response.json()["detail"]
    assert any(one in detail for one in says.split("|")), detail
    assert detail.endswith(".")
    assert ".." not in detail.replace('"..."', "")


def test_a_model_without_a_template_takes_no_conversation(workspace: Workspace) -> None:
    plain = Settings(model=str(workspace.model), indexes={"default": workspace.index})
    with Client(create_app(plain)) as started:
        refused = started.query(messages=TURNS, completion=" Paris")
        assert refused.status_code == 422
        assert "has no chat template" in refused.json()["detail"]
        (index,) = started.get("/v1/index").json()["indexes"]
        assert index["chat_template"] is False


def test_samples_are_terms_of_an_answer(client: Client) -> None:
    body = client.query(prompt="The", samples=4, sample_seed=2, **LIMITS).json()
    terms = body["measurement"]["terms"]
    assert [one["weight"] for one in terms] == [0.25] * 4
    mean = sum(one["log_probability"] for one in terms) / 4
    assert body["measurement"]["value"] == pytest.approx(mean)


def test_a_job_takes_conversations(url: str) -> None:
    with Asking(Connection(url=url)) as service:
        answer = service.query(messages=[*TURNS, SAID], **LIMITS)
        assert answer.measurement.terms[0].prompt == WRITTEN
        requests = [
            QueryRequest(messages=[*TURNS, SAID], **LIMITS),
            QueryRequest(prompt="The", samples=2, **LIMITS),
        ]
        job = service.submit(requests)
        assert service.wait(job.id, every=0.05).failed == 0
        first, second = service.results(job.id)
        assert first.answer is not None
        assert [r.id for r in first.answer.results] == [r.id for r in answer.results]
        assert second.answer is not None
        assert len(second.answer.measurement.terms) == 2
        (index,) = service.indexes().indexes
        assert index.chat_template


def test_an_assistant_asks_by_messages(url: str) -> None:
    async def ask(**arguments: Any) -> tuple[bool, str]:
        async with (
            AsyncClient(Connection(url=url)) as service,
            Assistant(make_server(service)) as assistant,
        ):
            result = await assistant.call_tool("query_training_examples", arguments)
            return bool(result.is_error), result.content[0].text  # type: ignore[union-attr]

    failed, said = asyncio.run(ask(messages=[*TURNS, SAID], k=2))
    assert not failed
    assert f"{WRITTEN!r} -> ' Paris'" in said
    failed, said = asyncio.run(ask(k=2))
    assert failed
    assert "give a prompt" in said


def test_the_command_reads_a_conversation(url: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(TURNS))
    options = ["--url", url, "--k", "2", "--completion", " Paris"]
    told = CliRunner().invoke(query.app, ["--messages", str(path), *options])
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["measurement"]["terms"][0]["prompt"] == WRITTEN
    told = CliRunner().invoke(
        query.app, ["--messages", "-", *options[:-2], "--max-new-tokens", "3"], json.dumps(TURNS)
    )
    assert json.loads(told.stdout)["measurement"]["terms"][0]["completion_tokens"] <= 3
    for arguments, given, says in (
        (["--messages", str(tmp_path / "none")], None, "There is no file"),
        (["--messages", "-"], "{", "The messages of stdin are not JSON"),
        (["--messages", "-"], "[]", "got an empty list"),
        (["x", "--messages", "-"], json.dumps(TURNS), "Both prompt and messages are given"),
        ([], None, "give a prompt, or a batch of them, or messages"),
    ):
        told = CliRunner().invoke(query.app, [*arguments, "--url", url], given)
        assert told.exit_code == 1
        assert says in " ".join(told.stderr.split())


# Questions to begin with


def test_three_beginnings_of_examples_are_suggested_and_can_be_asked(client: Client) -> None:
    found = client.get("/v1/suggestions").json()["suggestions"]
    assert found == client.get("/v1/suggestions?index=default").json()["suggestions"]
    texts = {row["id"]: row["text"] for row in corpus_rows()}
    for one in found:
        assert texts[one["id"]].startswith(one["prompt"])
    missing = client.get("/v1/suggestions?index=none")
    assert (missing.status_code, missing.json()["title"]) == (404, "Unknown index")


def store_of(path: Path, texts: list[str]) -> ExampleStore:
    examples = [
        Example(id=f"{n}", document=f"{n}", text=text, tokens=tuple(range(len(text.split()))))
        for n, text in enumerate(texts)
    ]
    write_examples(path, examples)
    return ExampleStore([path])


def test_suggestions_are_random_rows_of_enough_tokens_and_stay_the_same(tmp_path: Path) -> None:
    long = [f"Fact {n} is that " + "many words follow here " * 4 for n in range(300)]
    store = store_of(tmp_path / "0.arrow", [*["Too short a text."] * 200, *long])
    found = suggest(store)
    assert found == suggest(store)
    rows = [int(one.id) for one in found]
    assert len(set(rows)) == 3
    assert min(rows) >= 200
    assert rows != sorted(rows) or rows[-1] - rows[0] > 3
    assert suggest(store_of(tmp_path / "1.arrow", [])) == []
    assert len(suggest(store_of(tmp_path / "2.arrow", [long[0]] * 5))) == 1


CJK = "東京は日本の首都であり、世界最大の都市圏を形成している都市の一つである。"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The capital of France is Paris, a city on the Seine.", "The capital of France is"),
        ("One sentence here. Then", "One sentence"),  # not where a sentence ends
        ("1234567890 " * 100, ("1234567890 " * 100)[: LONGEST + 4]),
        (CJK, CJK[: len(CJK) // 2]),
        ("Nospacesatall" * 5, None),
        ("", None),
        ("- - - - - - - - - - - - - -", None),
    ],
)
def test_a_beginning_is_about_half_and_ends_with_a_word(text: str, expected: str | None) -> None:
    assert beginning(text) == expected
