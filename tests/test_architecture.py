"""The direction of imports, and that every top-level package is typed to the same rule."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "estimators": set(),
    "index": set(),
    "service": {"estimators", "index"},
    "scripts": {"estimators", "index", "service"},
}
MODULES = sorted(p for package in ALLOWED for p in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    others = imported_packages(path) & (set(ALLOWED) - {package})
    assert others <= ALLOWED[package]


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.is_relative_to(ROOT / "index")], ids=lambda p: p.name
)
def test_indexes_need_no_torch(path: Path) -> None:
    assert not imported_packages(path) & {"torch", "transformers"}


@pytest.mark.parametrize(
    "name", ["retrieval", "search", "building", "exhaustive", "models", "corpus", "opening"]
)
def test_the_engine_knows_no_http(name: str) -> None:
    path = ROOT / "service" / f"{name}.py"
    assert not imported_packages(path) & {"fastapi", "starlette", "uvicorn", "httpx"}


def test_nothing_unpickles() -> None:
    for path in MODULES:
        assert "pickle" not in imported_packages(path), path
        assert "torch.load" not in path.read_text(), path


def test_no_file_outgrows_a_reader() -> None:
    """About 400 lines is where a file wants a reason; none has one so far."""
    long = {
        str(p.relative_to(ROOT)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 420
    }
    assert not long
