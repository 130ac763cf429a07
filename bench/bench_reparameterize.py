"""reparameterize beside the eager formula and torch.compile of it: forward, backward, with KL."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import SHAPES, VAE_LATENTS, pointwise
from fastgen.bench.plugin import drawn_from, tensors

ALL = {**SHAPES, **VAE_LATENTS}
DRAWN = drawn_from(lambda mean, logvar: mean, lambda mean, logvar: (logvar / 2).exp())


def freshly_compiled(function):
    """Compiled for one shape and grad mode, far from the recompile limit."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


@pytest.mark.parametrize(
    "case", pointwise("reparameterize", tensors=3, flops=12, shapes=ALL), ids=str
)
def test_reparameterize(case, race):
    compiled, out = freshly_compiled(eager.reparameterize), torch.empty(case.shape)
    variants = {
        "fastgen": lambda m, v: fastgen.reparameterize(m, v, seed=0, step=1),
        "copy_": lambda m, v: out.copy_(m),
        "eager": eager.reparameterize,
        "compile": compiled,
    }
    race(case, variants, tensors(case.shape, 2), DRAWN)


@pytest.mark.parametrize(
    "case", pointwise("reparameterize with KL", tensors=3, flops=17, shapes=ALL), ids=str
)
def test_reparameterize_with_kl(case, race):
    variants = {
        "fastgen": lambda m, v: fastgen.reparameterize(m, v, seed=0, step=1, return_kl=True),
        "fastgen without": lambda m, v: fastgen.reparameterize(m, v, seed=0, step=1),
        "eager": eager.reparameterize_kl,
    }
    race(case, variants, tensors(case.shape, 2), DRAWN)


@pytest.mark.parametrize(
    "case", pointwise("reparameterize backward", tensors=7, flops=24, shapes=ALL), ids=str
)
def test_reparameterize_forward_and_backward(case, race):
    with torch.inference_mode(False), torch.enable_grad():
        compiled = freshly_compiled(eager.reparameterize)
        inputs = [tuple(t.requires_grad_() for t in given) for given in tensors(case.shape, 2)]
        grad = torch.randn(case.shape)

        def train(function):
            def run(m, v):
                z = function(m, v)
                return z.detach(), *torch.autograd.grad(z, (m, v), grad)

            return run

        def ours(m, v):
            return fastgen.reparameterize(m, v, seed=0, step=1)

        def check(name, result, given):
            z, of_mean, of_logvar = result
            m, v = (t.detach() for t in given)
            DRAWN(name, z, (m, v))
            assert torch.equal(of_mean, grad), "the gradient of mean is another"
            want = 0.5 * grad * (z - m)
            error = (of_logvar - want).abs().max() / want.abs().max()
            assert error < 1e-5, f"the gradient of logvar differs by {float(error):.3g}"

        variants = {
            "fastgen": train(ours),
            "eager": train(eager.reparameterize),
            "compile": train(compiled),
        }
        race(case, variants, inputs, check)
