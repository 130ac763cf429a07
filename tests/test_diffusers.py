"""diffusers' schedulers with a kernel a step: its images, its interface, its saved pipelines."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import fastgen
from fastgen.testing import assert_bitwise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from fastgen.integrations import diffusers as fast  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers', of NumPy's
SHAPE = (2, 3, 8, 8)
# FlowMatchEuler's stochastic sampling takes the global generator's numbers whatever it is given
IGNORES_GENERATOR = Version(diffusers.__version__) < Version("0.39")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
LAST = {"final_sigmas_type": "sigma_min"}
CONFIGS = {
    "DDIMScheduler": [
        {}, {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"prediction_type": "sample", "timestep_spacing": "trailing"},
        {"thresholding": True}, DYNAMIC,
    ],
    "DDPMScheduler": [
        {}, {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log", "clip_sample": False},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 2.0},
        {"thresholding": True}, DYNAMIC, {"variance_type": "learned"},
        {"variance_type": "learned_range", "prediction_type": "sample"},
    ],
    "EulerDiscreteScheduler": [
        {}, {"timestep_spacing": "leading", "steps_offset": 1}, {"use_karras_sigmas": True}, LAST,
        {"prediction_type": "v_prediction"}, {"prediction_type": "sample"},
    ],
    "EulerAncestralDiscreteScheduler": [
        {}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"},
    ],
    "HeunDiscreteScheduler": [
        {}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"},
        {"clip_sample": True, "timestep_spacing": "trailing"},
    ],
    "DPMSolverMultistepScheduler": [
        {}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {"algorithm_type": "dpmsolver", **LAST}, {"algorithm_type": "sde-dpmsolver", **LAST},
        {"algorithm_type": "dpmsolver", "solver_order": 3, **LAST},
        {"algorithm_type": "dpmsolver", **LAST, **DYNAMIC},
        {"use_karras_sigmas": True, "euler_at_final": True}, FLOW,
        {"prediction_type": "v_prediction", "lower_order_final": False},
        {"thresholding": True}, DYNAMIC,
    ],
    "UniPCMultistepScheduler": [
        {}, {"solver_order": 3}, {"solver_order": 1}, {"solver_type": "bh1", **LAST},
        {"predict_x0": False, **LAST}, {"solver_order": 3, "disable_corrector": [0, 2]}, FLOW,
        {"prediction_type": "v_prediction", "lower_order_final": False}, {"thresholding": True},
        DYNAMIC,
    ],
    "LMSDiscreteScheduler": [
        {}, {"prediction_type": "v_prediction"}, {"use_karras_sigmas": True},
    ],
    "KDPM2DiscreteScheduler": [{}, {"prediction_type": "v_prediction"}],
    "KDPM2AncestralDiscreteScheduler": [{}, {"timestep_spacing": "trailing"}],
    "DEISMultistepScheduler": [
        {}, {"solver_order": 3}, {"solver_order": 1}, {"thresholding": True}, DYNAMIC,
    ],
    "IPNDMScheduler": [{}],
    "PNDMScheduler": [
        {"skip_prk_steps": True}, {"skip_prk_steps": True, "steps_offset": 1},
        {"skip_prk_steps": True, "prediction_type": "v_prediction", "set_alpha_to_one": True}, {},
        {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    ],
    "DPMSolverSinglestepScheduler": [
        {}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"}, FLOW,
        {"solver_order": 3, "solver_type": "heun", **LAST}, {"algorithm_type": "dpmsolver", **LAST},
        {"algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun", **LAST},
        {"algorithm_type": "sde-dpmsolver++"}, {"prediction_type": "v_prediction"},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "prediction_type": "sample"},
        {"use_karras_sigmas": True, **LAST}, {"lower_order_final": True}, DYNAMIC,
    ],
    "DPMSolverMultistepInverseScheduler": [
        {}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"}, FLOW,
        {"algorithm_type": "dpmsolver"}, {"use_karras_sigmas": True, "euler_at_final": True},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"algorithm_type": "dpmsolver", "solver_order": 3, "timestep_spacing": "leading"}, DYNAMIC,
    ],
    "EDMDPMSolverMultistepScheduler": [
        {}, {"solver_order": 1}, {"solver_order": 3}, {"solver_type": "heun"}, LAST,
        {"algorithm_type": "sde-dpmsolver++"}, {"prediction_type": "v_prediction"},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "lower_order_final": False},
        {"sigma_schedule": "exponential", "euler_at_final": True, "sigma_max": 20.0}, DYNAMIC,
    ],
    "SASolverScheduler": [
        {}, {"predictor_order": 1}, {"corrector_order": 1}, {"algorithm_type": "noise_prediction"},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, FLOW, DYNAMIC,
        {"use_karras_sigmas": True, "lower_order_final": False}, {"tau_func": lambda t: 0.6},
    ],
    "EDMEulerScheduler": [{}, {"prediction_type": "v_prediction"}, {"sigma_max": 20.0}],
    "TCDScheduler": [{}, {"prediction_type": "v_prediction"}],
    "DDIMParallelScheduler": [{}],
    "DDPMParallelScheduler": [{}, {"variance_type": "learned"}],
    "UnCLIPScheduler": [
        {}, {"prediction_type": "sample", "clip_sample_range": 2.0}, {"clip_sample": False},
        {"variance_type": "learned_range"},
    ],
    "RePaintScheduler": [
        {}, {"eta": 1.0}, {"eta": 0.4, "clip_sample": False}, {"beta_schedule": "sigmoid"},
    ],
    "DDPMWuerstchenScheduler": [{}, {"scaler": 2.0}, {"scaler": 0.7, "s": 0.02}],
    "CogVideoXDDIMScheduler": [
        {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
             "timestep_spacing": "trailing", "snr_shift_scale": 1.0},
        {"prediction_type": "sample", "set_alpha_to_one": False, "steps_offset": 1},
    ],
    "CogVideoXDPMScheduler": [
        {}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
             "timestep_spacing": "trailing", "snr_shift_scale": 1.0},
        {"prediction_type": "sample", "set_alpha_to_one": False, "steps_offset": 1},
    ],
    "DDIMInverseScheduler": [{}, {"prediction_type": "v_prediction", "clip_sample": False}],
    "LCMScheduler": [{}, {"prediction_type": "v_prediction"}, {"clip_sample": True}, DYNAMIC],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}, {"stochastic_sampling": True}],
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}],
    "FlowMatchLCMScheduler": [{}, {"shift": 3.0}, {"use_karras_sigmas": True}],
    "CMStochasticIterativeScheduler": [
        {}, {"clip_denoised": False, "s_noise": 1.01}, {"sigma_data": 1.0, "rho": 3.0},
    ],
    "SCMScheduler": [{}, {"sigma_data": 1.0}],
    "ScoreSdeVeScheduler": [
        {"sigma_max": 3.0}, {"sigma_max": 3.0, "sampling_eps": 0.1},
        {"sigma_max": 2.0, "sigma_min": 0.1},
    ],
}  # fmt: skip
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]


def network(x, t):
    """Nonlinear in the sample and in time."""
    t = float(t)
    return torch.tanh(x * (0.4 + t / 2000)) + 0.3 * torch.sin(2 * x - t / 300)


GRIDS = {
    "RePaintScheduler": {"jump_length": 3, "jump_n_sample": 2},
    "SCMScheduler": {"intermediate_timesteps": None},
}


def times_of(scheduler):
    """The timesteps to step at: the last one of some classes is the data's."""
    ended = diffusers.SCMScheduler, diffusers.DDPMWuerstchenScheduler
    return scheduler.timesteps[: -1 if isinstance(scheduler, ended) else None]


