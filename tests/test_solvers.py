"""Solvers against their papers: the formulas as printed, in float64, over whole runs.

Here ``a`` and ``b`` are alpha_bar at the timestep and at the next, less noisy one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastgen
from fastgen import Loop, NoiseSchedule, Plan, Row, solvers
from fastgen.solvers.ddpm import ddpm_row

SCHEDULE = NoiseSchedule.linear()
STEPS = 8
SHAPE = (3, 5)
PREDICTIONS = ["epsilon", "sample", "v"]
CLIPS = [None, 0.8, (-0.5, 1.0)]


def network(x: np.ndarray, t: float) -> np.ndarray:
    """Nonlinear in the sample and in time; float64, whatever the run's dtype."""
    return np.tanh(x * (0.4 + t / 2000)) + 0.3 * np.sin(2 * x - t / 300)


# ---- the papers, as printed ----------------------------------------------------------------------


def levels(schedule: NoiseSchedule, steps: int) -> list[tuple[float, float, float]]:
    """(t, a, b) of trailing timesteps."""
    total = len(schedule)
    times = [round(total - k * total / steps) - 1 for k in range(steps)]
    return [
        (float(t), float(schedule.alpha_bars[t]), float(schedule.alpha_bars[s]) if s >= 0 else 1.0)
        for t, s in zip(times, [*times[1:], -1], strict=True)
    ]


def predicted_x0(prediction, x, output, a):
    """Ho et al. (2020), eq. 15; for v, Salimans & Ho (2022), appendix D."""
    if prediction == "epsilon":
        return (x - np.sqrt(1 - a) * output) / np.sqrt(a)
    if prediction == "v":
        return np.sqrt(a) * x - np.sqrt(1 - a) * output
    return output


def predicted_epsilon(prediction, x, output, a):
    if prediction == "epsilon":
        return output
    if prediction == "v":
        return np.sqrt(a) * output + np.sqrt(1 - a) * x
    return (x - np.sqrt(a) * output) / np.sqrt(1 - a)


def clipped(x0, clip):
    low, high = clip if isinstance(clip, tuple) else (-clip, clip) if clip else (-np.inf, np.inf)
    return np.clip(x0, low, high)


def ddpm_paper(x, output, z, a, b, past, prediction="epsilon", clip=None, variance="fixed_small"):
    """Ho et al. (2020), eq. 6 and 7, where beta is that of the whole step: 1 - a / b."""
    x0 = clipped(predicted_x0(prediction, x, output, a), clip)
    beta = 1 - a / b
    mean = np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(a / b) * (1 - b) / (1 - a) * x
    sigma_squared = {"fixed_small": (1 - b) / (1 - a) * beta, "fixed_large": beta}[variance]
    return mean + (np.sqrt(sigma_squared) * z if b < 1 else 0)  # algorithm 2: z = 0 at the end


def ddim_paper(x, output, z, a, b, past, prediction="epsilon", clip=None, eta=0.0, again=False):
    """Song et al. (2021), eq. 12 and 16; ``again``: epsilon from the clipped x_0."""
    x0 = clipped(predicted_x0(prediction, x, output, a), clip)
    epsilon = predicted_epsilon(prediction, x, output, a)
    if again:
        epsilon = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
    sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
    return np.sqrt(b) * x0 + np.sqrt(1 - b - sigma**2) * epsilon + sigma * z


def dpmpp_2m_paper(x, output, z, a, b, past, prediction="epsilon", clip=None):
    """Lu et al. (2022), algorithm 2: t_{i-1} is at ``a``, t_i at ``b``; past: (lambda, x_0)."""
    alpha, sigma = np.sqrt([a, b]), np.sqrt([1 - a, 1 - b])
    x0 = clipped(predicted_x0(prediction, x, output, a), clip)
    before = np.log(alpha[0] / sigma[0])
    past.append((before, x0))
    if b == 1:
        return x0  # h is infinite: the first-order update alone has a limit
    h = np.log(alpha[1] / sigma[1]) - before
    estimate = x0
    if len(past) > 1:
        lambda_past, x0_past = past[-2]
        r = (before - lambda_past) / h
        estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_past
    return sigma[1] / sigma[0] * x - alpha[1] * np.expm1(-h) * estimate


