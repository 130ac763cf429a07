"""Errors of a step against its formula in float64, beside those of diffusers' own step."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from test_diffusers import (  # noqa: E402
    CASES,
    advance,
    goes_back,
    masked,
    method,
    network,
    timed,
    told,
    with_variance,
)

from fastgen.integrations import diffusers as fast  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers', of its configurations
ROUNDING = 2.0**-24
SHOWN = 6
GIVEN = ("RePaintScheduler", "CogVideoXDPMScheduler")  # what slot 0 is comes with the step


def exact(row, x, e, normals, history, logvar):
    """[(target, value, bound)]: a row in float64, and what float32 may err: every coefficient and
    every operation rounds once."""
    x, e, normals = x.double(), e.double(), [(z.double(), 0.0) for z in normals]
    if logvar is not None:
        (z, _), (b, b_0) = normals[0], row.logvar
        z = z * torch.exp(0.5 * (b * logvar + b_0))
        normals[0] = z, ROUNDING * z.abs() * (4 + 2 * (b * logvar).abs() + 2 * abs(b_0))
    values = {"x": (x, 0.0), "e": (e, 0.0)} | {f"h{k}": h for k, h in enumerate(history)}
    terms = [row.denoised[0] * x, row.denoised[1] * e]
    d, bound = sum(terms), 4 * ROUNDING * sum(t.abs() for t in terms)
    if row.threshold:
        s = torch.quantile(d.flatten(1).abs(), row.threshold.quantile, dim=1)
        s = s.clamp(1.0, row.threshold.maximum).view(-1, *[1] * (x.ndim - 1))
        bound = (bound + bound.flatten(1).amax(1).view(s.shape)) / s + 4 * ROUNDING
        d = d.clamp(-s, s) / s
    elif row.clip:
        d = d.clamp(*row.clip)
    values["denoised"] = (d, bound)
    results = []
    for output in row.outputs:
        used = [(w, *values[name]) for name, w in output.weights.items() if w]
        used += [(f, *z) for f, z in zip(output.noise, normals, strict=False) if f]
        total, bound = torch.zeros_like(x), torch.zeros_like(x)
        for weight, value, error in used:
            total = total + weight * value
            bound = bound + abs(weight) * (error + (len(used) + 1) * ROUNDING * value.abs())
        results.append((output.target, total, bound))
    return results


def steps_of(name, config, dtype, monkeypatch, count):
    """(diffusers' result, ours, the exact one, its bound) of each step of a run of diffusers', both
    schedulers given the same sample, output and draws."""
    theirs = getattr(diffusers, name)(**config)
    ours, seen = fast.convert(getattr(diffusers, name)(**config)), []
    stepped = type(ours)._stepped

    def spy(self, index, row, sample, output, noise, *args, **kwargs):
        seen.append((row, output, noise[0], self._kept[0]))
        return stepped(self, index, row, sample, output, noise, *args, **kwargs)

    monkeypatch.setattr(type(ours), "_stepped", spy)
    monkeypatch.setattr(type(ours), "_under_way", lambda *_: None)  # which goes round it
    times = timed(theirs, count)
    timed(ours, count)
    random = "generator" in inspect.signature(getattr(theirs, method(theirs))).parameters
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    draws = [{"generator": g} if random else {} for g in generators]
    if "eta" in inspect.signature(getattr(theirs, method(theirs))).parameters:
        draws = [d | {"eta": 0.5} for d in draws]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x = (x * float(getattr(theirs, "init_noise_sigma", 1.0))).to(dtype)
    history = [None] * 7
    for i, t in enumerate(times):
        if goes_back(theirs, i):
            x = theirs.undo_step(x, times[i - 1])
            continue
        inputs = [s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
                  for s in (theirs, ours)]  # fmt: skip
        e = network(inputs[0], told(theirs, t)).to(dtype)
        seen.clear()
        want, got = (advance(s, e, i, x, **d, return_dict=False)[0]
                     for s, d in zip((theirs, ours), draws, strict=True))  # fmt: skip
        if seen:  # else the step is diffusers' own
            [(row, output, normals, given)] = seen
            logvar = with_variance(theirs, e)[:, 3:].double() if row.noises else None
            if logvar is not None and not logvar.numel():
                logvar = None
            elif logvar is not None and config["variance_type"] == "learned":
                logvar = logvar.log()
            if name in GIVEN:
                history[0] = None if given is None else (given.double(), 0.0)
            (_, value, bound), *others = exact(row, x, output, normals, history, logvar)
            if name == "RePaintScheduler":
                kept, mask = others[0], masked(x)[1] == 1
                value, bound = torch.where(mask, kept[1], value), torch.where(mask, kept[2], bound)
            for target, kept, error in others:
                if target != SHOWN:
                    history[target] = kept, error
            if want.isfinite().all():
                yield want, got, value, bound
        x = want.to(dtype)
        if hasattr(theirs, "former"):
            ours.former = theirs.former


def deviation(values):
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda v: str(v))
def test_a_step_errs_as_little_as_its_roundings(name, config, monkeypatch):
    """Within the bound of float32's roundings; and over the run at most twice diffusers' own error,
    or two units in the last place of the largest value: both do a handful of operations, of which
    one more or less is a rounding more or less."""
    ours, theirs = [0.0], [0.0]
    for want, got, value, bound in steps_of(name, config, torch.float32, monkeypatch, 10):
        assert got.dtype == want.dtype
        error, largest = (got.double() - value).abs(), float(value.abs().max())
        assert (error <= bound + 1e-37).all()
        ours.append(float(error.max()) / largest)
        theirs.append(float((want.double() - value).abs().max()) / largest)
    assert max(ours) <= max(2.0 * max(theirs), 4.0 * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(fast._CLASSES))
def test_half_precision_is_rounded_once(name, dtype, monkeypatch):
    """The rms error is that of one rounding of the exact result, within 5 %; or the result is
    float32, as there."""
    ours, ideal = [], []
    for want, got, value, _ in steps_of(name, {}, dtype, monkeypatch, 8):
        assert want.dtype == got.dtype
        if got.dtype != dtype:
            assert name in ("SCMScheduler", "ScoreSdeVeScheduler")
            assert got.dtype == torch.float32
            continue
        largest = float(value.abs().max())
        ours.append(deviation(got.double() - value) / largest)
        ideal.append(deviation(value.to(dtype).double() - value) / largest)
    assert math.hypot(*ours) <= 1.05 * math.hypot(*ideal)
