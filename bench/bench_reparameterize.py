"""reparameterize beside the eager formula and torch.compile of it: forward, backward, with KL."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import SHAPES, VAE_LATENTS, pointwise
from fastgen.bench.plugin import drawn_from, tensors
from fastgen.bench.variants import compiled, on_backends

ALL = {**SHAPES, **VAE_LATENTS}
DRAWN = drawn_from(lambda mean, logvar: mean, lambda mean, logvar: (logvar / 2).exp())


@pytest.mark.parametrize(
    "case", pointwise("reparameterize", tensors=3, flops=12, shapes=ALL), ids=str
)
def test_reparameterize(case, race, device):
    out = torch.empty(case.shape, device=device)

    def ours(backend):
        return lambda m, v: fastgen.reparameterize(m, v, seed=0, step=1, backend=backend)

    variants = {
        **on_backends("reparameterize", ours, case, device),
        "copy_": lambda m, v: out.copy_(m),
        "eager": eager.reparameterize,
        **compiled(eager.reparameterize, device),
    }
    race(case, variants, tensors(case.shape, 2, device), DRAWN)


@pytest.mark.parametrize(
    "case", pointwise("reparameterize with KL", tensors=3, flops=17, shapes=ALL), ids=str
)
def test_reparameterize_with_kl(case, race, device):
    def ours(backend):
        return lambda m, v: fastgen.reparameterize(
            m, v, seed=0, step=1, return_kl=True, backend=backend
        )

    variants = {
        **on_backends("reparameterize", ours, case, device),
        "fastgen without": lambda m, v: fastgen.reparameterize(m, v, seed=0, step=1),
        "eager": eager.reparameterize_kl,
        **compiled(eager.reparameterize_kl, device),
    }
    race(case, variants, tensors(case.shape, 2, device), DRAWN)


@pytest.mark.parametrize(
    "case", pointwise("reparameterize backward", tensors=7, flops=24, shapes=ALL), ids=str
)
def test_reparameterize_forward_and_backward(case, race, device):
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [
            tuple(t.requires_grad_() for t in given) for given in tensors(case.shape, 2, device)
        ]
        grad = torch.randn(case.shape, device=device)

        def train(function):
            def run(m, v):
                z = function(m, v)
                return z.detach(), *torch.autograd.grad(z, (m, v), grad)

            return run

        def ours(backend):
            return train(lambda m, v: fastgen.reparameterize(m, v, seed=0, step=1, backend=backend))

        def check(name, result, given):
            z, of_mean, of_logvar = result
            m, v = (t.detach() for t in given)
            DRAWN(name, z, (m, v))
            assert torch.equal(of_mean, grad), "the gradient of mean is another"
            want = 0.5 * grad * (z - m)
            error = (of_logvar - want).abs().max() / want.abs().max()
            assert error < 1e-5, f"the gradient of logvar differs by {float(error):.3g}"

        variants = {
            **on_backends("reparameterize", ours, case, device),
            "eager": train(eager.reparameterize),
            **{n: train(f) for n, f in compiled(eager.reparameterize, device).items()},
        }
        race(case, variants, inputs, check)
