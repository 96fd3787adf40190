"""The kernel for one-bit codes, run by Triton's interpreter where Triton is installed."""

import importlib
import logging
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from index.codes.vectors import make_index
from service import device_search
from service.device_search import DeviceIndex, find_sign_kernel


@pytest.fixture
def kernel() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("service.sign_kernel")


@pytest.mark.parametrize(
    ("rows", "dimensions", "queries"), [(300, 1024, 3), (1, 8, 1), (9, 100, 70)]
)
def test_products_are_those_with_the_signs_and_nothing_else_is_written(
    rows, dimensions, queries, kernel
):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(256, (rows, -(-dimensions // 8)), dtype=torch.uint8, generator=generator)
    y = torch.nn.functional.normalize(torch.randn(queries, dimensions, generator=generator))
    factors = torch.rand(rows, generator=generator)
    room = torch.full((queries, rows + 10), 7.0)
    kernel.multiply_signs(y, words, factors, room[:, 5 : 5 + rows])
    bits = np.unpackbits(words.numpy(), axis=1, count=dimensions, bitorder="little")
    signs = torch.from_numpy(2.0 * bits - 1).double()
    expected = y.half().double() @ signs.T * factors
    torch.testing.assert_close(room[:, 5 : 5 + rows].double(), expected, atol=1e-6, rtol=1e-5)
    assert room[:, :5].eq(7).all()
    assert room[:, 5 + rows :].eq(7).all()


def test_an_index_scans_with_it_what_it_scans_without(kernel, monkeypatch):
    assert kernel.find_obstacle(torch.device("cpu")) is None
    monkeypatch.setattr(device_search, "find_sign_kernel", lambda device: kernel.multiply_signs)
    generator = np.random.default_rng(0)
    host = make_index("one-bit", 200)
    codes = host.encode(generator.standard_normal((150, 200)).astype(np.float32))
    queries = 30 * generator.standard_normal((5, 200)).astype(np.float32)
    found = []
    for allowed in (True, False):
        index = DeviceIndex("one-bit", 200, "cpu", kernel=allowed)
        assert index.has_kernel == allowed
        for part in np.split(codes, [33]):
            index.add(index.pack(part), len(part))
        found.append(index.scan(queries))
    np.testing.assert_allclose(found[0], found[1], atol=2e-3 * np.std(found[1]))
    assert not DeviceIndex("half", 200, "cpu").has_kernel


def test_a_kernel_that_fails_or_errs_is_not_used(kernel, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("No compiler.\nLook for one.")

    monkeypatch.setattr(kernel, "multiply_signs", fails)
    assert kernel.find_obstacle(torch.device("cpu")) == "RuntimeError: No compiler."
    monkeypatch.setattr(kernel, "multiply_signs", lambda y, words, factors, found: found.zero_())
    assert kernel.find_obstacle(torch.device("cpu")) == "it computes something else here"


def test_without_triton_a_warning_says_what_it_costs(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "service.sign_kernel", raising=False)
    find_sign_kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert find_sign_kernel(torch.device("cuda")) is None
    find_sign_kernel.cache_clear()
    assert "take many times as long without the kernel" in caplog.text
    assert find_sign_kernel(torch.device("cpu")) is None
