"""The command ``etymon``: its subcommands, each loaded only when it is the one that runs.

``python -m scripts.main`` is the same where the package is not installed.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

PROGRAM = "etymon"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand.

    Attributes:
        module: that has its typer ``app``.
        says: one line for the list of commands.
    """

    module: str
    says: str


COMMANDS = {
    "fit": Command(
        module="scripts.fit_estimator", says="Fit curvature factors on training examples."
    ),
    "build": Command(
        module="scripts.build_index", says="Build an index of training examples, or add to one."
    ),
    "serve": Command(module="scripts.serve", says="Serve indexes over HTTP, with a page."),
    "query": Command(
        module="scripts.query", says="Ask a service which examples made the model say something."
    ),
    "audit": Command(
        module="scripts.audit_recall", says="Compare answers with exact scores of every example."
    ),
    "replay": Command(
        module="scripts.run.replay_run",
        says="Make a recorded training run again, with other weights of its rows or as it was.",
    ),
    "trace": Command(
        module="scripts.run.trace_run",
        says="Trace questions through a recorded run: the influence of every row.",
    ),
    "scale": Command(
        module="scripts.run.learn_scale",
        says="Learn what one unit of score is worth from the trace of a run.",
    ),
    "merge": Command(module="scripts.merge_indexes", says="Merge indexes that were built apart."),
    "delete": Command(module="scripts.delete_examples", says="Delete examples from an index."),
    "point-to": Command(
        module="scripts.point_to", says="Choose which index is served from a folder."
    ),
    "mcp": Command(module="scripts.serve_mcp", says="Let an AI assistant ask a service."),
    "demo": Command(module="scripts.demo.demo", says="Run the whole way on real text."),
}
"""By name, in the order in which they are used and listed."""


class LazyGroup(TyperGroup):
    """Knows its commands by name and line; imports a command's module when that command runs.

    So ``etymon --help`` and ``etymon query`` need no torch.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The command itself in place of its entry in the list."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed and load(str(name)), rest


def load(name: str) -> Any:
    """The command of this name, as ``python -m`` of its module runs it."""
    loaded = typer.main.get_command(importlib.import_module(COMMANDS[name].module).app)
    loaded.name = name
    return loaded


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {importlib.metadata.version(PROGRAM)}")
        raise typer.Exit


@app.callback()
def etymon(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Find the training examples that made a language model say something.

    The whole way, from a model and its training text to an answer:

    etymon fit --model MODEL --data train.jsonl --out ekfac.safetensors

    etymon build --model MODEL --data train.jsonl --factors ekfac.safetensors --out index

    etymon serve --model MODEL --index default=index

    etymon query "The capital of France is" --k 5

    Each command has a --help with an example. Progress and tables go to stderr; the last line on
    stdout is one JSON document for programs.
    """


def _listed(says: str) -> Callable[[], None]:
    def stands_in() -> None:
        """Never runs: ``LazyGroup`` puts the command itself in its place."""

    stands_in.__doc__ = says
    return stands_in


for _name, _command in COMMANDS.items():
    app.command(_name)(_listed(_command.says))


def main() -> None:
    """Run the command that the process' arguments name."""
    app(prog_name=PROGRAM)


if __name__ == "__main__":
    main()
