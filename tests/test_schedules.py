"""Noise schedules against their definitions, computed here in exact or plain float64 arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastgen import NoiseSchedule

UNIT = 2.0**-53  # half an ulp of float64, relative: the error of one operation
SHAPES = [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine,
          NoiseSchedule.sigmoid]  # fmt: skip


def exact_products(betas) -> np.ndarray:
    """alpha_bar_t = prod (1 - beta_i), in rational numbers, rounded once."""
    product, results = Fraction(1), []
    for beta in betas:
        product *= 1 - Fraction(float(beta))
        results.append(float(product))
    return np.array(results)


def assert_relative(actual, expected, operations: float | np.ndarray) -> None:
    """Within the rounding of so many operations, one after the other."""
    assert np.all(np.abs(actual - expected) <= operations * UNIT * np.abs(expected))


def test_alpha_bar_is_the_product_of_what_each_beta_leaves():
    betas = np.random.default_rng(0).uniform(0, 0.5, 60)
    expected = exact_products(betas)
    # a subtraction and a product a timestep, and the one rounding of the truth
    operations = 2 * np.arange(1, 61) + 1
    assert_relative(NoiseSchedule.from_betas(betas).alpha_bars, expected, operations)
    assert NoiseSchedule.from_betas([0.0, 0.5, 1.0]).alpha_bars.tolist() == [1.0, 0.5, 0.0]


def test_linear_betas_are_evenly_spaced():
    for timesteps, start, end in [(1000, 1e-4, 0.02), (7, 0.1, 0.3)]:
        k = np.arange(timesteps)
        betas = start + (end - start) * k / (timesteps - 1)
        schedule = NoiseSchedule.linear(timesteps, start, end)
        # betas err by a few units of themselves, which is less than one of 1 - beta
        assert_relative(schedule.alpha_bars, exact_products(betas), 4 * (k + 1))
    assert NoiseSchedule.linear() == NoiseSchedule.linear(1000, 1e-4, 0.02)


def test_scaled_linear_betas_have_evenly_spaced_roots():
    k = np.arange(1000)
    betas = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * k / 999) ** 2
    assert_relative(NoiseSchedule.scaled_linear().alpha_bars, exact_products(betas), 4 * (k + 1))
    # Stable Diffusion's last level, as published with its weights (float32)
    assert NoiseSchedule.scaled_linear().alpha_bars[-1] == pytest.approx(0.00466, abs=5e-6)


def test_cosine_levels_follow_the_squared_cosine_until_beta_reaches_its_limit():
    total, offset = 1000, 0.008
    level = np.cos((np.arange(total + 1) / total + offset) / (1 + offset) * np.pi / 2) ** 2
    ratio = level[1:] / level[:-1]  # 1 - beta: an error of a unit weighs 1 / ratio
    free = 1 - ratio < 0.999
    assert free[:-1].all()
    assert not free[-1]
    actual = NoiseSchedule.cosine().alpha_bars
    expected = level[1:] / level[0]
    operations = 6 * np.cumsum(1 / ratio[:-1])
    assert_relative(actual[:-1], expected[:-1], operations)
    # the last keeps 1 - 0.999 of what was left; 1 - 0.999 itself has lost three digits
    assert_relative(actual[-1], actual[-2] * 0.001, 1000.0)


def test_sigmoid_betas_rise_along_the_logistic_function():
    k = np.arange(1000)
    rise = 1 / (1 + np.exp(-(-6 + 12 * k / 999)))
    betas = 1e-4 + (0.02 - 1e-4) * rise
    assert_relative(NoiseSchedule.sigmoid().alpha_bars, exact_products(betas), 4 * (k + 1))


def test_a_zero_terminal_snr_ends_at_zero_and_keeps_the_first_level():
    """Lin et al. (2024), algorithm 1: shift the root of alpha_bar, then scale it back."""
    for make in SHAPES:
        schedule = make()
        root = np.sqrt(schedule.alpha_bars)
        expected = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        rescaled = schedule.rescaled_to_zero_terminal_snr()
        assert rescaled.alpha_bars[-1] == 0.0
        # a root, a product and a quotient, each on both sides, and the square of them all
        assert_relative(rescaled.alpha_bars, expected, 12)
        assert_relative(rescaled.alpha_bars[0], schedule.alpha_bars[0], 8)
        assert np.all(np.diff(rescaled.alpha_bars) < 0)
    with pytest.raises(ValueError, match="alpha_bars"):
        NoiseSchedule.from_alpha_bars([0.5, 0.5]).rescaled_to_zero_terminal_snr()


@pytest.mark.parametrize("make", SHAPES)
def test_every_schedule_falls_from_nearly_all_signal(make):
    for timesteps in (1, 2, 50, 1000):
        schedule = make(timesteps)
        assert len(schedule) == timesteps
        assert schedule.alpha_bars.dtype == np.float64
        assert np.all(np.diff(schedule.alpha_bars) < 0)
        assert schedule.alpha_bars[0] < 1


# ---- a value that cannot change ------------------------------------------------------------------


def test_a_schedule_cannot_be_changed():
    given = np.array([0.9, 0.5])
    schedule = NoiseSchedule.from_alpha_bars(given)
    given[0] = 0.7  # the caller's own array stays the caller's
    assert schedule.alpha_bars.tolist() == [0.9, 0.5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.alpha_bars = given
    copies = [pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), copy.copy(schedule)]
    for each in [schedule, *copies]:
        with pytest.raises(ValueError, match="read-only"):
            each.alpha_bars[0] = 0.7
        with pytest.raises(ValueError, match="read-only"):
            each.alpha_bars *= 1
        assert each == schedule
        assert hash(each) == hash(schedule)


def test_equal_schedules_are_those_of_equal_levels():
    linear = NoiseSchedule.linear()
    assert linear == NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    assert hash(linear) == hash(NoiseSchedule.from_alpha_bars(linear.alpha_bars.tolist()))
    assert linear != NoiseSchedule.linear(999)
    assert linear != NoiseSchedule.linear(beta_end=0.0200001)
    assert linear != "linear"
    assert len({linear, NoiseSchedule.linear(), NoiseSchedule.cosine()}) == 2


# ---- which timesteps -----------------------------------------------------------------------------


def spaced(total: int, steps: int, spacing: str) -> list[int]:
    """The timesteps, in exact arithmetic; halves go to the even neighbour, as NumPy rounds."""
    if spacing == "trailing":
        return [round(total - Fraction(total * k, steps)) - 1 for k in range(steps)]
    if spacing == "leading":
        return [total // steps * k for k in reversed(range(steps))]
    return [round(Fraction((total - 1) * k, max(steps - 1, 1))) for k in reversed(range(steps))]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_timesteps_follow_their_definition(spacing, steps):
    chosen = NoiseSchedule.linear().timesteps(steps, spacing)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == spaced(1000, steps, spacing)


def test_timesteps_are_those_of_the_published_table():
    """Lin et al. (2024), table 2: ten of a thousand timesteps, counted there from one."""
    table = {
        "leading": [1, 101, 201, 301, 401, 501, 601, 701, 801, 901],
        "linspace": [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000],
        "trailing": [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000],
    }
    for spacing, expected in table.items():
        chosen = NoiseSchedule.linear().timesteps(10, spacing)
        assert (chosen[::-1] + 1).tolist() == expected
    seven = NoiseSchedule.linear().timesteps(7).tolist()
    assert seven == [999, 856, 713, 570, 428, 285, 142]


def test_any_number_of_timesteps_falls_strictly_within_the_schedule():
    for total in (1, 2, 10, 37, 1000):
        schedule = NoiseSchedule.linear(total)
        for steps in range(1, total + 1, 1 if total < 100 else 13):
            for spacing in ("trailing", "leading", "linspace"):
                chosen = schedule.timesteps(steps, spacing)
                assert len(chosen) == steps
                assert np.all(np.diff(chosen) < 0)
                assert chosen[-1] >= 0
                assert chosen[0] < total
            assert schedule.timesteps(steps, "trailing")[0] == total - 1
            assert schedule.timesteps(steps, "leading")[-1] == 0
            assert steps == 1 or schedule.timesteps(steps, "linspace")[[0, -1]].tolist() == [
                total - 1, 0,
            ]  # fmt: skip


def test_pairs_step_from_level_to_level_and_end_without_noise():
    schedule = NoiseSchedule.cosine()
    for spacing in ("trailing", "leading", "linspace"):
        pairs = schedule.pairs(7, spacing)
        assert [t for t, _, _ in pairs] == spaced(1000, 7, spacing)
        assert [a for _, a, _ in pairs] == [schedule.alpha_bars[t] for t, _, _ in pairs]
        assert [a for _, _, a in pairs] == [*(a for _, a, _ in pairs[1:]), 1.0]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: NoiseSchedule.linear().timesteps(1001), ValueError, "steps"),
        (lambda: NoiseSchedule.linear().timesteps(0), ValueError, "steps"),
        (lambda: NoiseSchedule.linear().timesteps(-3), ValueError, "steps"),
        (lambda: NoiseSchedule.linear().timesteps(2.0), TypeError, "steps"),
        (lambda: NoiseSchedule.linear().timesteps("2"), TypeError, "steps"),
        (lambda: NoiseSchedule.linear().timesteps(True), TypeError, "steps"),
        (lambda: NoiseSchedule.linear().timesteps(5, "even"), ValueError, "spacing"),
        (lambda: NoiseSchedule.linear().pairs(0), ValueError, "steps"),
        (lambda: NoiseSchedule.linear(0), ValueError, "timesteps"),
        (lambda: NoiseSchedule.scaled_linear(-1), ValueError, "timesteps"),
        (lambda: NoiseSchedule.cosine(2.5), TypeError, "timesteps"),
        (lambda: NoiseSchedule.sigmoid(None), TypeError, "timesteps"),
        (lambda: NoiseSchedule.linear(10, 0.1, 1.5), ValueError, "beta_end"),
        (lambda: NoiseSchedule.linear(10, float("nan")), ValueError, "beta_start"),
        (lambda: NoiseSchedule.linear(10, "a"), TypeError, "beta_start"),
        (lambda: NoiseSchedule.scaled_linear(10, -0.1), ValueError, "beta_start"),
        (lambda: NoiseSchedule.sigmoid(10, limit=None), TypeError, "limit"),
        (lambda: NoiseSchedule.cosine(10, "a"), TypeError, "offset"),
        (lambda: NoiseSchedule.from_betas(["a"]), TypeError, "betas: got list"),
        (lambda: NoiseSchedule([[0.5], 1]), TypeError, "alpha_bars: got list"),
        (lambda: NoiseSchedule.from_betas([0.1, -0.1]), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas([0.1, float("nan")]), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas([[0.1, 0.2]]), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas(0.1), ValueError, "betas"),
        (lambda: NoiseSchedule.from_alpha_bars([0.5, 0.6]), ValueError, "alpha_bars.*increases"),
        (lambda: NoiseSchedule.from_alpha_bars([0.5, float("nan")]), ValueError, "alpha_bars"),
        (lambda: NoiseSchedule.from_alpha_bars([1.1, 0.5]), ValueError, "alpha_bars"),
        (lambda: NoiseSchedule.from_alpha_bars([0.5, -1e-9]), ValueError, "alpha_bars"),
        (lambda: NoiseSchedule.from_alpha_bars([]), ValueError, "alpha_bars"),
        (lambda: NoiseSchedule.from_alpha_bars(0.5), ValueError, "alpha_bars"),
        (lambda: NoiseSchedule.from_alpha_bars([[0.5]]), ValueError, "alpha_bars"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, error, argument):
    with pytest.raises(error, match=f"^{argument}"):
        call()


def test_a_schedule_is_shown_in_a_line():
    text = repr(NoiseSchedule.linear())
    assert text == "NoiseSchedule(1000 timesteps, alpha_bar from 0.9999 to 4.03583e-05)"


def test_a_schedule_is_made_from_a_tensor_as_well():
    betas = torch.linspace(1e-4, 0.02, 10, dtype=torch.float64, requires_grad=True)
    assert NoiseSchedule.from_betas(betas) == NoiseSchedule.linear(10)
