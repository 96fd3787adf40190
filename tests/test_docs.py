"""The documents name what exists, and everything that exists is named."""

import re
from pathlib import Path

import pytest

from estimators.registry import FACTORS
from index.codes.vectors import CODES
from service.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def test_the_tree_in_the_architecture_is_the_repository() -> None:
    tree = ARCHITECTURE.split("```")[1]
    named = set(re.findall(r"^ {2}(\w+\.py|\w+/)", tree, flags=re.MULTILINE))
    actual: set[str] = set()
    for package in ("estimators", "index", "service", "scripts"):
        for path in (ROOT / package).iterdir():
            if path.suffix == ".py" and path.name != "__init__.py":
                actual.add(path.name)
            elif path.is_dir() and path.name != "__pycache__":
                actual.add(f"{path.name}/")
    assert named == actual


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"`ETYMON_{name.upper()}`" in REFERENCE


@pytest.mark.parametrize("name", [*FACTORS, *CODES])
def test_every_estimator_and_code_is_documented(name: str) -> None:
    assert f"`{name}`" in REFERENCE


@pytest.mark.parametrize(
    "route", ["/v1/query", "/v1/index", "/v1/examples/{id}", "/livez", "/readyz"]
)
def test_every_route_is_documented(route: str) -> None:
    assert route in REFERENCE


@pytest.mark.parametrize("document", [README, ARCHITECTURE, REFERENCE])
def test_commands_in_the_documents_exist(document: str) -> None:
    modules = set(re.findall(r"-m scripts\.(\w+)", document)) - {"NAME"}
    missing = [m for m in modules if not (ROOT / "scripts" / f"{m}.py").is_file()]
    assert not missing


def test_every_test_that_the_coverage_table_names_exists() -> None:
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "docs" / "coverage.md").read_text())
    assert len(named) >= 30
    missing = [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()
    ]
    assert not missing


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_names_the_two_commands() -> None:
    assert "make demo" in README
    assert "make test" in README
