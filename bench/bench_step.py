"""ddim_step and ddpm_step beside eager PyTorch, torch.compile, diffusers and a plain torch.add.

python -m fastgen.bench.bench_step
"""

from __future__ import annotations

import torch

import fastgen
from fastgen.bench import eager
from fastgen.bench.cases import SHAPES
from fastgen.bench.timing import interleaved, machine, report

STEPS = 50


def diffusers_steps(shape):
    """(ddim, ddpm) closures over diffusers' schedulers, or None where it is not installed."""
    try:
        from diffusers import DDIMScheduler, DDPMScheduler
    except ImportError:
        return None
    ddim = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ddpm = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    ddim.set_timesteps(STEPS)
    ddpm.set_timesteps(STEPS)
    return ddim, ddpm


@torch.inference_mode()
def main() -> None:
    print(machine())
    schedule = fastgen.NoiseSchedule.linear()
    t, a_t, a_s = schedule.pairs(STEPS)[20]
    compiled = {
        name: torch.compile(getattr(eager, name), dynamic=False)
        for name in ("ddim_step", "ddpm_step")
    }
    rows: dict[str, list] = {"ddim_step": [], "ddpm_step": []}
    for shape in SHAPES:
        x, e = torch.randn(shape), torch.randn(shape)
        large = x.numel() > 1 << 22
        out = torch.empty_like(x)
        ours = {"out": out} if large else {}
        plain = eager.ddim_step(x, e, a_t, a_s)
        scale = plain.abs().max()
        assert (fastgen.ddim_step(x, e, a_t, a_s, **ours) - plain).abs().max() < 1e-5 * scale
        mean = fastgen.ddpm_step(x, e, a_t, a_s, noise=torch.zeros_like(x))
        drawn = fastgen.ddpm_step(x, e, a_t, a_s, seed=0, step=1)
        beta = 1 - a_t / a_s
        sigma = (beta * (1 - a_s) / (1 - a_t)) ** 0.5
        z = (drawn - mean) / sigma
        spread = 6 / x.numel() ** 0.5
        assert abs(z.mean()) < spread
        assert abs(z.std() - 1) < spread
        variants = {
            "ddim_step": {
                "fastgen": lambda: fastgen.ddim_step(x, e, a_t, a_s, **ours),
                "torch.add": lambda: torch.add(x, e, **ours),
                "copy_": lambda: out.copy_(x),
                "eager": lambda: eager.ddim_step(x, e, a_t, a_s),
                "compile": lambda: compiled["ddim_step"](x, e, a_t, a_s),
            },
            "ddpm_step": {
                "fastgen": lambda: fastgen.ddpm_step(x, e, a_t, a_s, seed=0, step=1, **ours),
                "eager": lambda: eager.ddpm_step(x, e, a_t, a_s),
                "compile": lambda: compiled["ddpm_step"](x, e, a_t, a_s),
            },
        }
        peers = diffusers_steps(shape)
        if peers is not None:
            ddim, ddpm = peers
            theirs = ddim.step(e, t, x).prev_sample
            assert (theirs - plain).abs().max() < 1e-3 * scale, "another grid than diffusers'"
            variants["ddim_step"]["diffusers"] = lambda: ddim.step(e, t, x)
            variants["ddpm_step"]["diffusers"] = lambda: ddpm.step(e, t, x)
        for op, runs in variants.items():
            rows[op].append((str(shape), interleaved(runs)))
    for op, timed in rows.items():
        report(f"{op}, float32", timed)
    for case, timings in rows["ddim_step"]:
        share = (3 / timings["fastgen"].median) / (2 / timings["copy_"].median)
        print(f"ddim_step {case}: {share:.0%} of copy_'s bandwidth")


if __name__ == "__main__":
    main()
