"""Where rows come from, which matrix an operand is, and rows in order by sequence."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from estimators.layers.operands import Operands, Parameter, find_product
from estimators.layers.places import follow, places_of, put_places
from estimators.layers.rows import NOWHERE, by_sequence

BATCH, TOKENS, WIDTH = 3, 4, 6


class Following(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        follow(func, args, kwargs or {}, output)
        return output


def numbered() -> Tensor:
    """Every entry is the number of its token: whatever is done to rows, they say whose they are."""
    places = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)
    values = places[..., None].expand(BATCH, TOKENS, WIDTH).double().clone()
    put_places(values, places)
    return values


CHOSEN = torch.tensor([5, 2, 2, 11, 0])
MASK = torch.arange(BATCH * TOKENS) % 3 == 1
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda x: x.flatten(0, 1),
    "reshaped": lambda x: x.reshape(-1, WIDTH),
    "view": lambda x: x.view(-1, x.shape[-1]),
    "chosen": lambda x: x.view(-1, WIDTH)[CHOSEN],
    "chosen behind a new axis": lambda x: x.view(-1, WIDTH)[None, CHOSEN],
    "masked": lambda x: x.view(-1, WIDTH)[MASK],
    "index_select": lambda x: x.view(-1, WIDTH).index_select(0, CHOSEN),
    "gathered": lambda x: x.view(-1, WIDTH).gather(0, CHOSEN[:, None].expand(-1, WIDTH)),
    "one": lambda x: x.view(-1, WIDTH)[7],
    "heads": lambda x: x.view(BATCH, TOKENS, 2, 3).transpose(1, 2),
    "heads and back": lambda x: (
        x.view(BATCH, TOKENS, 2, 3).transpose(1, 2).transpose(1, 2).flatten(2)
    ),
    "time first": lambda x: x.transpose(0, 1).contiguous(),
    "permuted": lambda x: x.permute(1, 0, 2).reshape(-1, WIDTH),
    "part of the features": lambda x: x[..., 1:3],
    "every other feature": lambda x: x[:, :, ::2],
    "later tokens": lambda x: x[:, 1:],
    "repeated": lambda x: x.view(-1, WIDTH).repeat(2, 1),
    "interleaved": lambda x: x.view(-1, WIDTH).repeat_interleave(2, dim=0),
    "split": lambda x: x.view(-1, WIDTH).split([5, 7])[1],
    "chunked features": lambda x: x.chunk(2, dim=-1)[1],
    "joined": lambda x: torch.cat([x.view(-1, WIDTH)[CHOSEN], x.view(-1, WIDTH)[MASK]]),
    "flipped": lambda x: x.flip(1),
    "rolled": lambda x: torch.roll(x, 1, dims=1),
    "activated": lambda x: (
        nn.functional.silu(x.view(-1, WIDTH)[CHOSEN]) * 0 + x.view(-1, WIDTH)[CHOSEN]
    ),
    "multiplied": lambda x: x @ torch.eye(WIDTH, 2).double(),
    "converted": lambda x: x.float().to(torch.float64),
}


@pytest.mark.parametrize("name", MOVES)
def test_rows_are_followed(name):
    with Following():
        moved = MOVES[name](numbered())
    places = places_of(moved)
    assert places is not None
    assert places.shape == moved.shape[:-1]
    assert torch.equal(moved[..., 0].round().long(), places)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=4))
def test_several_moves_are_followed_or_given_up(names):
    with Following():
        moved = numbered()
        for name in names:
            try:
                moved = MOVES[name](moved)
            except (RuntimeError, IndexError):
                return
    places = places_of(moved)
    if places is not None and name != "multiplied":
        assert torch.equal(moved, places[..., None].expand(moved.shape).double())


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x.transpose(1, 2),  # features became tokens
        lambda x: x.reshape(BATCH, -1),  # one row of all tokens
        lambda x: x.sum(1),
    ],
)
def test_rows_of_several_tokens_are_nobodys(mixing):
    with Following():
        assert places_of(mixing(numbered())) is None


def test_what_is_added_to_rows_does_not_rename_them():
    with Following():
        x = numbered().view(-1, WIDTH)
        total = torch.zeros_like(x)
        backwards = torch.arange(BATCH * TOKENS - 1, -1, -1)
        total.index_add_(0, backwards, x[backwards])
    assert torch.equal(places_of(total), torch.arange(BATCH * TOKENS))
    assert torch.equal(total, x)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_operands_are_found_by_where_they_lie(turned, double):
    fused, flat = nn.Parameter(torch.randn(4, 3, 5)), nn.Parameter(torch.randn(4 * 3, 5))
    named = {Parameter("m", "fused"): fused, Parameter("m", "flat"): flat}
    operands = Operands(named)
    for name, matrices in (("fused", fused), ("flat", flat.view(4, 3, 5))):
        for number in range(4):
            matrix = matrices[number]
            if double:
                before, matrix = matrix, matrix.double()
                operands.remember(Tensor.double, (before,), matrix)
            if turned:
                before, matrix = matrix, matrix.t()
                operands.remember(Tensor.t, (before,), matrix)
            found = operands.find(matrix)
            assert found is not None
            assert (found.parameter.name, found.number) == (name, number)
            assert (found.count, found.shape, found.turned) == (4, (3, 5), turned)
    every = operands.find(fused)
    assert every is not None
    assert (every.number, every.count) == (None, 4)
    assert operands.find(fused[1:3]) is None
    assert operands.find(fused[1, :, 1:3]) is None
    assert operands.find(fused[1].clone()) is None
    assert operands.find(torch.randn(3, 5)) is None


def test_products_know_their_matrix_and_bias():
    weight, bias = nn.Parameter(torch.randn(4, 3, 5)), nn.Parameter(torch.randn(4, 3))
    operands = Operands({Parameter("m", "weight"): weight, Parameter("m", "bias"): bias})
    x, linear = torch.randn(2, 5), nn.functional.linear
    y = linear(x, weight[2], bias[2])
    found = find_product(operands, linear, (x, weight[2], bias[2]), {}, y)
    assert found is not None
    assert (found.operand.number, found.inputs_first) == (2, False)
    assert found.bias == Parameter("m", "bias")
    matrix = weight[1].T
    y = x @ matrix
    found = find_product(operands, Tensor.__matmul__, (x, matrix), {}, y)
    assert found is not None
    assert (found.operand.number, found.inputs_first, found.bias) == (1, False, None)
    find_product(operands, Tensor.__add__, (y, bias[3]), {}, y + bias[3])  # another expert's
    assert found.bias is None
    find_product(operands, Tensor.__add__, (y, bias[1]), {}, y + bias[1])
    assert found.bias == Parameter("m", "bias")


@given(st.lists(st.integers(0, BATCH * TOKENS - 1), max_size=30), st.integers(0, 5))
def test_rows_are_put_in_order_by_sequence(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(len(tokens), 2, generator=generator)
    d = torch.randn(len(tokens), 3, generator=generator)
    found_a, found_d, places = by_sequence(
        a, d, torch.tensor(tokens, dtype=torch.int64), (BATCH, TOKENS)
    )
    if places is None:
        assert sorted(tokens) == tokens == list(range(BATCH * TOKENS))
        return
    for sequence in range(BATCH):
        own = [i for i, token in enumerate(tokens) if token // TOKENS == sequence]
        own.sort(key=lambda i: tokens[i])
        rest = found_a.shape[1] - len(own)
        expected = [tokens[i] % TOKENS for i in own] + [NOWHERE] * rest
        assert places[sequence].tolist() == expected
        assert torch.equal(found_a[sequence, : len(own)], a[own])
        assert torch.equal(found_d[sequence, : len(own)], d[own])
        assert not found_a[sequence, len(own) :].any()
        assert not found_d[sequence, len(own) :].any()
