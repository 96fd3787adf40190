"""Fuzzing finds what a service does that its description does not say, and nothing else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from typer.testing import CliRunner, Result

from scripts.bench import fuzz as fuzz_service
from service.http.problems import described
from tests.http.test_security import KEY, guarded, serving

pytest.importorskip("schemathesis")


class Numbers(BaseModel):
    """A body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    number: int = Field(ge=0, le=9)


def small(*, broken: bool, **changes: Any) -> FastAPI:
    """The guards around one route, which with ``broken`` fails at 0 and answers 1 with text."""
    app = guarded(**changes)
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") == "/livez"]

    @app.post("/v1/numbers", responses=described(422))
    async def numbers(body: Numbers) -> dict[str, int]:
        if broken:
            return {"inverse": 1 // body.number}
        return {"number": body.number}

    return app


@contextmanager
def described_and_served(app: FastAPI, folder: Path) -> Iterator[list[str]]:
    description = folder / "openapi.json"
    schema = app.openapi()
    del schema["paths"]["/livez"]
    description.write_text(json.dumps(schema))
    with serving(app) as port:
        yield ["--openapi", str(description), "--url", f"http://127.0.0.1:{port}"]


@pytest.fixture(scope="module", autouse=True)
def tables_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each run has a folder of its own, where it would compute Unicode's tables again."""
    folder = tmp_path_factory.mktemp("hypothesis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPOTHESIS_STORAGE_DIRECTORY", str(folder))
        yield


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(fuzz_service.app, [*arguments, "--examples", "5"])


def test_a_service_that_keeps_its_word_passes(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# one\n{KEY}\n")
    keys.chmod(0o600)
    app = small(broken=False, api_keys=(KEY,))
    with described_and_served(app, tmp_path) as arguments:
        ended = invoke(*arguments, "--keys-file", str(keys))
    counts = json.loads(ended.stdout)
    assert ended.exit_code == 0, counts
    assert counts["cases"] >= 20
    assert counts["operations"] == 1
    assert (counts["server_errors"], counts["undocumented"], counts["errors"]) == (0, 0, 0)


def test_an_error_of_the_service_is_found(tmp_path: Path) -> None:
    app = small(broken=True)
    with described_and_served(app, tmp_path) as arguments:
        ended = invoke(*arguments)
    counts = json.loads(ended.stdout)
    assert ended.exit_code == 1
    assert counts["server_errors"] == 1
    assert counts["undocumented"] >= 1  # no 500 is described
    assert "Server error" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--openapi", "/nowhere.json", "--url", "http://x"], "There is no file /nowhere.json"),
        (["--openapi", __file__], "give --url, or --model and --index"),
        (["--openapi", __file__, "--url", "http://127.0.0.1:1"], "schemathesis ended"),
    ],
    ids=["file", "service", "description"],
)
def test_what_cannot_be_fuzzed_is_one_sentence(arguments: list[str], says: str) -> None:
    ended = invoke(*arguments)
    assert ended.exit_code == 1
    assert ended.stdout == ""
    assert says in " ".join(ended.stderr.split())
