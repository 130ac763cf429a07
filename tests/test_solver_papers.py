"""RES, SEEDS, reverse-time SDEs, CFG++ and RePaint: whole runs against the papers' formulas in
float64, their integrals by quadrature.

The path is variance-preserving, lambda = log(alpha / sigma); a formula is given the network, so
that what its roundings can come to is seen by shaking it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_solvers import CLIPS, SCHEDULE, STEPS, clipped, network, start, step_noise

import fastgen
from fastgen import Loop, NoiseSchedule, Plan, denoiser_levels, sigmas, solvers
from fastgen.solvers.repaint import visited

NODES, SHARES = np.polynomial.legendre.leggauss(48)
LEVELS = [*SCHEDULE.sigmas[SCHEDULE.timesteps(STEPS)].tolist(), 0.0]  # sigma / alpha
LOGS = np.log(SCHEDULE.sigmas)


def run_numbers(plan: Plan, x, normals, kind: type = float, unconditional=None):
    """A plan's own numbers, as float64 or rounded to ``kind``, by the formula of ``Row``."""
    history: dict[str, np.ndarray] = {}
    for row, z in zip(plan.rows, normals, strict=True):
        values = {"x": x, "e": network(x, row.model_time), **history}
        if unconditional is not None:
            values["u"] = unconditional(x, row.model_time)
            values["e"] = values["u"] + GUIDANCE * (values["e"] - values["u"])
        d = sum(float(kind(a)) * values[n] for a, n in zip(row.denoised, "xe", strict=True))
        values["denoised"] = clipped(d, row.clip)
        for output in row.outputs:
            y = sum(float(kind(w)) * values[name] for name, w in output.weights.items())
            y = y + sum(float(kind(scale)) * z for scale in output.noise)
            if output.target == "x":
                x = y
            else:
                history[f"h{output.target}"] = y
    return x


def run_loop(plan: Plan, x: np.ndarray, seed: int, unconditional=None) -> np.ndarray:
    guidance = 1.0 if unconditional is None else GUIDANCE
    loop = Loop(plan, torch.from_numpy(x).float(), seed=seed, guidance_scale=guidance)
    while not loop.done:
        at, t = loop.model_input.double().numpy(), loop.row.model_time
        u = unconditional and torch.from_numpy(unconditional(at, t)).float()
        loop.step(torch.from_numpy(network(at, t)).float(), u)
    return loop.x.double().numpy()


def assert_follows(plan: Plan, formula: Callable, unconditional=None) -> None:
    """formula(x, normals, network): the plan's numbers to float64's rounding, the loop to
    float32's: sixteen times what the run's end moves by when its beginning, normals and network
    outputs are shaken by a unit, as in ``test_solvers.rounding``, and as much for the formula's own
    sums of many terms."""
    x, normals = start(), step_noise(11, len(plan))
    exact, moved = formula(x, normals, network), 0.0
    for seed in range(8):
        signs = np.random.default_rng(seed)

        def shaken(value, signs=signs):
            return value * (1 + 2.0**-26 * signs.choice([-1.0, 1.0], np.shape(value)))

        end = formula(
            shaken(x), [shaken(z) for z in normals], lambda x, t, s=shaken: s(network(s(x), t))
        )
        moved = max(moved, float(np.abs(end - exact).max()))
    bound = 32 * 2.0**26 * moved
    assert 2.0**-24 * bound < 2e-2 * np.abs(exact).max()  # or the comparison would say nothing
    ours = run_numbers(plan, x, normals, unconditional=unconditional)
    assert np.abs(ours - exact).max() <= 2.0**-53 * bound
    assert np.abs(run_loop(plan, x, 11, unconditional) - exact).max() <= 2.0**-24 * bound


def of(ratio: float) -> tuple[float, float, float]:
    """(alpha, sigma, time)"""
    time = float(np.interp(math.log(ratio), LOGS, np.arange(len(LOGS)))) if ratio else 0.0
    return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio), time


def estimates(x, ratio, net, clip=None):
    """(x_0, eps)"""
    alpha, sigma, time = of(ratio)
    x0 = clipped((x - sigma * net(x, time)) / alpha, clip)
    return x0, (x - alpha * x0) / sigma


# ---- RES and SEEDS -------------------------------------------------------------------------------


