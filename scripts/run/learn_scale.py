"""Learn what one unit of an index' scores is worth from the trace of a recorded run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from estimators.chosen import GradientEstimator
from index.manifest import Manifest
from scripts import options
from scripts.console import (
    one_sentence_errors,
    print_json,
    print_plain,
    show_logs,
    show_progress,
    stderr,
)
from service.checkpoints import ModelSource
from service.models import load_model
from service.run.loading import load_first_model
from service.scaling.evidence import TracedRun
from service.scaling.learning import Learner, ScalePrice
from service.scoring.estimators import Estimators
from service.scoring.scale import Interval, Scale, ScaleRecord, SizeScale, best_scale
from service.search.opening import open_index

DAMPINGS = (0.001, 0.01, 0.1, 1.0)
CHEAP = "identity"
"""Costs next to nothing beside another estimator, as training gradients are formed anyway."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    index: Annotated[Path, typer.Argument(help="Folder of the index.")],
    trace: Annotated[Path, typer.Argument(help="Folder that etymon trace wrote.")],
    run: Annotated[Path, typer.Option(help="Folder of the recorded run that was traced.")],
    estimators: Annotated[
        str | None,
        typer.Option(
            help="Names, with commas between. Left out: the index' own and gradient dot products."
        ),
    ] = None,
    dampings: Annotated[
        str | None,
        typer.Option(
            help="Numbers, with commas between, for the estimators that have a damping. Left out: "
            "that of the index, 0.001, 0.01, 0.1 and 1."
        ),
    ] = None,
    retrainings: Annotated[
        int,
        typer.Option(
            min=0,
            help="Repeat the run so often without a question's strongest rows or random ones (16 "
            "at least), to learn what sets of rows are worth together.",
        ),
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or name of the index' model, where it no longer lies there."),
    ] = None,
    first_model: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of the model before training, where it no longer lies where the "
            "run says."
        ),
    ] = None,
    token_budget: options.TokenBudget = 1024,
    seed: Annotated[int, typer.Option(help="Of random sets of rows.")] = 0,
    device: options.Device = "cpu",
    dtype: options.DType = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only predict passes and time; write nothing.")
    ] = False,
) -> None:
    r"""Learn from a traced run what one unit of score is worth, and keep it beside the index.

    The trace holds the exact first-order influence of every row of the run.
    Each estimator's scores of the same rows are compared with it: from then
    on, answers for that estimator and damping say what leaving a result out
    of the training would do. Without --retrainings to first order, one row
    at a time.

    Example:
    etymon scale runs/mine/index runs/mine/trace --run runs/mine/run
    """
    show_logs()
    traced = TracedRun.read(run, trace)
    manifest = Manifest.read(index)
    source = manifest.model.source if model is None else model
    completed = ModelSource.of(source).completed(manifest.model)
    opened = open_index(index, load_model(completed, device=device, dtype=dtype))
    first: Any = None
    if retrainings:
        chosen = None if first_model is None else ModelSource.of(first_model)
        first = load_first_model(traced.run, chosen, device=device)
    learner = Learner(
        index=opened,
        traced=traced,
        estimators=choose_estimators(opened.estimators, estimators, dampings),
        model=first,
        retrainings=retrainings,
        token_budget=token_budget,
        seed=seed,
    )
    if dry_run:
        _show_price(learner.predict())
        return
    record = learner.learn(show_progress)
    _show(record)
    print_json({"index": str(index), **record.model_dump(mode="json")})


def choose_estimators(
    known: Estimators, names: str | None, dampings: str | None
) -> list[GradientEstimator]:
    """Each estimator with each damping that it takes; the index' own with its own values first.

    Raises:
        ValueError: an unknown name, or a damping that is no number or out of bounds.
    """
    own = known.own
    wanted = [own.name, CHEAP] if names is None else [n.strip() for n in names.split(",")]
    values = [own.values.get("damping", DAMPINGS[0]), *DAMPINGS]
    if dampings is not None:
        try:
            values = [float(part) for part in dampings.split(",")]
        except ValueError as error:
            raise ValueError(
                f"--dampings must be numbers with commas between, got '{dampings}'."
            ) from error
    found: dict[str, GradientEstimator] = {}
    for name in wanted:
        usual = known.choose_gradients(name)
        damped = [{"damping": one} for one in values] if "damping" in usual.values else [{}]
        for given in damped:
            one = known.choose_gradients(name, given)
            found[one.fingerprint] = one
    return list(found.values())


def _show_price(price: ScalePrice) -> None:
    times = price.retrainings
    repeated = f", and the run is repeated {times} times" if times else ""
    print_plain(
        f"Scoring {price.rows:,} rows takes {price.passes} "
        f"{'pass' if price.passes == 1 else 'passes'} over them{repeated}: about "
        f"{price.seconds / 60:,.1f} minutes."
    )
    print_json(asdict(price))


def _show(record: ScaleRecord) -> None:
    table = Table(
        title=f"{record.questions} traced questions, {record.rows:,} of the run's "
        f"{record.run_rows:,} rows; intervals at {record.confidence:.0%} confidence",
        title_justify="left",
    )
    for heading in (
        "estimator",
        "nats a unit of score",
        "sets in the right order",
        "slope, left-out questions",
        "rank correlation",
        f"top {record.top} shared",
    ):
        table.add_column(heading)
    for scale in record.scales:
        table.add_row(*_cells(scale))
    stderr.print(table)
    best = best_scale(record.scales)
    print_plain(
        f"nearest to the run by rank correlation: {best.title}. Of the run's {record.top} "
        f"strongest rows its exact top {record.top} holds {best.shared_top.value:.0%}."
    )
    if record.partly_counted:
        print_plain(
            f"of {record.partly_counted:,} rows the run counted only some tokens, scores count all."
        )
    for scale in record.scales:
        _show_details(scale)
    print_plain(record.measured_by)
    if not record.retrainings:
        print_plain(
            "Sets of rows can do less or more than their sum; --retrainings 16 measures it."
        )


def _cells(scale: Scale) -> Sequence[str]:
    test = scale.sign_test
    return (
        scale.title,
        _told(scale.nats_per_unit),
        f"{test.right} of {test.pairs} (p = {test.p_value:.2g})",
        _told(scale.held_out_slope),
        _told(scale.rank_correlation),
        _told(scale.shared_top),
    )


def _show_details(scale: Scale) -> None:
    if scale.refused is not None:
        print_plain(f"{scale.title} is not used: {scale.refused}")
        return
    single = scale.nats_per_unit.value
    print_plain(
        f"{scale.title}: a question's strongest row is off by at most {scale.spread:.0%} of its "
        f"predicted effect, a weaker one by more of its own ({scale.spread_confidence:.0%} "
        f"confidence, to first order)"
    )
    sizes = [(f"the {one.rows} strongest", one) for one in scale.by_size]
    if scale.random_sets is not None:
        sizes.append((f"{scale.random_sets.rows} random rows", scale.random_sets))
    for what, one in sizes:
        print_plain(f"    without {what}: {_of_single(one, single)}")


def _of_single(one: SizeScale, single: float) -> str:
    """A size's worth as a part of the single row's."""
    parts = [getattr(one.nats_per_unit, name) / single for name in Interval.model_fields]
    return "{:.2f} ({:.2f} to {:.2f}) of what single rows say, by ".format(*parts) + (
        f"{one.sets} retrainings"
    )


def _told(interval: Interval) -> str:
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"


if __name__ == "__main__":
    app()
