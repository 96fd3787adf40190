"""Influence through a run against runs that were repeated with other weights, in float64."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from estimators.model.tokens import Sequence1D
from estimators.run.adjoint import Adjoint, final_adjoint, step_back
from estimators.run.passes import advance, batch_losses, trainable
from estimators.run.recorded import UNCOUNTED, Batch, Group, Recipe, Row, State, Step
from estimators.run.updates import update

VOCABULARY = 13
ROWS = 7
STEPS = 6
QUESTIONS = (
    [(Sequence1D(tokens=(3, 1, 4, 1, 5), first_target=2), 1.0)],
    [(Sequence1D(tokens=(2, 7, 1), first_target=1), 1.0), (Sequence1D(tokens=(2, 8, 2)), -0.5)],
)
RECIPES = {
    "sgd": Group(parameters=()),
    "sgd with momentum": Group(parameters=(), momentum=0.9, dampening=0.1, weight_decay=0.05),
    "sgd of nesterov": Group(parameters=(), momentum=0.8, nesterov=True),
    "adam": Group(parameters=(), weight_decay=0.02, epsilon=1e-4),
    "adamw": Group(parameters=(), weight_decay=0.1, betas=(0.8, 0.95), epsilon=1e-3),
}
CLIPPED = {"sgd": 0.5, "adamw": 0.3}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


def llama() -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A small run, and its repetition with other weights."""

    model: nn.Module
    recipe: Recipe
    rows: list[Row]
    steps: list[Step]

    def states(self, weights: Tensor | None = None) -> list[State]:
        weights = torch.ones(ROWS, dtype=torch.float64) if weights is None else weights
        with trainable(self.model, self.recipe) as parameters:
            found = [
                State(
                    step=0,
                    parameters={n: p.detach().clone() for n, p in parameters.items()},
                    moments={},
                )
            ]
            for step in self.steps:
                last = found[-1]
                found.append(
                    advance(self.model, parameters, self.recipe, self.rows, step, last, weights)
                )
        return found

    def values(self, state: State) -> list[float]:
        with trainable(self.model, self.recipe) as parameters:
            return [final_adjoint(self.model, parameters, state, q)[1] for q in QUESTIONS]

    def influences(
        self, states: Sequence[State], smallest: float = 0.0
    ) -> tuple[Tensor, list[Adjoint]]:
        total = torch.zeros(len(QUESTIONS), ROWS, dtype=torch.float64)
        with trainable(self.model, self.recipe) as parameters:
            adjoints = [
                final_adjoint(self.model, parameters, states[-1], question)[0]
                for question in QUESTIONS
            ]
            for number in reversed(range(len(self.steps))):
                step = self.steps[number]
                given = (self.model, parameters, self.recipe, self.rows, step, states[number])
                adjoints, found = step_back(*given, adjoints, smallest)
                read = [row for batch in step.batches for row in batch.rows]
                influences = torch.cat([part.sum(2) for part in found], dim=1)
                total.index_add_(1, torch.tensor(read), influences)
        return total, adjoints


def make_run(
    kind: str,
    build: Callable[[], nn.Module] = gpt2,
    clipping: float | None = None,
    *,
    batches: int = 2,
) -> Run:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(ROWS):
        length = 3 + number % 4
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        labels = [UNCOUNTED if number == 2 and place < 2 else t for place, t in enumerate(tokens)]
        rows.append(Row(id=str(number), tokens=tuple(tokens), labels=tuple(labels)))
    steps = []
    for number in range(STEPS):
        order = torch.randperm(ROWS, generator=generator).tolist()
        parts = (order[:3], order[3:5])[:batches]  # two rows or four are not read
        counted = sum(rows[row].targets for part in parts for row in part)
        passed = [
            Batch(
                rows=tuple(part),
                divisor=float(counted),
                width=max(len(rows[row].tokens) for row in part) + number % 2,
            )
            for part in parts
        ]
        steps.append(Step(batches=tuple(passed), rates=(0.05 / (1 + number), 0.02)))
    model = build()
    names = [name for name, _ in model.named_parameters()]
    group = RECIPES[kind]
    recipe = Recipe(
        optimizer="sgd" if kind.startswith("sgd") else "adamw" if kind == "adamw" else "adam",
        groups=(
            replace(group, parameters=tuple(names[::2])),
            replace(group, parameters=tuple(names[1::2]), weight_decay=0.0),
        ),
        clipping=clipping,
    )
    return Run(model=model, recipe=recipe, rows=rows, steps=steps)


def check(run: Run, small: float = 1e-5, within: float = 1e-5) -> None:
    found, _ = run.influences(run.states())
    largest = float(found.abs().max())
    assert largest > 1e-3
    for row in range(ROWS):
        values = []
        for sign in (1, -1):
            weights = torch.ones(ROWS, dtype=torch.float64)
            weights[row] += sign * small
            values.append(run.values(run.states(weights)[-1]))
        for question, (up, down) in enumerate(zip(*values, strict=True)):
            expected = (up - down) / (2 * small)
            assert float(found[question, row]) == pytest.approx(expected, abs=within * largest)


@pytest.mark.parametrize("kind", RECIPES)
def test_influences_are_the_finite_differences_of_repeated_runs(kind: str) -> None:
    check(make_run(kind))


