"""Check EK-FAC against kronfluence 1.0.1, an independent implementation of the same mathematics.

Both sides get the same two small models with random weights (GPT-2 with Conv1D layers, Llama with
grouped queries and no biases), fitting examples of unequal lengths, queries and damping (0.1 times
a layer's mean eigenvalue); all linear layers but the output head are attributed. kronfluence's side
is written apart from this package: own losses, one padded width, attention masks.

Two conventions are aligned. kronfluence scores ``<(H + lambda I)^-1 grad m(q), grad L(z)>``, so its
measurement is m = -log p(completion | prompt), which makes positive a proponent on both sides. Its
covariances leave out each sequence's last position, which predicts nothing.
"""

import copy
import json
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from estimators.curvature.fitting import Labels, fit_estimator
from estimators.model.capture import freeze
from estimators.model.gradients import negated
from estimators.model.layers import find_layers
from estimators.model.tokens import Sequence1D, collate
from estimators.operators.ekfac import EKFac
from estimators.rescoring import query_gradients, score_batch_for_queries
from index.files import write_whole

HELP = """Compare EK-FAC's factors and scores with kronfluence's; one JSON line on stdout.

Exits with 1 if a limit is missed, with 2 without kronfluence. It wants an environment of its own:

\b
python3 -m venv /tmp/peers
/tmp/peers/bin/pip install torch==2.13.0
echo torch==2.13.0 > /tmp/peers/torch.txt
/tmp/peers/bin/pip install -c /tmp/peers/torch.txt -e '.[cpu,peers]'
/tmp/peers/bin/pip uninstall -y torchvision torchaudio
/tmp/peers/bin/python -m scripts.bench.kronfluence
"""
DAMPING = 0.1
VOCABULARY = 64
SHORTEST, LONGEST = 4, 32
PADDING, IGNORED = 1, -100
TOTAL = "all layers"
PEER_BATCH = 32
MOST_DIFFERENCE = 1e-3
LEAST_PEARSON = 0.99
DEFINITIONS = {
    "*_difference": "max |etymon - kronfluence| / max |kronfluence| of a query's scores over the "
    "examples, or of a factor's entries; the largest of any query and layer",
    "*_covariance_difference": "of A / trace(A) and S / trace(S)",
    "pearson_min": "correlation over the scored examples, least of any query",
    "pearson_min_redraw": "the same between two of etymon's own fits with labels drawn anew",
    "norm_ratio": "norm of etymon's scores over that of kronfluence's",
    "passed": f"empirical: differences <= {MOST_DIFFERENCE}; sampled: pearson >= {LEAST_PEARSON}",
}

ModelKind = Literal["gpt2", "llama"]
Precision = Literal["float32", "float64"]
Example = dict[str, Tensor]
Factors = tuple[Tensor, Tensor, Tensor]
"""A [in, in] and S [out, out], both up to a factor, and corrected eigenvalues [in, out]."""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Case:
    """What one row of the report compares.

    Attributes:
        model: architecture.
        labels: "empirical" (the examples' own tokens) or "sampled" (drawn from the model).
        dtype: floating-point type of the model and of both sides' arithmetic.
        fitting_examples: fitted on; the first ``scored_examples`` are scored for ``queries``.
    """

    model: ModelKind
    labels: Labels
    dtype: Precision
    fitting_examples: int
    scored_examples: int
    queries: int


