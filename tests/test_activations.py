"""The fast GELU is PyTorch's but for rounding, in value and slope, and is the one that a policy computes with."""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import nn
from torch.nn.functional import gelu

from flowbench.models.activations import gelu_tanh, own_gelu, use_fast_gelu
from flowbench.models.policy import Policy


def test_value_and_slope_equal_those_of_the_tanh_form_in_float64():
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    exact = gelu(wide := x.clone().requires_grad_(), approximate="tanh")
    fast = gelu_tanh(narrow := x.float().requires_grad_())
    torch.testing.assert_close(fast.double(), exact, rtol=2e-6, atol=2e-6)
    weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
    exact.backward(weights)
    fast.backward(weights.float())
    assert wide.grad is not None
    assert narrow.grad is not None
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=5e-6, atol=5e-6)


def test_other_precisions_and_infinite_values_are_as_in_pytorch():
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(50, dtype=dtype)
        assert gelu_tanh(x).equal(gelu(x, approximate="tanh"))
    far = torch.tensor([-1e30, -60.0, 60.0, 1e12])
    assert gelu_tanh(far)[1:].equal(torch.tensor([0.0, 60.0, 1e12]).copysign(far[1:]))
    assert gelu_tanh(torch.tensor([float("nan")])).isnan().all()


def test_only_tanh_gelus_are_replaced_and_their_own_code_can_be_had_back():
    block = nn.Sequential(GELU(4, 8, approximate="tanh"), nn.GELU(approximate="tanh"), nn.GELU(), GELU(8, 8))
    x, before = torch.randn(3, 4), block(torch.zeros(1, 4))
    own = block(x)
    use_fast_gelu(block)
    assert [sorted({"gelu", "forward"} & vars(part).keys()) for part in block] == [["gelu"], ["forward"], [], []]
    torch.testing.assert_close(block(x), own, rtol=1e-5, atol=1e-6)
    with own_gelu(block):
        assert block(x).equal(own)
    assert block[0].gelu is gelu_tanh
    assert before.isfinite().all()


def test_a_policy_computes_with_it(shared_policy: Policy):
    latents, sigma = shared_policy.draw_noise(2), torch.tensor([0.3, 0.8])
    cond = shared_policy.encode(["a red circle", "a blue square"])
    with torch.no_grad():
        fast = shared_policy.velocity(latents, sigma, cond)
        with own_gelu(shared_policy.transformer):
            own = shared_policy.velocity(latents, sigma, cond)
    assert not fast.equal(own)
    torch.testing.assert_close(fast, own, rtol=1e-4, atol=1e-5)
