"""step() of diffusers' schedulers beside the same with a kernel a step, with either noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastgen.bench.cases import SHAPES, pointwise
from fastgen.bench.plugin import tensors

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
SMALL = {shape: reason for shape, reason in SHAPES.items() if torch.Size(shape).numel() < 1 << 20}
STEPS, AT = 20, 4
SCHEDULERS = {  # name: (class, options of step, tensors read and written)
    "DDPM": ("DDPMScheduler", {}, 4),
    "DDIM": ("DDIMScheduler", {}, 4),
    "DDIM, eta 1": ("DDIMScheduler", {"eta": 1.0}, 4),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, 5),
    "UniPC 2": ("UniPCMultistepScheduler", {}, 7),
    "Euler": ("EulerDiscreteScheduler", {}, 4),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 4),
    "Heun, two calls": ("HeunDiscreteScheduler", {}, 9),
    "LCM": ("LCMScheduler", {}, 4),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}, 3),
}


def begun(scheduler, options, x, e, steps):
    """A run's first steps; the sample after them."""
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    for t in scheduler.timesteps[:steps]:
        x = scheduler.step(e, t, x, **options, return_dict=False)[0]
    return x


def stepping(scheduler, options, x, e, calls):
    """One step (or two) of a run that is under way, again and again."""
    begun(scheduler, options, x, e, AT + calls)
    counts = hasattr(scheduler, "_step_index")
    times = list(scheduler.timesteps[AT : AT + calls])

    def run(x, e):
        if counts:
            scheduler._step_index = AT
        for t in times:
            result = scheduler.step(e, t, x, **options, return_dict=False)
        return result

    return run


def cases(op, count):
    """In float32, and in bfloat16 (half of the bytes), whose label says so."""
    wide = pointwise(op, tensors=count, flops=5, shapes=SMALL)
    return [*wide, *(replace(c, label=f"{c} bfloat16", bytes=c.bytes // 2) for c in wide)]


@pytest.mark.parametrize(
    "case",
    [c for name, (_, _, count) in SCHEDULERS.items() for c in cases(f"step of {name}", count)],
    ids=lambda case: f"{case.op} {case}",
)
def test_step(case, race, device):
    from fastgen.integrations import diffusers as fast

    name, options, _ = SCHEDULERS[case.op.removeprefix("step of ")]
    dtype = torch.bfloat16 if "bfloat16" in case.label else torch.float32
    inputs = [tuple(t.to(dtype) for t in given) for given in tensors(case.shape, 2, device)]
    # in bfloat16 as far as diffusers' own roundings, up to six of 2^-9 a step, may take it
    bound = 1e-4 if dtype == torch.float32 else 6 * 2**-9 * (AT + 2)
    calls = 2 if "two calls" in case.op else 1

    def scheduler(variant):
        made = getattr(diffusers, name)()
        if variant == "diffusers":
            return made
        return fast.convert(made, noise="fastgen" if variant == "fastgen" else "torch")

    names = ("fastgen", "fastgen, torch's noise", "diffusers")
    variants = {v: stepping(scheduler(v), options, *inputs[0], calls) for v in names}

    def check(variant, result, given):
        assert result[0].isfinite().all(), "not finite"
        if variant == "fastgen":
            return  # noise of its own, from the same rows as the next variant's
        ends = []
        for which in (variant, "diffusers"):
            torch.manual_seed(0)
            ends.append(begun(scheduler(which), options, *given, AT + calls))
        error = (ends[0] - ends[1]).abs().max() / ends[1].abs().max()
        assert error < bound, f"differs by {float(error):.3g} of the largest value"

    race(case, variants, inputs, check)
