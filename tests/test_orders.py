"""Every solver reaches the exact solution at the order that it claims, whatever the path."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from fastgen import (
    NoiseSchedule,
    denoiser_levels,
    edm_levels,
    flow_levels,
    randn,
    sample,
    sigmas,
    solvers,
)
from fastgen.bench.solver_errors import drawn_error, error, path

DETERMINISTIC = {
    "euler": (solvers.euler, 1),
    "euler_ancestral, eta 0": (functools.partial(solvers.euler_ancestral, eta=0.0), 1),
    "heun": (solvers.heun, 2),
    "dpm2": (solvers.dpm2, 2),
    "gradient_estimation, gamma 1.5": (
        functools.partial(solvers.gradient_estimation, gamma=1.5), 2),
    "lms 1": (functools.partial(solvers.lms, order=1), 1),
    "lms 2": (functools.partial(solvers.lms, order=2), 2),
    "lms 3": (functools.partial(solvers.lms, order=3), 3),
    "lms 4": (functools.partial(solvers.lms, order=4), 4),
    "deis 2": (functools.partial(solvers.deis, order=2), 2),
    "deis 3": (functools.partial(solvers.deis, order=3), 3),
    "deis 4": (functools.partial(solvers.deis, order=4), 4),
    "dpm_multistep 1": (functools.partial(solvers.dpm_multistep, order=1), 1),
    "dpm_multistep 2": (functools.partial(solvers.dpm_multistep, order=2), 2),
    "dpm_multistep 2, heun": (functools.partial(solvers.dpm_multistep, order=2, kind="heun"), 2),
    "dpm_multistep 3": (functools.partial(solvers.dpm_multistep, order=3), 3),
    "dpmpp_multistep 1": (functools.partial(solvers.dpmpp_multistep, order=1), 1),
    "dpmpp_multistep 2": (functools.partial(solvers.dpmpp_multistep, order=2), 2),
    "dpmpp_multistep 2, heun": (
        functools.partial(solvers.dpmpp_multistep, order=2, kind="heun"), 2),
    "dpmpp_multistep 3": (functools.partial(solvers.dpmpp_multistep, order=3), 3),
    "dpmpp_multistep 3, published": (
        functools.partial(solvers.dpmpp_multistep, order=3, published=True), 2),
    "dpmpp_2m": (solvers.dpmpp_2m, 2),
    "dpmpp_2m_sde, eta 0": (functools.partial(solvers.dpmpp_2m_sde, eta=0.0), 2),
    "dpmpp_3m_sde, eta 0": (functools.partial(solvers.dpmpp_3m_sde, eta=0.0), 3),
    "dpmpp_2s_ancestral, eta 0": (functools.partial(solvers.dpmpp_2s_ancestral, eta=0.0), 2),
    "dpmpp_sde, eta 0": (functools.partial(solvers.dpmpp_sde, eta=0.0), 2),
    "dpm_singlestep 2": (functools.partial(solvers.dpm_singlestep, order=2), 2),
    "dpm_singlestep 3": (functools.partial(solvers.dpm_singlestep, order=3), 3),
    "dpm_singlestep 2, noise": (
        functools.partial(solvers.dpm_singlestep, order=2, data=False), 2),
    "dpm_singlestep 3, noise": (
        functools.partial(solvers.dpm_singlestep, order=3, data=False), 3),
    **{
        f"er_sde {order}, the flow": (
            functools.partial(solvers.er_sde, order=order, noise_scale=lambda s: s), order)
        for order in (1, 2, 3)
    },
    "er_sde 3, the flow, published": (
        functools.partial(solvers.er_sde, noise_scale=lambda s: s, published=True), 2),
    "res_multistep": (solvers.res_multistep, 2),
    "res_singlestep": (solvers.res_singlestep, 2),
    "res_singlestep, c2 0.7": (functools.partial(solvers.res_singlestep, c2=0.7), 2),
    "res_singlestep, c2 1": (functools.partial(solvers.res_singlestep, c2=1.0), 2),
    **{
        f"unipc {order}, {variant}, {'data' if data else 'noise'}, {'with' if c else 'without'}": (
            functools.partial(solvers.unipc, order=order, variant=variant, data=data, corrector=c,
                              lower_order_final=False), order + c)
        for order in (1, 2, 3) for variant in ("bh1", "bh2") for data in (True, False)
        for c in (True, False)
    },
    **{
        f"sa_solver {p}, {c}, {'data' if data else 'noise'}": (
            functools.partial(solvers.sa_solver, predictor_order=p, corrector_order=c, tau=0.0,
                              data=data, lower_order_final=False), min(p + 1, c) if c else p)
        for p, c in ((1, 0), (2, 0), (3, 0), (4, 0), (1, 2), (2, 3), (3, 4), (3, 2))
        for data in (True, False)
    },
    "sa_solver 2, 2, published": (
        functools.partial(solvers.sa_solver, tau=0.0, published=True), 2),
    "sa_solver 2, 3, to a corrected end": (
        functools.partial(solvers.sa_solver, corrector_order=3, tau=0.0, lower_order_final=False,
                          correct_end=True), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("way", ["vp", "ve", "flow"])
def test_the_error_falls_with_the_order(name, way):
    solver, order = DETERMINISTIC[name]
    steps = (40, 80, 160) if order < 4 else (60, 120, 240)
    errors = [error(solver, way, n) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope > order - 0.25, errors
    assert slope < order + 0.6, errors


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_corrector_of_the_predictors_order_keeps_it(order, data):
    """Where the steps are fine: before, the predictor's own error is the larger and falls faster.
    (The fourth order is then at float64's rounding.)"""
    solver = functools.partial(solvers.sa_solver, predictor_order=order, corrector_order=order,
                               tau=0.0, data=data, lower_order_final=False)  # fmt: skip
    steps = (320, 640, 1280)
    slope = -np.polyfit(np.log(steps), np.log([error(solver, "vp", n) for n in steps]), 1)[0]
    assert abs(slope - order) < 0.25


# ---- what is drawn -------------------------------------------------------------------------------

STOCHASTIC = {
    "euler_ancestral": solvers.euler_ancestral,
    "euler_ancestral, eta 0.5": functools.partial(solvers.euler_ancestral, eta=0.5),
    "euler, churn": functools.partial(solvers.euler, s_churn=20.0),
    "heun, churn": functools.partial(solvers.heun, s_churn=20.0, s_tmin=0.2, s_tmax=4.0),
    "dpm2_ancestral": functools.partial(solvers.dpm2, eta=1.0),
    "sde_dpm_multistep 1": functools.partial(solvers.dpm_multistep, order=1, sde=True),
    "sde_dpm_multistep 2": functools.partial(solvers.dpm_multistep, sde=True),
    "sde_dpm_multistep 2, heun": functools.partial(solvers.dpm_multistep, sde=True, kind="heun"),
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "dpmpp_2m_sde, heun, eta 0.5": functools.partial(solvers.dpmpp_2m_sde, kind="heun", eta=0.5),
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde,
    "dpmpp_2s_ancestral": solvers.dpmpp_2s_ancestral,
    "dpmpp_sde": solvers.dpmpp_sde,
    "dpmpp_sde, r 0.4": functools.partial(solvers.dpmpp_sde, r=0.4),
    "repaint": functools.partial(solvers.repaint, jump_length=7, resamplings=3),
    **{f"er_sde {n}": functools.partial(solvers.er_sde, order=n) for n in (1, 2, 3)},
    "er_sde of s^2": functools.partial(solvers.er_sde, noise_scale=lambda s: s * s),
    "er_sde, published": functools.partial(solvers.er_sde, published=True),
    "score_sde_ve": solvers.score_sde_ve,
    # a correction's own step leaves a share of snr^2 of the variance: less than is looked for
    "score_sde_ve, corrected": functools.partial(solvers.score_sde_ve, corrections=2, snr=0.02),
    "score_sde_vp": solvers.score_sde_vp,
    "seeds_2": solvers.seeds_2,
    "seeds_3": solvers.seeds_3,
    "seeds_2, noise": functools.partial(solvers.seeds_2, data=False),
    "seeds_3, noise": functools.partial(solvers.seeds_3, data=False),
    **{
        f"sa_solver {p}, {c}, {'data' if data else 'noise'}": functools.partial(
            solvers.sa_solver, predictor_order=p, corrector_order=c, data=data
        )
        for p, c in ((1, 0), (2, 0), (2, 2), (3, 4))
        for data in (True, False)
    },
    "sa_solver, tau of a level": functools.partial(
        solvers.sa_solver, tau=lambda point: 0.5 if point.ratio > 1.0 else 1.2
    ),
    "sa_solver, published": functools.partial(solvers.sa_solver, published=True),
}


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("way", ["vp", "ve", "flow"])
def test_what_is_drawn_has_the_distribution_of_the_end(name, way):
    if name == "score_sde_vp" and way != "vp":
        with pytest.raises(ValueError, match="levels"):
            STOCHASTIC[name](path(way, 3))
        return
    errors = [drawn_error(STOCHASTIC[name], path(way, steps)) for steps in (30, 60, 120)]
    assert errors[2] < 1e-3 or errors[2] < 0.65 * errors[1], errors
    assert abs(2 * errors[2] - errors[1]) < 0.025, errors  # with no steps at all


@pytest.mark.parametrize(
    ("name", "order"),
    [("er_sde 1", 1), ("er_sde 2", 2), ("er_sde 3", 3), ("er_sde, published", 2), ("seeds_2", 2),
     ("seeds_3", 2), ("score_sde_ve", 1), ("score_sde_vp", 1)],
)  # fmt: skip
def test_mean_and_variance_come_nearer_with_the_order(name, order):
    steps = (60, 120, 240)
    errors = [drawn_error(STOCHASTIC[name], path("vp", n)) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.35 < slope < order + 0.35, errors


# ---- levels of every kind ------------------------------------------------------------------------

ZERO = NoiseSchedule.linear().rescaled_to_zero_terminal_snr()
VE = denoiser_levels(sigmas.karras(3))
KINDS = {
    "flow": lambda n: flow_levels(sigmas.flow(n, 3.0)),
    "zero terminal SNR": lambda n: ZERO.levels(n, prediction="v"),
    "edm": lambda n: edm_levels(sigmas.karras(n)),
    "ends above zero": lambda n: denoiser_levels(sigmas.karras(n)[:-1] if n > 1 else [3.0, 1.0]),
}
FINITE = [name for name in solvers.__all__ if name not in ("ddim", "ddpm", "score_sde_vp", "tcd")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FINITE)
def test_a_run_on_any_levels_is_finite(name, kind):
    for steps in (1, 2, 3, 7):
        for clip in (None, 1.0):
            plan = getattr(solvers, name)(KINDS[kind](steps), clip=clip)
            x = randn((2, 3, 5), seed=1).mul_(plan.initial_scale)
            y = sample(lambda x, t, cond: 0.4 * x.tanh(), plan, x=x, seed=2)
            assert y.isfinite().all(), (steps, clip)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigmas.karras(5, rho=0), "rho"),
        (lambda: sigmas.polyexponential(5, rho=-1), "rho"),
        (lambda: sigmas.vp(5, -19.0), "beta_d"),
        (lambda: sigmas.vp(5, epsilon=2.0), "epsilon"),
        (lambda: sigmas.vp(5, 1e6), "beta_d, beta_min"),
        (lambda: sigmas.lu(5, 2.0, 1.0), "sigma_min"),
        (lambda: sigmas.flow(5, 0.0), "shift"),
        (lambda: edm_levels([3.0, 0.0, 0.0]), "sigmas"),
        (lambda: edm_levels([3.0, -1.0]), "sigmas"),
        (lambda: edm_levels("abc"), "sigmas"),
        (lambda: edm_levels([3.0, 0.0], 0.0), "sigma_data"),
        (lambda: flow_levels([1.0, 0.0], 0.0), "scale"),
        (lambda: flow_levels([2.0, 0.0]), "sigmas"),
        (lambda: denoiser_levels([1.0, 2.0, 0.0]), "levels that fall, got 1 at 0 and 2 at 1"),
        (lambda: VE[3:3], r"levels: got \[3:3\], which leaves no step of"),
        (lambda: VE[50:], r"levels: got \[50:\], which leaves no step of"),
        (lambda: solvers.heun(VE, prediction="v"), "prediction: got 'v', but levels have theirs"),
        (lambda: solvers.heun(VE, spacing="linspace"), "spacing: .*levels have theirs"),
        (lambda: ZERO.levels_at([]), "sigmas"),
        (lambda: ZERO.levels_at(3.0), "sigmas"),
        (lambda: solvers.heun(ZERO), "steps"),
        (lambda: solvers.heun(edm_levels(sigmas.karras(3)), 4), "steps"),
        (lambda: solvers.euler(ZERO, 3), "alpha_bar"),
        (lambda: solvers.lms(ZERO, 3, order=5, prediction="v"), "order"),
        (lambda: solvers.dpmpp_sde(ZERO, 3, r=1.0, prediction="v"), "r:"),
        (lambda: solvers.res_singlestep(ZERO, 3, c2=1.5, prediction="v"), "c2"),
        (lambda: solvers.repaint(VE, jump_length=0), "jump_length"),
        (lambda: solvers.repaint(VE, resamplings=0), "resamplings"),
        (lambda: solvers.repaint(VE, eta=-1.0), "eta"),
        (lambda: solvers.er_sde(ZERO, 3, order=4, prediction="v"), "order"),
        (lambda: solvers.er_sde(ZERO, 3, noise_scale=2.0, prediction="v"), "noise_scale"),
        (lambda: solvers.er_sde(VE, noise_scale=lambda s: 1.0), "noise_scale.*less"),
        (lambda: solvers.er_sde(VE, noise_scale=lambda s: -s), "noise_scale.*more than 0"),
        (lambda: solvers.score_sde_vp(ZERO, 3, prediction="v"), "without signal"),
        (lambda: solvers.score_sde_ve(VE, corrections=-1), "corrections"),
        (lambda: solvers.score_sde_ve(VE, corrections=1, snr=-0.1), "snr"),
        (lambda: solvers.seeds_3(ZERO, 3, s_noise=-1.0, prediction="v"), "s_noise"),
        (lambda: solvers.dpm2(ZERO, 3, eta=1.0, s_churn=1.0, prediction="v"), "eta, s_churn"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
