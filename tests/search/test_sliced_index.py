"""Searches of an index of several slices: the same exact scores, sharper estimates."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from estimators.model.tokens import Sequence1D, collate
from estimators.sketching.sketch import SketchPlan
from estimators.sketching.slices import SketchSlices
from estimators.storage import load_factors
from index.codes.signs import encode_signs, estimate_signs
from index.editing import delete_rows
from scripts.bench.certificates.worlds import Known
from service.indexing.encoding import encode_further
from service.scoring.exhaustive import exact_scores
from service.search.answer import Clock
from service.search.opening import open_index
from service.search.proposing import estimate_rows
from service.search.proxies import Proxies
from service.search.query import Condition, Query
from service.search.retrieval import Retriever
from service.search.search import Search
from service.search.shards import DenseShard
from tests.rankings import assert_best_first

pytest_plugins = ["tests.index_fixtures"]

SLICES, ROWS = 16, 120
AFTER = [1, 4, 16]
ASKED = Query(
    prompt="In 1828 a fire destroyed",
    completion=" the old theatre",
    k=5,
    budget=60,
    calibration_rows=16,
    audit_rows=16,
    seed=3,
)


@pytest.fixture(scope="module")
def folder(workshop) -> Path:
    """An index of sixteen slices; tests only read it."""
    folder = workshop.folder / "sixteen"
    workshop.build(folder, slices=SLICES)
    return folder


@pytest.fixture(scope="module")
def retriever(workshop, folder) -> Retriever:
    return Retriever(open_index(folder, workshop.loaded))


def truth_of(retriever: Retriever, query: Query) -> np.ndarray:
    index = retriever.index
    sequence = index.loaded.encode_query(query.prompt, query.completion)
    directions = {"": index.estimators.own.directions}
    return exact_scores(index.loaded, directions, index.examples, [sequence])[""][0]


def directions_of(retriever: Retriever, query: Query):
    sequence = retriever.loaded.encode_query(query.prompt, query.completion)
    return retriever.directions(sequence)[0]


@pytest.mark.parametrize("ranking", ["score", "normalised"])
def test_estimates_are_means_over_the_slices_by_their_formula(retriever, ranking):
    index = retriever.index
    directions = directions_of(retriever, ASKED)
    shard = estimate_rows(index, directions, ranking)
    assert shard.looks == len(AFTER)
    sketched = index.sketches.query({n: d[None] for n, d in directions.items()})
    rows = np.random.default_rng(0).permutation(ROWS)[:40]
    cosines = [shard.cosines[rows].astype(np.float64)]
    codes = index.slices.read(rows, SLICES - 1)
    for number in range(1, SLICES):
        y = sketched[number][0][0].double().numpy()
        code = codes[number - 1]
        bits = np.unpackbits(code[:, :-8], axis=1, bitorder="little")
        factors = code[:, -4:].copy().view(np.float32)[:, 0] / bits.shape[1] ** 0.5
        cosines.append(((2.0 * bits - 1) @ y) * factors / np.linalg.norm(y))
    norm = index.norms[rows] if ranking == "score" else (index.norms[rows] > 0)
    for look, count in enumerate(AFTER):
        found = shard.at(rows, look)
        wanted = np.mean(cosines[:count], axis=0) * float(sketched[0][1][0]) * norm
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(found.values, wanted, atol=2e-3 * scale)
        assert found.sigmas.max() < 1.4 * shard.at(rows, 0).sigmas.max() / count**0.5


def test_later_looks_err_as_they_say(retriever):
    residuals: list[list[float]] = [[] for _ in AFTER]
    for number, prompt in enumerate(("The market of Porto", "Every spring", "Kyoto is known for")):
        query = replace(
            ASKED, prompt=prompt, completion=[" opened", " the library", " its"][number]
        )
        values = truth_of(retriever, query) / retriever.index.norms
        shard = estimate_rows(retriever.index, directions_of(retriever, query), "normalised")
        for look in range(len(AFTER)):
            near = shard.at(np.arange(ROWS), look)
            residuals[look] += ((near.values - values) / near.scales(values)).tolist()
    for found in residuals:
        assert 0.7 < float(np.sqrt(np.mean(np.square(found)))) < 1.15


@pytest.mark.parametrize("direction", ["proponents", "opponents"])
@pytest.mark.parametrize("ranking", ["score", "normalised"])
def test_answers_are_the_exact_ranking_with_fewer_rows_rescored(
    retriever, workshop, built, ranking, direction
):
    query = replace(ASKED, ranking=ranking, direction=direction, budget=ROWS)
    answer = retriever.answer(query)
    truth = truth_of(retriever, query)
    values = truth if ranking == "score" else truth / retriever.index.norms
    sign = 1 if direction == "proponents" else -1
    assert answer.certificates[0].status in ("certified", "exhaustive")
    assert_best_first([result.row for result in answer.results], sign * values, rounding=1e-3)
    for result in answer.results:
        assert result.score == pytest.approx(truth[result.row], rel=1e-3, abs=1e-4)
    alone = Retriever(open_index(built, workshop.loaded)).answer(query)
    assert answer.rescored_rows <= alone.rescored_rows


def test_the_estimate_of_a_result_is_that_of_all_slices(retriever):
    answer = retriever.answer(ASKED)
    shard = estimate_rows(retriever.index, directions_of(retriever, ASKED), "normalised")
    rows = np.array([result.row for result in answer.results])
    np.testing.assert_allclose(
        [result.proxy for result in answer.results], shard.at(rows, 2).values, rtol=1e-4
    )


def test_filters_and_deleted_rows_are_looked_up_where_they_lie(retriever, workshop, tmp_path):
    workshop.build(tmp_path, slices=SLICES)
    delete_rows(tmp_path, [f"fact-{number}" for number in range(0, 30, 2)])
    shorter = Retriever(open_index(tmp_path, workshop.loaded))
    kept = shorter.index.kept
    assert kept is not None
    whole = estimate_rows(retriever.index, directions_of(retriever, ASKED), "normalised")
    some = estimate_rows(shorter.index, directions_of(shorter, ASKED), "normalised")
    rows = np.array([0, 17, 90, 5])
    for look in range(len(AFTER)):
        np.testing.assert_allclose(
            some.at(rows, look).values, whole.at(kept[rows], look).values, rtol=1e-4, atol=1e-6
        )
        np.testing.assert_array_equal(
            some.among(rows).negated().at(np.arange(4), look).values,
            -some.at(rows, look).values,
        )
    asked = replace(ASKED, filters={"page": Condition(at_least=20, at_most=80)})
    answer = shorter.answer(asked)
    assert {result.id for result in answer.results} <= {
        f"fact-{number}" for number in range(20, 81) if number >= 30 or number % 2
    }
    truth = truth_of(shorter, ASKED)
    for result in answer.results:
        assert result.score == pytest.approx(truth[result.row], rel=1e-3, abs=1e-4)


def test_looks_are_told(retriever):
    observed = retriever.answer(ASKED).certificates[0].observed
    assert observed["looks"] == len(AFTER)


REDRAWS, QUESTIONS = 24, 8


def test_redrawn_slices_of_real_gradients_keep_the_stated_confidence(retriever, workshop):
    """Sketches drawn again and again for the same gradients, through the code of a build."""
    index = retriever.index
    asked = [
        replace(ASKED, prompt=" ".join(index.examples[row].text.split()[:3]), completion=" the")
        for row in range(5, 5 + 13 * QUESTIONS, 13)
    ]
    truths = [truth_of(retriever, query) / index.norms for query in asked]
    directions = [directions_of(retriever, query) for query in asked]
    stacked = {name: torch.stack([one[name] for one in directions]) for name in directions[0]}
    sequences = [Sequence1D(tokens=index.examples.tokens(row)) for row in range(ROWS)]
    layers = index.loaded.coverage.layers
    whitening = load_factors(workshop.factors)[1].whitening(layers, 0.1)
    model, batch = index.loaded.model, collate(sequences)
    wrong = np.zeros((REDRAWS, QUESTIONS), dtype=bool)
    spared = []
    for draw in range(REDRAWS):
        plan = SketchPlan(seed=9000 + draw, dimensions=512, rank=16)
        sketches = SketchSlices(layers, whitening, plan, SLICES)
        trained = [(x.numpy(), norm.numpy()) for x, norm in sketches.training(model, batch)]
        psi = sketches.query(stacked)
        first = encode_signs(trained[0][0], np.ones(ROWS))
        codes = [first, *encode_further(trained[1:], index.norms).swapaxes(0, 1)]
        cosines = [
            estimate_signs(code, (y / y.norm(dim=1, keepdim=True)).numpy())
            for code, (y, _) in zip(codes, psi, strict=True)
        ]
        norms = psi[0][1].numpy()
        for number, truth in enumerate(truths):
            looks = [
                Proxies(
                    values=norms[number] * np.mean(cosines[:count], axis=0)[number],
                    sigmas=np.full(ROWS, norms[number] * sketches.predicted_noise(count)),
                    relative=0.1 / count**0.5,
                    divisors=np.ones(ROWS),
                    failed=np.zeros(ROWS, dtype=bool),
                )
                for count in AFTER
            ]
            query = replace(asked[number], budget=ROWS, calibration_rows=30, audit_rows=0)
            search = Search(query, DenseShard(*looks), draw)
            bound = search.run(Known(truth), Clock())[0].recall_lower_bound
            recall = float(np.mean(truth[search.best(5)] >= np.sort(truth)[-5]))
            wrong[draw, number] = bound is not None and bound > recall + 1e-9
            spared.append(ROWS - int(search.scored.sum()))
    shares = wrong.mean(1)  # of one draw they are dependent
    assert shares.mean() <= 0.05 + 3.1 * shares.std(ddof=1) / REDRAWS**0.5
    assert np.mean(np.array(spared) > 0) > 0.5  # certified with rows left, not by scoring all