@pytest.mark.parametrize("kind", CLIPPED)
def test_clipped_gradients_are_differentiated_through_their_norm(kind: str) -> None:
    run = make_run(kind, clipping=CLIPPED[kind])
    unclipped = make_run(kind)
    assert run.values(run.states()[-1]) != unclipped.values(unclipped.states()[-1])
    check(run)


def test_one_batch_a_step_shares_its_pass() -> None:
    check(make_run("adamw", batches=1))


def test_another_architecture_with_an_output_head_of_its_own() -> None:
    # Its norms round to float32 inside, which small differences of values cannot bear.
    check(make_run("adamw", llama), small=1e-3, within=1e-3)


@pytest.mark.parametrize("kind", RECIPES)
def test_updates_are_those_of_torchs_optimizers(kind: str) -> None:
    run = make_run(kind, clipping=CLIPPED.get(kind))
    states = run.states()
    model = copy.deepcopy(run.model)
    model.eval()
    named = dict(model.named_parameters())
    shared: dict[str, Any] = {}
    groups = []
    for group in run.recipe.groups:
        constants = {"params": [named[name] for name in group.parameters], "lr": 0.1}
        constants["weight_decay"] = group.weight_decay
        if kind.startswith("sgd"):
            constants |= {"momentum": group.momentum, "dampening": group.dampening}
            constants["nesterov"] = group.nesterov
        else:
            constants |= {"betas": group.betas, "eps": group.epsilon}
        groups.append(constants)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[run.recipe.optimizer](groups, **shared)
    for number, step in enumerate(run.steps):
        for group, rate in zip(optimizer.param_groups, step.rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        for batch in step.batches:
            losses = batch_losses(model, run.rows, batch, torch.device("cpu"))
            (losses.sum() / batch.divisor).backward()
        if run.recipe.clipping is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.recipe.clipping)
        optimizer.step()
        for name, parameter in named.items():
            torch.testing.assert_close(
                parameter.detach(), states[number + 1].parameters[name], rtol=1e-9, atol=1e-12
            )


def test_a_second_moment_of_zero_gives_no_nan() -> None:
    recipe = Recipe(optimizer="adam", groups=(Group(parameters=("w",)),))
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    gradient = torch.tensor([0.0, 1e-3, 0.0], dtype=torch.float64, requires_grad=True)
    after, _ = update(recipe, 0, (0.1,), {"w": weight}, {}, {"w": gradient})
    (found,) = torch.autograd.grad(after["w"].sum(), gradient)
    assert torch.isfinite(found).all()
    assert float(after["w"].detach()[0]) == 0.0
    assert math.isclose(float(after["w"].detach()[1]), -0.1, rel_tol=1e-4)


def test_a_floor_makes_a_step_linear_where_the_second_moment_is_next_to_nothing() -> None:
    """Elsewhere it changes nothing; the derivative of a first step's entry is 0, unlike its way."""
    recipe = Recipe(optimizer="adamw", groups=(Group(parameters=("w",), epsilon=0.0),))
    weight = torch.zeros(4, dtype=torch.float64)
    values = torch.tensor([1e-3, 1e-2, 2.0, 3.0], dtype=torch.float64)

    def derivative(smallest: float) -> Tensor:
        gradient = values.clone().requires_grad_()
        after, _ = update(recipe, 0, (0.1,), {"w": weight}, {}, {"w": gradient}, smallest)
        (found,) = torch.autograd.grad(after["w"].sum(), gradient)
        return found

    exact, floored = derivative(0.0), derivative(0.1)
    assert exact == pytest.approx(torch.zeros(4).double(), abs=1e-9)  # by the rate, whatever it is
    least = (0.1 * values.square().mean()).sqrt()
    expected = torch.stack([-0.1 / least, -0.1 / least, exact[2], exact[3]])
    torch.testing.assert_close(floored, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_floor_below_every_moment_changes_nothing(kind: str) -> None:
    run = make_run(kind)
    states = run.states()
    exact, _ = run.influences(states)
    floored, _ = run.influences(states, smallest=1e-300)
    assert torch.equal(exact, floored)
    larger, _ = run.influences(states, smallest=0.5)
    assert torch.equal(exact, larger) == (kind == "sgd")


def test_the_model_is_left_as_it_was() -> None:
    run = make_run("adamw")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.requires_grad_(False)
    run.influences(run.states())
    assert not any(parameter.requires_grad for parameter in run.model.parameters())
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_without_a_trained_parameter_is_refused() -> None:
    recipe = Recipe(optimizer="sgd", groups=(Group(parameters=("lm_head.bias",)),))
    expected = "trained 1 parameters that this model lacks, the first is 'lm_head.bias'"
    with pytest.raises(ValueError, match=expected), trainable(gpt2(), recipe):
        pass


def test_the_adjoint_of_the_first_state_is_the_gradient_of_the_whole_run() -> None:
    run = make_run("adam")
    states = run.states()
    _, adjoints = run.influences(states)
    name = run.recipe.groups[0].parameters[0]
    small, index = 1e-6, (1, 2)
    values = []
    for sign in (1, -1):
        moved = make_run("adam")
        with torch.no_grad():
            dict(moved.model.named_parameters())[name][index] += sign * small
        values.append(moved.values(moved.states()[-1]))
    expected = (values[0][0] - values[1][0]) / (2 * small)
    assert float(adjoints[0].parameters[name][index]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert adjoints[0].norm > 0
