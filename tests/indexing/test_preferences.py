"""Pairs of which one was preferred: DPO's loss, its gradients and its Fisher matrix."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from estimators.contracts import PASSES
from estimators.curvature.fitting import as_fitted, fit_estimator
from estimators.grounds import training_sequence
from estimators.model.capture import visit_gradients
from estimators.model.gradients import sum_over_tokens
from estimators.model.layers import find_layers
from estimators.model.selection import LayerSelection
from estimators.model.tokens import Rejected, Sequence1D, collate
from estimators.rescoring import score_batch, score_batch_for_queries
from estimators.sketching.sketch import Sketch, SketchPlan
from service.corpus.reading import read_examples, sequence_of
from service.corpus.source import CorpusSource
from service.indexing.fitting import FitOptions, draw_sequences
from service.models import load_model
from service.search.opening import open_index
from service.search.query import Query
from service.search.retrieval import Retriever
from tests.dense_reference import loss, trainable, weight_gradients, worst_error
from tests.index_fixtures import CONTEXT, save_model, sentences, write_jsonl

pytest_plugins = ["tests.index_fixtures"]

PAIRS = [
    {
        "prompt": text[:8],
        "chosen": text[8:20],
        "rejected": f" {other[3:12]}.",
    }
    for text, other in zip(sentences(12), sentences(24)[12:], strict=True)
]
BETA = 0.3


@pytest.fixture(scope="module")
def reference(workshop, tmp_path_factory):
    """Another model of the same kind, as it was before the preferences were learnt."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workshop.loaded.source)
    return load_model(str(save_model(tmp_path_factory.mktemp("reference"), tokenizer, seed=5)))


def source_of(folder, reference, rows=PAIRS, **options) -> CorpusSource:
    path = write_jsonl(folder / "pairs.jsonl", rows)
    return CorpusSource(data=str(path), beta=BETA, reference=reference.source, **options)


@pytest.fixture(scope="module")
def read(workshop, reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    return list(read_examples(source_of(folder, reference), workshop.loaded, CONTEXT))


def dpo(model, reference, example) -> torch.Tensor:
    """The loss by its formula, in float64."""
    other = example.preference
    pair = [
        Sequence1D(tokens=example.tokens, counted=example.counted),
        Sequence1D(tokens=other.tokens, counted=other.counted),
    ]
    logs = [[-loss(m, sequence) for sequence in pair] for m in (model, reference)]
    margin = BETA * ((logs[0][0] - logs[0][1]) - (logs[1][0] - logs[1][1]))
    return -torch.nn.functional.logsigmoid(margin)


def summed_gradients(model, layers, sequences) -> list[dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}

    def visit(layer: Any, a: torch.Tensor, d: torch.Tensor) -> None:
        found[layer.name] = sum_over_tokens(a, d)

    visit_gradients(model, layers, collate(sequences), visit)
    return [{n: g[i] for n, g in found.items()} for i in range(len(sequences))]


def test_gradients_are_those_of_the_loss(workshop, reference, read):
    model, theirs = trainable(workshop.loaded.model), trainable(reference.model)
    layers = workshop.loaded.coverage.layers
    found = summed_gradients(workshop.loaded.model, layers, [sequence_of(e) for e in read])
    for example, gradients in zip(read, found, strict=True):
        expected = weight_gradients(model, layers, dpo(model, theirs, example))
        assert worst_error(gradients, expected) < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the library's own
def test_gradients_are_those_of_the_trainers_own_loss(workshop, reference, tmp_path):
    from trl import DPOConfig, DPOTrainer

    loaded = workshop.loaded
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        beta=BETA,
        max_length=CONTEXT,
    )
    trainer = DPOTrainer(
        model=trainable(loaded.model),
        ref_model=trainable(reference.model),
        args=arguments,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=PreTrainedTokenizerFast.from_pretrained(loaded.source),
    )
    mine = list(read_examples(source_of(tmp_path, reference, append_eos=True), loaded, CONTEXT))
    layers = loaded.coverage.layers
    found = summed_gradients(loaded.model, layers, [sequence_of(e) for e in mine])
    trainer.model.eval()  # without dropout
    for row, gradients in zip(trainer.train_dataset, found, strict=True):
        value = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
        assert worst_error(gradients, weight_gradients(trainer.model, layers, value)) < 1e-5