def timed(scheduler, steps):
    """The timesteps to step at, which are set."""
    scheduler.set_timesteps(steps, **GRIDS.get(type(scheduler).__name__, {}))
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(steps)
    return times_of(scheduler)


def method(scheduler):
    return "step" if hasattr(scheduler, "step") else "step_pred"


def told(scheduler, t):
    """What ``network`` is told, of times up to 1000."""
    return float(t) * {"SCMScheduler": 600.0, "ScoreSdeVeScheduler": 1e3}.get(
        type(scheduler).__name__, 1.0
    )


def goes_back(scheduler, i):
    """Whether RePaint adds noise again before the i-th timestep."""
    times = scheduler.timesteps
    return hasattr(scheduler, "undo_step") and i > 0 and bool(times[i] > times[i - 1])


def with_variance(scheduler, e):
    """The network's output, and behind it a variance, where one is learned."""
    kind = getattr(scheduler.config, "variance_type", None) or ""
    if not kind.startswith("learned"):
        return e
    share = 0.05 if kind == "learned" else 1.0
    return torch.cat([e, share * torch.sigmoid(3.0 * torch.sin(5.0 * e))], 1)


def masked(x):
    """(image, mask) for RePaint: 0 where the image is to be painted."""
    mask = (torch.arange(x.shape[-1], device=x.device) % 3 == 0).to(x.dtype)
    image = (torch.arange(x.shape[-1], device=x.device) * 7 % 5 - 2) * 0.45
    return image.to(x.dtype).expand(x.shape).contiguous(), mask


