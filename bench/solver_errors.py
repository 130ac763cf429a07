"""Solvers on a problem with a known answer: a mixture of two Gaussians, whose network is exact.

``python -m fastgen.bench.solver_errors docs/solvers.png`` draws the error of each solver against
the number of network calls.
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
X = np.linspace(-2.5, 2.5, 41)  # x / sqrt(alpha^2 + sigma^2), where the runs begin


def denoised(x, alpha, sigma):
    """E[x_0 | x = alpha x_0 + sigma eps] for a mixture of two Gaussians: the exact network."""
    total = weighted = 0.0
    for share, mean, spread in SHARES:
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
        schedule = NoiseSchedule.from_alpha_bars(1 / (1 + np.exp(-2 * np.linspace(3, -3, 1000))))
        return schedule.levels_at(ratios, prediction="epsilon")
    if name == "ve":
        return levels.denoiser_levels(ratios)
    return levels.flow_levels(ratios / (1 + ratios))


def run(plan: Plan, points: NoiseLevels, x: np.ndarray, normals=None) -> np.ndarray:
    """A plan's own numbers in float64. The network is exact: from what a row says of its output."""
    history: dict[str, np.ndarray] = {}
    for i, row in enumerate(plan.rows):
        at = seen(row, points)
        d = denoised(x, at.alpha, at.sigma)
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
    "unipc 2": solvers.unipc,
    "unipc 3": functools.partial(solvers.unipc, order=3),
}


def even(steps: int) -> NoiseLevels:
    """As samplers are used: steps even in log-SNR, ending at LAST."""
    return levels.denoiser_levels(np.exp(-np.linspace(FIRST, LAST, steps + 1)))


def draw(file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors[::2] + ("black",))
    for name, solver in SHOWN.items():
        calls, errors = [], []
        for steps in (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            points = even(steps)
            plan = solver(points)
            x = X * math.hypot(1.0, points.points[0].sigma)
            calls.append(plan.network_calls)
            errors.append(float(np.abs(run(plan, points, x) - truth()).max()))
        axes.plot(calls, errors, marker=".", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("network calls")
    axes.set_ylabel("largest error of x at the end")
    axes.set_title(
        "a mixture of two Gaussians with its exact score, log-SNR from -2 to 2", fontsize=9
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    draw(sys.argv[1])
