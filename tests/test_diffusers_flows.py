"""Consistency models, flows and the variance-exploding SDE where a step is more than a row, and
where diffusers' own numbers are a defect's."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.testing import assert_bitwise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from test_diffusers import CHURN, SHAPE, method, network, run, timed  # noqa: E402

from fastgen.integrations import diffusers as fast  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TURNED = {"invert_sigmas": True}
RANDOM = {"stochastic_sampling": True}


def assert_close(got, want, share=1e-5):
    assert float((got - want).abs().max()) <= share * float(want.abs().max())


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- consistency models --------------------------------------------------------------------------


def test_the_last_step_of_a_consistency_model_draws_what_nothing_reads():
    """diffusers takes the root of sigma_min^2 - sigma_min^2 in float32: NaN for some sigma_min."""
    theirs = diffusers.CMStochasticIterativeScheduler(sigma_min=0.0011)
    assert run(theirs, 4)[0].isnan().any()
    made = fast.convert(theirs)
    assert run(made, 4)[0].isfinite().all()
    assert made._rows[-1].noises == 0


def test_a_consistency_model_takes_timesteps_of_ones_choice():
    ends = []
    for made in (diffusers.CMStochasticIterativeScheduler(), fast.CMStochasticIterativeScheduler()):
        made.set_timesteps(timesteps=[22, 9, 0])
        x, generator = 80.0 * normal(1), torch.Generator().manual_seed(2)
        for t in made.timesteps:
            e = network(made.scale_model_input(x, t), t)
            x = made.step(e, t, x, generator=generator).prev_sample
        ends.append(x)
    assert made._left is False
    assert_close(ends[1], ends[0])


def test_one_step_draws_nothing():
    made = fast.CMStochasticIterativeScheduler()
    made.set_timesteps(1)
    x, t, generator = 80.0 * normal(1), made.timesteps[0], torch.Generator().manual_seed(2)
    made.step(network(made.scale_model_input(x, t), t), t, x, generator=generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(2).get_state())


@pytest.mark.parametrize("name", ["SCMScheduler", "ScoreSdeVeScheduler"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_float32_there_is_not_rounded_twice(name, dtype):
    """One step of half-precision tensors is that of the same numbers in float32."""
    found = []
    for kind in (dtype, torch.float32):
        made = getattr(fast, name)()
        t = timed(made, 4)[1]
        x, e = (normal(seed).to(dtype).to(kind) for seed in (1, 2))
        noise = normal(3).to(dtype if name == "ScoreSdeVeScheduler" else torch.float32)
        made._normals = lambda row, *_, z=noise: ((z,), None, 0)
        found.append(getattr(made, method(made))(e, t, x, return_dict=False))
    assert found[0][0].dtype == torch.float32
    assert_bitwise(found[0][0], found[1][0])
    assert_bitwise(found[0][1], found[1][1].to(found[0][1].dtype))


# ---- flows ---------------------------------------------------------------------------------------


def test_churn_of_heun_on_a_flow():
    """diffusers multiplies the velocity by sigma / (1 + gamma) sigma in a step's first call."""
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    churn = {**CHURN, "s_tmin": 0.3, "s_tmax": 0.9}
    for steps in (1, 3, 10):
        want = run(theirs, steps, **churn)
        got = run(fast.convert(theirs, compat="diffusers"), steps, **churn)
        for a, b in zip(want, got, strict=True):
            assert_close(b, a)
    own = run(fast.convert(theirs, noise="fastgen"), 10, **churn)[0]
    assert own.isfinite().all()
    assert float((own - want[0]).abs().max()) > 1e-2

    made = fast.convert(theirs)
    made.set_timesteps(5)
    made.set_begin_index(2)
    x, first, second = (normal(k) for k in range(3))
    sigma, end = made.sigmas[2:4].double().tolist()
    higher, z = sigma * (1.0 + 2.0 / 9.0), normal(4).double()
    generator = torch.Generator().manual_seed(4)
    got = [made.step(e, made.timesteps[2], x, s_churn=2.0, generator=generator).prev_sample
           for e in (first, second)]  # fmt: skip
    start = x.double() + math.sqrt(higher**2 - sigma**2) * z
    for e, y in zip((first.double(), 0.5 * (first.double() + second)), got, strict=True):
        assert_close(y.double(), start + (end - higher) * e, 1e-6)
    again = torch.Generator().manual_seed(4)
    torch.randn(2, *SHAPE, generator=again)  # the second call's is drawn as well
    assert torch.equal(generator.get_state(), again.get_state())


