"""add_noise: the forward process."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.testing import assert_bitwise

EPS = torch.finfo(torch.float32).eps


def test_it_is_the_papers_formula(backend):
    x0, noise = torch.randn(2, 3, 5, 40)
    a = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
    x_t, eps, v = fastgen.add_noise(x0, a, noise=noise, return_noise=True, return_velocity=True,
                                    backend=backend)  # fmt: skip
    signal, sigma = a.sqrt().view(3, 1, 1), (1 - a).sqrt().view(3, 1, 1)
    scale = x0.abs() + noise.abs()
    assert ((x_t - (signal * x0 + sigma * noise)).abs() <= 3 * EPS * scale).all()
    assert ((v - (signal * noise - sigma * x0)).abs() <= 3 * EPS * scale).all()
    assert_bitwise(eps, noise)


def test_the_noise_returned_is_streams_fours():
    x0 = torch.zeros(2, 3, 20)
    x_t, eps = fastgen.add_noise(x0, 0.0, seed=5, step=9, return_noise=True)
    assert_bitwise(eps, fastgen.randn(x0.shape, seed=5, step=9, stream=4))
    assert_bitwise(x_t, eps)


def test_one_level_is_that_level_for_each_sample(backend):
    x0 = torch.randn(3, 50)
    level = torch.full((3,), 0.3, dtype=torch.float64)
    one = fastgen.add_noise(x0, 0.3, seed=1, step=0, backend=backend)
    assert_bitwise(fastgen.add_noise(x0, level, seed=1, step=0, backend=backend), one)
    assert_bitwise(fastgen.add_noise(x0, [0.3] * 3, seed=1, step=0, backend=backend), one)


def test_gradients_reach_the_data_the_noise_and_the_level():
    x0, noise = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    level = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)

    def run(x0, noise, level):
        return fastgen.add_noise(x0, level, noise=noise, return_velocity=True)

    # the coefficients themselves are float32: steps of 1e-2 keep their rounding out of sight
    assert torch.autograd.gradcheck(run, (x0, noise, level), eps=1e-2, atol=1e-3, rtol=1e-2)
    single = x0.detach().float().requires_grad_()
    (grad,) = torch.autograd.grad(fastgen.add_noise(single, 0.25, seed=1, step=1).sum(), single)
    assert_bitwise(grad, torch.full_like(grad, 0.5))


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("level", "options", "error", "message"),
    [
        (0.5, {}, ValueError, "seed, noise: got neither"),
        (0.5, {"seed": 1}, ValueError, "step: must be given"),
        (-0.1, {"seed": 1, "step": 0}, ValueError, "alpha_bar: got -0.1"),
        (1.1, {"seed": 1, "step": 0}, ValueError, "alpha_bar: got 1.1"),
        (float("nan"), {"seed": 1, "step": 0}, ValueError, "alpha_bar: got nan"),
        ([0.1, 0.2, 0.3], {"seed": 1, "step": 0}, ValueError, "alpha_bar: got shape"),
        ("0.5", {"seed": 1, "step": 0}, TypeError, "alpha_bar: got str"),
        (0.5, {"noise": X[:1]}, ValueError, "noise: got shape"),
        (0.5, {"seed": 1, "step": 0, "out": X[:1]}, ValueError, "out: got shape"),
    ],
)
def test_it_names_what_is_wrong(level, options, error, message):
    with pytest.raises(error, match=message):
        fastgen.add_noise(X, level, **options)
