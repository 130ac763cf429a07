"""Solvers on a problem with a known answer: a mixture of two Gaussians, whose network is exact.

``python -m fastgen.bench.solver_errors docs/solvers.png`` draws the error of each solver against
the number of network calls: of the sample, and of what stochastic solvers draw, by its mean and
variance, where the data are one Gaussian.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable

import numpy as np

from fastgen import levels, solvers
from fastgen.levels import NoiseLevels
from fastgen.plan import Plan
from fastgen.schedules import NoiseSchedule

FIRST, LAST = -2.0, 2.0  # lambda = log(alpha / sigma), where a run begins and ends
SHARES = ((0.4, -1.0, 0.3), (0.6, 0.6, 0.5))  # of the data: share, mean, spread
GAUSSIAN = ((1.0, 0.4, 0.7),)
X = np.linspace(-2.5, 2.5, 41)  # x / sqrt(alpha^2 + sigma^2), where the runs begin


def denoised(x, alpha, sigma, shares=SHARES):
    """E[x_0 | x = alpha x_0 + sigma eps] for a mixture of Gaussians: the exact network."""
    total = weighted = 0.0
    for share, mean, spread in shares:
        variance = alpha**2 * spread**2 + sigma**2
        density = share / math.sqrt(variance) * np.exp(-((x - alpha * mean) ** 2) / (2 * variance))
        total = total + density
        weighted = weighted + density * (mean + alpha * spread**2 / variance * (x - alpha * mean))
    return weighted / total


@functools.cache
def truth() -> np.ndarray:
    """y = x / alpha at the end: dy/ds = (y - x_0) / s by Runge-Kutta 4 in log s."""
    count = 2000
    h = (LAST - FIRST) / count
    y = X * math.sqrt(1 + math.exp(-2 * FIRST))

    def slope(point, y):  # dy/dlambda = x_0 - y
        return denoised(y, 1.0, math.exp(-point)) - y

    for i in range(count):
        point = FIRST + i * h
        k1 = slope(point, y)
        k2 = slope(point + h / 2, y + h / 2 * k1)
        k3 = slope(point + h / 2, y + h / 2 * k2)
        k4 = slope(point + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def path(name: str, steps: int) -> NoiseLevels:
    """From FIRST to LAST in lambda, in steps that grow: a multistep method begins with its first
    order, whose error would else be all that is seen."""
    ramp = np.linspace(0.0, 1.0, steps + 1) ** 3
    ratios = np.exp(-(FIRST + (LAST - FIRST) * ramp))
    if name == "vp":
        return _vp(ratios)
    if name == "ve":
        return levels.denoiser_levels(ratios)
    return levels.flow_levels(ratios / (1 + ratios))


def _vp(ratios: np.ndarray) -> NoiseLevels:
    schedule = NoiseSchedule.from_alpha_bars(1 / (1 + np.exp(-2 * np.linspace(3, -3, 1000))))
    return schedule.levels_at(ratios, prediction="epsilon")


def run(plan: Plan, points: NoiseLevels, x: np.ndarray, normals=None, shares=SHARES) -> np.ndarray:
    """A plan's own numbers in float64. The network is exact: from what a row says of its output."""
    history: dict[str, np.ndarray] = {}
    for i, row in enumerate(plan.rows):
        at = seen(row, points)
        d = denoised(x, at.alpha, at.sigma, shares)
        of_x, of_e = at.estimate
        values = {"x": x, "e": (d - of_x * x) / of_e, "denoised": d, **history}
        for output in row.outputs:
            y = sum(weight * values[name] for name, weight in output.weights.items())
            for scale in output.noise:
                y = y + (scale * normals[i] if scale else 0.0)
            if output.target == "x":
                x = y
            elif output.target != "input":
                history[f"h{output.target}"] = y
    return x


def seen(row, points: NoiseLevels):
    """The point where a row calls the network, by its time."""
    for point in points.points:
        if point.time == row.model_time:
            return point
    low, high = 1e-9, 1e9  # time grows with the ratio
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if points.at(middle).time < row.model_time else (low, middle)
    return points.at(low)


def error(solver, name: str, steps: int) -> float:
    points = path(name, steps)
    first = points.points[0]
    x = X * math.hypot(first.alpha, first.sigma)
    y = run(solver(points), points, x) / points.end.alpha
    return float(np.abs(y - truth()).max())