def test_heun_on_a_flow_begun_inside_a_step_is_left_to_diffusers():
    theirs = diffusers.FlowMatchHeunDiscreteScheduler()
    made = fast.convert(theirs)
    for scheduler in (theirs, made):
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(3)
    x, t = normal(1), made.timesteps[3]
    assert torch.equal(made.step(x, t, x).prev_sample, theirs.step(x, t, x).prev_sample)
    assert made._left


SCALES = {"scale_factors": [1.0, 1.5, 2.0, 2.0], "upscale_mode": "nearest"}


@pytest.mark.parametrize("mode", ["bicubic", "nearest"])
def test_lcm_on_a_flow_grows_as_there(mode):
    theirs = diffusers.FlowMatchLCMScheduler(**{**SCALES, "upscale_mode": mode})
    for dtype in (torch.float32, torch.bfloat16):
        want, got = (run(s, 5, dtype) for s in (theirs, fast.convert(theirs)))
        assert got[0].shape == want[0].shape == (2, 3, 16, 16)
        assert got[0].dtype == want[0].dtype
        assert torch.equal(got[2], want[2])
        if dtype == torch.float32:
            assert_close(got[0], want[0])
    made = fast.convert(theirs, noise="fastgen")
    assert run(made, 5)[0].isfinite().all()
    assert run(made, 5)[0].shape == (2, 3, 16, 16)  # the first size is taken anew
    x = normal(1)
    found = []
    for scheduler in (theirs, fast.convert(theirs)):  # noise of the sum's dtype
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(3)
        found.append(scheduler.step(x.double(), scheduler.timesteps[0], x, generator=generator))
    assert found[1].prev_sample.dtype == found[0].prev_sample.dtype == torch.float64
    assert_close(found[1].prev_sample, found[0].prev_sample, 1e-6)
    made.set_scale_factors([2.0], mode)
    made.set_timesteps(5)
    with pytest.raises(ValueError, match="_scale_factors"):
        made.step(normal(1), made.timesteps[0], normal(1))


def test_lcm_that_grows_compiles():
    made, x, ends = fast.FlowMatchLCMScheduler(**SCALES), normal(1), []
    made.set_timesteps(5)
    for compiled in (True, False):
        torch._dynamo.reset()
        made._step_index = None
        made.set_begin_index(0)

        def loop(x):
            for t in made.timesteps:
                x = made.step(torch.tanh(x), t, x, return_dict=False)[0]
            return x

        torch.manual_seed(0)
        call = torch.compile(loop, fullgraph=True, backend="aot_eager") if compiled else loop
        ends.append(call(x))
    assert ends[0].shape == (2, 3, 16, 16)
    assert_bitwise(*ends)


@pytest.mark.parametrize(
    ("name", "config"),
    [("FlowMatchLCMScheduler", TURNED), ("FlowMatchEulerDiscreteScheduler", TURNED | RANDOM)],
)
def test_noise_on_an_inverted_flow_ends_on_data(name, config):
    """With the exact velocity of one image the run ends on it, where diffusers' ends on noise."""
    theirs, image = getattr(diffusers, name)(**config), normal(7)

    def end(scheduler):
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(SHAPE, generator=generator)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            e = (image - x) / (1.0 - sigma)  # x_0 - eps
            x = scheduler.step(e, t, x, generator=generator).prev_sample
        return x

    noise = torch.Generator().manual_seed(2)
    drawn = [torch.randn(SHAPE, generator=noise) for _ in range(7)]
    assert torch.equal(end(theirs), drawn[-1])
    assert torch.equal(end(fast.convert(theirs, compat="diffusers")), drawn[-1])
    assert_close(end(fast.convert(theirs)), image, 1e-6)


def tokens(scheduler):
    """(x, -e, t, the tokens' timesteps, their sigmas and the next lower ones): 3 tokens of 5, one
    of which is clean already."""
    scheduler.set_timesteps(4)
    shape = (2, 3, 5)
    given = scheduler.timesteps[[1, 2, 1]].repeat(2, 1)
    given[:, 2] = 0.0
    sigmas = scheduler.sigmas.double()
    at = given.double() / 1000
    lower = torch.stack([sigmas[2], sigmas[3], sigmas[4]]).repeat(2, 1)
    return normal(1, shape), -normal(2, shape), scheduler.timesteps[1], given, at, lower


