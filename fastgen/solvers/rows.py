"""How solvers write their rows: weights of x, of the estimate of x_0 and of history."""

from __future__ import annotations

from collections.abc import Mapping

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Clip, Output, Plan, Row, clip_bounds
from ..schedules import NoiseSchedule
from .prediction import folded

Weights = Mapping[str, float]


def levels_of(
    levels: NoiseLevels | NoiseSchedule, steps: int | None, prediction: str, spacing: str
) -> NoiseLevels:
    """What a solver was given: levels, or a schedule with the number of steps on it."""
    if isinstance(levels, NoiseLevels):
        if steps is not None and steps != len(levels):
            raise ValueError(f"steps: got {steps}, but the levels given have {len(levels)}")
        for name, given, usual in (("prediction", prediction, "epsilon"),
                                   ("spacing", spacing, "trailing")):  # fmt: skip
            if given != usual:
                raise ValueError(f"{name}: got {given!r}, but levels have theirs; give it to what "
                                 "makes them")  # fmt: skip
        return levels
    if not isinstance(levels, NoiseSchedule):
        raise TypeError(
            f"levels: got {type(levels).__name__}, expected a fastgen.NoiseSchedule and steps, or "
            "levels, as denoiser_levels(sigmas), edm_levels(sigmas) and flow_levels(sigmas) make"
        )
    return levels.levels(checks.integer("steps", steps, 1), prediction=prediction, spacing=spacing)


def check_schedule(schedule: object, solver: str, alike: str) -> None:
    """Of a solver whose formula has a schedule's timesteps; alike: a solver of levels."""
    if isinstance(schedule, NoiseLevels):
        raise TypeError("schedule: got NoiseLevels, expected a fastgen.NoiseSchedule and steps; "
                        f"of levels, {alike} instead of {solver}")  # fmt: skip
    checks.instance("schedule", schedule, NoiseSchedule)


def combined(*terms: tuple[float, Weights]) -> dict[str, float]:
    """sum_k factor_k weights_k."""
    total: dict[str, float] = {}
    for factor, weights in terms:
        for name, weight in weights.items():
            total[name] = total.get(name, 0.0) + factor * weight
    return total


def first_order(start: Point, end: Point) -> dict[str, float]:
    """The step that is exact where the estimate of x_0 does not change: DDIM, Song, Meng & Ermon
    (2021), eq. 13, which is Euler's method in x / alpha over sigma / alpha."""
    of_x = end.sigma / start.sigma
    return {"x": of_x, "denoised": end.alpha - start.alpha * of_x}


def noise_of(start: Point) -> dict[str, float]:
    """The estimate of the noise: eps = (x - alpha x_0) / sigma."""
    return {"x": 1.0 / start.sigma, "denoised": -start.alpha / start.sigma}


def cfgpp_step(start: Point, end: Point) -> dict[str, float]:
    """CFG++, Chung et al. (2024), algorithm 2: the guided estimate of x_0, and the noise that the
    unconditional output alone, u, tells: alpha_t x_0 + sigma_t eps_u."""
    of_x, of_u = start.estimate
    return {"denoised": end.alpha, "x": end.sigma * (1.0 - start.alpha * of_x) / start.sigma,
            "u": -end.sigma * start.alpha * of_u / start.sigma}  # fmt: skip


def _cancels(weights: Weights, estimate: tuple[float, float]) -> bool:
    """Whether x and e have much smaller weights once the estimate of x_0 is put in."""

    def size(weights: Weights, of_denoised: float) -> float:
        x, e, d = (abs(weights.get(name, 0.0)) for name in ("x", "e", "denoised"))
        return x + e + of_denoised * d

    apart = size(weights, abs(estimate[0]) + abs(estimate[1]))
    return size(folded(weights, estimate), 0.0) < 0.5 * apart


class Rows:
    """Collects the rows of a plan, a network call each."""

    def __init__(self, levels: NoiseLevels, clip: Clip) -> None:
        self.levels = levels
        self.rows: list[Row] = []
        self.clip = clip_bounds(clip)

    def add(
        self,
        at: Point,
        to: Point | None,
        weights: Weights,
        noise: tuple[float, ...] = (),
        keep: Mapping[int, Weights] | None = None,
        kept_noise: Mapping[int, tuple[float, ...]] | None = None,
    ) -> None:
        """The call at a point: the next sample, which the network sees at ``to`` (None: the run is
        over), and by slot what is kept."""
        outputs: list[tuple[Weights, tuple[float, ...], str | int]] = [(weights, noise, "x")]
        for slot, kept in (keep or {}).items():
            outputs.append((kept, (kept_noise or {}).get(slot, ()), slot))
        if to is not None and to.input_scale != 1.0:
            scaled = combined((to.input_scale, weights))
            outputs.append((scaled, tuple(to.input_scale * s for s in noise), "input"))
        # What is neither clipped nor kept need not be computed by itself, nor should what cancels:
        # float32 keeps little of eps = (x - alpha x_0) / sigma where sigma is small.
        estimated = self.clip is not None or (
            bool(keep) and not any(_cancels(w, at.estimate) for w, _, _ in outputs)
        )
        made = [Output(w if estimated else folded(w, at.estimate), z, target)
                for w, z, target in outputs]  # fmt: skip
        estimate = at.estimate if estimated else (0.0, 0.0)
        self.rows.append(Row(tuple(made), estimate, self.clip, model_time=at.time,
                             input_scale=at.input_scale, level=(at.alpha, at.sigma)))  # fmt: skip

    def plan(self, solver: str, initial_scale: float | None = None) -> Plan:
        """What was collected; initial_scale: where the run does not begin at the first level."""
        scale = self.levels.initial_scale if initial_scale is None else initial_scale
        discrete = self.levels.discrete and all(r.model_time.is_integer() for r in self.rows)
        end = self.levels.end
        return Plan(tuple(self.rows), scale, discrete, solver, (end.alpha, end.sigma))
