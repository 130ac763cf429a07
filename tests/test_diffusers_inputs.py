"""What diffusers' schedulers are given that does not fit: refused as there, or by name."""

from __future__ import annotations

import inspect

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from test_diffusers import CONFIGS, SHAPE, advance, network, timed  # noqa: E402

from fastgen.integrations import diffusers as fast  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
# fmt: off
PREDICTING = [name for name in CONFIGS
              if "prediction_type" in inspect.signature(getattr(diffusers, name)).parameters]
WITH_SIGMAS = [name for name in CONFIGS if not name.startswith(
    ("Cog", "DDIM", "DDPM", "PNDM", "IPNDM", "LCM", "TCD", "SCM", "RePaint", "UnCLIP"))]
TAKING_SIGMAS = ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
                 "FlowMatchLCMScheduler"]
# fmt: on


def made(module, name, **config):
    if name == "PNDMScheduler":  # its Runge-Kutta steps need more timesteps
        config = {"skip_prk_steps": True, **config}
    scheduler = getattr(module, name)(**config)
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True
    return scheduler


def step(scheduler, e, t, x):
    return advance(scheduler, e, 0, x, times=[t], return_dict=False)[0]


def outcome(call):
    torch.manual_seed(0)
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_as_there(name, use, **config):
    """The same exception, or the same numbers; returns that."""
    want, got = (outcome(lambda m=module: use(made(m, name, **config)))
                 for module in (diffusers, fast))  # fmt: skip
    if isinstance(want, type) or isinstance(got, type):
        assert got is want
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    return got


@pytest.mark.parametrize("name", PREDICTING)
def test_an_unknown_prediction_is_refused(name):
    scheduler = made(fast, name, prediction_type="nonsense")
    x, t = torch.ones(SHAPE), timed(scheduler, 6)[0]
    with pytest.raises(ValueError, match="nonsense"):
        step(scheduler, x, t, x)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_before_timesteps_is_served_or_refused_as_there(name):
    x = torch.ones(SHAPE)

    def use(scheduler):
        return step(scheduler, x, scheduler.timesteps[0], x)

    assert_as_there(name, use)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_timestep_off_the_grid_is_served_or_refused_as_there(name):
    x = torch.ones(SHAPE)
    for off in (lambda t: 0.987 * float(t) + 0.1, lambda t: torch.tensor(123456), lambda t: 3):

        def use(scheduler, off=off):
            t = timed(scheduler, 6)[1]
            return step(scheduler, x, off(t), x)

        assert_as_there(name, use)


@pytest.mark.parametrize("name", CONFIGS)
def test_more_steps_than_timesteps_are_refused(name):
    """But where a step is known by its timestep, which may be taken again."""
    scheduler, x = made(fast, name), torch.ones(SHAPE)
    for t in timed(scheduler, 6):
        x = step(scheduler, network(x, t), t, x)
    if not scheduler._counts and name != "PNDMScheduler":
        assert step(scheduler, x, t, x).shape == SHAPE
    else:
        message = "one after the other" if name == "PNDMScheduler" else "all steps were taken"
        with pytest.raises((IndexError, ValueError), match=message):
            step(scheduler, x, t, x)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler",
                                  "CMStochasticIterativeScheduler", "SCMScheduler"])  # fmt: skip
def test_more_timesteps_than_it_was_trained_with_are_refused(name):
    with pytest.raises(ValueError, match="cannot be larger than"):
        made(fast, name).set_timesteps(1001)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("part", [(slice(1),), (..., slice(3))], ids=["batch", "width"])
def test_an_output_of_another_shape_than_the_samples_is_refused(name, part):
    scheduler, x = made(fast, name), torch.ones(SHAPE)
    t = timed(scheduler, 6)[0]
    for output, sample in ((x[part], x), (x, x[part])):
        with pytest.raises(ValueError, match=r"model_output: got shape .* expected the sample's"):
            step(scheduler, output, t, sample)


@pytest.mark.parametrize("name", WITH_SIGMAS)
def test_sigmas_that_are_no_numbers_are_refused(name):
    scheduler, x = made(fast, name), torch.ones(SHAPE)
    t = timed(scheduler, 6)[0]
    scheduler.sigmas[2] = float("nan")
    with pytest.raises(ValueError, match="sigmas: got NaN"):
        step(scheduler, x, t, x)


@pytest.mark.parametrize("name", TAKING_SIGMAS)
@pytest.mark.parametrize("sigmas", [[0.9, 0.5, 0.7, 0.2], [0.2, 0.5, 0.9], [0.9, 0.5, 0.5, 0.2]])
def test_sigmas_that_do_not_fall_give_diffusers_numbers(name, sigmas):
    x = torch.ones(SHAPE)

    def use(scheduler):
        scheduler.set_timesteps(sigmas=sigmas)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(network(y, t), t, y).prev_sample
        return y

    assert isinstance(assert_as_there(name, use), torch.Tensor)


@pytest.mark.parametrize("name", TAKING_SIGMAS)
def test_sigmas_of_ones_choice_that_are_no_numbers_are_refused(name):
    scheduler, x = made(fast, name), torch.ones(SHAPE)
    scheduler.set_timesteps(sigmas=[0.9, float("nan"), 0.2])
    with pytest.raises(ValueError, match="sigmas: got NaN"):
        scheduler.step(x, scheduler.timesteps[0], x)
