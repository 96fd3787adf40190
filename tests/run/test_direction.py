"""The run's direction: curvature against dense matrices, and against the exact adjoint."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from estimators.run.adjoint import final_adjoint, step_back
from estimators.run.curvature import curvature_products, half, logits_of
from estimators.run.direction import (
    Directions,
    StepBack,
    direction_back,
    reading_weights,
    segment_count,
    segment_of,
)
from estimators.run.passes import batch_losses, collated, put, trainable
from estimators.run.recorded import UNCOUNTED, Batch, Group, Recipe, Row, Step
from estimators.run.updates import scaling, update
from tests.run.test_adjoint import QUESTIONS, STEPS, Run, llama, make_run


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def dense_gauss_newton(run: Run, parameters: dict[str, nn.Parameter], batch: Batch) -> Tensor:
    """``sum over positions of J^T (diag(p) - p p^T) J / divisor``, by whole Jacobians."""
    tokens = collated(run.rows, batch, torch.device("cpu"))
    passed = logits_of(run.model, parameters, tokens)
    names = list(parameters)

    def at(*values: Tensor) -> Tensor:
        return passed(dict(zip(names, values, strict=True)))

    found = torch.autograd.functional.jacobian(at, tuple(parameters.values()))
    logits = passed(parameters)
    jacobian = torch.cat([part.reshape(*logits.shape, -1) for part in found], dim=-1)
    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1], dtype=torch.float64)
    for row in range(logits.shape[0]):
        for place in range(logits.shape[1] - 1):
            if tokens.target_mask[row, place + 1]:
                p = torch.softmax(logits[row, place], dim=-1)
                own = jacobian[row, place]
                total += own.T @ (torch.diag(p) - torch.outer(p, p)) @ own
    return total.detach() / batch.divisor


def vectors(parameters: dict[str, nn.Parameter], count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {n: torch.randn(p.shape, generator=generator).double() for n, p in parameters.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("build", [None, llama])
def test_gauss_newton_products_are_those_of_the_whole_matrix(build: object) -> None:
    run = make_run("sgd", llama) if build else make_run("sgd")
    batch = run.steps[0].batches[0]
    with trainable(run.model, run.recipe) as parameters:
        some = vectors(parameters)
        part = half(run.rows, batch, torch.Generator().manual_seed(0))
        assert part is not None
        assert len(part.rows) == 2
        found = curvature_products(
            run.model, parameters, run.rows, batch, some, "gauss-newton",
            torch.Generator().manual_seed(0),
        )  # fmt: skip
        matrix = dense_gauss_newton(run, parameters, part)
    for vector, product in zip(some, found, strict=True):
        expected = matrix @ flat(vector)
        scale = float(expected.abs().max())
        within = 1e-9 if build is None else 1e-4  # its norms round to float32 inside
        torch.testing.assert_close(flat(product), expected, rtol=0, atol=within * scale)


def test_hessian_products_are_differences_of_gradients() -> None:
    run = make_run("sgd")
    batch = run.steps[0].batches[0]
    small = 1e-5
    with trainable(run.model, run.recipe) as parameters:
        (vector,) = vectors(parameters, 1)
        (found,) = curvature_products(
            run.model, parameters, run.rows, batch, [vector], "hessian", torch.Generator()
        )
        before = {name: value.detach().clone() for name, value in parameters.items()}
        gradients = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(before[name] + sign * small * vector[name])
            losses = batch_losses(run.model, run.rows, batch, torch.device("cpu")).sum(1)
            got = torch.autograd.grad(losses.sum() / batch.divisor, list(parameters.values()))
            gradients.append(flat(dict(zip(parameters, got, strict=True))))
    expected = (gradients[0] - gradients[1]) / (2 * small)
    torch.testing.assert_close(
        flat(found), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_half_of_a_batch_weighs_as_much_as_the_whole() -> None:
    rows = [
        Row(id=str(n), tokens=tuple(range(n + 1)), labels=tuple(range(n + 1))) for n in range(1, 7)
    ]
    batch = Batch(rows=(0, 1, 2, 3, 4), divisor=30.0, width=9)
    seen: set[int] = set()
    for seed in range(40):
        part = half(rows, batch, torch.Generator().manual_seed(seed))
        assert part is not None
        assert len(part.rows) == 3
        counted = sum(rows[row].targets for row in part.rows)
        assert counted / part.divisor == pytest.approx(15 / 30)
        assert part.width == max(len(rows[row].tokens) for row in part.rows)
        seen |= set(part.rows)
    assert seen == {0, 1, 2, 3, 4}
    silent = [replace(row, labels=(UNCOUNTED,) * len(row.tokens)) for row in rows]
    assert half(silent, batch, torch.Generator()) is None


@pytest.mark.parametrize("kind", ["sgd", "sgd decayed", "sgd clipped"])
def test_without_moments_the_direction_is_the_exact_adjoint(kind: str) -> None:
    """Whatever the step, all that is left out is the derivative of the clipping's factor."""
    run = make_run("sgd", clipping=1e3 if kind.endswith("clipped") else None)
    if kind.endswith("decayed"):
        groups = tuple(replace(group, weight_decay=0.3) for group in run.recipe.groups)
        run = replace(run, recipe=replace(run.recipe, groups=groups))
    states = run.states()
    with trainable(run.model, run.recipe) as parameters:
        how = StepBack(
            model=run.model, parameters=parameters, recipe=run.recipe, rows=run.rows,
            curvature="hessian",
        )  # fmt: skip
        exact = [final_adjoint(run.model, parameters, states[-1], q)[0] for q in QUESTIONS]
        mine = [dict(one.parameters) for one in exact]
        for number in reversed(range(STEPS)):
            step = run.steps[number]
            exact, found = step_back(
                run.model, parameters, run.recipe, run.rows, step, states[number], exact
            )
            mine, met = direction_back(how, step, states[number], states[number + 1], mine)
            for one, expected in zip(mine, exact, strict=True):
                scale = float(flat(dict(expected.parameters)).abs().max())
                torch.testing.assert_close(
                    flat(one), flat(dict(expected.parameters)), rtol=0, atol=1e-9 * scale
                )
            put(parameters, states[number])
            influences = torch.cat([part.sum(2) for part in found], dim=1)
            place = 0
            for batch in step.batches:
                losses = batch_losses(run.model, run.rows, batch, torch.device("cpu")).sum(1)
                for loss in losses:
                    got = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
                    gradient = flat(dict(zip(parameters, got, strict=True)))
                    for question in range(len(QUESTIONS)):
                        influence = -flat(met[question]) @ gradient / batch.divisor
                        assert float(influence) == pytest.approx(
                            float(influences[question, place]),
                            abs=1e-9 * float(influences.abs().max()),
                        )
                    place += 1


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd with momentum", "sgd of nesterov"])
def test_scalings_are_what_constant_gradients_come_to(kind: str) -> None:
    """Repeating one gradient, the step comes to the scaling times it, as the moments settle."""
    run = make_run(kind)
    recipe = replace(
        run.recipe,
        groups=tuple(replace(g, weight_decay=0.0, epsilon=1e-8) for g in run.recipe.groups),
        clipping=None,
    )
    parameters = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    gradients = {
        n: (torch.randint(2, p.shape, generator=generator).double() - 0.5)
        for n, p in parameters.items()
    }
    moments: dict[str, dict[str, Tensor]] = {}
    rates = (0.05, 0.02)
    for number in range(400):
        before = parameters
        parameters, moments = update(recipe, number, rates, parameters, moments, gradients)
    scales = scaling(recipe, 399, rates, None, moments)
    for name, gradient in gradients.items():
        moved = before[name] - parameters[name]
        torch.testing.assert_close(scales[name] * gradient, moved, rtol=1e-5, atol=1e-12)