def advance(scheduler, e, i, x, times=None, **options):
    """``step`` at the i-th timestep, with what else it takes in some classes: a learned variance,
    the timestep before or behind, the former estimate, an image and a mask."""
    name, times = type(scheduler).__name__, scheduler.timesteps if times is None else times
    t, former = times[i], getattr(scheduler, "former", None) if i else None
    e = with_variance(scheduler, e)
    if name == "RePaintScheduler":
        options["original_image"], options["mask"] = masked(x)
    if name == "DDPMWuerstchenScheduler":
        t = torch.as_tensor(t).expand(len(x))
    if name == "UnCLIPScheduler" and i + 1 < len(times):
        options["prev_timestep"] = times[i + 1]
    if name != "CogVideoXDPMScheduler":
        return getattr(scheduler, method(scheduler))(e, t, x, **options)
    result = scheduler.step(e, former, t, None if former is None else times[i - 1], x, **options)
    scheduler.former = result[1]
    return result


def run(scheduler, steps, dtype=torch.float32, shape=SHAPE, generator=None, start=0, **options):
    """(the end, what was shown beside it, the generator's next number)."""
    generator = generator or torch.Generator().manual_seed(3)
    times, step = timed(scheduler, steps), getattr(scheduler, method(scheduler))
    first = generator[0] if isinstance(generator, list) else generator
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = (torch.randn(shape, generator=first) * scale).to(dtype)
    if "generator" in inspect.signature(step).parameters:
        options["generator"] = generator
    for i in range(start, len(times)):
        t = times[i]
        if goes_back(scheduler, i):
            x = scheduler.undo_step(x, times[i - 1], generator)
            continue
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x, *rest = advance(
            scheduler, network(seen, told(scheduler, t)), i, x, **options, return_dict=False
        )
    return x, rest[-1] if rest else x, torch.rand(1, generator=first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda v: str(v))
def test_a_seed_gives_diffusers_image(name, config):
    """Within 1e-4 of the largest value, as float32's own errors along a run go; and the generator
    is left as diffusers leaves it."""
    # two steps from 157 to 0.03: diffusers' sigma_down, of float32, has lost all of its digits
    # and PNDM's Runge-Kutta steps take four timesteps at least
    fewest = 5 if name in ("KDPM2AncestralDiscreteScheduler", "PNDMScheduler") else 2
    for steps in (fewest, 10, 20):
        theirs = getattr(diffusers, name)(**config)
        # whose last step scales the image
        ours = fast.convert(theirs, compat="diffusers" if name == "UnCLIPScheduler" else "")
        assert isinstance(ours, type(theirs))
        options = {"eta": 0.5} if name in ("DDIMScheduler", "DDIMParallelScheduler") else {}
        fixed = config.get("stochastic_sampling") and IGNORES_GENERATOR
        expected, actual = (
            run(made, steps, generator=torch.manual_seed(3) if fixed else None, **options)
            for made in (theirs, ours)
        )
        for want, got in zip(expected, actual, strict=True):
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert float((got - want).abs().max()) <= 1.5e-4 * float(want.abs().max())
        assert not ours._left


@pytest.mark.parametrize("name", CONFIGS)
def test_the_interface_is_diffusers(name):
    theirs, ours = getattr(diffusers, name), getattr(fast, name)
    for part in (method(theirs), "set_timesteps"):
        wanted = inspect.signature(getattr(theirs, part))
        assert inspect.signature(getattr(ours, part)) == wanted
    made = ours.from_config(theirs().config)
    assert made.config == theirs().config
    x, results = torch.ones(SHAPE), []
    for scheduler in (made, theirs()):
        timed(scheduler, 4)
        scheduler.former = x
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, scheduler.timesteps[0])
        late = name == "CogVideoXDPMScheduler"  # whose first step is a tuple there in any case
        results.append(advance(scheduler, x, int(late), x, return_dict=True))
    assert type(results[0]) is type(results[1])
    assert isinstance(results[0].prev_sample, torch.Tensor)


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_stays_what_it_is(name):
    theirs = getattr(diffusers, name)()
    for dtype in (torch.bfloat16, torch.float16):
        expected, actual = run(theirs, 5, dtype), run(fast.convert(theirs), 5, dtype)
        assert (actual[0].dtype, actual[1].dtype) == (expected[0].dtype, expected[1].dtype)
        assert actual[0].isfinite().all()


