"""The documents name what exists, and everything that exists is named."""

import importlib.util
import re
from pathlib import Path

import pytest

from estimators.registry import OPERATORS, SCORERS
from index.codes.vectors import CODES
from scripts.main import COMMANDS, load
from service.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
DECISIONS = ROOT / "docs" / "decisions"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_the_tree_in_the_architecture_is_the_repository() -> None:
    tree = ARCHITECTURE.split("```")[1]
    named: set[str] = set()
    room = ""
    for line in tree.splitlines():
        room = line.split("/ ")[0] if line[:1].strip() else room
        if entry := re.match(r" {2}(\w+\.py|\w+/)", line):
            named.add(f"{room}/{entry[1]}")
    packages = ("estimators", "index", "service", "scripts")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    actual = {str(p.relative_to(ROOT)) for p in files if p.name != "__init__.py"}
    assert named == actual | {"service/http/page/"}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"`ETYMON_{name.upper()}`" in REFERENCE


@pytest.mark.parametrize("name", [*OPERATORS, *SCORERS, *CODES])
def test_every_estimator_and_code_is_documented(name: str) -> None:
    assert f"`{name}`" in REFERENCE


@pytest.mark.parametrize(
    "route", ["/v1/query", "/v1/index", "/v1/examples/{id}", "/livez", "/readyz"]
)
def test_every_route_is_documented(route: str) -> None:
    assert route in REFERENCE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documents_exist(page: Path) -> None:
    text = page.read_text()
    modules = set(re.findall(r"-m (scripts[.\w]+\w)", text)) - {"scripts.NAME"}
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    assert not missing
    typed = re.findall(r"(?:^|[`$] ?)etymon ([a-z][a-z-]*)", text, flags=re.MULTILINE)
    assert set(typed) <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_of_commands_in_the_documents_exist(page: Path) -> None:
    """In lines of code that begin with a command of ``etymon``, and those that they go on in."""
    text = re.sub(r"\\\n\s+", "", page.read_text())
    for name, rest in re.findall(r"^(?:\$ )?etymon ([a-z-]+) (.*)$", text, flags=re.MULTILINE):
        given = set(re.findall(r"(?<= )--[a-z-]+", rest.split("  #")[0]))
        options = {option for parameter in load(name).params for option in parameter.opts}
        assert given <= options, f"etymon {name} has no {given - options}"


def test_every_test_that_the_coverage_table_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "coverage.md").read_text())
    assert len(named) >= 30
    missing = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert not missing


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_links_to_headings_lead_somewhere() -> None:
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
            text = (page.parent / target if target else page).read_text()
            headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert heading in anchors, f"{page.name} links to #{heading}"


def test_paths_in_the_code_that_name_documents_exist() -> None:
    for package in ("estimators", "index", "service", "scripts", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            for document in re.findall(r"docs/[\w./-]+\.md", path.read_text()):
                assert (ROOT / document).is_file(), f"{path} names {document}"


def test_every_decision_is_a_dated_file_in_the_index() -> None:
    files = sorted(path for path in DECISIONS.glob("*.md") if path.name != "README.md")
    listed = re.findall(
        r"^- (\S+) \[(.+)\]\((.+)\)$", (DECISIONS / "README.md").read_text(), re.MULTILINE
    )
    assert len(files) == len(listed)
    days = [day for day, _, _ in listed]
    assert days == sorted(days, reverse=True)
    for day, title, name in listed:
        assert re.fullmatch(rf"{day}-[a-z0-9-]+\.md", name)
        text = (DECISIONS / name).read_text()
        assert text.startswith(f"# {title}\n\nDate: {day}\n")
        headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
        assert headings[:3] == ["Motivation", "Evidence", "Verdict"]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_readme_names_the_two_commands() -> None:
    assert "make demo" in README
    assert "make test" in README