def test_an_entry_that_hardly_had_a_gradient_is_scaled_like_a_tenth_of_its_tensor() -> None:
    recipe = Recipe(optimizer="adamw", groups=(Group(parameters=("w", "v")),))
    square = torch.tensor([0.0, 1e-12, 4.0, 12.0], dtype=torch.float64)
    moments = {"exp_avg_sq": {"w": square, "v": torch.zeros(2, dtype=torch.float64)}}
    found = scaling(recipe, 10**6, (0.1,), None, moments)
    least = 0.1 / 0.4**0.5
    expected = torch.tensor([least, least, 0.05, 0.1 / 12**0.5], dtype=torch.float64)
    torch.testing.assert_close(found["w"], expected, rtol=1e-6, atol=0)
    assert not torch.as_tensor(found["v"]).any()


def test_clipping_scales_what_a_gradient_is_multiplied_with() -> None:
    recipe = Recipe(optimizer="sgd", groups=(Group(parameters=("w",)),), clipping=1.0)
    gradients = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    assert scaling(recipe, 0, (0.1,), gradients, {})["w"] == pytest.approx(0.02, rel=1e-5)


def test_sums_of_segments_weighted_by_readings_are_the_sums_over_steps() -> None:
    """Exact where rate and divisor do not change within a segment; else weighted by them."""
    steps = [
        Step(batches=(Batch(rows=(n % 4, 3), divisor=2.0 + n // 3, width=4),), rates=(0.1,))
        for n in range(6)
    ]
    rows = [Row(id=str(n), tokens=(1, 2), labels=(1, 2)) for n in range(4)]
    assert segment_count(rows, steps) == 3
    assert [segment_of(n, 6, 2) for n in range(6)] == [0, 0, 0, 1, 1, 1]
    sums = Directions(steps, 2, questions=1)
    met = [{"w": torch.full((2,), float(n // 3 + 1), dtype=torch.float64)} for n in range(6)]
    for number in reversed(range(6)):
        sums.add(number, [met[number]])
    weights = reading_weights(4, steps, 2)
    gradient = torch.tensor([2.0, 5.0], dtype=torch.float64)
    for row in range(4):
        expected = sum(
            -float(met[n]["w"] @ gradient)
            / step.batches[0].divisor
            * step.batches[0].rows.count(row)
            for n, step in enumerate(steps)
        )
        got = sum(
            float(weights[s, row]) * float(sums.found[0][s]["w"] @ gradient) for s in range(2)
        )
        assert got == pytest.approx(expected)
