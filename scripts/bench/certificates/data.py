"""What certificates are tried on: exact scores of all rows, proxies by many sketches; made once."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from estimators.contracts import Factors
from estimators.grounds import Questions, training_sequence
from estimators.model.tokens import Sequence1D, collate, plan_batches
from estimators.registry import rebuild_factors
from estimators.rescoring import query_gradients
from estimators.scorers.bm25 import BM25
from estimators.sketching.sketch import Sketch, SketchPlan, training_sketches
from estimators.sketching.whitening import LayerWhitening
from estimators.storage import load_factors
from index.codes.onebit import OneBitIndex
from index.manifest import NoiseRecord
from scripts.bench.corpora import Subject, trained
from scripts.console import show_progress, stderr
from scripts.demo.steps import Steps
from service.corpus.source import CorpusSource
from service.indexing.building import BuildOptions, build_index
from service.indexing.noise import noise_record
from service.models import LoadedModel, load_model
from service.scoring.exhaustive import exact_scores
from service.search.opening import OpenIndex, open_index
from service.search.retrieval import Retriever

DAMPING = 0.1
TOKEN_BUDGET = 2048
SKETCHES_AT_ONCE = 20
NOISE_QUERIES = 16
"""The first queries, on which each draw's noise is measured as a build does."""
NOISE_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """One proposer's values for all queries and rows.

    Attributes:
        cosines: estimated cosines of query and row; 0 for rows without a gradient.
        noise: error scale of a cosine, of rows that have nothing in common with the query.
        relative: error scale that comes on top, as a share of the cosine.
        lawful: whether the errors are those of a random sketch.
        bytes_per_example: codes with their factor, norm and id; 0 if not stored as such.
    """

    cosines: Float[np.ndarray, "query row"]
    noise: float
    relative: float
    lawful: bool
    bytes_per_example: int = 0