def moved(x, begin, end, estimate: Callable, sde: bool, data: bool):
    """The exact solution from one ratio to another, but for its noise, for an estimate (of x_0:
    data; or of eps) that is known as a function of lambda: Lu et al. (2022b), eq. 8 and 14."""
    (alpha_s, sigma_s, _), (alpha_t, sigma_t, _) = of(begin), of(end)
    low, high = -math.log(begin), -math.log(end)
    points = 0.5 * (high - low) * NODES + 0.5 * (high + low)
    weights = 0.5 * (high - low) * SHARES * (2 if sde else 1)
    if data:
        mean = sigma_t / sigma_s * math.exp(-(high - low) if sde else 0.0) * x
        weights = weights * sigma_t * np.exp(points - ((high - points) if sde else 0.0))
    else:
        mean = alpha_t / alpha_s * x
        weights = -weights * alpha_t * np.exp(-points)
    return mean + sum(w * estimate(p) for w, p in zip(weights, points, strict=True))


def drawn(begin, middle, end, data):
    """The deviation at ``end`` of what the reverse SDE's noise from one ratio to another comes to:
    sigma e^-lambda (2 int e^(2 lambda))^(1/2), or alpha (2 int e^(-2 lambda))^(1/2)."""
    alpha, sigma, _ = of(end)
    if data:
        return sigma * end * math.sqrt(middle**-2 - begin**-2)
    return alpha * math.sqrt(begin**2 - middle**2)


def line(low, low_value, high, high_value):
    return lambda p: low_value + (p - low) / (high - low) * (high_value - low_value)


def staged(nodes, sde=False, data=True, midpoint=False, clip=None):
    """One step of so many stages after the other; the later stages' estimates of x_0 or eps are the
    line through the first and the last one, or, where ``midpoint``, that of the middle."""

    def formula(x, normals, net):
        rest = iter(normals)
        for s, t in itertools.pairwise(LEVELS):
            if t == 0.0:
                return estimates(x, s, net, clip)[0]
            ratios = [s, *(s ** (1 - c) * t**c for c in nodes), t]
            values: list = []
            draws: list = []
            y = x
            for k, end in enumerate(ratios[1:]):
                values.append(estimates(y, ratios[k], net, clip)[0 if data else 1])
                draws.append(next(rest))
                lambdas = [-math.log(r) for r in ratios]
                if k == 0 or midpoint:
                    estimate = lambda p, v=values[-1]: v  # noqa: E731
                else:
                    estimate = line(lambdas[0], values[0], lambdas[k], values[k])
                y = moved(x, s, end, estimate, sde, data)
                if sde:
                    y = y + sum(drawn(ratios[j], ratios[j + 1], end, data) * z
                                for j, z in enumerate(draws))  # fmt: skip
            x = y
        return x

    return formula


@pytest.mark.parametrize("clip", CLIPS[:2])
@pytest.mark.parametrize("c2", [0.5, 0.3, 0.9])
def test_res_singlestep_integrates_the_line_through_its_stages(c2, clip):
    plan = solvers.res_singlestep(SCHEDULE, STEPS, c2=c2, clip=clip)
    assert_follows(plan, staged((c2,), clip=clip))


@pytest.mark.parametrize("clip", CLIPS[:2])
def test_res_multistep_integrates_the_line_through_its_last_estimates(clip):
    def formula(x, normals, net):
        before = None
        for s, t in itertools.pairwise(LEVELS):
            x0 = estimates(x, s, net, clip)[0]
            if t == 0.0:
                return x0
            if before is None:
                estimate = lambda p, x0=x0: x0  # noqa: E731
            else:
                estimate = line(-math.log(before[0]), before[1], -math.log(s), x0)
            x, before = moved(x, s, t, estimate, False, True), (s, x0)
        return x

    assert_follows(solvers.res_multistep(SCHEDULE, STEPS, clip=clip), formula)


# eps in long steps of the reverse SDE grows by e^h: the formula is held on shorter ones
@pytest.mark.parametrize("clip", CLIPS[:2])
def test_seeds_is_its_stages_on_one_brownian_path(clip):
    for solver, nodes in [(solvers.seeds_2, (0.5,)), (solvers.seeds_3, (1 / 3, 2 / 3))]:
        plan = solver(SCHEDULE, STEPS, clip=clip)
        assert_follows(plan, staged(nodes, sde=True, midpoint=len(nodes) == 1, clip=clip))


