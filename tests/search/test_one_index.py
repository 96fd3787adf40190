"""One index, built with EK-FAC's factors, answers for every direction; the law holds for all."""

import numpy as np
import pytest

from estimators.names import RUN_DIRECTION
from estimators.registry import OPERATORS
from service.scoring.exhaustive import exact_scores
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from tests.index_fixtures import sentences

pytest_plugins = ["tests.index_fixtures"]

CHOICES = [
    ("ekfac", {"damping": 0.1}),
    ("ekfac", {"damping": 0.001}),
    ("ekfac", {"damping": 1.0}),
    ("kfac", {}),
    ("identity", {}),
]
K = 10


@pytest.fixture(scope="module")
def retriever(workshop, tmp_path_factory) -> Retriever:
    folder = tmp_path_factory.mktemp("one") / "index"
    workshop.build(folder, dimensions=16384, rank=64)
    return Retriever(open_index(folder, workshop.loaded))


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, str]]:
    """Beginnings of held-out sentences and how they go on."""
    words = [text.split(" ") for text in sentences(132)[120:]]
    return [(" ".join(w[:3]), " " + " ".join(w[3:])) for w in words]


def test_every_operator_is_asked():
    assert {name for name, _ in CHOICES} == set(OPERATORS) - {RUN_DIRECTION}  # needs a trace


@pytest.mark.parametrize(("name", "given"), CHOICES)
def test_recall_noise_and_certificates_for_any_direction(retriever, asked, name, given):
    index = retriever.index
    estimator = index.estimators.choose_gradients(name, given)
    sequences = [index.loaded.encode_query(*one) for one in asked]
    directions_of = {"": estimator.directions}
    exact = exact_scores(index.loaded, directions_of, index.examples, sequences)[""]
    residuals, found = [], []
    for number, (prompt, completion) in enumerate(asked):
        truth = exact[number] / index.norms
        directions, _ = retriever.directions(sequences[number], estimator)
        proxies = retriever.proxies(directions, "normalised")
        residuals.append((proxies.values - truth) / proxies.scales(truth))
        answer = retriever.answer(
            Query(
                prompt=prompt,
                completion=completion,
                k=K,
                estimator=name,
                parameters=given,
                budget=50,
                seed=number,
            )
        )
        threshold = np.sort(truth)[-K] - 1e-4 * np.abs(truth).max()
        recall = float(np.mean(truth[[r.row for r in answer.results]] >= threshold))
        found.append(recall)
        for certificate in answer.certificates:
            bound = certificate.recall_lower_bound
            assert bound is None or recall >= bound - 1e-9
        assert answer.estimator == name
        assert answer.parameters == estimator.values
    # Uniform rows have errors of one scale; those near the query may have more.
    assert 0.8 < float(np.sqrt(np.mean(np.square(residuals)))) < 1.3
    assert np.mean(found) > 0.9


def test_directions_of_one_index_differ(retriever, asked):
    sequence = retriever.loaded.encode_query(*asked[0])
    every = [
        retriever.directions(sequence, retriever.index.estimators.choose_gradients(name, given))[0]
        for name, given in CHOICES
    ]
    flat = np.stack([np.concatenate([v.flatten() for v in d.values()]) for d in every])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    cosines = flat @ flat.T - np.eye(len(CHOICES))
    assert cosines.max() < 0.999


def test_fingerprints_tell_estimators_and_parameters_apart(retriever):
    choose = retriever.index.estimators.choose
    every = {choose(name, given).fingerprint for name, given in CHOICES}
    assert len(every) == len(CHOICES)
    assert choose(None, {}).fingerprint == choose("ekfac", {"damping": 0.1}).fingerprint


def test_an_index_without_corrected_eigenvalues_says_what_it_lacks(workshop, tmp_path):
    workshop.build(tmp_path / "index", factors=workshop.fit("kfac"))
    index = open_index(tmp_path / "index", workshop.loaded)
    offers = {offer.name: offer for offer in index.estimators.offers()}
    assert offers["kfac"].unavailable is None
    assert offers["identity"].unavailable is None
    assert "lack 'eigenvalues'" in offers["ekfac"].unavailable
    with pytest.raises(ValueError, match="lack 'eigenvalues'"):
        Retriever(index).answer(Query(prompt="Porto", completion=" is", estimator="ekfac"))
