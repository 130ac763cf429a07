"""The DPM-Solvers and SA-Solver of diffusers where diffusers' own numbers are a defect's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastgen import solvers

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from test_diffusers import DYNAMIC, LAST, SHAPE, run  # noqa: E402

from fastgen.integrations import diffusers as fast  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_close(got, want, share=1e-4):
    assert float((got - want).abs().max()) <= share * float(want.abs().max())


def rows_of(scheduler, steps):
    made = fast.convert(scheduler)
    made.set_timesteps(steps)
    made._begin()
    assert not made._left
    return made, made._rows


THIRD = {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver", **LAST}),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_the_third_stochastic_order_is_the_integral_of_a_parabola(name, config):
    """As SA-Solver's of three estimates is, which is tested by itself. diffusers fails, or, in
    DPMSolverMultistepScheduler's sde-dpmsolver++, has a sign wrong."""
    theirs = getattr(diffusers, name)(**THIRD, **config)
    if "EDM" in name or config["algorithm_type"] == "sde-dpmsolver":
        with pytest.raises(UnboundLocalError):
            run(theirs, 8)
    made, rows = rows_of(theirs, 8)
    levels = made._exploding if "EDM" in name else made._preserving
    plan = solvers.sa_solver(
        levels(made.sigmas.tolist()), predictor_order=3, corrector_order=0,
        data=config["algorithm_type"].endswith("++"), lower_order_final=False,
    )  # fmt: skip
    for i, (ours, other) in enumerate(zip(rows, plan.rows, strict=True)):
        mine, given = ours.outputs[0], other.outputs[0]
        assert mine.noise == pytest.approx(given.noise, rel=1e-9)
        for name in ("x", "e", "denoised"):
            want = given.weights.get(name, 0.0)
            assert mine.weights.get(name, 0.0) == pytest.approx(want, rel=1e-9, abs=1e-9)
        for back in (1, 2):  # in two slots there, in three here
            want = given.weights.get(f"h{(i - back) % 3}", 0.0)
            assert mine.weights.get(f"h{(i - back) % 2}", 0.0) == pytest.approx(want, abs=1e-9)


def test_the_third_stochastic_order_of_a_singlestep_is_the_integral_of_a_parabola():
    """diffusers has a sign wrong."""
    theirs = diffusers.DPMSolverSinglestepScheduler(
        solver_order=3, solver_type="heun", algorithm_type="sde-dpmsolver++"
    )
    made, rows = rows_of(theirs, 7)
    assert made.order_list[:3] == [1, 2, 3]
    points = made._preserving(made.sigmas.tolist()).points[:4]
    h = points[3].log_snr - points[0].log_snr
    ratios = [(p.log_snr - points[0].log_snr) / h for p in points[:3]]
    wanted = solvers.sa.coefficients(h, 1.0, ratios, True)
    weights = rows[2].outputs[0].weights
    e, alpha = points[2].estimate[1], points[3].alpha
    found = [weights["h1"], weights["h2"], weights["e"] / e]
    assert found == pytest.approx([alpha * w for w in wanted], rel=1e-9)
    want, got = run(theirs, 7)[0], run(made, 7)[0]
    assert float((got - want).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver", **LAST}),
        ("SASolverScheduler", {"algorithm_type": "noise_prediction"}),
    ],
)
def test_thresholding_is_of_the_estimate_of_x0_where_noise_is_integrated(name, config):
    """diffusers looks for a timestep that it does not have there."""
    kind = getattr(diffusers, name)
    with pytest.raises(RuntimeError):
        run(kind(**config, **DYNAMIC), 7)

    class Right(kind):
        def convert_model_output(self, output, sample):
            alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[self.step_index])
            x0 = self._threshold_sample((sample - sigma * output) / alpha)
            return (sample - alpha * x0) / sigma

    theirs = Right(**config, **DYNAMIC)
    assert_close(run(fast.convert(kind(**config, **DYNAMIC)), 7)[0], run(theirs, 7)[0])


