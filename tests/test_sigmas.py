"""Grids of noise levels against their definitions and against diffusers' own."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastgen import NoiseSchedule, flow_levels, sigmas
from fastgen.sigmas import beta_quantiles

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

UNIT = 2.0**-53
SINGLE = 2.0**-24  # half an ulp of float32, relative
SHARES = np.linspace(0.0, 1.0, 101)
STEPS = [1, 2, 3, 7, 28, 50]


# ---- the beta distribution, where its quantiles have a closed form -------------------------------


@pytest.mark.parametrize(
    ("alpha", "beta", "quantile"),
    [
        (0.5, 0.5, lambda q: np.sin(0.5 * np.pi * q) ** 2),  # the arcsine distribution
        (1.0, 1.0, lambda q: q),
        (3.0, 1.0, lambda q: q ** (1 / 3)),
        (0.3, 1.0, lambda q: q ** (1 / 0.3)),
        (1.0, 4.0, lambda q: -np.expm1(0.25 * np.log1p(-np.minimum(q, 1 - 1e-300)))),
        # 3 x^2 - 2 x^3 = q
        (2.0, 2.0, lambda q: 0.5 - np.sin(np.arcsin(1 - 2 * q) / 3)),
    ],
)
def test_quantiles_are_the_closed_forms(alpha, beta, quantile):
    """Within the roundings of log B, a sum of three numbers below 4, and of log I: over alpha, or
    over beta from the other end."""
    with np.errstate(divide="ignore"):
        expected = quantile(SHARES)
    expected[-1] = 1.0
    error = np.abs(beta_quantiles(SHARES, alpha, beta) - expected).max()
    assert error <= 32 * UNIT / min(alpha, beta, 1.0)


@pytest.mark.parametrize("ends", [(0.6, 0.6), (0.2, 7.0), (7.0, 0.2), (0.1, 40.0), (50.0, 50.0)])
def test_quantiles_invert_the_integral_of_the_density(ends):
    """By Gauss-Legendre up to 1/2 (the rest is the mirror's), in t = u^(1 / a) where a < 1."""
    a, b = ends
    x = beta_quantiles(SHARES, a, b)
    assert np.all(np.diff(x) >= 0)
    assert x[[0, -1]].tolist() == [0.0, 1.0]
    mirrored = 1.0 - beta_quantiles(1.0 - SHARES, b, a)
    assert np.abs(x - mirrored).max() <= 64 * UNIT / min(a, b, 1.0)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    for share, point in zip(SHARES[1:-1], x[1:-1], strict=True):
        if point > 0.5:
            continue
        power = 1.0 / min(a, 1.0)
        top = point ** (1.0 / power)
        u = 0.5 * top * (nodes + 1.0)
        density = power * u ** (power * a - 1.0) * (1.0 - u**power) ** (b - 1.0)
        integral = 0.5 * top * (weights * density).sum()
        assert scale * integral == pytest.approx(share, abs=1e-9)


def test_beta_is_diffusers():
    for steps in STEPS[1:]:  # of one step diffusers makes one from the least level
        theirs = diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", use_beta_sigmas=True
        )
        theirs.set_timesteps(steps)
        expected = theirs.sigmas.double().numpy()
        table = np.asarray(((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5, "float64")
        ours = sigmas.beta(steps, table[0], table[-1])
        # of the ends in float32, and the store
        assert np.abs(ours - expected).max() <= 4 * SINGLE * table[-1]


# ---- from a table --------------------------------------------------------------------------------

SCHEDULE = NoiseSchedule.scaled_linear()
GEOMETRIC = np.geomspace(0.01, 100.0, 1000)


def diffusers_table(**options):
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", **options)
    return scheduler, NoiseSchedule(scheduler.alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 999])
def test_ddim_uniform_is_diffusers_leading_spacing(steps):
    theirs, schedule = diffusers_table(timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(steps)
    ours = sigmas.ddim_uniform(steps, schedule)
    expected = theirs.sigmas.double().numpy()
    assert np.all(np.abs(ours - expected) <= 8 * SINGLE * expected)


@pytest.mark.parametrize("steps", [2, 4, 28, 112, 1000])
def test_uniform_is_diffusers_linspace_on_whole_timesteps(steps):
    theirs, schedule = diffusers_table(timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    assert 999 % (steps - 1) == 0
    expected = theirs.sigmas.double().numpy()
    ours = sigmas.uniform(steps, schedule)
    assert np.all(np.abs(ours - expected) <= 8 * SINGLE * expected)


def test_what_lies_between_timesteps_is_even_in_logarithms():
    """On a geometric table a grid is the exponential of its timesteps."""
    top, rise = math.log(100.0), math.log(1e4) / 999
    for steps in STEPS:
        k = np.arange(steps)
        for grid, times in [
            (sigmas.uniform, 999 - k * 999 / max(steps - 1, 1)),
            (sigmas.sgm_uniform, 999 - k * 999 / steps),
            (sigmas.beta_times, 999 * beta_quantiles(1 - k / steps, 0.6, 0.6)),
        ]:
            expected = np.exp(top - rise * (999 - times))
            actual = grid(steps, GEOMETRIC)
            assert actual[-1] == 0.0
            # a logarithm of 4.6 loses 8 units, and its interpolation as many
            assert np.abs(actual[:-1] / expected - 1).max() <= 40 * UNIT


def test_simple_takes_whole_timesteps_from_the_last():
    for steps, chosen in [
        (1, [999]),
        (3, [999, 666, 333]),
        (7, [999, 857, 714, 571, 428, 285, 142]),
    ]:
        expected = [*SCHEDULE.sigmas[chosen], 0.0]
        assert sigmas.simple(steps, SCHEDULE).tolist() == expected
    assert sigmas.simple(1000, SCHEDULE).tolist() == [*SCHEDULE.sigmas[::-1], 0.0]


@pytest.mark.parametrize("grid", ["uniform", "sgm_uniform", "beta_times", "simple", "ddim_uniform"])
def test_a_grid_serves_schedules_and_straight_paths(grid):
    for steps in STEPS:
        levels = SCHEDULE.levels_at(getattr(sigmas, grid)(steps, SCHEDULE))
        assert len(levels) == steps
        straight = getattr(sigmas, grid)(steps, np.linspace(1e-3, 1.0, 1000))
        assert len(flow_levels(straight)) == steps


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_a_run_may_end_at_the_tables_smallest_level(steps):
    theirs, schedule = diffusers_table(timestep_spacing="trailing", final_sigmas_type="sigma_min")
    theirs.set_timesteps(steps)
    expected = theirs.sigmas.double().numpy()
    zero = NoiseSchedule(theirs.alphas_cumprod).sigmas[schedule.timesteps(steps)]
    ours = sigmas.ending_at([*zero, 0.0], schedule.sigmas[0])
    assert np.all(np.abs(ours - expected) <= 8 * SINGLE * expected)
    assert len(schedule.levels_at(ours)) == steps


# ---- straight paths ------------------------------------------------------------------------------


def diffusers_flow(steps: int, mu: float | None = None, **options) -> np.ndarray:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    return scheduler.sigmas.double().numpy()


@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9216])
def test_flow_is_diffusers_with_dynamic_shifts(tokens, kind, terminal):
    shift = sigmas.dynamic_shift(tokens, kind=kind)
    mu = 0.5 + (tokens - 256) / 3840 * 0.65
    for steps in STEPS[1:]:
        options = {"use_dynamic_shifting": True, "time_shift_type": kind}
        expected = diffusers_flow(steps, mu, shift_terminal=terminal, **options)
        actual = sigmas.flow(steps, shift, terminal=terminal)
        # 1 / sigma - 1 in float32, where sigma is rounded first: 2 units over the least sigma' of
        # 1 / 2 of those; stretched, by less than 2
        assert np.abs(actual - expected).max() <= 16 * SINGLE
        assert actual[-1] == 0.0
        if terminal:
            assert actual[-2] == pytest.approx(terminal, rel=4 * UNIT / terminal)


def test_flow_is_diffusers_with_a_static_shift():
    for steps in STEPS:
        expected = diffusers_flow(steps, shift=3.0)
        assert np.abs(sigmas.flow(steps, 3.0) - expected).max() <= 8 * SINGLE


def test_flow_with_a_power_is_the_formula():
    for steps in STEPS:
        s = np.linspace(1.0, 0.0, steps + 1)[:-1]
        for power in (0.5, 1.0, 2.0):
            expected = math.exp(0.8) / (math.exp(0.8) + (1 / s - 1) ** power)
            actual = sigmas.flow(steps, math.exp(0.8), power=power)
            assert np.abs(actual[:-1] - expected).max() <= 16 * UNIT
            assert actual[[0, -1]].tolist() == [1.0, 0.0]
    assert sigmas.flow(1, 3.0, terminal=0.1).tolist() == [1.0, 0.0]


def test_dynamic_shifts_lie_on_the_line_through_their_ends():
    assert sigmas.dynamic_shift(256) == pytest.approx(math.exp(0.5))
    assert sigmas.dynamic_shift(4096) == pytest.approx(math.exp(1.15))
    half = sigmas.dynamic_shift(150, first=(100, 0.2), last=(200, 0.4), kind="linear")
    assert half == pytest.approx(0.3)


@pytest.mark.parametrize("steps", [2, 3, 8, 64])
@pytest.mark.parametrize("threshold", [0.025, 0.4])
def test_linear_quadratic_is_a_line_and_a_parabola_of_its_slope(steps, threshold):
    """The published coefficients, of i^2, i and 1, for the second half."""
    line, rest = steps // 2, steps - steps // 2
    difference = line - threshold * steps
    square = difference / (line * rest**2)
    slope = threshold / line - 2 * difference / rest**2
    i = np.arange(steps + 1)
    curve = square * i**2 + slope * i + square * line**2
    expected = 1 - np.where(i < line, threshold * i / line, curve)
    actual = sigmas.linear_quadratic(steps, threshold)
    # the published form cancels: its terms reach square steps^2
    assert np.abs(actual - expected).max() <= 16 * UNIT * max(1.0, abs(square) * steps**2)
    assert actual[0] == 1.0
    assert np.all(np.diff(actual) < 0)
    assert sigmas.linear_quadratic(1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigmas.beta(5, alpha=0.0), "alpha"),
        (lambda: sigmas.beta(5, 2.0, 1.0), "sigma_min"),
        (lambda: sigmas.beta_times(5, SCHEDULE, beta=-1.0), "beta"),
        (lambda: sigmas.simple(1001, SCHEDULE), "steps.*1000"),
        (lambda: sigmas.simple(0, SCHEDULE), "steps"),
        (lambda: sigmas.ddim_uniform(3, [1.0, 2.0, 3.0]), "steps.*3"),
        (lambda: sigmas.uniform(5, SCHEDULE.rescaled_to_zero_terminal_snr()), "table.*finite"),
        (lambda: sigmas.uniform(5, [0.0, 1.0]), "table.*above zero"),
        (lambda: sigmas.uniform(5, [2.0, 1.0]), "table.*rise"),
        (lambda: sigmas.sgm_uniform(0, SCHEDULE), "steps"),
        (lambda: sigmas.ending_at([2.0, 1.0, 0.0], 1.0), "last"),
        (lambda: sigmas.ending_at([2.0, 1.0, 0.0], -0.1), "last"),
        (lambda: sigmas.flow(5, power=0.0), "power"),
        (lambda: sigmas.flow(5, terminal=1.0), "terminal"),
        (lambda: sigmas.dynamic_shift(0), "tokens"),
        (lambda: sigmas.dynamic_shift(9, kind="static"), "kind"),
        (lambda: sigmas.dynamic_shift(9, first=(4096, 1.0)), "first, last"),
        (lambda: sigmas.dynamic_shift(1, first=(256, 0.001), kind="linear"), "shift"),
        (lambda: sigmas.linear_quadratic(5, 1.0), "threshold"),
        (lambda: sigmas.linear_quadratic(0), "steps"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
