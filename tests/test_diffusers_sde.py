"""diffusers' schedulers whose noise is of a Brownian tree: as those of test_diffusers."""

from __future__ import annotations

import copy

import pytest
import torch

import fastgen
from fastgen.testing import assert_bitwise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("torchsde", reason="torchsde is not installed, which diffusers needs for these")
import test_diffusers as others  # noqa: E402

from fastgen.integrations import diffusers as fast  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
LAST = {"final_sigmas_type": "sigma_min"}
SEEDED = {"noise_sampler_seed": 7}
CONFIGS = {
    "CosineDPMSolverMultistepScheduler": [
        {}, {"prediction_type": "epsilon"}, {"solver_order": 1}, {"solver_type": "heun"},
        {"sigma_schedule": "karras", "lower_order_final": False}, {"euler_at_final": True},
    ],
    "DPMSolverSDEScheduler": [
        SEEDED, {"prediction_type": "v_prediction", **SEEDED},
        {"use_karras_sigmas": True, **SEEDED}, {"timestep_spacing": "trailing", **SEEDED},
        {"timestep_spacing": "leading", "steps_offset": 1, **SEEDED},
    ],
}  # fmt: skip
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda v: str(v))
def test_a_seed_gives_diffusers_image(name, config):
    others.test_a_seed_gives_diffusers_image(name, config)


def test_a_list_of_generators_gives_diffusers_images():
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    theirs = diffusers.CosineDPMSolverMultistepScheduler()
    want = others.run(theirs, 10, generator=[g.clone_state() for g in generators])[0]
    got = others.run(fast.convert(theirs), 10, generator=generators)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_interface_is_diffusers(name):
    others.test_the_interface_is_diffusers(name)
    others.test_half_precision_stays_what_it_is(name)
    for kinds in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        others.test_dtypes_that_differ_come_out_as_there(name, kinds)


def test_what_is_exported_is_what_convert_knows():
    assert set(CONFIGS) < set(fast.__all__)
    others.test_what_is_exported_is_what_convert_knows()


@pytest.mark.parametrize("s_noise", [0.0, 0.7])
def test_noise_is_scaled_as_there(s_noise):
    theirs = diffusers.DPMSolverSDEScheduler(**SEEDED)
    want, got = (others.run(s, 8, s_noise=s_noise)[0] for s in (theirs, fast.convert(theirs)))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_may_begin_late(name):
    config = SEEDED if name == "DPMSolverSDEScheduler" else {}
    theirs = getattr(diffusers, name)(**config)
    ours = fast.convert(theirs)
    for scheduler in (theirs, ours):
        scheduler.set_begin_index(4)
    want, got = others.run(theirs, 10, start=4)[0], others.run(ours, 10, start=4)[0]
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_a_cosine_run_may_end_on_its_last_level():
    """diffusers asks torchsde for the way between two times that rounding alone parts, which is an
    endless recursion."""
    theirs = diffusers.CosineDPMSolverMultistepScheduler(**LAST)
    with pytest.raises(RecursionError):
        others.run(theirs, 10)
    longer = others.run(fast.convert(theirs), 10)[0]
    assert longer.isfinite().all()


def ends(name, seeds, config):
    """Of runs with the kernel's noise."""
    made = fast.convert(getattr(diffusers, name)(**config), noise="fastgen")
    made.set_timesteps(6)
    x = torch.cat([fastgen.randn((1, 3, 8, 8), seed=s) for s in seeds]) * made.init_noise_sigma
    options = {"generator": [torch.Generator().manual_seed(s) for s in seeds]}
    for t in made.timesteps:
        output = 0.5 * made.scale_model_input(x, t)
        x = made.step(output, t, x, return_dict=False,
                      **(options if name.startswith("Cosine") else {}))[0]  # fmt: skip
    assert made.noise_sampler is None
    return x


def test_noise_of_the_kernel_does_not_depend_on_the_batch():
    together = ends("CosineDPMSolverMultistepScheduler", [5, 6, 7], {})
    assert_bitwise(ends("CosineDPMSolverMultistepScheduler", [6], {}), together[1:2])
    one = ends("DPMSolverSDEScheduler", [5, 6], SEEDED)
    assert_bitwise(ends("DPMSolverSDEScheduler", [5, 6], SEEDED), one)
    assert not torch.equal(ends("DPMSolverSDEScheduler", [5, 6], {"noise_sampler_seed": 8}), one)


def test_schedulers_can_be_copied():
    for name in CONFIGS:
        made = fast.convert(getattr(diffusers, name)(), noise="fastgen")
        made.set_timesteps(4)
        x = torch.ones(others.SHAPE)
        made.step(made.scale_model_input(x, made.timesteps[0]), made.timesteps[0], x)
        t = made.timesteps[1]
        found = [s.step(x, t, x).prev_sample for s in (copy.deepcopy(made), copy.deepcopy(made))]
        assert_bitwise(*found)


def test_gradients_pass_as_through_diffusers():
    for name in CONFIGS:
        found = []
        config = SEEDED if name == "DPMSolverSDEScheduler" else {}
        theirs = getattr(diffusers, name)(**config)
        for scheduler in (theirs, fast.convert(theirs)):
            x = torch.ones(others.SHAPE, requires_grad=True)
            y, scale = x, torch.tensor(0.3, requires_grad=True)
            scheduler.set_timesteps(3)
            options = {}
            if name.startswith("Cosine"):
                options["generator"] = torch.Generator().manual_seed(1)
            for t in scheduler.timesteps:
                seen = scheduler.scale_model_input(y, t)
                y = scheduler.step(scale * seen, t, y, return_dict=False, **options)[0]
            found.append(torch.autograd.grad(y.sum(), (x, scale)))
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