STOCHASTIC = {
    "DDIMScheduler": {"eta": 1.0}, "DDPMScheduler": {}, "EulerAncestralDiscreteScheduler": {},
    "LCMScheduler": {}, "DPMSolverMultistepScheduler": {}, "DPMSolverSinglestepScheduler": {},
    "EDMDPMSolverMultistepScheduler": {}, "SASolverScheduler": {}, "FlowMatchLCMScheduler": {},
    "CMStochasticIterativeScheduler": {}, "SCMScheduler": {}, "ScoreSdeVeScheduler": {},
    "UnCLIPScheduler": {}, "RePaintScheduler": {}, "DDPMWuerstchenScheduler": {},
    "CogVideoXDPMScheduler": {},
}  # fmt: skip


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_of_the_kernel_does_not_depend_on_the_batch(name):
    config = {"algorithm_type": "sde-dpmsolver++"} if "DPMSolver" in name else {}
    options = STOCHASTIC[name]

    def end(seeds):
        made = fast.convert(getattr(diffusers, name)(**config), noise="fastgen")
        times = timed(made, 6)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        x = torch.cat([fastgen.randn((1, 3, 8, 8), seed=s) for s in seeds])
        x = x * getattr(made, "init_noise_sigma", 1.0)
        for i, t in enumerate(times):
            seen = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
            output = 0.5 * seen
            x = advance(made, output, i, x, generator=generators, return_dict=False, **options)[0]
        return x

    together = end([5, 6, 7])
    assert_bitwise(end([6]), together[1:2])
    assert_bitwise(end([5, 6, 7]), together)
    assert not torch.equal(together[0], together[1])


def test_a_run_may_begin_late():
    """Image to image: a multistep method begins with its first order wherever it begins."""
    theirs = diffusers.PNDMScheduler(skip_prk_steps=True)
    want, got = (run(s, 10, start=4)[0] for s in (theirs, fast.convert(theirs)))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                 "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler",
                 "TCDScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler",
                 "EDMDPMSolverMultistepScheduler", "SASolverScheduler",
                 "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
                 "CMStochasticIterativeScheduler", "SCMScheduler"):  # fmt: skip
        theirs = getattr(diffusers, name)()
        ours = fast.convert(theirs)
        for scheduler in (theirs, ours):
            scheduler.set_begin_index(4)
        want, got = run(theirs, 10, start=4)[0], run(ours, 10, start=4)[0]
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_gradients_pass_as_through_diffusers():
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler",
                 "RePaintScheduler", "DDPMWuerstchenScheduler", "CogVideoXDDIMScheduler",
                 "CogVideoXDPMScheduler", "FlowMatchHeunDiscreteScheduler",
                 "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler", "SCMScheduler",
                 "ScoreSdeVeScheduler"):  # fmt: skip
        found, config = [], {"variance_type": "learned"} if name == "DDPMScheduler" else {}
        theirs = getattr(diffusers, name)(**config)
        for scheduler in (theirs, fast.convert(theirs)):
            x = torch.ones(SHAPE, requires_grad=True)
            y, scale = x, torch.tensor(0.3, requires_grad=True)
            torch.manual_seed(0)
            for i in range(len(timed(scheduler, 3))):
                y = advance(scheduler, torch.tanh(scale * y), i, y, return_dict=False)[0]
            found.append(torch.autograd.grad(y.sum(), (x, scale)))
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_noise_that_broadcasts_is_taken_as_there():
    x = torch.ones(SHAPE)
    for shape in (SHAPE[:1] + (1, 8, 8), (1, 3, 1, 1), (8,)):
        found = []
        for made in (diffusers.DDIMScheduler(), fast.DDIMScheduler()):
            made.set_timesteps(5)
            noise = torch.full(shape, 0.3)
            found.append(made.step(x, made.timesteps[0], x, eta=1.0, variance_noise=noise))
        torch.testing.assert_close(found[1].prev_sample, found[0].prev_sample)
    with pytest.raises(ValueError, match="variance_noise: got shape"):
        made.step(x, made.timesteps[0], x, eta=1.0, variance_noise=torch.ones(3))


