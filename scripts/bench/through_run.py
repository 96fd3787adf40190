"""Influence through the run against estimators at its end: who predicts what repeated runs show."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from jaxtyping import Float
from rich.table import Table
from scipy import stats
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from estimators.curvature.fitting import fit_estimator
from estimators.model.tokens import Sequence1D
from estimators.run.adjoint import final_adjoint, measured_value, step_back
from estimators.run.passes import advance, trainable
from estimators.run.recorded import Batch, Group, Recipe, Row, State, Step
from index.examples import ExampleStore
from scripts.bench.record import write_record
from scripts.console import one_sentence_errors, print_json, show_progress, stderr
from scripts.demo import train_model
from scripts.demo.corpus import corpus_rows, fact_queries, load_profiles
from scripts.demo.train_model import demo_optimizers, on_bar, progress_bars, schedule
from service.models import LoadedModel, load_model
from service.scoring.estimators import Estimators
from service.scoring.exhaustive import exact_scores

DAMPINGS = (0.001, 0.01, 0.1, 1.0)
SHARES = (0.05, 0.5)
"""Of the rows that a repeated run leaves out."""
TOP = 20
EVERY = 4
"""One of so many countries is kept for the fine-tuning; the others are what the base model read."""
EPOCHS, RATE, WARMUP, ROWS_PER_BATCH = 3, 1e-3, 0.1, 32
SEED = 20261130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@one_sentence_errors
def main(
    out: Annotated[Path, typer.Option(help="Where to work.")] = Path("runs/through-run"),
    base_epochs: Annotated[int, typer.Option(help="Of the base model's training.")] = 5,
    rows: Annotated[int, typer.Option(help="Of the fine-tuning, at most.")] = 2000,
    queries: Annotated[int, typer.Option(help="Facts that are asked.")] = 12,
    reruns: Annotated[int, typer.Option(help="For each share left out.")] = 32,
    epsilon: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-8,
    record: Annotated[bool, typer.Option(help="Write docs/benchmarks/run_*.json.")] = True,
) -> None:
    """Fine-tune, trace facts through the fine-tuning, leave rows out and repeat it.

    For each estimator: LDS, the rank correlation of predicted and measured log p over repeated runs
    without random rows, mean over questions, with a bootstrap interval over questions.
    """
    task = make_task(out, base_epochs, rows, queries, epsilon)
    scores, facts = _scores(task, out)
    rows_found = _measure(task, scores, reruns, out)
    _show(rows_found)
    document = {"task": task.description, **facts, "rows": rows_found}
    if record:
        stderr.print(f"Record: {write_record('run', document)}")
    print_json(document)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A fine-tuning and what is asked of it.

    Attributes:
        model: in memory.
        tokenizer: its own.
        recipe: of the fine-tuning.
        rows: that it reads.
        steps: that it makes.
        start: state before the first.
        asked: prompts and completions.
        questions: the same as tokens.
        description: in words.
    """

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerFast
    recipe: Recipe
    rows: list[Row]
    steps: list[Step]
    start: State
    asked: list[tuple[str, str]]
    questions: list[Sequence1D]
    description: str

    def run(self, weights: Float[torch.Tensor, "row"], *, keep: bool = False) -> list[State]:
        """The states of the run with these weights, all of them or the last."""
        with trainable(self.model, self.recipe) as parameters:
            states = [self.start]
            for step in self.steps:
                after = advance(
                    self.model, parameters, self.recipe, self.rows, step, states[-1], weights
                )
                states = [*states, after] if keep else [after]
        return states

    def values(self, state: State) -> list[float]:
        """Log-probability of each question's completion, in a state."""
        with trainable(self.model, self.recipe) as parameters:
            return [
                measured_value(self.model, parameters, state, [(q, 1.0)]) for q in self.questions
            ]