def doubled(kind):
    """A scheduler whose coefficients come out in float64."""

    class Doubled(kind):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.sigmas = self.sigmas.double()

    return Doubled


@pytest.mark.parametrize("data", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize("orders", [(2, 3), (3, 3), (3, 4), (4, 4)])
def test_sa_solvers_numbers_are_diffusers_in_float64(orders, data):
    """By its float32 the higher orders lose their digits: the integrals are differences there of
    numbers that grow as lambda^3."""
    config = {"predictor_order": orders[0], "corrector_order": orders[1], "algorithm_type": data}
    kind = diffusers.SASolverScheduler
    got = run(fast.convert(kind(**config)), 20)[0]
    want = run(doubled(kind)(**config), 20)[0]
    assert_close(got, want)
    if orders == (4, 4):
        own = run(kind(**config), 20)[0]
        assert float((own - want).abs().max()) > 5 * float((got - want).abs().max())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepInverseScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, **LAST, "lower_order_final": False}),
    ],
)
def test_a_last_step_that_goes_nowhere_stays(name, config):
    """Two levels that are the same: 0 / 0 in diffusers."""
    theirs = getattr(diffusers, name)(**config)
    made = fast.convert(theirs)
    assert run(theirs, 40)[0].isnan().any()
    assert run(made, 40)[0].isfinite().all()
    assert made._rows[-1].outputs[0].weights == {"x": 1.0}


def test_noise_upwards_has_no_variance_and_is_left_to_diffusers():
    theirs = diffusers.DPMSolverMultistepInverseScheduler(algorithm_type="sde-dpmsolver++")
    made = fast.convert(theirs)
    made.set_timesteps(5)
    x = torch.ones(SHAPE)
    assert made.step(x, made.timesteps[0], x).prev_sample.isnan().all()
    assert made._left


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler",
     "UniPCMultistepScheduler", "DEISMultistepScheduler"],
)  # fmt: skip
def test_predictions_of_other_paths_than_the_sigmas_are_left_to_diffusers(name):
    for config in ({"use_flow_sigmas": True, "prediction_type": "v_prediction"},
                   {"prediction_type": "flow_prediction"}):  # fmt: skip
        theirs = getattr(diffusers, name)(**config)
        made = fast.convert(theirs)
        assert torch.equal(run(made, 5)[0], run(theirs, 5)[0])
        assert made._left


def test_runge_kutta_steps_begin_at_the_first_timestep():
    made = fast.convert(diffusers.PNDMScheduler())
    made.set_timesteps(10)
    x = torch.ones(SHAPE)
    made.step(x, made.timesteps[3], x)
    assert made._left  # as there, where the table of timesteps is read from its beginning


def test_sa_solver_can_be_pickled():
    made = fast.convert(diffusers.SASolverScheduler())
    made.set_timesteps(6)
    x = torch.ones(SHAPE)
    generator = torch.Generator().manual_seed(0)
    made.step(x, made.timesteps[0], x, generator=generator)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        again, t = copy.deepcopy(made), made.timesteps[1]
        pair = [s.step(x, t, x, generator=torch.Generator()).prev_sample for s in (other, again)]
        assert torch.equal(*pair)


@pytest.mark.parametrize(
    "name",
    ["DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "SASolverScheduler",
     "DPMSolverMultistepInverseScheduler", "PNDMScheduler"],
)  # fmt: skip
def test_gradients_pass_as_through_diffusers(name):
    found = []
    for scheduler in (getattr(diffusers, name)(), fast.convert(getattr(diffusers, name)())):
        x = torch.ones(SHAPE, requires_grad=True)
        y, scale = x, torch.tensor(0.3, requires_grad=True)
        scheduler.set_timesteps(4)
        options = {"generator": torch.Generator()} if name == "SASolverScheduler" else {}
        for t in scheduler.timesteps:
            y = scheduler.step(scale * y, t, y, return_dict=False, **options)[0]
        found.append(torch.autograd.grad(y.sum(), (x, scale)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