def drawn_error(solver, points: NoiseLevels) -> float:
    """How far mean and variance of what is drawn are from those at the run's end. For Gaussian data
    a run is linear in its first sample and its normals: one run for each of them gives both."""
    ((_, centre, width),) = GAUSSIAN
    plan = solver(points)
    first, end, count = points.points[0], points.end, len(plan)
    scale = plan.initial_scale / points.initial_scale  # churn begins above the first level
    x = np.full(count + 2, first.alpha * centre)
    x[1] += math.hypot(first.alpha * width, scale * first.sigma)
    normals = np.zeros((count, count + 2))
    normals[np.arange(count), np.arange(count) + 2] = 1.0
    last = run(plan, points, x, normals, GAUSSIAN)
    mean, variance = last[0], ((last[1:] - last[0]) ** 2).sum()
    wanted = end.alpha * centre, (end.alpha * width) ** 2 + end.sigma**2
    return float(max(abs(mean - wanted[0]), abs(variance / wanted[1] - 1.0)))


# ---- the picture ---------------------------------------------------------------------------------

SHOWN: dict[str, Callable[[NoiseLevels], Plan]] = {
    "euler, ddim": solvers.euler,
    "heun": solvers.heun,
    "dpm2": solvers.dpm2,
    "lms 4": solvers.lms,
    "ipndm": solvers.ipndm,
    "deis 3": solvers.deis,
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_multistep 3": functools.partial(solvers.dpmpp_multistep, order=3),
    "dpm_singlestep 3": solvers.dpm_singlestep,
    "res_multistep": solvers.res_multistep,
    "res_singlestep": solvers.res_singlestep,
    "er_sde 3, the flow": functools.partial(solvers.er_sde, noise_scale=lambda s: s),
    "unipc 2": solvers.unipc,
    "unipc 3": functools.partial(solvers.unipc, order=3),
}


DRAWN: dict[str, Callable[[NoiseLevels], Plan]] = {
    "euler_ancestral": solvers.euler_ancestral,
    "dpm2_ancestral": functools.partial(solvers.dpm2, eta=1.0),
    "dpmpp_2s_ancestral": solvers.dpmpp_2s_ancestral,
    "dpmpp_sde": solvers.dpmpp_sde,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde,
    "sa_solver": solvers.sa_solver,
    "seeds_2": solvers.seeds_2,
    "seeds_3": solvers.seeds_3,
    "er_sde 1": functools.partial(solvers.er_sde, order=1),
    "er_sde 3": solvers.er_sde,
    "score_sde_ve": solvers.score_sde_ve,
    "score_sde_vp": solvers.score_sde_vp,
    "repaint": functools.partial(solvers.repaint, jump_length=2, resamplings=2),
}
STEPS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def even(steps: int, name: str = "ve") -> NoiseLevels:
    """As samplers are used: steps even in log-SNR, ending at LAST."""
    ratios = np.exp(-np.linspace(FIRST, LAST, steps + 1))
    return _vp(ratios) if name == "vp" else levels.denoiser_levels(ratios)


def sample_error(solver, points: NoiseLevels) -> float:
    plan = solver(points)
    x = X * math.hypot(1.0, points.points[0].sigma)
    return float(np.abs(run(plan, points, x) - truth()).max())


def draw(file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(14, 5))
    colors = pyplot.get_cmap("tab20").colors[::2] + ("black",)
    panels = [
        (SHOWN, sample_error, "largest error of x at the end",
         "a mixture of two Gaussians with its exact score, log-SNR from -2 to 2"),
        (DRAWN, drawn_error, "error of the mean, and of the variance's share, at the end",
         "what stochastic solvers draw of one Gaussian, its exact score, the same log-SNR"),
    ]  # fmt: skip
    for axes, (shown, measure, label, title) in zip(both, panels, strict=True):
        axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=colors))
        for name, solver in shown.items():
            on = [even(steps, "vp" if name == "score_sde_vp" else "ve") for steps in STEPS]
            calls = [solver(points).network_calls for points in on]
            axes.plot(calls, [measure(solver, p) for p in on], marker=".", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("network calls")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7, handlelength=3, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    draw(sys.argv[1])