def test_known_log_probabilities_stand_for_the_reference(workshop, reference, read, tmp_path):
    rows = []
    for pair, example in zip(PAIRS, read, strict=True):
        other = example.preference
        sequences = (
            Sequence1D(tokens=example.tokens, counted=example.counted),
            Sequence1D(tokens=other.tokens, counted=other.counted),
        )
        logs = [-float(loss(trainable(reference.model), s).detach()) for s in sequences]
        rows.append({**pair, "ref_chosen_logps": logs[0], "ref_rejected_logps": logs[1]})
    source = replace(source_of(tmp_path, reference, rows), reference=None)
    found = list(read_examples(source, workshop.loaded, CONTEXT))
    margins = [example.preference.margin for example in read]
    assert [e.preference.margin for e in found] == pytest.approx(margins, rel=1e-4, abs=1e-4)
    assert [e.tokens for e in found] == [e.tokens for e in read]
    assert found[0].metadata == {}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {"reference": None}, "DPO's loss compares with a reference model"),
        ({"ref_chosen_logps": 3.0, "ref_rejected_logps": -1.0}, {}, "numbers of at most 0"),
        ({"chosen": [{"role": "user", "content": "x"}]}, {}, "a text beside messages"),
        ({"weight": -1.0}, {"columns": {"weight": "weight"}}, "a number of at least 0"),
    ],
)
def test_what_is_no_pair_is_refused(workshop, reference, tmp_path, change, options, said):
    source = replace(source_of(tmp_path, reference, [{**PAIRS[0], **change}]), **options)
    with pytest.raises(ValueError, match="Row 0 of the corpus") as told:
        list(read_examples(source, workshop.loaded, CONTEXT))
    assert said in str(told.value)


def test_a_pair_that_is_too_long_is_cut_off(workshop, reference, tmp_path):
    long = [{**PAIRS[0], "rejected": " ".join(sentences(4))}]
    (example,) = read_examples(source_of(tmp_path, reference, long), workshop.loaded, CONTEXT)
    assert example.id == "0"
    assert len(example.preference.tokens) == CONTEXT
    theirs = trainable(reference.model)
    expected = weight_gradients(
        model := trainable(workshop.loaded.model),
        layers := workshop.loaded.coverage.layers,
        dpo(model, theirs, example),
    )
    (found,) = summed_gradients(workshop.loaded.model, layers, [sequence_of(example)])
    assert worst_error(found, expected) < 1e-5