def sa_paper(x, output, z, a, b, past, prediction="epsilon", clip=None, orders=(2, 2), tau=1.0,
             data=True):  # fmt: skip
    """Xue et al. (2023), algorithm 1; past: (alpha, sigma, x, z, estimate) of each step."""

    def moved(end, nodes):
        (alpha_s, sigma_s, x, z, _), (alpha_t, sigma_t) = past[-1], end
        low, high = math.log(alpha_s / sigma_s), math.log(alpha_t / sigma_t)
        points, shares = np.polynomial.legendre.leggauss(60)
        points = 0.5 * (high - low) * points + 0.5 * (high + low)
        weight = 0.5 * (high - low) * shares * (1 + tau**2)
        h = high - low
        if data:
            mean = sigma_t / sigma_s * math.exp(-(tau**2) * h) * x
            weight = weight * sigma_t * np.exp(-(tau**2) * (high - points)) * np.exp(points)
            deviation = sigma_t * math.sqrt(1 - math.exp(-2 * tau**2 * h))
        else:
            mean = alpha_t / alpha_s * x
            weight = -weight * alpha_t * np.exp(-points)
            deviation = tau * sigma_t * math.sqrt(math.exp(2 * h) - 1)
        for j, (at, estimate) in enumerate(nodes):
            others = [other for k, (other, _) in enumerate(nodes) if k != j]
            lagrange = [np.ones_like(points), *((points - o) / (at - o) for o in others)]
            mean = mean + (weight * np.prod(lagrange, axis=0)).sum() * estimate
        return mean + deviation * z

    alpha, sigma = np.sqrt([a, b]), np.sqrt([1 - a, 1 - b])
    x0 = clipped(predicted_x0(prediction, x, output, a), clip)
    now = x0 if data else (x - alpha[0] * x0) / sigma[0]
    nodes = [(math.log(alpha[0] / sigma[0]), now)]
    nodes += [(math.log(p[0] / p[1]), p[4]) for p in past[::-1]]
    if past and orders[1]:
        x = moved((alpha[0], sigma[0]), nodes[: orders[1]])
    past.append((alpha[0], sigma[0], x, z, now))
    return x0 if b == 1 else moved((alpha[1], sigma[1]), nodes[: orders[0]])


def run_paper(step, x, normals, schedule=SCHEDULE, steps=STEPS, shake=0.0, seed=0, **options):
    """A whole run; with ``shake``, every result is moved by that share of itself, up or down."""
    signs = np.random.default_rng(seed)
    past: list = []

    def shaken(value):
        return value * (1 + shake * signs.choice([-1.0, 1.0], value.shape))

    x = shaken(x)
    for (t, a, b), z in zip(levels(schedule, steps), normals, strict=True):
        output = shaken(network(x, t))
        x = shaken(step(x, output, z, a, b, past, **options))
    return x


def rounding(step, x, normals, unit, **options) -> float:
    """How far an arithmetic of relative error ``unit`` may end up.

    Measured: what all results and network outputs move the end by when shaken by 2^-26, a size at
    which the run is still linear; per operation. A term passes through at most 8 roundings in a
    step (its coefficient, product, sums, the estimate of x_0), and the 8 shakes may not have met
    the worst signs: a factor of 16 in all.
    """
    exact = run_paper(step, x, normals, **options)
    shakes = [run_paper(step, x, normals, shake=2.0**-26, seed=s, **options) for s in range(8)]
    return 16 * unit * 2.0**26 * max(np.abs(s - exact).max() for s in shakes)


# ---- a plan and a loop, to compare ---------------------------------------------------------------


def run_numbers(plan: Plan, x, normals, kind: type = float):
    """A plan's own numbers, as float64 or rounded to ``kind``, by the formula of ``Row``."""

    def n(value) -> float:
        return float(kind(value))

    history: dict[str, np.ndarray] = {}
    for row, z in zip(plan.rows, normals, strict=True):
        values = {"x": x, "e": network(x, row.model_time), **history}
        d = n(row.denoised[0]) * x + n(row.denoised[1]) * values["e"]
        values["denoised"] = np.clip(d, *(n(end) for end in row.clip or (-np.inf, np.inf)))
        for output in row.outputs:
            y = sum(n(weight) * values[name] for name, weight in output.weights.items())
            y = y + sum(n(scale) * z for scale in output.noise)
            if output.target == "x":
                x = y
            else:
                history[f"h{output.target}"] = y
    return x