@dataclass(frozen=True)
class Problem:
    """Input of both sides: frozen model, examples to fit on, the scored ones of them, queries."""

    case: Case
    model: nn.Module
    examples: Sequence[Sequence1D]
    scored: Sequence[Sequence1D]
    queries: Sequence[Sequence1D]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one side computed.

    Attributes:
        scores: of each layer and of ``TOTAL``: [query, example], positive = proponent.
        factors: of each layer.
    """

    scores: Mapping[str, Tensor]
    factors: Mapping[str, Factors]


class PeerTask:
    """kronfluence's view of the models: next-token losses written without this package."""

    enable_post_process_per_sample_gradient = False

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = list(layers)

    def get_influence_tracked_modules(self) -> list[str]:
        """Names of the attributed layers."""
        return self._layers

    def get_attention_mask(self, batch: Example) -> Tensor:
        """1 at the positions that count in covariances: those that predict a token."""
        return (batch["next"] != IGNORED).long()

    def compute_train_loss(self, batch: Example, model: nn.Module, sample: bool = False) -> Tensor:
        """Summed negative log-likelihood in nats, of labels drawn from the model if ``sample``."""
        logits, labels = self._logits(batch, model), batch["next"].flatten()
        if sample:
            drawn = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
            labels = torch.where(labels == IGNORED, labels, drawn)
        return cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Example, model: nn.Module) -> Tensor:
        """``-log p(completion | prompt)``, summed over the batch."""
        labels = batch["completion"].flatten()
        return cross_entropy(self._logits(batch, model), labels, reduction="sum")

    def _logits(self, batch: Example, model: nn.Module) -> Tensor:
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits: Tensor = output.logits.flatten(0, 1)
        return logits


@app.command(help=HELP)
def main(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("docs/benchmarks"),
    queries: Annotated[int, typer.Option(min=1, help="Queries.")] = 20,
    examples: Annotated[int, typer.Option(min=2, help="Examples fitted on and scored.")] = 200,
    sampled: Annotated[int, typer.Option(help="Examples fitted on if labels are sampled.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of weights, data and sampled labels.")] = 0,
) -> None:
    """Compare all cases, write and print the report, exit with 1 if a limit is missed."""
    try:
        version("kronfluence")
    except PackageNotFoundError as error:
        wanted = "make a separate environment and run `pip install -e '.[cpu,peers]'` in it"
        typer.echo(f"error: kronfluence is not installed; {wanted}, as --help shows.", err=True)
        raise typer.Exit(2) from error
    torch.set_num_threads(1)  # the matrices are too small to share out
    plan = cases(examples, max(examples, sampled), queries)
    at, now = commit(), datetime.now(UTC)
    options = f"--queries {queries} --examples {examples} --sampled {sampled} --seed {seed}"
    rows = [{**compare(case, seed), "commit": at} for case in plan]
    report = {
        "rows": rows,
        "definitions": DEFINITIONS,
        "versions": {name: version(name) for name in ("kronfluence", "torch", "transformers")},
        "command": f"python -m scripts.bench.kronfluence {options}",
        "date": now.isoformat(timespec="seconds"),
    }
    path = out / f"kronfluence_cpu{os.cpu_count()}_{now:%Y%m%d}.json"
    write_whole(path, json.dumps(report, indent=2).encode() + b"\n")
    typer.echo(table(rows), err=True)
    typer.echo(json.dumps(report))
    raise typer.Exit(0 if all(row["passed"] for row in rows) else 1)


def cases(examples: int, sampled: int, queries: int) -> list[Case]:
    """Both models; the examples' own labels in either precision, sampled labels in float32."""
    variants: tuple[tuple[Labels, Precision, int], ...] = (
        ("empirical", "float64", examples),
        ("empirical", "float32", examples),
        ("sampled", "float32", sampled),
    )
    return [Case(m, *v, examples, queries) for m in get_args(ModelKind) for v in variants]


def compare(case: Case, seed: int) -> dict[str, Any]:
    """One row of the report: how the two sides' factors and scores differ."""
    started = time.perf_counter()
    problem = make_problem(case, seed)
    ours, theirs = etymon(problem, seed), kronfluence(problem, seed)
    ours_total, theirs_total = ours.scores[TOTAL], theirs.scores[TOTAL]
    differences = [relative_difference(ours.scores[n], theirs.scores[n]) for n in theirs.scores]
    row: dict[str, Any] = {
        **asdict(case),
        "layers": len(ours.factors),
        "max_relative_difference": relative_difference(ours_total, theirs_total),
        "layer_relative_difference": max(differences),
        **factor_differences(ours, theirs),
        "pearson_min": pearson_min(ours_total, theirs_total),
        "norm_ratio": float(ours_total.norm() / theirs_total.norm()),
    }
    if case.labels == "sampled":
        again = etymon(problem, seed + 1).scores[TOTAL]
        row["pearson_min_redraw"] = pearson_min(ours_total, again)
        passed = row["pearson_min"] >= LEAST_PEARSON
    else:
        passed = all(v <= MOST_DIFFERENCE for k, v in row.items() if k.endswith("_difference"))
    return {**row, "passed": passed, "seconds": round(time.perf_counter() - started, 1)}