def test_a_batch_that_changes_within_a_run_is_refused():
    made = fast.DPMSolverMultistepScheduler()
    made.set_timesteps(5)
    x = torch.ones(SHAPE)
    made.step(x[:1], made.timesteps[0], x[:1])
    with pytest.raises(ValueError, match="sample: got shape"):
        made.step(x, made.timesteps[1], x)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "kinds",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16,) * 2],
)
def test_dtypes_that_differ_come_out_as_there(name, kinds):
    config = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    found = []
    for made in (getattr(diffusers, name)(**config), getattr(fast, name)(**config)):
        x, t = torch.ones(SHAPE, dtype=kinds[0]), timed(made, 5)[0]
        if hasattr(made, "scale_model_input"):
            made.scale_model_input(x, t)
        results = advance(made, x.to(kinds[1]), 0, x, return_dict=False)
        found.append([y.dtype for y in results if y is not None])
    assert found[0] == found[1]


def test_what_is_exported_is_what_convert_knows():
    assert set(fast.__all__) == {"convert", *fast._CLASSES, *fast.guiders._GUIDERS}


def test_every_scheduler_is_here_or_named_as_left_out():
    """Those that a new version of diffusers adds are to be added or named."""
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
    parts = page.split("Left out for good")
    table, left = (set(re.findall(r"`(\w+Scheduler)`", part)) for part in (
        parts[0], parts[1].split("**")[0]))  # fmt: skip
    theirs = {name for name in dir(diffusers.schedulers)
              if name.endswith("Scheduler") and not name.startswith("Flax")}  # fmt: skip
    assert theirs <= table | left
    assert set(fast._CLASSES) <= table
    assert table - set(fast._CLASSES) <= {"CosineDPMSolverMultistepScheduler",
                                          "DPMSolverSDEScheduler"}  # fmt: skip
    assert not table & left


def test_converting_again_keeps_what_was_asked_for():
    once = fast.convert(diffusers.DDIMScheduler(), noise="fastgen", compat="diffusers")
    again = fast.convert(once)
    assert (again._noise, again._compat) == ("fastgen", "diffusers")
    assert fast.convert(again, noise="torch")._noise == "torch"


CHURN = {"s_churn": 4.0, "s_tmin": 0.5, "s_tmax": 60.0, "s_noise": 1.01}


@pytest.mark.parametrize(("name", "prediction"), [
    ("EulerDiscreteScheduler", "epsilon"), ("EulerDiscreteScheduler", "v_prediction"),
    ("EulerDiscreteScheduler", "sample"), ("EDMEulerScheduler", "epsilon"),
    ("EDMEulerScheduler", "v_prediction"),
])  # fmt: skip
def test_churn_is_diffusers(name, prediction):
    theirs = getattr(diffusers, name)(prediction_type=prediction)
    for steps in (3, 10):
        want = run(theirs, steps, **CHURN)
        got = run(fast.convert(theirs, compat="diffusers"), steps, **CHURN)
        for a, b in zip(want, got, strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())
    own = run(fast.convert(theirs, noise="fastgen"), 10, **CHURN)[0]
    assert own.isfinite().all()
    assert not torch.equal(own, run(fast.convert(theirs), 10, **CHURN)[0])


# ---- defects of diffusers ------------------------------------------------------------------------


