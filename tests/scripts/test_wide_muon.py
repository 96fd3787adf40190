"""The demo's optimiser iterates in the precision of the gradients."""

import torch
from torch import Tensor, nn

from scripts.demo.wide_muon import WideMuon


def orthogonalised(gradient: Tensor) -> Tensor:
    """Muon's five Newton-Schulz steps in float64."""
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


def test_a_step_is_that_of_muon_without_bfloat16():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(6, 10))
    weight.grad = torch.randn(6, 10)
    WideMuon([weight], lr=0.5, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    expected = -0.5 * 0.2 * 10**0.5 * orthogonalised(weight.grad)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)
    assert weight.grad.dtype == torch.float32
