"""Dynamic thresholding as a clip: Saharia et al. (2022), section 2.3."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

import fastgen
from fastgen import Threshold
from fastgen.reference.threshold import quantile
from fastgen.testing import assert_bitwise
from shared import network

EPS = torch.finfo(torch.float32).eps
SCHEDULE = fastgen.NoiseSchedule.linear()


def inputs(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(3, *shape, generator=generator).unbind()


def papers(x0: torch.Tensor, q: float, maximum: float) -> torch.Tensor:
    flat = x0.double().flatten(1)
    s = np.quantile(flat.abs().numpy(), q, axis=1).clip(1.0, maximum)
    s = torch.from_numpy(s).view(-1, *[1] * (x0.ndim - 1))
    return torch.maximum(torch.minimum(x0.double(), s), -s) / s


@pytest.mark.parametrize("q", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 1), (1, 40, 41)])
def test_a_step_is_the_papers(q, shape, backend):
    a, s = 0.2, 0.35
    x, e, _ = inputs(*shape)
    x = x * torch.arange(1, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    x0 = (x.double() - math.sqrt(1 - a) * e.double()) / math.sqrt(a)
    expected = math.sqrt(s) * papers(x0, q, 2.5) + math.sqrt(1 - s) * e.double()
    actual = fastgen.ddim_step(x, e, a, s, clip=Threshold(q, 2.5), backend=backend)
    # eight roundings of what is no larger than the estimate's terms
    scale = (x.abs() / math.sqrt(a) + e.abs() / math.sqrt(a) + e.abs()).double().amax()
    assert ((actual - expected).abs() <= 8 * EPS * scale).all()


def test_backends_agree_bit_for_bit(backend):
    x, e, u = inputs(3, 2, 33)
    arguments = {"uncond": u, "guidance_scale": torch.tensor([1.0, 3.0, 7.5]), "seed": 5, "step": 2}

    def step(which):
        return fastgen.ddpm_step(4 * x, e, 0.3, 0.5, clip=Threshold(0.9), backend=which,
                                 **arguments)  # fmt: skip

    assert_bitwise(step(backend), step("reference"))


def test_a_loop_takes_it_and_a_sample_is_its_own():
    plan = fastgen.solvers.dpmpp_2m(SCHEDULE, 6, clip=Threshold(0.8, 3.0))
    together = fastgen.sample(network, plan, (4, 3, 6, 6), seed=[1, 2, 3, 4], sample_ids=[0] * 4)
    alone = fastgen.sample(network, plan, (1, 3, 6, 6), seed=3, sample_ids=[0])
    assert_bitwise(alone, together[2:3])
    clipped = fastgen.solvers.dpmpp_2m(SCHEDULE, 6, clip=1.0)
    other = fastgen.sample(network, clipped, (1, 3, 6, 6), seed=3, sample_ids=[0])
    assert not torch.equal(alone, other)


def test_a_maximum_of_one_is_a_clip():
    row = fastgen.solvers.dpmpp_2m(SCHEDULE, 3, clip=Threshold(0.9, 1.0)).rows[0]
    assert (row.clip, row.threshold) == ((-1.0, 1.0), None)


def test_gradients_pass_through_the_quantile():
    x, e, _ = (v.double().requires_grad_() for v in inputs(2, 3, 4))

    def step(x, e):
        return fastgen.ddim_step(3 * x, e, 0.3, 0.5, clip=Threshold(0.7, 4.0))

    assert torch.autograd.gradcheck(step, (x, e))
    x, e = x.detach().float().requires_grad_(), e.detach().float()
    found = torch.autograd.grad(step(x, e).square().sum(), x)[0]
    wide = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(step(wide, e.double()).square().sum(), wide)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_compiled_step_is_the_eager_one():
    x, e, _ = inputs(2, 3, 8)

    def step(x, e):
        return fastgen.ddim_step(x, e, 0.3, 0.5, clip=Threshold(0.7, 4.0))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x, e), step(x, e))


def test_half_precision_strides_and_nothing_at_all():
    x, e, _ = inputs(2, 3, 8, 8)
    clip = Threshold(0.9)
    half = x.half()
    whole = fastgen.ddim_step(half.float(), e, 0.03, 0.5, clip=clip)
    assert_bitwise(fastgen.ddim_step(half, e, 0.03, 0.5, clip=clip), whole.half())
    turned = (3 * x).to(memory_format=torch.channels_last)
    assert_bitwise(fastgen.ddim_step(turned, e, 0.3, 0.5, clip=clip),
                   fastgen.ddim_step(3 * x, e, 0.3, 0.5, clip=clip))  # fmt: skip
    for shape in ((0, 3), (2, 0)):
        empty = torch.empty(shape)
        assert fastgen.ddim_step(empty, empty, 0.3, 0.5, clip=clip).shape == shape


def test_nan_stays_in_its_place_and_its_sample():
    x, e, _ = inputs(2, 3, 8)
    x[0, 1, 2] = math.nan
    y = fastgen.ddim_step(x, e, 0.3, 0.5, clip=Threshold(0.5))
    assert y[0, 1, 2].isnan()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3, 100, 1001])
def test_the_quantile_is_numpys(count):
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    for q in (0.0, 0.001, 0.3, 0.5, 0.995, 1.0):
        wanted = np.quantile(values.double().abs().numpy(), q, axis=1)
        np.testing.assert_allclose(quantile(values, q), wanted, rtol=4 * EPS)


@pytest.mark.parametrize(("arguments", "error"), [
    ((1.5,), ValueError), ((-0.1,), ValueError), (("a",), TypeError), ((0.9, 0.5), ValueError),
    ((math.nan,), ValueError), ((0.9, math.nan), ValueError), ((0.9, "a"), TypeError),
])  # fmt: skip
def test_what_is_refused(arguments, error):
    with pytest.raises(error, match=r"quantile|maximum"):
        Threshold(*arguments)


def test_a_table_cannot_hold_it():
    plan = fastgen.solvers.ddim(SCHEDULE, 3, clip=Threshold())
    with pytest.raises(ValueError, match="Threshold"):
        plan.table()
    assert plan.digest != fastgen.solvers.ddim(SCHEDULE, 3, clip=Threshold(0.9)).digest
    assert pickle.loads(pickle.dumps(plan)) == plan
