"""The images and the compose file, read as text: what they run, copy and set exists here."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.testing import CliRunner

from scripts.main import app, load
from service.http.app import create_app
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECRET = re.compile(
    r"(token(?!_budget)|passw|secret|credential|api_?key)\w*[\"']?[ \t]*[:=][ \t]*"
    r"(?!/run/secrets/|\[keys\])\S",
    re.IGNORECASE,
)
"""Something with such a name is given a value that is not the name of a mounted file."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    instructions: list[tuple[str, str]]

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.instructions if name == instruction]


def read_stages() -> dict[str, Stage]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not line.strip():
            continue
        instruction, value = line.split(maxsplit=1)
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            stages[name] = Stage(name=name, base=base, instructions=[])
            current = stages[name]
        else:
            current.instructions.append((instruction, value))
    return stages


STAGES = read_stages()
TARGETS = ("service", "batch")


def lineage(name: str) -> list[Stage]:
    """The stage ``name`` after all that it is built from, oldest first."""
    stage = STAGES[name]
    return [*(lineage(stage.base) if stage.base in STAGES else []), stage]


def last(name: str, instruction: str) -> str:
    """The value of an instruction that is in force at the end of a stage."""
    found: str = [value for stage in lineage(name) for value in stage.values(instruction)][-1]
    return found


def variables(name: str) -> dict[str, str]:
    """What ENV sets in a stage and in those it is built from."""
    found = {}
    for stage in lineage(name):
        for value in stage.values("ENV"):
            found.update(part.split("=", 1) for part in shlex.split(value))
    return found


def options_of(name: str) -> set[str]:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", result.stdout))


def check_command(name: str, arguments: list[str]) -> dict[str, Any]:
    """Check a command of ``etymon`` against its help and its parser; gives the parameters."""
    flags = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    assert flags <= options_of(name)
    if "--help" in flags:
        return {}
    context = load(name).make_context(name, list(arguments))
    parameters: dict[str, Any] = context.params
    return parameters


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return document


def compose_services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = compose()["services"]
    return services


# Dockerfile


