"""Whole generators through ``fastgen.fuse``, beside eager PyTorch in both memory formats and
Inductor with frozen weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import testing
from fastgen.bench.cases import Case
from fastgen.bench.generators import GENERATORS, made

CASES = (
    ("DCGAN", 1), ("DCGAN", 16), ("DCGAN", 64), ("pix2pix", 1), ("CycleGAN", 1),
    ("VAE decoder", 16), ("HiFi-GAN", 1), ("3D-GAN", 1),
)  # fmt: skip
FROZEN = ("DCGAN", "3D-GAN")  # whose convolutions are all transposed; the rest compile too long
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def work(network: nn.Module, x: Tensor) -> tuple[int, int]:
    """(bytes of input, weights and output; floating-point operations of the convolutions)."""
    counted = [0]

    def count(module, given, result):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        places = (given[0] if transposed else result)[:, 0].numel()
        counted[0] += 2 * places * module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in network.modules()
             if isinstance(m, nn.modules.conv._ConvNd)]  # fmt: skip
    y = network(x)
    for hook in hooks:
        hook.remove()
    numbers = x.numel() + y.numel() + sum(p.numel() for p in network.parameters())
    return numbers * x.element_size(), counted[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "batch"), CASES, ids=lambda v: str(v))
def test_generator(name, batch, dtype, race, device):
    build, shape = GENERATORS[name]
    base = made(build()).to(device)
    kind = DTYPES[dtype]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator).to(device, kind)
    eager = copy.deepcopy(base).to(kind)
    variants = {
        "fastgen": fastgen.fuse(base, dtype=kind),
        "fastgen channels_last": fastgen.fuse(base, dtype=kind, memory_format=torch.channels_last),
        "eager": eager,
    }
    if x.ndim > 3 or x.ndim == 2:
        last = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        theirs = copy.deepcopy(eager).to(memory_format=last)
        variants["eager channels_last"] = lambda x: theirs(x.to(memory_format=last)
                                                           if x.ndim > 3 else x)  # fmt: skip
        if name in FROZEN:
            torch.compiler.reset()
            variants["compile freezing"] = torch.compile(
                copy.deepcopy(theirs), dynamic=False, options={"freezing": True}
            )
            if device.type == "cuda":
                variants["compile autotuned"] = torch.compile(
                    copy.deepcopy(theirs), dynamic=False, mode="max-autotune"
                )
    if name == "HiFi-GAN":
        del variants["fastgen channels_last"]
    bytes_, flops = work(eager, x)
    case = Case("fuse", f"{name}, batch {batch}, {dtype}", "a whole generator", bytes_, flops,
                tuple(x.shape))  # fmt: skip
    exact = copy.deepcopy(base).double()(x.double())

    def check(variant, result, given):
        testing.assert_close_to_oracle(result, eager(*given), exact, 4.0, rounding=1e-6)

    race(case, variants, [(x,)], check, rounds=9)
