"""Golden hashes: the bits of version 1 of the contract. A change here is a major version."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastgen
from shared import digest


def ramp(shape, scale):
    """Values that need no random generator: exact in every dtype's neighbourhood of [-4, 4]."""
    count = int(np.prod(shape))
    return torch.from_numpy(
        ((np.arange(count) * 37 % 101 - 50) / 16 * scale).astype(np.float32)
    ).view(shape)


X, E, U = (ramp((3, 5, 67), scale) for scale in (1.0, -0.5, 0.25))
ROW = fastgen.Row(
    (
        fastgen.Output({"x": 0.3, "e": -0.2, "denoised": 0.9, "h0": 0.4}, (0.5, 0.25)),
        fastgen.Output({"denoised": 1.0}, (0.0, 1.5), target=0),
    ),
    denoised=(1.25, -0.75),
    clip=(-1.0, 1.0),
)
CASES = {
    "randn": lambda: fastgen.randn((3, 5, 67), seed=2**63 + 7, step=3),
    "randn bfloat16": lambda: fastgen.randn((3, 5, 67), seed=1, dtype=torch.bfloat16),
    "reparameterize": lambda: fastgen.reparameterize(X, E, seed=5, step=9),
    "gaussian_kl": lambda: fastgen.gaussian_kl(X, E),
    "cfg_combine": lambda: fastgen.cfg_combine(E, U, 7.5),
    "cfg_combine rescaled": lambda: fastgen.cfg_combine(E, U, 7.5, rescale=0.7),
    "combine": lambda: fastgen.combine([X, E, U], [0.3, -0.7, 1.1]),
    "add_noise": lambda: fastgen.add_noise(X, 0.37, seed=5, step=9),
    "ddpm_step": lambda: fastgen.ddpm_step(X, E, 0.3, 0.4, clip=1.0, seed=5, step=9),
    "ddim_step": lambda: fastgen.ddim_step(X, E, 0.3, 0.4, uncond=U, guidance_scale=3.0),
    "step": lambda: torch.stack(fastgen.step(ROW, X, E, history=[U], seed=5, step=9)),
}
GOLDEN = {
    "randn": "68a482bc6c3e54e3",
    "randn bfloat16": "8cb4fad3d507a9f9",
    "reparameterize": "1e3d2dc5ffe74ce3",
    "gaussian_kl": "6d4617cc66778174",
    "cfg_combine": "82ec5d18e99d8811",
    "cfg_combine rescaled": "e2d293e2ee868d43",
    "combine": "ed68da6b6484a1dc",
    "add_noise": "d8d1167e7d225c25",
    "ddpm_step": "a4c807d9a017ea34",
    "ddim_step": "173f2154b119d964",
    "step": "6817d555733d5636",
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_version_one(case):
    assert digest(CASES[case]())[:16] == GOLDEN[case]