def run_loop(plan: Plan, x: torch.Tensor, seed=None) -> torch.Tensor:
    loop = Loop(plan, x, seed=seed)
    while not loop.done:
        t = float(loop.time[0])
        assert torch.equal(loop.time, torch.full(x.shape[:1], int(t)))
        output = network(loop.model_input.double().numpy(), t)
        loop.step(torch.from_numpy(output).to(x.dtype))
    return loop.x


def start(seed=7) -> np.ndarray:
    return fastgen.randn(SHAPE, seed=seed).double().numpy()


def step_noise(seed, steps=STEPS, shape=SHAPE) -> list[np.ndarray]:
    return [
        fastgen.randn(shape, seed=seed, step=i, stream=2).double().numpy() for i in range(steps)
    ]


def assert_follows(plan: Plan, paper, **options) -> None:
    """The plan's numbers to float64's rounding, the loop to float32's."""
    x, normals = start(), step_noise(11)
    expected = run_paper(paper, x, normals, **options)
    double = rounding(paper, x, normals, 2.0**-53, **options)
    single = rounding(paper, x, normals, 2.0**-24, **options)
    assert single < 2e-2 * np.abs(expected).max()  # or the comparison would say nothing
    assert np.abs(run_numbers(plan, x, normals) - expected).max() <= double
    seed = 11 if plan.stochastic else None
    result = run_loop(plan, torch.from_numpy(x).float(), seed)
    assert np.abs(result.double().numpy() - expected).max() <= single
    # float64 samples: float64 arithmetic on the float32 numbers of the table
    result = run_loop(plan, torch.from_numpy(x), seed)
    packed = run_numbers(plan, x, normals, np.float32)
    assert np.abs(result.numpy() - packed).max() <= double


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_is_the_posterior_of_the_paper(prediction, clip, variance):
    options = {"prediction": prediction, "clip": clip, "variance": variance}
    assert_follows(solvers.ddpm(SCHEDULE, STEPS, **options), ddpm_paper, **options)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_equation_12(prediction, clip, eta):
    options = {"prediction": prediction, "clip": clip, "eta": eta}
    assert_follows(solvers.ddim(SCHEDULE, STEPS, **options), ddim_paper, **options)


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_can_take_epsilon_from_the_clipped_x0(prediction, eta):
    options = {"prediction": prediction, "clip": 0.8, "eta": eta}
    plan = solvers.ddim(SCHEDULE, STEPS, **options, use_clipped_model_output=True)
    assert_follows(plan, ddim_paper, again=True, **options)
    unclipped = solvers.ddim(SCHEDULE, STEPS, prediction=prediction, use_clipped_model_output=True)
    assert_follows(unclipped, ddim_paper, prediction=prediction)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_is_algorithm_2(prediction, clip):
    options = {"prediction": prediction, "clip": clip}
    assert_follows(solvers.dpmpp_2m(SCHEDULE, STEPS, **options), dpmpp_2m_paper, **options)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("orders", [(1, 0), (2, 2), (3, 3), (2, 4)])
@pytest.mark.parametrize("tau", [0.0, 0.8])
@pytest.mark.parametrize("clip", CLIPS[:2])
def test_sa_solver_is_algorithm_1(clip, tau, orders, data):
    options = {"clip": clip, "tau": tau, "data": data}
    plan = solvers.sa_solver(SCHEDULE, STEPS, **options, predictor_order=orders[0],
                             corrector_order=orders[1], lower_order_final=False)  # fmt: skip
    x, normals = start(), step_noise(11)
    expected = run_paper(sa_paper, x, normals, orders=orders, **options)
    # fourth orders over few, long steps cancel: what they lose is not what shaking shows
    scale = np.abs(expected).max()
    assert np.abs(run_numbers(plan, x, normals) - expected).max() <= 1e-9 * scale
    result = run_loop(plan, torch.from_numpy(x).float(), 11).double().numpy()
    assert np.abs(result - expected).max() <= 1e-2 * scale