@pytest.mark.parametrize("name", ["seeds_2", "seeds_3"])
def test_seeds_of_the_noise_is_its_stages(name, monkeypatch):
    """The estimate of eps, on levels near each other: its steps grow the sample by e^h."""
    monkeypatch.setattr(f"{__name__}.LEVELS", np.geomspace(2.0, 0.5, 5).tolist())
    plan = getattr(solvers, name)(SCHEDULE.levels_at(LEVELS), data=False)
    nodes = (0.5,) if name == "seeds_2" else (1 / 3, 2 / 3)
    assert_follows(plan, staged(nodes, sde=True, data=False, midpoint=len(nodes) == 1))


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_singlestep_is_its_stages(order):
    nodes = (0.5,) if order == 2 else (1 / 3, 2 / 3)
    plan = solvers.dpm_singlestep(SCHEDULE, STEPS, order=order)
    assert_follows(plan, staged(nodes, midpoint=order == 2))


# ---- reverse-time SDEs ---------------------------------------------------------------------------


def er_sde_scale(u):
    """(phi, phi')"""
    power = np.exp(u**0.3)
    return u * (power + 10), power * (1 + 0.3 * u**0.3) + 10


SCALES = {
    "the paper's": (None, er_sde_scale),
    "the flow": (lambda s: s, lambda u: (u, np.ones_like(u))),
    "the SDE": (lambda s: s * s, lambda u: (u * u, 2 * u)),
}


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_integrates_the_taylor_polynomial_of_its_estimates(order, scale, published):
    """y_t = phi_t / phi_s y_s + phi_t int_t^s phi' / phi^2 x_0 du and noise of what is left of t^2:
    the polynomial through the last estimates, by Newton's differences."""
    given, phi = SCALES[scale]

    def formula(x, normals, net):
        past: list = []
        for (s, t), z in zip(itertools.pairwise(LEVELS), normals, strict=True):
            x0 = estimates(x, s, net)[0]
            past = [(s, x0), *past[: order - 1]]
            if t == 0.0:
                return x0
            slopes = [(a[1] - b[1]) / (a[0] - b[0]) for a, b in itertools.pairwise(past)]
            points = np.exp(0.5 * math.log(s / t) * NODES + 0.5 * math.log(s * t))
            weights = 0.5 * math.log(s / t) * SHARES * points
            value, rise = phi(points)
            total = 0.0
            for u, weight in zip(points, weights * rise / value**2, strict=True):
                d = x0
                if slopes:
                    d = d + (u - s) * slopes[0]
                if len(slopes) > 1:
                    second = (slopes[0] - slopes[1]) / (s - past[2][0])
                    # published: without what the second difference adds to the slope at s
                    d = d + second * (u - s) * ((u - s) if published else (u - past[1][0]))
                total = total + weight * d
            (high,), (low,) = phi(np.array([s]))[0], phi(np.array([t]))[0]
            ends, begins = of(t)[0], of(s)[0]
            noise = math.sqrt(max(t * t - (low / high * s) ** 2, 0.0)) if scale != "the flow" else 0
            x = ends * (low / high * x / begins + low * total + noise * z)
        return x

    options = {} if given is None else {"noise_scale": given}
    plan = solvers.er_sde(SCHEDULE, STEPS, order=order, published=published, **options)
    assert_follows(plan, formula)
    assert plan.stochastic == (scale != "the flow")


@pytest.mark.parametrize("clip", CLIPS[:2])
@pytest.mark.parametrize("corrections", [0, 2])
def test_score_sde_ve_is_reverse_diffusion_behind_langevin_steps(corrections, clip):
    def formula(x, normals, net):
        rest = iter(normals)
        for s, t in itertools.pairwise(LEVELS):
            alpha, sigma, _ = of(s)
            for _ in range(corrections):
                score = -estimates(x, s, net, clip)[1] / sigma
                size = 2 * (0.1 * sigma) ** 2
                x = x + size * score + math.sqrt(2 * size) * next(rest)
            score = -estimates(x, s, net, clip)[1] / sigma
            f = alpha / of(t)[0]
            growth = sigma**2 - f**2 * of(t)[1] ** 2
            x = (2 - f) * x + growth * score + (t > 0) * math.sqrt(growth) * next(rest)
        return x

    plan = solvers.score_sde_ve(SCHEDULE, STEPS, corrections=corrections, snr=0.1, clip=clip)
    assert_follows(plan, formula)