def test_ddim_stays_on_its_grid():
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    want, same = run(theirs, 7)[0], run(fast.convert(theirs, compat="diffusers"), 7)[0]
    assert float((same - want).abs().max()) <= 1e-5 * float(want.abs().max())
    right = run(fast.convert(theirs), 7)[0]
    assert float((right - want).abs().max()) > 1e-3
    plan = fastgen.solvers.ddim(
        fastgen.NoiseSchedule.from_alpha_bars(theirs.alphas_cumprod.double().numpy()), 7, clip=1.0
    )
    loop = fastgen.Loop(plan, torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    while not loop.done:
        loop.step(network(loop.x, loop.time[0]))
    assert float((right - loop.x).abs().max()) <= 1e-5 * float(want.abs().max())


def test_the_last_step_of_unclip_ends_on_the_estimate():
    """Where a_s = 1, beta is 1 - a_t: diffusers has the one from its betas and the other from their
    products in float32, and the image comes out as 0.99947 of itself."""
    x, e = torch.full(SHAPE, 0.5), torch.full(SHAPE, 0.3)
    ends = []
    for compat in (None, "", "diffusers"):
        made = diffusers.UnCLIPScheduler()
        made = made if compat is None else fast.convert(made, compat=compat)
        made.set_timesteps(5)
        ends.append(made.step(e, made.timesteps[-1], x))
    theirs, ours, same = ends
    assert_bitwise(ours.prev_sample, ours.pred_original_sample)
    assert_bitwise(same.prev_sample, theirs.prev_sample)
    ratio = float((theirs.prev_sample / theirs.pred_original_sample).mean())
    beta, level = diffusers.UnCLIPScheduler().betas[0], diffusers.UnCLIPScheduler().alphas_cumprod
    assert ratio == pytest.approx(float(beta / (1 - level[0])), abs=1e-6)
    assert abs(ratio - 1.0) > 5e-4


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_cogvideox_stays_on_its_grid(name):
    theirs = getattr(diffusers, name)(timestep_spacing="trailing")
    want, same = run(theirs, 7), run(fast.convert(theirs, compat="diffusers"), 7)
    for a, b in zip(want, same, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())
    right = run(fast.convert(theirs), 7)
    assert float((right[0] - want[0]).abs().max()) > 1e-3
    assert_bitwise(right[0], right[1])  # it ends on the estimate
    assert_bitwise(right[2], want[2])  # and the generator where it would


def test_the_former_estimate_of_cogvideox_dpm():
    """Wider than the sample, of another step than the one before, absent, or of another shape."""
    x, e, old = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)) for k in (1, 2, 3))
    theirs = diffusers.CogVideoXDPMScheduler()
    made = fast.convert(theirs)
    for scheduler in (theirs, made):
        scheduler.set_timesteps(6)
    t = made.timesteps
    for former, back, dtype in (
        (old, t[2], torch.bfloat16),
        (old.double(), t[2], torch.float32),
        (old, t[1], torch.float32),
        (old, int(t[2]), torch.float32),
        (None, t[2], torch.float32),
        (old.mT, t[2], torch.float32),
    ):
        want, got = (
            scheduler.step(e.to(dtype), former, t[3], back, x.to(dtype),
                           generator=torch.Generator().manual_seed(0))
            for scheduler in (theirs, made)
        )  # fmt: skip
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    for scheduler in (theirs, made):
        with pytest.raises(IndexError, match="list index"):
            scheduler.step(e, old, t[3], None, x)
    with pytest.raises(ValueError, match="old_pred_original_sample: got shape"):
        made.step(e, old[:1], t[3], t[2], x)


def test_the_first_step_of_cogvideox_dpm_returns_what_it_is_asked_for():
    made, x = fast.CogVideoXDPMScheduler(), torch.ones(SHAPE)
    made.set_timesteps(3)
    t = made.timesteps[0]
    result = made.step(x, None, t, None, x, return_dict=True)
    assert isinstance(result, diffusers.schedulers.scheduling_dpm_cogvideox.DDIMSchedulerOutput)
    assert isinstance(made.step(x, None, t, None, x), tuple)


def repaint(made, x, mask, image):
    made.set_timesteps(8, jump_length=2, jump_n_sample=2)
    return made.step(0.5 * x, made.timesteps[1], x, image, mask, torch.Generator().manual_seed(0))