class Ground:
    """Corpus, model, queries and exact scores, kept under a folder.

    Args:
        folder: for all that is made.
        texts: of the corpus.
        queries: the first ``NOISE_QUERIES`` only serve to measure noise.
    """

    def __init__(self, folder: Path, texts: int, queries: int) -> None:
        self.folder = folder
        self.subject: Subject = trained("fields", folder, queries, texts, 3)
        self.loaded: LoadedModel = load_model(str(self.subject.model))
        self.source = CorpusSource(data=str(self.subject.corpus), id_column="id")
        self.factors = folder / "ekfac.safetensors"
        if not self.factors.is_file():
            Steps().command(
                "fit",
                *("--model", str(self.subject.model), "--data", str(self.subject.corpus)),
                *("--out", str(self.factors), "--examples", "4096"),
            )
        self.index = self._open("one-bit", 16384)
        self.asked = [self.loaded.encode_query(*query) for query in self.subject.queries]
        self.rows = len(self.index.examples)
        self.sequences = [training_sequence(self.index.examples, row) for row in range(self.rows)]
        self.norms = self.index.norms.astype(np.float64)

    @property
    def exact(self) -> Float[np.ndarray, "query row"]:
        """Exact scores of all rows, positive = proponent."""
        return self._truths["exact"]

    @property
    def query_norms(self) -> Float[np.ndarray, "query"]:
        """Norms of the queries' whitened gradients."""
        return self._truths["query_norms"]

    @cached_property
    def _truths(self) -> dict[str, np.ndarray]:
        return self._kept("truth", self._truth)

    @property
    def cosines(self) -> Float[np.ndarray, "query row"]:
        """Exact cosines of whitened gradients; 0 for rows without a gradient."""
        divisors = np.where(self.norms > 0, self.norms, np.inf)
        cosines: np.ndarray = self.exact / divisors / self.query_norms[:, None]
        return cosines

    def estimates(self, codes: str, dimensions: int) -> Estimates:
        """Estimates from an index as a build makes it."""

        def make() -> dict[str, np.ndarray]:
            index = self._open(codes, dimensions)
            retriever = Retriever(index, TOKEN_BUDGET)
            found = []
            for query in show_progress(f"{codes} codes of {dimensions} dimensions", self.asked):
                directions, _ = retriever.directions(query)
                proxies = retriever.proxies(directions, "normalised")
                found.append(np.where(proxies.failed, 0, proxies.values).astype(np.float32))
            noise = index.manifest.sketch.noise
            stored = index.vectors.code_size + index.norms.itemsize + 8
            return {
                "values": np.stack(found),
                "law": np.array([max(noise.predicted, noise.measured), noise.relative]),
                "stored": np.array(stored),
            }

        kept = self._kept(f"{codes}-{dimensions}", make)
        return Estimates(
            cosines=kept["values"] / self.query_norms[:, None],
            noise=float(kept["law"][0]),
            relative=float(kept["law"][1]),
            lawful=codes != "low-rank",
            bytes_per_example=int(kept["stored"]),
        )

    def bm25(self) -> Estimates:
        """BM25 of prompt and completion together, a proposer that knows nothing of the model."""
        lexical = BM25(self.index.examples.texts)
        scores = [lexical.scores(f"{prompt}{said}") for prompt, said in self.subject.queries]
        return Estimates(cosines=np.stack(scores), noise=0.0, relative=0.0, lawful=False)

    def redraws(
        self, name: str, rows: Sequence[int], plans: Sequence[SketchPlan], queries: int
    ) -> "Redraws":
        """One-bit proxies of some rows by many draws of the sketch, for EK-FAC or the identity."""
        asked = self.asked[: NOISE_QUERIES + queries]
        estimator = self.index.estimators.choose_gradients(name)

        def make() -> dict[str, np.ndarray]:
            layers = self.loaded.coverage.layers
            gradients, _ = query_gradients(self.loaded.model, layers, asked)
            questions = Questions(sequences=[[(one, 1.0)] for one in asked], gradients=gradients)
            directions = estimator.directions(questions)
            sequences = [self.sequences[row] for row in rows]
            exact = exact_scores(
                self.loaded,
                {"": estimator.directions},
                self.index.examples,
                asked,
                rows=list(rows),
                token_budget=TOKEN_BUDGET,
                progress=show_progress,
            )[""]
            whitening = self._factors(name).whitening(layers, DAMPING)
            return redraw(self.loaded, whitening, sequences, directions, exact, plans)

        plan = plans[0]
        key = f"redraws-{name}-{len(rows)}-{len(plans)}-{plan.dimensions}-{plan.rank}"
        kept = self._kept(key, make)
        return Redraws(
            proxies=kept["proxies"],
            noise=[NoiseRecord.model_validate_json(str(text)) for text in kept["noise"]],
            exact=kept["exact"],
        )

    def _factors(self, name: str) -> Factors:
        return load_factors(self.factors)[1] if name == "ekfac" else rebuild_factors(name, {})

    def _open(self, codes: str, dimensions: int) -> OpenIndex:
        folder = self.folder / f"index-{codes}-{dimensions}"
        options = BuildOptions(
            dimensions=dimensions,
            codes=codes,
            damping=DAMPING,
            seed=1,
            token_budget=TOKEN_BUDGET,
            slices=1,
        )
        if not (folder / "manifest.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            build_index(folder, self.loaded, self.factors, self.source, options, show_progress)
        return open_index(folder, self.loaded)

    def _truth(self) -> dict[str, np.ndarray]:
        norms: list[Tensor] = []
        exact = exact_scores(
            self.loaded,
            {"": self.index.estimators.own.directions},
            self.index.examples,
            self.asked,
            token_budget=TOKEN_BUDGET,
            progress=show_progress,
            watch=lambda directions: norms.append(self.index.sketch.query(directions)[1]),
        )[""]
        return {"exact": exact, "query_norms": torch.cat(norms).cpu().numpy()}

    def _kept(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            stderr.print(f"Making {path.name} ...", highlight=False)
            unfinished = path.with_suffix(".tmp.npz")
            np.savez(unfinished, **make())  # type: ignore[arg-type]
            unfinished.replace(path)
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}


@dataclass(frozen=True, kw_only=True)
class Redraws:
    """One-bit proxies by several draws of the sketch, and the truth, as cosines.

    Attributes:
        proxies: estimated cosines; 0 for rows without a gradient.
        noise: as measured with each draw.
        exact: cosines.
    """

    proxies: Float[np.ndarray, "draw query row"]
    noise: list[NoiseRecord]
    exact: Float[np.ndarray, "query row"]


def redraw(
    loaded: LoadedModel,
    whitening: Mapping[str, LayerWhitening],
    sequences: Sequence[Sequence1D],
    directions: dict[str, Tensor],
    exact: Float[np.ndarray, "query row"],
    plans: Sequence[SketchPlan],
) -> dict[str, np.ndarray]:
    """Proxies of all queries and rows by each plan's sketch, through the code of a build.

    The first ``NOISE_QUERIES`` queries only serve to measure the noise.
    """
    layers = loaded.coverage.layers
    batches = list(plan_batches([len(s.tokens) for s in sequences], TOKEN_BUDGET))
    sampled = np.random.default_rng(0).permutation(len(sequences))[:NOISE_ROWS]
    found, records, cosines = [], [], np.zeros_like(exact)
    for start in range(0, len(plans), SKETCHES_AT_ONCE):
        part = plans[start : start + SKETCHES_AT_ONCE]
        sketches = [Sketch(layers, whitening, plan) for plan in part]
        indexes = [OneBitIndex(plan.dimensions) for plan in part]
        codes = [np.zeros((len(sequences), i.code_size), dtype=np.uint8) for i in indexes]
        norms = np.zeros((len(part), len(sequences)))
        for positions in show_progress(f"sketches {start + 1} to {start + len(part)}", batches):
            batch = collate([sequences[p] for p in positions]).to(loaded.device)
            sketched = training_sketches(sketches, loaded.model, batch)
            for number, (x, norm) in enumerate(sketched):
                length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-30)
                codes[number][positions] = indexes[number].encode((x / length).cpu().numpy())
                norms[number, positions] = norm.cpu().numpy()
        for number, (sketch, index) in enumerate(zip(sketches, indexes, strict=True)):
            index.add(index.pack(codes[number]), len(sequences))
            y, query_norms = (t.cpu().numpy() for t in sketch.query(directions))
            live = norms[number] > 0
            divisors = np.where(live, norms[number], np.inf)
            cosines = exact / divisors / query_norms[:, None]
            proxies = index.scan(y) / np.linalg.norm(y, axis=1, keepdims=True) * live
            head = (proxies - cosines)[:NOISE_QUERIES, sampled]
            truth = cosines[:NOISE_QUERIES, sampled]
            noise = noise_record(sketch.predicted_noise(), head, truth, live[sampled])
            records.append(noise.model_dump_json())
            found.append(proxies[NOISE_QUERIES:].astype(np.float32))
    return {
        "proxies": np.stack(found),
        "noise": np.array(records),
        "exact": cosines[NOISE_QUERIES:].astype(np.float32),
    }