def test_score_sde_vp_is_euler_maruyama():
    levels = np.geomspace(3.0, 0.02, 30).tolist()

    def formula(x, normals, net):
        for (s, t), z in zip(itertools.pairwise(levels), normals, strict=True):
            beta = math.log((1 + s * s) / (1 + t * t))
            score = -estimates(x, s, net)[1] / of(s)[1]
            x = x + beta * (x / 2 + score) + math.sqrt(beta) * z
        return x

    assert_follows(solvers.score_sde_vp(SCHEDULE.levels_at(levels)), formula)


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_predictors_are_diffusers_to_first_order(name):
    """One step of 1 / 2000 of the time: as diffusers' own, up to the square of it."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    x = fastgen.randn((3, 5), seed=1, dtype=torch.float64)
    if name == "ve":
        theirs = diffusers.ScoreSdeVeScheduler(num_train_timesteps=2000)
        theirs.set_timesteps(2000)
        theirs.set_sigmas(2000)
        high, low = theirs.discrete_sigmas[[1000, 999]].double().tolist()
        t = theirs.timesteps[999]
        assert float(theirs.discrete_sigmas[int(t * 1999)]) == high
        x, score = high * x, -x / high
        given = theirs.step_pred(score, t, x, torch.Generator().manual_seed(0)).prev_sample_mean
        row = solvers.score_sde_ve(denoiser_levels([high, low], "epsilon")).rows[0]
        expected = (x + (high**2 - low**2) * score).numpy()
        exact = 1e-12
    else:
        from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

        theirs = ScoreSdeVpScheduler()
        theirs.set_timesteps(2000)
        t, s = (0.5, 0.5 - 1 / 2000)

        def level(t):
            log_alpha = -0.25 * t * t * 19.9 - 0.5 * t * 0.1
            return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))

        (alpha, _), (alpha_s, _) = level(t), level(s)
        # diffusers takes the network's output for the score's times -sigma: that of eps
        torch.manual_seed(0)
        given = theirs.step_pred(x, x, torch.tensor([t], dtype=torch.float64))[1]
        schedule = NoiseSchedule.from_alpha_bars([alpha_s**2, alpha**2])
        row = solvers.score_sde_vp(schedule, 2).rows[0]
        expected = given.numpy()
        exact = 19.9 / 2000**2  # of beta, whose slope is 19.9
    (output,) = row.outputs
    eps = (-score * high if name == "ve" else x).numpy()
    ours = output.weights["x"] * x.numpy() + output.weights["e"] * eps
    single = 8 * 2.0**-24  # diffusers' own levels are float32
    scale = np.abs(expected).max()
    assert np.abs(ours - expected).max() <= (exact + single) * scale
    assert np.abs(given.double().numpy() - ours).max() <= (exact + single) * scale


# ---- CFG++ ---------------------------------------------------------------------------------------

GUIDANCE = 0.6


def unconditional(x: np.ndarray, t: float) -> np.ndarray:
    return 0.7 * np.sin(x * (1 + t / 3000)) - 0.2 * np.tanh(x)


def cfgpp(eta=0.0, clip=None):
    """Chung et al. (2024), algorithm 2, with Song, Meng & Ermon's (2021) eq. 16 of the noise."""

    def formula(x, normals, net):
        for (s, t), z in zip(itertools.pairwise(LEVELS), normals, strict=True):
            (alpha_s, sigma_s, time), (alpha_t, sigma_t, _) = of(s), of(t)
            u = unconditional(x, time)
            guided = u + GUIDANCE * (net(x, time) - u)
            x0 = clipped((x - sigma_s * guided) / alpha_s, clip)
            up = eta * sigma_t / sigma_s * math.sqrt(1 - (alpha_s / alpha_t) ** 2)
            x = alpha_t * x0 + math.sqrt(sigma_t**2 - up**2) * u + up * z
        return x

    return formula