@pytest.mark.parametrize("embeddings", [False, True])
def test_scores_and_sketches_of_pairs_beside_texts(workshop, read, embeddings):
    """A batch may hold pairs, weighted texts and plain ones; each is scored as if alone."""
    model = trainable(workshop.loaded.model)
    model.requires_grad_(False)
    layers = find_layers(model, LayerSelection(embeddings=embeddings)).layers
    plain = Sequence1D(tokens=read[0].tokens)
    mixed = [sequence_of(read[1]), plain, replace(plain, weight=2.5), sequence_of(read[2])]
    generator = torch.Generator().manual_seed(0)
    directions = {
        layer.name: torch.randn(
            2, layer.in_features, layer.out_features, generator=generator, dtype=torch.float64
        )
        for layer in layers
    }
    alone = torch.cat(
        [score_batch_for_queries(model, layers, directions, collate([s])) for s in mixed], dim=1
    )
    together = score_batch_for_queries(model, layers, directions, collate(mixed))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    assert float(alone[0, 2] / alone[0, 1]) == pytest.approx(2.5)
    for number in range(2):
        one = {name: direction[number] for name, direction in directions.items()}
        parts = score_batch(model, layers, one, collate(mixed))
        torch.testing.assert_close(parts.total, alone[number], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parts.by_position.sum(1), alone[number], rtol=1e-9, atol=1e-12)
    fitted = fit_estimator("ekfac", model, layers, mixed)
    sketch = Sketch(
        layers, fitted.whitening(layers, 0.1), SketchPlan(seed=1, dimensions=256, rank=8)
    )
    apart = [sketch.training(model, collate([s])) for s in mixed]
    joint, norms = sketch.training(model, collate(mixed))
    torch.testing.assert_close(joint, torch.cat([x for x, _ in apart]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(norms, torch.cat([n for _, n in apart]), rtol=1e-6, atol=1e-9)


def test_a_fit_draws_which_of_a_pair_won():
    """As often as the model would prefer the other one; weights make no curvature."""
    pair = Rejected(tokens=(0, 1), counted=((1, 2),), beta=2.0, margin=0.7)
    count, chance = 4000, 1 / (1 + np.exp(0.7))
    drawn = [
        as_fitted(Sequence1D(tokens=(0, 2), weight=3.0, rejected=pair, row=row), label_seed=9)
        for row in range(count)
    ]
    won = np.mean([one.rejected.won for one in drawn])
    assert abs(won - chance) < 4 * np.sqrt(chance * (1 - chance) / count)
    assert {one.weight for one in drawn} == {1.0}
    assert as_fitted(Sequence1D(tokens=(0, 2), rejected=pair), None).rejected == pair


def test_factors_of_pairs_are_those_of_what_was_drawn(workshop, reference, tmp_path):
    """The covariance of output gradients, beside sums over pairs one by one in float64."""
    loaded = workshop.loaded
    model = trainable(loaded.model)
    model.requires_grad_(False)
    sequences = draw_sequences(loaded, source_of(tmp_path, reference), FitOptions())
    layer = loaded.coverage.layers[0]
    (own,) = [one for one in find_layers(model).layers if one.name == layer.name]
    fitted = fit_estimator("kfac", model, [own], sequences, seed=0)
    label_seed = len(PASSES) * 0 + PASSES.index("covariances")
    total = torch.zeros(own.out_features, own.out_features, dtype=torch.float64)

    def visit(_: Any, a: torch.Tensor, d: torch.Tensor) -> None:
        total.add_(torch.einsum("bti,btj->ij", d, d))

    for sequence in sequences:
        visit_gradients(model, [own], collate([as_fitted(sequence, label_seed)]), visit)
    _, vectors = torch.linalg.eigh(total)
    found = fitted.tensors()[f"{own.name}.right"].double()
    leading = vectors[:, -1] @ found
    assert float(leading.abs().max()) == pytest.approx(1.0, abs=1e-6)


def test_the_chance_that_the_rejected_one_wins_is_that_of_the_model():
    pair = Rejected(tokens=(0, 1), counted=((1, 2),), beta=2.0, margin=0.7)
    sigmoid = 1 / (1 + np.exp(-0.7))
    assert pair.slope == pytest.approx(2.0 * (1 - sigmoid))
    assert replace(pair, won=True).slope == pytest.approx(-2.0 * sigmoid)
    mean = sigmoid * pair.slope + (1 - sigmoid) * replace(pair, won=True).slope
    assert mean == pytest.approx(0)  # a score has no mean


def test_an_index_of_pairs_answers_by_their_loss(workshop, reference, tmp_path):
    loaded = workshop.loaded
    rows = [{**pair, "copies": 1.0 + i % 3} for i, pair in enumerate(PAIRS)]
    source = source_of(tmp_path, reference, rows, columns={"weight": "copies"})
    manifest = workshop.build(tmp_path / "index", source=source)
    reading = manifest.parts[0].data.reading
    assert (reading.format, reading.beta, reading.reference) == (
        "preference",
        BETA,
        reference.source,
    )
    index = open_index(tmp_path / "index", loaded)
    retriever = Retriever(index)
    answer = retriever.answer(
        Query(prompt="The bridge", completion=" of Porto", k=5, budget=24, tokens=True, layers=True)
    )
    directions, _ = retriever.directions(
        loaded.encode_query("The bridge", " of Porto"), index.estimators.own
    )
    model, theirs = trainable(loaded.model), trainable(reference.model)
    for result in answer.results:
        example = index.examples[result.row]
        assert example.weight == 1.0 + result.row % 3
        assert "--- rejected: ---" in example.text
        value = example.weight * dpo(model, theirs, example)
        gradient = weight_gradients(model, loaded.coverage.layers, value)
        expected = sum(float((directions[n].double() * g).sum()) for n, g in gradient.items())
        assert result.score == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert len(result.tokens) == len(index.examples.read(result.row))
        assert sum(score for _, score in result.tokens) == pytest.approx(expected, rel=1e-3)
        assert sum(result.layers.values()) == pytest.approx(expected, rel=1e-3)
        assert training_sequence(index.examples, result.row).padded > len(example.tokens)
