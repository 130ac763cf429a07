"""reparameterize beside the eager formula and torch.compile of it: forward, backward, with KL.

python -m fastgen.bench.bench_reparameterize
"""

from __future__ import annotations

import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import SHAPES
from fastgen.bench.timing import interleaved, machine, report

VAE_LATENTS = (16, 8, 64, 64)


def freshly_compiled():
    """The eager formula compiled for one shape and grad mode, far from the recompile limit."""
    torch.compiler.reset()
    return torch.compile(eager.reparameterize, dynamic=False)


def main() -> None:
    print(machine())
    forward, backward, divergence = [], [], []
    for shape in (*SHAPES, VAE_LATENTS):
        mean, logvar = torch.randn(shape), torch.randn(shape)
        noise = torch.randn(shape)
        expected = mean + torch.exp(0.5 * logvar) * noise
        given = fastgen.reparameterize(mean, logvar, noise=noise)
        assert (given - expected).abs().max() < 1e-5 * expected.abs().max()
        compiled = freshly_compiled()
        with torch.inference_mode():
            runs = {
                "fastgen": lambda: fastgen.reparameterize(mean, logvar, seed=0, step=1),
                "eager": lambda: eager.reparameterize(mean, logvar),
                "compile": lambda: compiled(mean, logvar),
            }
            forward.append((str(shape), interleaved(runs)))
            with_kl = {
                "fastgen": lambda: fastgen.reparameterize(mean, logvar, seed=0, step=1),
                "with KL": lambda: fastgen.reparameterize(
                    mean, logvar, seed=0, step=1, return_kl=True
                ),
                "eager with KL": lambda: eager.reparameterize_kl(mean, logvar),
            }
            divergence.append((str(shape), interleaved(with_kl)))
        m, v = mean.clone().requires_grad_(), logvar.clone().requires_grad_()
        grad = torch.randn(shape)

        compiled = freshly_compiled()

        def train(function):
            torch.autograd.grad(function(), (m, v), grad)

        runs = {
            "fastgen": lambda: train(lambda: fastgen.reparameterize(m, v, seed=0, step=1)),
            "eager": lambda: train(lambda: eager.reparameterize(m, v)),
            "compile": lambda: train(lambda: compiled(m, v)),
        }
        backward.append((str(shape), interleaved(runs)))
    report("reparameterize forward, float32", forward)
    report("reparameterize forward + backward, float32", backward)
    report("reparameterize with KL, float32", divergence)


if __name__ == "__main__":
    main()