@pytest.mark.parametrize("clip", CLIPS[:2])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["ddim", "euler_ancestral"])
def test_cfgpp_renoises_with_the_unconditional_output(name, eta, clip):
    plan = getattr(solvers, name)(SCHEDULE, STEPS, eta=eta, clip=clip, cfgpp=True)
    assert_follows(plan, cfgpp(eta, clip), unconditional)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_euler_with_cfgpp_is_ddim_with_it(prediction):
    """Whatever the network predicts: row by row."""
    euler = solvers.euler(SCHEDULE, STEPS, prediction=prediction, cfgpp=True)
    ddim = solvers.ddim(SCHEDULE, STEPS, prediction=prediction, cfgpp=True)
    for ours, theirs in zip(euler.rows, ddim.rows, strict=True):
        for name in ("x", "e", "u"):
            given = theirs.outputs[0].weights.get(name, 0.0)
            assert ours.outputs[0].weights[name] == pytest.approx(given, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("solver", [solvers.ddim, solvers.euler, solvers.euler_ancestral])
def test_cfgpp_of_equal_outputs_is_the_solver_itself(solver):
    """Where the network does not listen to its condition, there is no guidance to tell apart."""

    def model(x, t, cond):
        return torch.from_numpy(network(x.double().numpy(), float(t[0])))

    x = torch.from_numpy(start())
    cond = torch.zeros(x.shape[0])
    plans = [solver(SCHEDULE, STEPS, cfgpp=cfgpp) for cfgpp in (True, False)]
    ends = [fastgen.sample(model, plan, x=x, seed=1, cond=cond, uncond=cond, guidance_scale=0.6)
            for plan in plans]  # fmt: skip
    assert torch.allclose(*ends, rtol=0, atol=64 * STEPS * 2.0**-24 * float(ends[0].abs().max()))


def test_cfgpp_must_be_given_an_unconditional_output():
    plan = solvers.ddim(SCHEDULE, STEPS, cfgpp=True)
    loop = Loop(plan, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="uncond"):
        loop.step(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="cfgpp, use_clipped_model_output"):
        solvers.ddim(SCHEDULE, STEPS, cfgpp=True, use_clipped_model_output=True)


# ---- RePaint -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jumps", [(20, 10, 10), (7, 2, 3), (50, 10, 2), (5, 1, 2), (5, 10, 3)])
def test_repaint_visits_the_levels_of_diffusers(jumps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    theirs = diffusers.RePaintScheduler()
    theirs.set_timesteps(*jumps)
    times = [int(t) // (1000 // jumps[0]) for t in theirs.timesteps]
    down = [t for t, following in zip(times, [*times[1:], -1], strict=True) if following < t]
    assert [jumps[0] - 1 - place for place in visited(*jumps)] == down


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_steps_down_and_draws_the_way_up(eta):
    """Of each row the mean, and the variance of a step down and of single forward steps back up."""
    plan = solvers.repaint(SCHEDULE, STEPS, jump_length=3, resamplings=2, eta=eta)
    places = visited(STEPS, 3, 2)
    for row, place, to in zip(plan.rows, places, [*places[1:], STEPS], strict=True):
        (alpha_s, sigma_s, time), (alpha_t, sigma_t, _) = of(LEVELS[place]), of(LEVELS[place + 1])
        assert row.model_time == pytest.approx(time)
        up = eta * sigma_t / sigma_s * math.sqrt(1 - (alpha_s / alpha_t) ** 2)
        of_e = math.sqrt(sigma_t**2 - up**2) - alpha_t * sigma_s / alpha_s
        of_x, variance = alpha_t / alpha_s, up**2
        for level in range(place, to - 1, -1):  # Lugmayr et al. (2022), eq. 1, at each level
            kept = of(LEVELS[level])[0] / of(LEVELS[level + 1])[0]
            of_x, of_e, variance = kept * of_x, kept * of_e, kept**2 * variance + 1 - kept**2
        (output,) = row.outputs
        assert output.weights["x"] == pytest.approx(of_x, rel=1e-9)
        assert output.weights["e"] == pytest.approx(of_e, rel=1e-9)
        assert output.noise[0] == pytest.approx(math.sqrt(variance), abs=1e-9)


def test_resampling_brings_what_is_filled_in_nearer_to_what_is_known():
    """Two pixels of correlation 0.9, one of them known to be 1: the other's mean is 0.9 and its
    variance 0.19. The exact network, 20 steps."""
    levels = denoiser_levels(sigmas.karras(20, 0.02, 20.0))
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def model(x, sigma, cond):
        gain = covariance @ torch.linalg.inv(covariance + float(sigma[0]) ** 2 * torch.eye(2))
        return x @ gain.T

    known = torch.tensor([[1.0, 0.0]]).repeat(4000, 1)
    mask = torch.tensor([[0.0, 1.0]])
    errors = []
    for resamplings in (1, 4, 16):
        plan = solvers.repaint(levels, jump_length=2, resamplings=resamplings)
        end = fastgen.sample(model, plan, known.shape, known=known, mask=mask, seed=3)
        assert torch.equal(end[:, 0], known[:, 0])
        errors.append(abs(float(end[:, 1].mean()) - 0.9))
    assert errors[2] < errors[1] < errors[0]
    # five standard errors of the mean, and what the steps themselves err by
    assert errors[2] < 5 * (0.19 / 4000) ** 0.5 + 0.1 * errors[0]
