"""Running out of memory: halves, told once, nothing counted twice, one sentence at the end."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from estimators.curvature.fitting import fit_estimator
from estimators.model.capture import visit_gradients
from estimators.model.layers import find_layers
from estimators.model.memory import BackOff, OutOfMemory, ran_out
from tests import dense_reference as dense

ROOT = Path(__file__).parents[2]
CPU_SAYS = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError(CPU_SAYS)], ids=repr
)
def test_halves_cover_the_batch_in_order(error: Exception, caplog: pytest.LogCaptureFixture):
    lengths = [7, 1, 2, 3, 5, 5, 5, 5, 5]
    attempts: list[int] = []
    done: list[int] = []

    def work(part: Sequence[int]) -> None:
        padded = len(part) * max(lengths[p] for p in part)
        attempts.append(padded)
        if padded > 11:
            raise error
        done.extend(part)

    backing = BackOff(lengths)
    with caplog.at_level(logging.WARNING, logger="estimators.model.memory"):
        backing.run([1, 2, 3, 4, 5, 6, 7], work)
        assert done == [1, 2, 3, 4, 5, 6, 7]
        backing.run([4, 5, 6, 7, 8], work)
    assert done[7:] == [4, 5, 6, 7, 8]
    # 35 tokens failed, so that at most 17 were tried next: 15 failed too, 25 was cut at once.
    assert [padded for padded in attempts if padded > 11] == [35, 15]
    assert [r.message for r in caplog.records] == [
        "Out of memory with 35 padded tokens a batch; going on with smaller batches. A smaller "
        "--token-budget avoids the lost time."
    ]


def test_one_sequence_that_does_not_fit_is_one_sentence():
    def work(part: Sequence[int]) -> None:
        if 2 in part:
            raise MemoryError

    with pytest.raises(OutOfMemory, match=r"one sequence of 40 tokens \(MemoryError\)\. Cut texts"):
        BackOff([1, 1, 40]).run([0, 1, 2], work)


def test_a_long_sequence_does_not_fail_for_what_shorter_ones_did():
    lengths = [30, 2, 2, 2, 2]
    done: list[int] = []

    def work(part: Sequence[int]) -> None:
        if len(part) > 1:
            raise MemoryError
        done.extend(part)

    backing = BackOff(lengths)
    backing.run([1, 2, 3, 4], work)
    backing.run([0], work)
    assert done == [1, 2, 3, 4, 0]


def test_other_errors_pass():
    def work(part: Sequence[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        BackOff([1, 1]).run([0, 1], work)
    assert not ran_out(KeyError("out of memory"))


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_fit_that_runs_out_half_way_counts_nothing_twice(
    name: str, gpt2, sequences, monkeypatch: pytest.MonkeyPatch
):
    layers = find_layers(gpt2).layers
    expected = fit_estimator(name, gpt2, layers, sequences, token_budget=40).tensors()
    failures = []

    def failing(model, layers, batch, visit, label_seed, visit_terms, places):
        # Each batch size fails at another layer, some before the first and some after the last.
        ends = {4: 3, 3: 0, 2: len(layers) - 1}
        reached = []

        def visit_or_fail(layer, a, d):
            if len(reached) == ends.get(len(batch.rows)):
                failures.append(layer.name)
                raise MemoryError
            reached.append(layer.name)
            visit(layer, a, d)

        return visit_gradients(
            model, layers, batch, visit_or_fail, label_seed, visit_terms=visit_terms, places=places
        )

    monkeypatch.setattr("estimators.curvature.fitting.visit_gradients", failing)
    monkeypatch.setattr(
        "estimators.model.memory.BackOff._padded", lambda self, positions: len(positions)
    )
    found = fit_estimator(name, gpt2, layers, sequences, token_budget=40).tensors()
    assert len(set(failures)) >= 2
    for key, tensor in expected.items():
        if key.endswith((".left", ".right")):  # eigenvectors up to their sign
            product = (found[key].T @ tensor).abs()
            assert dense.relative_error(product, torch.eye(len(product))) < 1e-6
        else:
            assert dense.relative_error(found[key], tensor) < 1e-9


LIMITED = """
import logging, resource, torch
from estimators.model.memory import BackOff
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
logging.basicConfig()
done = []
def work(part):
    held = torch.ones(len(part), 25 * 2**20)  # 100 MB a sequence
    done.extend(part)
BackOff([25] * 8).run(range(8), work)
print(done)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")
def test_a_real_limit_of_memory_is_survived():
    run = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(list(range(8)))
    assert run.stderr.count("Out of memory with 200 padded tokens a batch") == 1
