"""The examples in the documentation run as they are pasted, one behind the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastgen

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def test_readme():
    diffusers = pytest.importorskip("diffusers")
    given = {"pipe": Pipe(diffusers.DDIMScheduler())}
    for block in blocks("README.md"):
        exec(block, given)
    assert given["x"].isfinite().all()
    assert given["loop"].done
    assert type(given["pipe"].scheduler) is fastgen.integrations.diffusers.DDIMScheduler


def test_generators():
    first, layer, choices, freezing = blocks("docs/generators.md")
    given = {}
    for block in (first, layer, choices):
        exec(block, given)
    assert fastgen.explain(given["fast"]).count("with BatchNorm2d and relu") == 2
    assert given["images"].shape == (16, 3, 16, 16)
    assert "torch._inductor.config.freezing = True" in freezing  # compiles for seconds: not run


def test_solvers():
    image = fastgen.randn((2, 1, 4, 4), seed=1)
    levels = fastgen.denoiser_levels(fastgen.sigmas.karras(30))
    plan = fastgen.solvers.ddim(fastgen.NoiseSchedule.linear(), 30)
    loop = fastgen.Loop(plan, image.clone(), seed=0)
    given = {"model": lambda x, t, cond: 0.4 * x.tanh(), "image": image, "shape": image.shape,
             "known": image, "mask": torch.ones_like(image), "sample": fastgen.sample,
             "Threshold": fastgen.Threshold, "state": loop.state_dict()}  # fmt: skip
    first, *rest = blocks("docs/solvers.md")
    exec(first, given)
    given |= {"plan": plan, "levels": levels}
    for block in rest:
        exec(block, given)
    inline = re.findall(r"`(solvers\.[^`]*levels[^`]*)`", (ROOT / "docs/solvers.md").read_text())
    assert inline
    for expression in inline:
        assert isinstance(eval(expression, given), fastgen.Plan)