def make_task(out: Path, base_epochs: int, rows: int, queries: int, epsilon: float) -> Task:
    """The base model, trained in ``out`` unless it is there, and the fine-tuning's plan."""
    profiles = load_profiles()
    kept = {profile.name for profile in profiles[::EVERY]}
    corpus = list(corpus_rows(profiles))
    base = [row["text"] for row in corpus if row["country"] not in kept]
    tuning = [row for row in corpus if row["country"] in kept][:rows]
    folder = out / f"base-{base_epochs}"
    if not (folder / "config.json").is_file():
        _train_base(folder, base, base_epochs)
    loaded = load_model(str(folder))
    generator = np.random.default_rng(SEED)
    encoded = [loaded.encode(row["text"])[: loaded.context] for row in tuning]
    parts = [
        Row(id=row["id"], tokens=tuple(ids), labels=tuple(ids))
        for row, ids in zip(tuning, encoded, strict=True)
    ]
    known = {row["id"] for row in tuning}
    facts = [query for query in fact_queries(profiles) if query["source_id"] in known]
    chosen = generator.permutation(len(facts))[:queries]
    asked = [(facts[i]["prompt"], f" {facts[i]['answer'].strip()}") for i in chosen]
    names = [name for name, _ in loaded.model.named_parameters()]
    group = Group(parameters=tuple(names), weight_decay=0.0, epsilon=epsilon)
    with trainable(loaded.model, Recipe(optimizer="adamw", groups=(group,))) as parameters:
        weights = {name: value.detach().clone() for name, value in parameters.items()}
    return Task(
        model=cast(GPT2LMHeadModel, loaded.model),
        tokenizer=loaded.tokenizer,
        recipe=Recipe(optimizer="adamw", groups=(group,)),
        rows=parts,
        steps=plan_steps(parts, generator),
        start=State(step=0, parameters=weights, moments={}),
        asked=asked,
        questions=[loaded.encode_query(*one) for one in asked],
        description=f"{len(parts):,} rows of countries that the base model never read, {EPOCHS} "
        f"epochs of AdamW at {RATE:g} with epsilon {epsilon:g}; base: the demonstration's "
        f"architecture after {base_epochs} epochs over {len(base):,} rows",
    )


def plan_steps(rows: Sequence[Row], generator: np.random.Generator) -> list[Step]:
    """Every row once an epoch, in batches that lose the mean over their tokens."""
    orders = [generator.permutation(len(rows)) for _ in range(EPOCHS)]
    batches = [
        order[start : start + ROWS_PER_BATCH].tolist()
        for order in orders
        for start in range(0, len(rows), ROWS_PER_BATCH)
    ]
    steps = []
    for number, batch in enumerate(batches):
        divisor = float(sum(rows[row].targets for row in batch))
        width = max(len(rows[row].tokens) for row in batch)
        rate = RATE * schedule(number, len(batches), WARMUP)
        steps.append(
            Step(batches=(Batch(rows=tuple(batch), divisor=divisor, width=width),), rates=(rate,))
        )
    return steps


def _train_base(folder: Path, texts: Sequence[str], epochs: int) -> None:
    recipe = train_model.Recipe(epochs=epochs)
    torch.manual_seed(recipe.seed)
    tokenizer = train_model.train_tokenizer(texts, recipe.vocabulary)
    model = train_model.new_model(tokenizer)
    sequences = [torch.tensor(ids) for ids in train_model.encode(tokenizer, texts)]
    with progress_bars() as progress:
        on_step = on_bar(progress, "base model")
        train_model.train(model, sequences, recipe, demo_optimizers(model, recipe), on_step)
    train_model.save(model, tokenizer, folder)


