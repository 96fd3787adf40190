"""The direction of imports between rooms, and what no room may import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = {
    "estimators/layers": set(),
    "estimators/model": {"estimators/layers"},
    "estimators/sketching": {"estimators/model"},
    "estimators": {"estimators/model", "estimators/sketching"},
    "estimators/curvature": {"estimators", "estimators/layers", "estimators/model"},
    "estimators/operators": {
        "estimators",
        "estimators/curvature",
        "estimators/model",
        "estimators/sketching",
    },
    "estimators/run": {"estimators", "estimators/model"},
    "estimators/scorers": {"estimators", "estimators/model"},
    "index": set(),
    "index/certificates": set(),
    "index/codes": {"index"},
    "service": {"estimators", "index"},
    "service/scoring": {"service"},
    "service/corpus": {"service"},
    "service/indexing": {"service", "service/corpus", "service/scoring"},
    "service/run": {"service"},
    "service/tracing": {"service", "service/run"},
    "service/search": {"service", "service/scoring", "service/tracing"},
    "service/scaling": {
        "service",
        "service/run",
        "service/scoring",
        "service/search",
        "service/tracing",
    },
    "service/schemas": {"service/search"},
    "service/client": {"service/schemas"},
    "service/jobs": {"service", "service/schemas"},
    "service/http": {
        "service",
        "service/jobs",
        "service/schemas",
        "service/scoring",
        "service/search",
        "service/tracing",
    },
    "scripts": {"service", "scripts/report"},
    "scripts/report": set(),
    "scripts/run": {"scripts"},
    "scripts/demo": {"scripts"},
    "scripts/demo/chat": {"scripts", "scripts/demo"},
    "scripts/bench": {"scripts", "scripts/demo"},
    "scripts/bench/coverage": {"scripts", "scripts/bench"},
    "scripts/bench/certificates": {"scripts", "scripts/bench", "scripts/demo"},
    "scripts/bench/gpu": {"scripts", "scripts/bench"},
    "scripts/bench/recall": {"scripts", "scripts/bench", "scripts/demo"},
    "scripts/bench/through_run": {"scripts", "scripts/bench", "scripts/demo"},
    "scripts/dev": {"scripts"},
}
"""Rooms that each room may import from, within its package; ``PACKAGES`` says what lies beyond."""

PACKAGES = {
    "estimators": set(),
    "index": set(),
    "service": {"estimators", "index"},
    "scripts": {"estimators", "index", "service"},
}
"""Packages whose rooms a package may import from, any of them."""

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_FILES = 14
"""In a folder, ``__init__`` aside: about a dozen is what a reader takes in at a glance."""


def room_of(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, or imports a name from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            for alias in node.names:
                inner = (ROOT / module.replace(".", "/") / f"{alias.name}.py").is_file()
                found.add(f"{module}.{alias.name}" if inner else module)
    return found


def imported_packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(path)}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for module in imported_modules(path):
        if module.split(".")[0] in PACKAGES:
            file = ROOT / f"{module.replace('.', '/')}.py"
            rooms.add(room_of(file) if file.is_file() else module.replace(".", "/"))
    return rooms


def test_every_room_has_its_place():
    assert {room_of(path) for path in MODULES} == set(ROOMS)


def test_no_folder_has_a_name_that_tools_pass_over():
    """Formatters and test runners leave out folders called build, dist or the like."""
    files = [*MODULES, *(ROOT / "tests").rglob("*.py")]
    folders = {part for path in files for part in path.relative_to(ROOT).parts}
    assert not folders & {"build", "dist", "env", "node_modules", "venv"}


def test_the_rooms_of_a_package_have_an_order():
    """No two rooms import each other, directly or through others."""
    above = {room: set(below) for room, below in ROOMS.items()}
    while free := [room for room, below in above.items() if not below & set(above)]:
        for room in free:
            del above[room]
    assert not above


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards_only(path: Path) -> None:
    own = room_of(path)
    package = own.split("/")[0]
    for room in imported_rooms(path) - {own}:
        if room.split("/")[0] == package:
            assert room in ROOMS[own], f"{own} must not import from {room}"
        else:
            assert room.split("/")[0] in PACKAGES[package], f"{package} must not know {room}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_for(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert docstring
    files = [path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.is_relative_to(ROOT / "index")], ids=lambda p: p.name
)
def test_indexes_need_no_torch(path: Path) -> None:
    assert not imported_packages(path) & {"torch", "transformers"}


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if room_of(p).split("/")[:2] != ["service", "http"]],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_only_one_room_knows_http(path: Path) -> None:
    clients = {"service/client", "scripts/demo", "scripts/bench"}  # they ask over it
    forbidden = {"fastapi", "uvicorn"} | (set() if room_of(path) in clients else {"httpx"})
    if room_of(path) != "scripts":  # serve runs it
        assert not imported_packages(path) & forbidden


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