def test_masks_of_repaint_of_any_kind():
    """Shares, whole numbers, and those that broadcast; an image for the whole batch."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    share = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2))
    image = torch.linspace(-1.0, 1.0, 64).view(8, 8)
    for mask in (share, share[:1, :1], share.round().int(), share.round()[0, 0], share.double(),
                 share.transpose(2, 3)):  # fmt: skip
        for given in (image.expand(SHAPE), image, image.bfloat16(), image.double()):
            want = repaint(diffusers.RePaintScheduler(eta=0.7), x, mask, given)
            got = repaint(fast.RePaintScheduler(eta=0.7), x, mask, given)
            assert got.prev_sample.dtype == want.prev_sample.dtype
            # diffusers scales the image, of at most 1, in its own dtype
            atol = 2.0**-9 if given.dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(got.prev_sample, want.prev_sample, rtol=1e-5, atol=atol)
    wider = torch.ones(4, 1, 3, 8, 8)  # makes more of the sample
    want = repaint(diffusers.RePaintScheduler(), x, wider, image)
    assert_bitwise(repaint(fast.RePaintScheduler(), x, wider, image).prev_sample, want.prev_sample)


def test_repaint_draws_anew_where_a_timestep_comes_again():
    made = fast.RePaintScheduler.from_config(diffusers.RePaintScheduler(eta=1.0).config,
                                             noise="fastgen")  # fmt: skip
    x, mask = torch.ones(SHAPE), torch.zeros(SHAPE)
    timed(made, 8)
    times = made.timesteps.tolist()
    torch.manual_seed(0)
    ends = [made.step(0.5 * x, t, x, x, mask).prev_sample for t in times[:1] + [times[3]] * 2]
    assert not torch.equal(ends[1], ends[2])
    torch.manual_seed(0)
    assert_bitwise(made.step(0.5 * x, times[0], x, x, mask).prev_sample, ends[0])  # another run
    made.eta = 0.0  # as its pipeline sets it
    ends = [made.step(0.5 * x, times[3], x, x, mask).prev_sample for _ in range(2)]
    assert_bitwise(*ends)


def test_unclip_steps_where_it_is_told():
    """To the next timestep of the grid, to t - 1 where none is told; to any other as there."""
    x, e = torch.ones(SHAPE), torch.full(SHAPE, 0.3)
    theirs = diffusers.UnCLIPScheduler()
    made = fast.convert(theirs)
    for scheduler in (theirs, made):
        scheduler.set_timesteps(5)
    t, s = made.timesteps[1:3]
    for told in (s, int(s), None, int(t) - 1, made.timesteps[3], 5):
        for place in (t, int(t)):
            want, got = (scheduler.step(e, place, x, told, torch.Generator().manual_seed(0))
                         for scheduler in (theirs, made))  # fmt: skip
            torch.testing.assert_close(got.prev_sample, want.prev_sample)
            torch.testing.assert_close(got.pred_original_sample, want.pred_original_sample)


def test_wuerstchen_knows_a_timestep_that_was_rounded():
    """A pipeline in half precision tells it its timesteps in that; the level is that of the grid,
    where the sample is, and not that of the rounded number."""
    theirs = diffusers.DDPMWuerstchenScheduler()
    ours, same = fast.convert(theirs), fast.convert(theirs, compat="diffusers")
    x, e = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    for made in (theirs, ours, same):
        made.set_timesteps(20)
    strays = []
    for t in theirs.timesteps[:-1]:
        wanted, *ends = (
            made.step(e, t.expand(2).to(dtype), x, torch.Generator().manual_seed(0)).prev_sample
            for made, dtype in ((theirs, torch.float32), (ours, torch.bfloat16),
                                (theirs, torch.bfloat16), (same, torch.bfloat16))
        )  # fmt: skip
        torch.testing.assert_close(ends[0], wanted, rtol=1e-5, atol=1e-5)
        assert_bitwise(ends[2], ends[1])
        strays.append(float((ends[1] - wanted).abs().max()))
    assert max(strays) > 1e-2


def test_wuerstchen_steps_each_sample_from_its_own_timestep():
    """diffusers takes the timestep behind the first sample's for all."""
    made = fast.DDPMWuerstchenScheduler()
    made.set_timesteps(6)
    x, e = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    times = made.timesteps[[1, 4]]
    together = made.step(e, times, x, torch.Generator().manual_seed(0)).prev_sample
    plain = diffusers.DDPMWuerstchenScheduler()
    plain.set_timesteps(6)
    for k, t in enumerate(times):
        alone = plain.step(e, t.expand(2), x, torch.Generator().manual_seed(0)).prev_sample
        torch.testing.assert_close(together[k], alone[k])
    off = made.step(e, torch.tensor([0.5, 0.51]), x).prev_sample
    assert off[1].isnan().all()