def test_the_base_is_pinned_and_every_other_stage_builds_on_it() -> None:
    outside = {stage.base for stage in STAGES.values() if stage.base not in STAGES}
    assert outside == {"python:3.11-slim-bookworm"}
    assert set(TARGETS) < set(STAGES)
    assert [stage.name for stage in lineage("service")] == ["base", "runtime", "service"]
    assert [stage.name for stage in lineage("batch")] == ["base", "runtime", "batch"]


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_nobody_special(target: str) -> None:
    user, _, group = last(target, "USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    (creation,) = [v for stage in lineage(target) for v in stage.values("RUN") if "useradd" in v]
    assert f"--uid {user}" in creation


@pytest.mark.parametrize("target", TARGETS)
def test_images_are_offline_and_write_to_tmp_only(target: str) -> None:
    found = variables(target)
    assert found["HF_HUB_OFFLINE"] == "1"
    assert found["HF_HOME"].startswith("/tmp/")
    assert found["HOME"] == "/tmp"
    assert found["PYTHONSAFEPATH"] == "1"
    assert found["PYTHONDONTWRITEBYTECODE"] == "1"


def test_the_environment_of_the_build_is_on_the_path_of_the_images() -> None:
    (created,) = re.findall(r"python -m venv (\S+)", " ".join(STAGES["build"].values("RUN")))
    assert f"--from=build {created} {created}" in STAGES["runtime"].values("COPY")
    for target in (*TARGETS, "build"):
        assert variables(target)["PATH"] == f"{created}/bin:$PATH"


def test_variants_are_extras_and_torch_is_pinned_within_its_range() -> None:
    build = STAGES["build"]
    arguments = dict(value.split("=", 1) for value in build.values("ARG"))
    assert set(arguments) == {"VARIANT", "TORCH", "PIP_OPTIONS"}
    assert arguments["PIP_OPTIONS"] == ""
    torch, install = [run for run in build.values("RUN") if "pip install" in run]
    assert torch == 'pip install $PIP_OPTIONS "$TORCH"'
    assert arguments["VARIANT"] == "cpu"
    assert {"cpu", "gpu"} <= set(PROJECT["optional-dependencies"])
    assert install == 'pip install ".[$VARIANT]"'
    pinned = Requirement(arguments["TORCH"])
    (wanted,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch"]
    (version,) = [s.version for s in pinned.specifier if s.operator == "=="]
    assert pinned.name == "torch"
    assert wanted.specifier.contains(version)


def test_everything_that_the_package_is_made_of_is_copied_and_not_ignored() -> None:
    copied = {
        source
        for value in STAGES["build"].values("COPY")
        for source in value.split()[:-1]
        if not source.startswith("--")
    }
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in patterns["packages"]["find"]["include"]}
    assert copied == {*packages, "pyproject.toml", PROJECT["readme"]}
    for name in copied:
        assert (ROOT / name).exists()
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert kept == copied


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_commands_that_exist(target: str) -> None:
    words = json.loads(last(target, "ENTRYPOINT"))
    if target == "batch":
        words += json.loads(last(target, "CMD"))
    assert words[0] in PROJECT["scripts"]
    check_command(words[1], words[2:])


def test_the_health_check_asks_whether_the_service_is_ready() -> None:
    value = last("service", "HEALTHCHECK")
    python, dash, code = json.loads(value[value.index("CMD ") + 4 :])
    assert (python, dash) == ("python", "-c")
    compile(code, "HEALTHCHECK", "exec")
    words = json.loads(last("service", "ENTRYPOINT"))
    port = check_command(words[1], words[2:])["port"]
    assert f"http://127.0.0.1:{port}/readyz" in code
    assert last("service", "EXPOSE") == str(port)
    served = create_app(Settings(model="m", indexes={"default": Path("i")}))
    assert "/readyz" in served.openapi()["paths"]


def test_there_is_no_secret() -> None:
    for path in (DOCKERFILE, COMPOSE):
        assert SECRET.findall(path.read_text()) == []


def test_the_commands_in_the_heading_build_what_exists() -> None:
    heading = DOCKERFILE.read_text().split("FROM")[0]
    commands = re.findall(r"docker build -f (\S+) --target (\w+)", heading)
    assert commands == [("docker/Dockerfile", target) for target in TARGETS]
    for name in re.findall(r"ETYMON_(\w+)", heading):
        assert name.lower() in Settings.model_fields


# Compose


def test_the_batch_jobs_and_the_service_share_one_folder() -> None:
    services = compose_services()
    assert set(services) == {"fit", "index", "service"}
    mounts = {name: tuple(service["volumes"]) for name, service in services.items()}
    assert mounts["fit"] == mounts["index"]
    (shared,) = mounts["fit"]
    assert shared.endswith(":/data")
    assert mounts["service"] == (f"{shared}:ro",)
    for name in ("fit", "index"):
        assert services[name]["profiles"] == ["batch"]
        assert "restart" not in services[name]
    assert services["index"]["depends_on"] == {
        "fit": {"condition": "service_completed_successfully"}
    }


@pytest.mark.parametrize("name", compose_services())
def test_compose_builds_what_exists(name: str) -> None:
    service = compose_services()[name]
    build = service["build"]
    context = (COMPOSE.parent / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    assert build["target"] in TARGETS
    declared = {value.split("=")[0] for value in STAGES["build"].values("ARG")}
    assert set(build["args"]) <= declared
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert re.fullmatch(r"\$\{RUN_AS:-(\d+:\d+)\}", service["user"])
    assert service["user"][10:-1] == last(build["target"], "USER")


def test_compose_runs_commands_that_fit_together() -> None:
    services = compose_services()
    fitted = check_command(services["fit"]["command"][0], services["fit"]["command"][1:])
    indexed = check_command(services["index"]["command"][0], services["index"]["command"][1:])
    assert fitted["model"] == indexed["model"] == services["service"]["environment"]["ETYMON_MODEL"]
    assert fitted["data"] == indexed["data"]
    assert fitted["out"] == indexed["factors"]
    served = json.loads(services["service"]["environment"]["ETYMON_INDEXES"])
    assert served == {"default": str(indexed["out"])}


def test_the_services_environment_is_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = compose_services()["service"]["environment"]
    for name, value in environment.items():
        assert name.removeprefix("ETYMON_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.model == "/data/model"
    assert settings.indexes == {"default": Path("/data/index")}
    assert settings.device == "cpu"


def test_the_published_port_is_the_services_and_only_local() -> None:
    (published,) = compose_services()["service"]["ports"]
    address, _, inside = published.split(":")
    assert address == "127.0.0.1"
    assert inside == last("service", "EXPOSE")


def test_the_commands_in_compose_s_heading_name_its_services() -> None:
    heading = COMPOSE.read_text().split("\nname:")[0]
    named = set(_services_in(heading))
    assert named == {"index", "service"}
    assert named <= set(compose_services())


def _services_in(heading: str) -> Iterator[str]:
    for line in heading.splitlines():
        found = re.search(r"docker compose -f docker/compose\.yml (?:run --rm|up) (\w+)", line)
        if found:
            yield found.group(1)