def test_tokens_of_levels_of_their_own_go_down_from_each():
    """diffusers' pipelines give the velocity's opposite with these, whose step has the opposite
    sign: together they are right, and stay as they are."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    made = fast.convert(theirs)
    x, e, t, given, at, lower = tokens(made)
    want = x.double() + (lower - at)[..., None] * -e.double()
    got = made.step(e, t, x, per_token_timesteps=given).prev_sample
    assert_close(got.double(), want, 1e-6)
    assert_bitwise(got[:, 2], x[:, 2])
    tokens(theirs)
    assert_bitwise(got, theirs.step(e, t, x, per_token_timesteps=given).prev_sample)
    assert made.step_index == theirs.step_index == 2


def test_noise_for_tokens_begins_from_the_same_estimate():
    """diffusers takes what its pipelines give for the velocity itself where noise is added."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**RANDOM)
    ends = []
    for made in (theirs, fast.convert(theirs, compat="diffusers"), fast.convert(theirs)):
        x, e, t, given, at, lower = tokens(made)
        generator = torch.Generator().manual_seed(5)
        got = made.step(e, t, x, generator=generator, per_token_timesteps=given).prev_sample
        ends.append((got, torch.rand(1, generator=generator)))
    assert_bitwise(ends[1][0], ends[0][0])
    assert torch.equal(ends[2][1], ends[0][1])
    at, lower, z = at[..., None], lower[..., None], normal(5, x.shape).double()
    estimate = x.double() - at * -e.double()
    assert_close(ends[2][0].double(), (1.0 - lower) * estimate + lower * z, 1e-6)
    wrong = x.double() - at * e.double()
    assert_close(ends[0][0].double(), (1.0 - lower) * wrong + lower * z, 1e-6)


def test_tokens_on_a_device_are_not_waited_for():
    made = fast.FlowMatchEulerDiscreteScheduler()
    x, e, _, given, *_ = tokens(made)
    made._times = made.timesteps.tolist()
    made._begin()
    for name in ("timesteps", "sigmas"):
        setattr(made, name, getattr(made, name).to("meta"))
    x, e, given = x.to("meta"), e.to("meta"), given.to("meta")
    got = made.step(e, made.timesteps[1], x, per_token_timesteps=given).prev_sample
    assert got.shape == x.shape
    assert made.step_index == 2


# ---- the variance-exploding SDE ------------------------------------------------------------------


def test_correction_and_prediction_are_diffusers():
    """A run as the pipeline makes it: a correction with noise of its own before each step."""
    ends = []
    for made in (diffusers.ScoreSdeVeScheduler(sigma_max=20.0),
                 fast.ScoreSdeVeScheduler(sigma_max=20.0)):  # fmt: skip
        times, generator = timed(made, 12), torch.Generator().manual_seed(2)
        x = 20.0 * normal(1)
        for t, sigma in zip(times, made.sigmas, strict=True):
            for _ in range(2):
                score = (torch.tanh(x * (1.0 - 0.5 * t)) - x) / sigma**2
                x = made.step_correct(score, x, generator=generator).prev_sample
            score = (torch.tanh(x * (1.0 - 0.5 * t)) - x) / sigma**2
            x, mean = made.step_pred(score, t, x, generator=generator, return_dict=False)
        ends.append((x, mean, torch.rand(1, generator=generator)))
    assert made._left is False
    for got, want in zip(ends[1], ends[0], strict=True):
        assert_close(got, want)


def test_times_of_each_sample_and_off_the_grid_are_left_to_diffusers():
    theirs, made = (kind(sigma_max=20.0) for kind in (
        diffusers.ScoreSdeVeScheduler, fast.ScoreSdeVeScheduler))  # fmt: skip
    x, e = normal(1), normal(2)
    for t in (torch.tensor([0.9, 0.4]), 0.123, 0):
        found = []
        for scheduler in (theirs, made):
            timed(scheduler, 10)
            generator = torch.Generator().manual_seed(3)
            found.append(scheduler.step_pred(e, t, x, generator=generator).prev_sample)
        assert torch.equal(*found)


def test_sigmas_that_are_set_again_are_taken():
    made = fast.ScoreSdeVeScheduler()
    x = normal(1)
    for sigmas in ({"sigma_max": 5.0}, {"sigma_max": 20.0}):
        theirs, found = diffusers.ScoreSdeVeScheduler(), []
        for scheduler in (theirs, made, made):
            if scheduler is not made or not found[1:]:
                timed(scheduler, 10)
                scheduler.set_sigmas(10, **sigmas)
            else:
                scheduler = made.new_loop()
            generator = torch.Generator().manual_seed(3)
            t = scheduler.timesteps[2]
            found.append(scheduler.step_pred(x, t, x, generator=generator).prev_sample)
        assert_close(found[1], found[0])
        assert_bitwise(found[2], found[1])
    made.set_timesteps(3000)  # of which the sigmas are 10
    with pytest.raises(IndexError):
        made.step_pred(x, made.timesteps[0], x)