def make_problem(case: Case, seed: int) -> Problem:
    """A model and texts of one random Markov chain; a query completes the first half of a text."""
    count = case.fitting_examples + case.queries
    generator = torch.Generator().manual_seed(seed)
    chain = (3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)).softmax(-1)
    tokens = torch.randint(VOCABULARY, (count, 1), generator=generator)
    while tokens.shape[1] < LONGEST:
        following = torch.multinomial(chain[tokens[:, -1]], 1, generator=generator)
        tokens = torch.cat([tokens, following], dim=1)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    texts = [tuple(row[:n]) for row, n in zip(tokens.tolist(), lengths, strict=True)]
    asked = [Sequence1D(tokens=t, first_target=len(t) // 2) for t in texts[case.fitting_examples :]]
    texts = texts[: case.fitting_examples]
    examples = [Sequence1D(tokens=text, row=i) for i, text in enumerate(texts)]
    model = new_model(case.model, seed).to(getattr(torch, case.dtype))
    return Problem(case, model, examples, examples[: case.scored_examples], asked)


def new_model(kind: ModelKind, seed: int) -> nn.Module:
    """Two layers of width 48 with seeded random weights, large enough for uneven predictions."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 48, "max_position_embeddings": LONGEST}
    common = {"initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0, **shape}
    if kind == "gpt2":
        return freeze(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, **common)))
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return freeze(LlamaForCausalLM(LlamaConfig(intermediate_size=96, **heads, **common)))


def etymon(problem: Problem, seed: int) -> Outcome:
    """This package's side, in batches of similar length without an attention mask."""
    model, labels = problem.model, problem.case.labels
    layers = find_layers(model).layers
    fitting: dict[str, Any] = {"token_budget": 512, "seed": seed, "labels": labels}
    ekfac = EKFac(fit_estimator("ekfac", model, layers, problem.examples, **fitting).tensors())
    kfac = fit_estimator("kfac", model, layers, problem.examples, **fitting)
    gradients, _ = query_gradients(model, layers, problem.queries)
    directions = negated(ekfac.precondition(gradients, DAMPING))
    corrected, product = ekfac.tensors(), kfac.tensors()
    factors = {}
    for name in gradients:
        left, right = product[f"{name}.left"], product[f"{name}.right"]
        positions = float(product[f"{name}.positions"])
        inputs, gradients_ = product[f"{name}.left_values"], product[f"{name}.right_values"]
        factors[name] = (
            left * (positions * inputs * gradients_.sum()) @ left.T,
            right * (positions * gradients_ * inputs.sum()) @ right.T,
            corrected[f"{name}.eigenvalues"],
        )
    batch = collate(problem.scored)
    scores = {x.name: score_batch_for_queries(model, [x], directions, batch) for x in layers}
    scores[TOTAL] = score_batch_for_queries(model, layers, directions, batch)
    return Outcome(scores=scores, factors=factors)


def kronfluence(problem: Problem, seed: int) -> Outcome:
    """The peer's side, on a copy of the model whose Conv1D layers have become nn.Linear."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    twin = linear_twin(problem.model)
    names = [n for n, m in twin.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    task, dtype = PeerTask(names), getattr(torch, problem.case.dtype)
    fitting = FactorArguments(
        use_empirical_fisher=problem.case.labels == "empirical",
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    scoring = ScoreArguments(
        damping_factor=None,  # means 0.1 times the mean eigenvalue of each layer
        compute_per_module_scores=True,
        per_sample_gradient_dtype=dtype,
        precondition_dtype=dtype,
        score_dtype=dtype,
    )
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="kronfluence")
        peer = Analyzer(
            "a", prepare_model(twin, task), task, cpu=True, disable_tqdm=True, output_dir=folder
        )
        peer.fit_all_factors("f", padded(problem.examples), PEER_BATCH, factor_args=fitting)
        sets = padded(problem.queries), padded(problem.scored)
        sizes = {"per_device_train_batch_size": PEER_BATCH, "score_args": scoring}
        peer.compute_pairwise_scores("s", "f", *sets, PEER_BATCH, **sizes)
        scores = peer.load_pairwise_scores("s")
        sums = {**peer.load_covariance_matrices("f"), **peer.load_lambda_matrices("f")}
    scores[TOTAL] = torch.stack(list(scores.values())).sum(0)
    inputs, gradients = sums["activation_covariance"], sums["gradient_covariance"]
    squares, counts = sums["lambda_matrix"], sums["num_lambda_processed"]
    factors = {n: (inputs[n], gradients[n], squares[n].T / counts[n]) for n in names}
    return Outcome(scores=scores, factors=factors)


def linear_twin(model: nn.Module) -> nn.Module:
    """A copy that computes the same with nn.Linear, the only affine layer the peer knows."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, dtype=module.weight.dtype)
            linear.weight.data.copy_(module.weight.data.T)
            linear.bias.data.copy_(module.bias.data)
            twin.set_submodule(name, linear)
    return twin


def padded(sequences: Sequence[Sequence1D]) -> list[Example]:
    """The peer's data set: vectors of one width of token ids, attention mask and the labels.

    The labels of position t are token t + 1: ``next`` of any, ``completion`` of a query's counted.
    """

    def fill(tokens: Sequence[int], value: int, before: int = 0) -> Tensor:
        return torch.tensor([*[value] * before, *tokens, *[value] * LONGEST][:LONGEST])

    return [
        {
            "input_ids": fill(sequence.tokens, PADDING),
            "attention_mask": fill([1] * len(sequence.tokens), 0),
            "next": fill(sequence.tokens[1:], IGNORED),
            "completion": fill(sequence.tokens[start:], IGNORED, start - 1),
        }
        for sequence in sequences
        for start in [sequence.first_target]
    ]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest over rows of ``max |ours - theirs| / max |theirs|``."""
    return float(((ours - theirs).abs().amax(1) / theirs.abs().amax(1)).max())


def pearson_min(ours: Tensor, theirs: Tensor) -> float:
    """Least correlation between a row of ``ours`` and the same row of ``theirs``."""
    pairs = zip(ours, theirs, strict=True)
    return min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs)


def factor_differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """``max |ours - theirs| / max |theirs|`` of each kind of factor, the largest of any layer."""
    kinds = ("input_covariance", "output_gradient_covariance", "eigenvalue")
    worst = dict.fromkeys([f"{kind}_difference" for kind in kinds], 0.0)
    for name, factors in ours.factors.items():
        for key, mine, peers in zip(worst, factors, theirs.factors[name], strict=True):
            if "covariance" in key:
                mine, peers = mine / mine.trace(), peers / peers.trace()
            difference = relative_difference(mine.flatten()[None], peers.flatten()[None])
            worst[key] = max(worst[key], difference)
    return worst


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report for people."""
    keys = ("max_relative", "layer_relative", "input_covariance", "output_gradient_covariance")
    head = f"{'scores':>9}{'layers':>9}{'A':>9}{'S':>9}  {'Pearson':9}passed"
    lines = [f"{'model':7}{'labels':11}{'dtype':9}{head}"]
    for row in rows:
        cells = "".join(f"{row[f'{key}_difference']:9.1e}" for key in keys)
        facts = f"{row['model']:7}{row['labels']:11}{row['dtype']:9}"
        lines.append(f"{facts}{cells}  {row['pearson_min']:<9.5f}{row['passed']}")
    return "\n".join(lines)


def commit() -> str:
    """The commit of this repository, with ``-dirty`` if the estimators differ from it."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "estimators"], check=False)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    return head + ("-dirty" if changed.returncode else "")


if __name__ == "__main__":
    app()