def _scores(task: Task, out: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Scores [question, row] of every estimator, and what they cost."""
    start = time.perf_counter()
    states = task.run(torch.ones(len(task.rows)), keep=True)
    training = time.perf_counter() - start
    start = time.perf_counter()
    traced, norms = trace(task, states)
    tracing = time.perf_counter() - start
    before, after = task.values(task.start), task.values(states[-1])
    folder = out / "tuned"
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            parameter.copy_(states[-1].parameters[name])
    train_model.save(task.model, task.tokenizer, folder)
    found = {"run": traced, **at_the_end(load_model(str(folder)), task)}
    facts = {
        "training_seconds": training,
        "trainings_a_query": tracing / training / len(task.questions),
        "adjoint_norms": norms,
        "log_p_before": before,
        "log_p_after": after,
    }
    stderr.print(
        f"One training took {training:.0f} s; tracing {len(task.questions)} questions through it "
        f"{facts['trainings_a_query']:.2f} trainings each; norm of the adjoint {norms[0]:.3g} at "
        f"the end, {norms[-1]:.3g} at the beginning.",
        highlight=False,
    )
    return found, facts


def trace(
    task: Task, states: Sequence[State]
) -> tuple[Float[np.ndarray, "question row"], list[float]]:
    """Influence of each row on each question through all steps; norms of the first's adjoint."""
    total = torch.zeros(len(task.questions), len(task.rows), dtype=torch.float64)
    norms = []
    with trainable(task.model, task.recipe) as parameters:
        adjoints = [
            final_adjoint(task.model, parameters, states[-1], [(question, 1.0)])[0]
            for question in task.questions
        ]
        for number in show_progress("trace", range(len(task.steps) - 1, -1, -1)):
            step = task.steps[number]
            norms.append(adjoints[0].norm)
            adjoints, found = step_back(
                task.model, parameters, task.recipe, task.rows, step, states[number], adjoints
            )
            read = [row for batch in step.batches for row in batch.rows]
            influences = torch.cat([part.sum(2) for part in found], dim=1)
            total.index_add_(1, torch.tensor(read), influences.double())
    return total.numpy(), [*norms[:: max(1, len(norms) // 20)], adjoints[0].norm]


@dataclass(frozen=True)
class _Examples:
    """The fine-tuning's rows as exact scoring asks for them."""

    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, row: int) -> tuple[int, ...]:
        return self.rows[row].tokens


def at_the_end(loaded: LoadedModel, task: Task) -> dict[str, np.ndarray]:
    """Scores by the final model alone: EK-FAC at several dampings, and the dot product."""
    sequences = [Sequence1D(tokens=row.tokens, row=i) for i, row in enumerate(task.rows)]
    fitted = fit_estimator(
        "ekfac", loaded.model, loaded.coverage.layers, sequences, progress=show_progress
    )
    examples = cast(ExampleStore, _Examples(task.rows))
    estimators = Estimators.of_factors(loaded, examples, "ekfac", fitted, DAMPINGS[0])
    chosen = {
        f"ekfac, damping {damping:g}": estimators.choose_gradients("ekfac", {"damping": damping})
        for damping in DAMPINGS
    }
    chosen["dot product"] = estimators.choose_gradients("identity")
    return exact_scores(
        loaded,
        {name: one.directions for name, one in chosen.items()},
        examples,
        task.questions,
        progress=show_progress,
    )


def _measure(
    task: Task, scores: Mapping[str, np.ndarray], reruns: int, out: Path
) -> list[dict[str, Any]]:
    full = np.array(task.values(task.run(torch.ones(len(task.rows)))[-1]))
    measured: dict[float, tuple[np.ndarray, np.ndarray]] = {}
    for share in SHARES:
        generator = np.random.default_rng([SEED, round(1000 * share)])
        count = round(share * len(task.rows))
        left, values = [], []
        for _ in show_progress(f"runs without {share:.0%} of the rows", range(reruns)):
            weights = torch.ones(len(task.rows))
            weights[torch.from_numpy(generator.permutation(len(task.rows))[:count])] = 0
            left.append(weights.numpy() == 0)
            values.append(np.array(task.values(task.run(weights)[-1])) - full)
        measured[share] = (np.array(left), np.array(values))
        saved = {"left_out": measured[share][0].tolist(), "change": measured[share][1].tolist()}
        (out / f"reruns-{share:g}.json").write_text(json.dumps(saved))
    return [_row(name, one, scores["run"], measured) for name, one in scores.items()]


def _row(
    name: str,
    scores: np.ndarray,
    exact: np.ndarray,
    measured: Mapping[float, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    row: dict[str, Any] = {"estimator": name}
    for share, (left, change) in measured.items():
        predicted = -left.astype(float) @ scores.T.astype(float)  # [rerun, question]
        each = [
            float(stats.spearmanr(p, m).statistic)
            for p, m in zip(predicted.T, change.T, strict=True)
        ]
        label = f"lds_{round(100 * share)}"
        spread = stats.bootstrap((each,), np.mean, rng=np.random.default_rng(0))
        row[label] = float(np.mean(each))
        row[f"{label}_low"], row[f"{label}_high"] = map(float, spread.confidence_interval)
        if share == SHARES[0]:  # through the origin: how many nats one predicted is worth
            row["slope"] = float((predicted * change).sum() / (predicted**2).sum())
    pairs = zip(scores, exact, strict=True)
    shared = [len({*np.argsort(-a)[:TOP]} & {*np.argsort(-b)[:TOP]}) / TOP for a, b in pairs]
    row["top20_shared"] = float(np.mean(shared))
    return row


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Predictions against repeated runs", title_justify="left")
    for heading in ("estimator", "LDS, 5 % left out", "LDS, half", "top 20 shared", "slope"):
        table.add_column(heading)
    for row in rows:
        lds = [
            f"{row[k]:.3f} ({row[f'{k}_low']:.2f} to {row[f'{k}_high']:.2f})"
            for k in ("lds_5", "lds_50")
        ]
        table.add_row(row["estimator"], *lds, f"{row['top20_shared']:.2f}", f"{row['slope']:.3g}")
    stderr.print(table)


if __name__ == "__main__":
    app()