@pytest.mark.parametrize(("tau", "other"), [(0.0, solvers.ddim), (1.0, solvers.ddpm)])
def test_sa_solver_of_one_estimate_is_ddim_and_ddpm(tau, other):
    """Xue et al. (2023), section 5.3."""
    plan = solvers.sa_solver(SCHEDULE, STEPS, predictor_order=1, corrector_order=0, tau=tau)
    for ours, theirs in zip(plan.rows, other(SCHEDULE, STEPS).rows, strict=True):
        (mine,), (given,) = ours.outputs, theirs.outputs
        for name in ("x", "e"):
            assert mine.weights[name] == pytest.approx(given.weights[name], abs=1e-10)
        assert max(mine.noise, default=0.0) == pytest.approx(
            max(given.noise, default=0.0), abs=1e-10
        )


@pytest.mark.parametrize("schedule", [NoiseSchedule.scaled_linear(), NoiseSchedule.sigmoid(100)])
def test_solvers_follow_any_schedule(schedule):
    for solver, paper in [(solvers.ddpm, ddpm_paper), (solvers.ddim, ddim_paper),
                          (solvers.dpmpp_2m, dpmpp_2m_paper)]:  # fmt: skip
        for steps in (1, 2, 5):
            x, normals = start(), step_noise(3, steps)
            options = {"schedule": schedule, "steps": steps}
            expected = run_paper(paper, x, normals, **options)
            error = run_numbers(solver(schedule, steps), x, normals) - expected
            assert np.abs(error).max() <= rounding(paper, x, normals, 2.0**-53, **options)


def test_ddpm_without_clip_is_the_mean_in_epsilon():
    """Ho et al. (2020), eq. 11: mu = (x - beta / sqrt(1 - alpha_bar) epsilon) / sqrt(alpha)."""
    for t in (1, 10, 500, 999):
        a, b = SCHEDULE.alpha_bars[t], SCHEDULE.alpha_bars[t - 1]
        alpha, beta = a / b, 1 - a / b
        weights = ddpm_row(float(a), float(b)).outputs[0].weights
        # 1 - a / b loses 1 / beta units, and so do both forms that are compared
        rtol = 16 * 2.0**-53 / beta
        assert weights["x"] == pytest.approx(1 / np.sqrt(alpha), rel=rtol)
        assert weights["e"] == pytest.approx(-beta / np.sqrt(1 - a) / np.sqrt(alpha), rel=rtol)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_eta_one_is_ddpm(prediction):
    """Song et al. (2021), section 4.1: then the process is the DDPM's."""
    ddim = solvers.ddim(SCHEDULE, STEPS, 1.0, prediction=prediction)
    ddpm = solvers.ddpm(SCHEDULE, STEPS, prediction=prediction)
    for ours, theirs in zip(ddim.rows, ddpm.rows, strict=True):
        (mine,), (other,) = ours.outputs, theirs.outputs
        # 1 - b - sigma^2 of the one is beta-free in the other: what cancels is at most 1 / (1 - b)
        rtol = 64 * 2.0**-53 / (1 - SCHEDULE.alpha_bars[int(ours.model_time)])
        scale = max(abs(w) for w in other.weights.values())
        for name in ("x", "e"):
            assert mine.weights[name] == pytest.approx(other.weights[name], abs=rtol * scale)
        assert mine.noise == pytest.approx(other.noise, rel=rtol)


