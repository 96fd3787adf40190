"""The command ``etymon``: what it lists, what it loads, and that both ways in are the same."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from scripts import main
from scripts.demo.steps import command_line, typed
from scripts.main import COMMANDS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


def invoke(app: typer.Typer, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    result = CliRunner().invoke(app, list(arguments), env=WIDE, prog_name="etymon")
    return result.exit_code, result.stdout, result.stderr


def app_of(name: str) -> typer.Typer:
    app: typer.Typer = importlib.import_module(COMMANDS[name].module).app
    return app


def test_the_entry_point_is_the_command() -> None:
    assert PROJECT["scripts"] == {"etymon": "scripts.main:main"}


def test_the_help_lists_every_command_with_its_line() -> None:
    code, said, _ = invoke(main.app, "--help")
    assert code == 0
    for name, command in COMMANDS.items():
        assert re.search(rf"{name} +{re.escape(command.says)}", said)


def test_without_a_command_it_shows_its_help() -> None:
    code, said, told = invoke(main.app)
    assert code == 2
    assert "Commands" in said + told


def test_the_version_is_that_of_the_project() -> None:
    code, said, _ = invoke(main.app, "--version")
    assert (code, said) == (0, f"etymon {importlib.metadata.version('etymon')}\n")
    assert PROJECT["version"] in said


def test_an_unknown_command_is_refused_with_the_nearest_one() -> None:
    code, said, told = invoke(main.app, "qurey")
    assert (code, said) == (2, "")
    assert "No such command 'qurey'. Did you mean 'query'?" in told


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_with_an_example(name: str) -> None:
    code, said, _ = invoke(main.app, name, "--help")
    assert code == 0
    example = re.search(rf"Example:\s+etymon {name} ([^│╭]+)╭", said)
    assert example is not None
    flags = set(re.findall(r"--[a-z-]+", example[1]))
    assert flags <= set(re.findall(r"--[a-z-]+", said[example.end() :]))


@pytest.mark.parametrize("name", COMMANDS)
def test_both_ways_have_the_same_options_and_say_the_same(name: str) -> None:
    """The module's own app, that ``python -m`` runs, and the command."""

    def body(said: str) -> str:
        return said.partition("Usage:")[2].partition("\n")[2]

    by_command, by_module = invoke(main.app, name, "--help"), invoke(app_of(name), "--help")
    assert by_command[0] == by_module[0] == 0
    assert body(by_command[1]) == body(by_module[1])
    assert "--help" in by_module[1]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("query", ["x", "--url", "nowhere"]),
        ("delete", ["--index", "/nowhere"]),
        ("merge", ["/nowhere", "--out", "/tmp/never"]),
        ("point-to", ["/nowhere", "v2"]),
        ("serve", ["--model", "m", "--index", "folder"]),
    ],
)
def test_errors_are_the_same_sentence_both_ways(name: str, arguments: list[str]) -> None:
    by_command = invoke(main.app, name, *arguments)
    assert by_command == invoke(app_of(name), *arguments)
    code, said, told = by_command
    assert (code, said) == (1, "")
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_help_and_questions_load_no_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from scripts import main\n"
        "for asked in ([], ['--help'], ['query', '--help'], ['query', 'x', '--url', 'nowhere']):\n"
        "    CliRunner().invoke(main.app, asked)\n"
        "heavy = 'torch', 'scipy', 'numpy', 'transformers', 'faiss', 'fastapi'\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_names_of_commands_are_completed() -> None:
    environment = {
        **WIDE,
        "_ETYMON_COMPLETE": "complete_bash",
        "COMP_WORDS": "etymon po",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "scripts.main"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["point-to"]


def test_demonstrations_show_what_a_user_would_type() -> None:
    assert typed("fit") == ["etymon", "fit"]
    assert command_line("fit", "--help")[1:] == ["-m", "scripts.main", "fit", "--help"]
    module = "scripts.demo.train_model"
    assert typed(module) == ["python", "-m", module]
    assert command_line(module)[1:] == ["-m", module]