def test_euler_with_churn_takes_the_estimate_at_the_level_of_the_noise():
    """Karras et al. (2022), algorithm 2, where diffusers has the level before it for v."""
    theirs = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    made = fast.convert(theirs)
    for scheduler in (theirs, made):
        scheduler.set_timesteps(5)
    x, e = torch.ones(SHAPE), torch.full(SHAPE, 0.3)
    t = made.timesteps[2]
    made.set_begin_index(2)
    made.scale_model_input(x, t)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    got = made.step(e, t, x, s_churn=2.0, generator=torch.Generator().manual_seed(3))
    sigma, end = made.sigmas[2:4].double().tolist()
    higher = sigma * 1.4
    x = x.double() + (higher**2 - sigma**2) ** 0.5 * z
    estimate = x / (higher**2 + 1) - higher / (higher**2 + 1) ** 0.5 * e
    want = x + (end - higher) * (x - estimate) / higher
    torch.testing.assert_close(got.pred_original_sample.double(), estimate, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.prev_sample.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_is_nan_in_diffusers_is_not_here():
    for theirs in (diffusers.DDPMScheduler(variance_type="fixed_large_log"),
                   diffusers.UniPCMultistepScheduler(solver_type="bh1")):  # fmt: skip
        assert run(theirs, 5)[0].isnan().any()
        assert run(fast.convert(theirs), 5)[0].isfinite().all()


# ---- pipelines, files and errors -----------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_a_pipeline_makes_the_same_image(name, unet, tmp_path):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    pipe = getattr(diffusers, f"{name}Pipeline")(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)

    def image():
        generator = torch.Generator().manual_seed(1)
        return torch.from_numpy(pipe(batch_size=2, generator=generator, num_inference_steps=10,
                                     output_type="np").images)  # fmt: skip

    before = image()
    assert fast.convert(pipe) is pipe
    assert type(pipe.scheduler) is getattr(fast, f"{name}Scheduler")
    assert float((image() - before).abs().max()) <= 1e-4
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", f"{name}Scheduler"]
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is getattr(diffusers, f"{name}Scheduler")


@pytest.mark.parametrize("name", CONFIGS)
def test_schedulers_can_be_copied_pickled_and_saved(name, tmp_path):
    made = fast.convert(getattr(diffusers, name)(), noise="fastgen")
    times, x = timed(made, 6), torch.ones(SHAPE)
    if hasattr(made, "scale_model_input"):
        made.scale_model_input(x, times[0])
    advance(made, x, 0, x)
    ends = []
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made):
        assert type(other) is type(made)
        assert other._noise == "fastgen"
        torch.manual_seed(0)
        ends.append(advance(other, 0.5 * x, 1, x, return_dict=False)[0])
    assert_bitwise(ends[0], ends[2])
    assert_bitwise(ends[1], ends[2])
    made.save_pretrained(tmp_path)
    for module in (fast, diffusers):
        loaded = getattr(module, name).from_pretrained(tmp_path)
        assert type(loaded) is getattr(module, name)
        assert all(loaded.config[k] == v for k, v in made.config.items() if k[0] != "_")


@pytest.mark.parametrize("name", CONFIGS)
def test_strides_do_not_matter(name):
    made = getattr(fast, name)()
    timed(made, 6)
    x, e = (torch.randn(2, 8, 6, 3, generator=torch.Generator().manual_seed(k)) for k in range(2))
    views = [tensor[:, :, ::2].permute(0, 3, 1, 2) for tensor in (x, e)]
    ends = []
    for x, e in (views, [view.contiguous() for view in views]):
        run, y = made.new_loop(), x
        if hasattr(run, "is_scale_input_called"):
            run.is_scale_input_called = True
        torch.manual_seed(0)
        for i in range(3):
            y = advance(run, e, i, y, return_dict=False)[0]
        assert not run._left
        ends.append(y)
    assert_bitwise(*ends)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"VQDiffusionScheduler has no counterpart.*DDIM,"):
        fast.convert(diffusers.VQDiffusionScheduler(num_vec_classes=4))
    vae = diffusers.AutoencoderKL(block_out_channels=(32,))
    with pytest.raises(ValueError, match=r"compat: .*an autoencoder does not take"):
        fast.convert(vae, compat="diffusers")
    with pytest.raises(ValueError, match=r"noise: .*a guider does not take"):
        fast.convert(diffusers.ClassifierFreeGuidance(), noise="torch")
    with pytest.raises(TypeError, match="expected a scheduler, a pipeline"):
        fast.convert(3)
    with pytest.raises(ValueError, match="noise: got 'cuda'"):
        fast.convert(diffusers.DDIMScheduler(), noise="cuda")
    with pytest.raises(ValueError, match="compat: got 'old'"):
        fast.convert(diffusers.DDIMScheduler(), compat="old")
    x = torch.ones(SHAPE)
    for name in ("DDIMScheduler", "UniPCMultistepScheduler"):
        with pytest.raises(ValueError, match="you need to run 'set_timesteps'"):
            getattr(fast, name)().step(x, 1, x)
    made = fast.UniPCMultistepScheduler()
    made.set_timesteps(2)
    with pytest.raises(ValueError, match="model_output: got shape"):
        made.step(x[:1], made.timesteps[0], x)
    for t in made.timesteps:
        x = made.step(x, t, x).prev_sample
    with pytest.raises(IndexError, match="all steps were taken"):
        made.step(x, made.timesteps[-1], x)