@pytest.mark.parametrize("prediction", ["sample", "v"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_run_may_start_without_any_signal(name, prediction):
    """From alpha_bar = 0 (Lin et al. 2024) the first estimate of x_0 is the network's alone."""
    zero = SCHEDULE.rescaled_to_zero_terminal_snr()
    plan = getattr(solvers, name)(zero, STEPS, prediction=prediction)
    options = {"schedule": zero, "prediction": prediction}
    paper = {"ddpm": ddpm_paper, "ddim": ddim_paper, "dpmpp_2m": dpmpp_2m_paper}[name]
    x, normals = start(), step_noise(5)
    with np.errstate(divide="ignore"):
        expected = run_paper(paper, x, normals, **options)
        bound = rounding(paper, x, normals, 2.0**-53, **options)
    assert np.isfinite(expected).all()
    assert np.abs(run_numbers(plan, x, normals) - expected).max() <= bound
    with pytest.raises(ValueError, match=r"alpha_bar.*epsilon"):
        getattr(solvers, name)(zero, STEPS)


def test_a_deterministic_solver_draws_no_noise_and_the_last_step_never_does():
    assert all(row.noises == 0 for row in solvers.ddim(SCHEDULE, STEPS).rows)
    assert all(row.noises == 0 for row in solvers.dpmpp_2m(SCHEDULE, STEPS).rows)
    for plan in (
        solvers.ddpm(SCHEDULE, STEPS),
        solvers.ddpm(SCHEDULE, STEPS, variance="fixed_large"),
        solvers.ddim(SCHEDULE, STEPS, 1.0),
    ):
        assert [row.noises for row in plan.rows] == [1] * (STEPS - 1) + [0]


def test_a_solver_is_a_pure_function():
    for solver in (solvers.ddpm, solvers.ddim, solvers.dpmpp_2m):
        assert solver(SCHEDULE, 5) == solver(NoiseSchedule.linear(), 5)
        plan = solver(SCHEDULE, 5, spacing="leading")
        assert [row.model_time for row in plan.rows] == [800.0, 600.0, 400.0, 200.0, 0.0]
        assert plan.solver == solver.__name__
        assert plan.initial_scale == 1.0


def test_ddpm_steps_in_place_where_no_time_passes():
    flat = NoiseSchedule.from_alpha_bars([0.9, 0.5, 0.5])
    row = solvers.ddpm(flat, 3).rows[0]
    assert row.outputs[0].weights == {"x": 1.0, "e": 0.0}
    assert row.noises == 0


# ---- known answers -------------------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.4


def gaussian_x0(x, a):
    """E[x_0 | x_t] where the data are N(MEAN, SPREAD^2): the exact network."""
    gain = math.sqrt(a) * SPREAD**2 / (a * SPREAD**2 + 1 - a)
    return MEAN + gain * (x - math.sqrt(a) * MEAN)


def mixture_x0(x, a):
    """E[x_0 | x_t] of two Gaussians, at -1 and 0.6, with spreads 0.3 and 0.5."""
    alpha, total, weighted = math.sqrt(a), 0.0, 0.0
    for share, mean, spread in ((0.4, -1.0, 0.3), (0.6, 0.6, 0.5)):
        variance = a * spread**2 + 1 - a
        density = share / math.sqrt(variance) * np.exp(-((x - alpha * mean) ** 2) / (2 * variance))
        total = total + density
        weighted = weighted + density * (mean + alpha * spread**2 / variance * (x - alpha * mean))
    return weighted / total


def even_log_snr(steps: int) -> NoiseSchedule:
    """Levels evenly spaced in lambda = log(alpha / sigma), from 2 down to -2."""
    return NoiseSchedule.from_alpha_bars(1 / (1 + np.exp(-2 * np.linspace(2, -2, steps))))


def probability_flow(estimate, x: np.ndarray, intervals: int = 400) -> np.ndarray:
    """The ODE from lambda = -2 to 2 by Runge-Kutta 4: d(x / sigma) / dlambda = e^lambda x_0."""

    def slope(point, y):
        a = 1 / (1 + math.exp(-2 * point))
        return math.exp(point) * estimate(y * math.sqrt(1 - a), a)

    h = 4 / intervals
    y = x / math.sqrt(1 / (1 + math.exp(-4)))
    for i in range(intervals):
        point = -2 + i * h
        k1 = slope(point, y)
        k2 = slope(point + h / 2, y + h / 2 * k1)
        k3 = slope(point + h / 2, y + h / 2 * k2)
        k4 = slope(point + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y * math.sqrt(1 / (1 + math.exp(4)))


def gaussian_flow(x: np.ndarray) -> np.ndarray:
    """The same in closed form: (x - alpha MEAN) keeps its share of the marginal's deviation."""
    a, b = 1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))
    shares = [math.sqrt(level * SPREAD**2 + 1 - level) for level in (a, b)]
    return math.sqrt(b) * MEAN + shares[1] / shares[0] * (x - math.sqrt(a) * MEAN)


def run_to_the_last_level(solver, estimate, steps: int, x: np.ndarray) -> np.ndarray:
    """Down an even grid, without the jump from its last level to no noise at all."""
    schedule = even_log_snr(steps + 1)
    loop = Loop(solver(schedule, steps + 1), torch.from_numpy(x))
    for _ in range(steps):
        a = float(schedule.alpha_bars[int(loop.time[0])])
        point = loop.model_input.numpy()
        output = (point - math.sqrt(a) * estimate(point, a)) / math.sqrt(1 - a)
        loop.step(torch.from_numpy(output))
    return loop.x.numpy()


def test_the_fine_reference_solves_the_known_flow():
    x = np.linspace(-2.5, 2.5, 41).reshape(1, -1)
    error = probability_flow(gaussian_x0, x) - gaussian_flow(x)
    assert np.abs(error).max() < 1e-8  # h^4 = 1e-8: it may serve where nothing is known


@pytest.mark.parametrize(("solver", "order"), [(solvers.ddim, 1), (solvers.dpmpp_2m, 2)])
@pytest.mark.parametrize("estimate", [gaussian_x0, mixture_x0])
def test_the_error_falls_with_the_order_of_the_solver(solver, order, estimate):
    """The slope of log error over log steps, from 40 to 320 steps, within 0.15 of the order."""
    x = np.linspace(-2.5, 2.5, 41).reshape(1, -1)
    truth = gaussian_flow(x) if estimate is gaussian_x0 else probability_flow(estimate, x)
    steps = [40, 80, 160, 320]
    errors = [np.abs(run_to_the_last_level(solver, estimate, n, x) - truth).max() for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.15), errors
    assert (
        errors[-1] > 1e-6
    )  # above the rounding of the float32 table: it is the order that is seen


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_draws_from_the_distribution_that_its_paper_gives(variance):
    """With the exact network the chain is linear, so that its mean and variance are known."""
    steps, shape = 20, (40, 5000)
    count = shape[0] * shape[1]
    mean, spread = 0.0, 1.0
    for _, a, b in levels(SCHEDULE, steps):
        at = lambda x, a=a: gaussian_x0(x, a)  # noqa: E731
        step = lambda x, z, a=a, b=b, at=at: ddpm_paper(  # noqa: E731
            x, at(x), z, a, b, None, "sample", None, variance
        )
        gain, noise = step(1.0, 0.0) - step(0.0, 0.0), step(0.0, 1.0) - step(0.0, 0.0)
        mean, spread = step(mean, 0.0), math.hypot(gain * spread, noise)

    def model(x, t, cond):
        return gaussian_x0(x, float(SCHEDULE.alpha_bars[int(t[0])]))

    plan = solvers.ddpm(SCHEDULE, steps, prediction="sample", variance=variance)
    result = fastgen.sample(model, plan, shape, seed=2024).double()
    # five standard errors of a mean, spread / sqrt(n), and of a variance, spread^2 sqrt(2 / n)
    assert float(result.mean()) == pytest.approx(mean, abs=5 * spread / count**0.5)
    assert float(result.var()) == pytest.approx(spread**2, abs=5 * spread**2 * (2 / count) ** 0.5)
    # and samples are independent: the correlation of two has the standard error 1 / sqrt(n)
    first, second = result[:20].flatten() - mean, result[20:].flatten() - mean
    correlation = float((first * second).mean()) / spread**2
    assert abs(correlation) < 5 / (count / 2) ** 0.5


def test_many_steps_of_ddpm_reach_the_data_whichever_the_variance():
    for variance in ("fixed_small", "fixed_large"):
        mean, spread = 0.0, 1.0
        for row, (_, a, _) in zip(
            solvers.ddpm(SCHEDULE, 1000, prediction="sample", variance=variance).rows,
            levels(SCHEDULE, 1000), strict=True,
        ):  # fmt: skip
            weights, (noise,) = row.outputs[0].weights, row.outputs[0].noise
            gain = gaussian_x0(1.0, a) - gaussian_x0(0.0, a)
            mean = weights["x"] * mean + weights["e"] * gaussian_x0(mean, a)
            spread = math.hypot((weights["x"] + weights["e"] * gain) * spread, noise)
        # what discretising leaves is of the order of the largest beta, 0.02
        assert mean == pytest.approx(MEAN, abs=0.02)
        assert spread == pytest.approx(SPREAD, rel=0.02)


# ---- what is refused -----------------------------------------------------------------------------

FLAT = NoiseSchedule.from_alpha_bars([0.9, 0.5, 0.5])
NOISELESS = NoiseSchedule.from_alpha_bars([1.0, 0.5])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: solvers.ddpm(SCHEDULE, 5, prediction="x0"), ValueError, "prediction.*x0"),
        (lambda: solvers.ddim(SCHEDULE, 5, prediction="eps"), ValueError, "prediction.*eps"),
        (lambda: solvers.dpmpp_2m(SCHEDULE, 5, prediction=None), ValueError, "prediction"),
        (lambda: solvers.ddpm(SCHEDULE, 5, variance="learned"), ValueError, "variance.*learned"),
        (lambda: solvers.ddpm(SCHEDULE, 5, variance="small"), ValueError, "variance.*small"),
        (lambda: solvers.ddpm(SCHEDULE, 5, clip=(1.0, -1.0)), ValueError, "clip"),
        (lambda: solvers.ddim(SCHEDULE, 5, clip=-1.0), ValueError, "clip"),
        (lambda: solvers.ddim(SCHEDULE, 5, clip=float("nan")), ValueError, "clip"),
        (lambda: solvers.dpmpp_2m(SCHEDULE, 5, clip="1"), TypeError, "clip"),
        (lambda: solvers.dpmpp_2m(SCHEDULE, 5, clip=(1.0, 2.0, 3.0)), TypeError, "clip"),
        (lambda: solvers.ddim(SCHEDULE, 5, -0.1), ValueError, "eta"),
        (lambda: solvers.ddim(SCHEDULE, 5, float("nan")), ValueError, "eta"),
        (lambda: solvers.ddim(SCHEDULE, 5, "1"), TypeError, "eta"),
        (lambda: solvers.ddim(SCHEDULE, 5, 2.0), ValueError, "eta"),
        (lambda: solvers.ddim(FLAT, 3, 1.0), ValueError, "eta"),
        (lambda: solvers.dpmpp_2m(FLAT, 3), ValueError, "levels that fall"),
        (lambda: solvers.dpmpp_2m(NOISELESS, 2), ValueError, "levels that fall"),
        (lambda: solvers.ddim(SCHEDULE, 1001), ValueError, "steps"),
        (lambda: solvers.ddpm(SCHEDULE, 0), ValueError, "steps"),
        (lambda: solvers.dpmpp_2m(SCHEDULE, 2.5), TypeError, "steps"),
        (lambda: solvers.ddpm(SCHEDULE, 5, spacing="karras"), ValueError, "spacing.*karras"),
        (lambda: solvers.sa_solver(SCHEDULE, 5, predictor_order=0), ValueError, "predictor_order"),
        (lambda: solvers.sa_solver(SCHEDULE, 5, corrector_order=5), ValueError, "corrector_order"),
        (lambda: solvers.sa_solver(SCHEDULE, 5, tau=-1.0), ValueError, "tau"),
        (lambda: solvers.sa_solver(SCHEDULE, 5, tau=lambda p: "1"), TypeError, "tau"),
        (lambda: solvers.sa_solver(SCHEDULE, 5, correct_end=True), ValueError, "correct_end"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rows_are_shared_between_equal_steps():
    """A row is a value: the same numbers give the same object, and its packing is made once."""
    row: Row = solvers.ddim(SCHEDULE, 5).rows[0]
    assert row is solvers.ddim(SCHEDULE, 5).rows[0]
