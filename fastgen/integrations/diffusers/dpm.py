"""DPM-Solver's schedulers: multistep, on other levels, upwards, and singlestep."""

from __future__ import annotations

import math

import diffusers
import torch

from ...levels import NoiseLevels, Point
from ...plan import Row
from ...solvers.dpm import DATA, SAMPLE, _multistep, data_step, noise_step
from ...solvers.rows import Rows, Weights, combined, first_order, noise_of
from .base import _DRAWS_WIDE, _register
from .by_sigma import _BySigma, _Drawing, _Edm


class _Dpm(_BySigma):
    @property
    def _sde(self) -> bool:
        return self.config.algorithm_type.startswith("sde")

    @property
    def _data(self) -> bool:
        return self.config.algorithm_type.endswith("++")

    def _leaves(self) -> bool:
        flows = self._prediction == "flow" and not self._data
        learned = getattr(self.config, "variance_type", None) is not None
        return super()._leaves() or learned or flows or self._mixed

    def _multisteps(self, levels: NoiseLevels) -> tuple[Row, ...]:
        config, orders = self.config, self._orders()
        if config.euler_at_final or getattr(config, "final_sigmas_type", "") == "zero":
            orders[-1] = 1
        # of the third stochastic order diffusers' is wrong or fails: there it is the paper's
        published = not self._sde or config.solver_order < 3
        return _multistep(
            levels, self._clips, "dpm", order=config.solver_order, noise=not self._data,
            kind=config.solver_type, eta=float(self._sde), orders=orders, published=published,
        ).rows  # fmt: skip


class _Promoted(_Dpm, _Drawing):
    """A step that draws, where its algorithm is stochastic, in the dtype of what it integrates."""

    _draws = _Dpm._sde

    def _noise_at(self, index, row, output, sample, generator):
        kind = output.dtype
        if self._prediction != "sample":
            kind = torch.promote_types(kind, sample.dtype)
        return self._normals(row, output, generator, None, self._sde, kind)


class _Given(_Dpm):
    """A step that draws in float32, or is given its noise."""

    _strict = _DRAWS_WIDE

    def _build(self) -> list[Row]:
        return self._to_the_end(lambda sigmas: self._multisteps(self._preserving(sigmas)))

    def step(self, model_output, timestep, sample, generator=None, variance_noise=None,
             return_dict=True):  # fmt: skip
        if variance_noise is None:
            done = self._under_way(timestep, sample, model_output, return_dict,
                                   generator if self._sde else False)  # fmt: skip
            if done is not None:
                return done
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, variance_noise,
                                return_dict)  # fmt: skip
        row, sde = self._rows[index], self._sde
        given = variance_noise if sde else None
        noise = self._normals(row, model_output, generator, given, sde, torch.float32)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class DPMSolverMultistepScheduler(_Given, diffusers.DPMSolverMultistepScheduler):
    pass


@_register
class EDMDPMSolverMultistepScheduler(_Edm, _Promoted, diffusers.EDMDPMSolverMultistepScheduler):
    def _leaves(self) -> bool:
        return super()._leaves() or self._prediction == "sample"

    def _build(self) -> list[Row]:
        return self._to_the_end(lambda sigmas: self._multisteps(self._exploding(sigmas)))


class _Rising(NoiseLevels):
    """Levels from data to noise (or back, as flow's are there)."""

    def __post_init__(self) -> None:
        ratios = [p.ratio for p in (*self.points, self.end)]
        if ratios != sorted(set(ratios)) and ratios != sorted(set(ratios), reverse=True):
            raise ValueError(f"sigmas: expected noise levels that rise, got {ratios}")


@_register
class DPMSolverMultistepInverseScheduler(_Given, diffusers.DPMSolverMultistepInverseScheduler):
    """Along the ODE alone: upwards the noise of its SDE has no variance."""

    _ladder = _Rising

    @property
    def _run(self) -> list[float]:
        """There are fewer timesteps than sigmas where some repeat."""
        return self._host_sigmas[self._start : len(self.timesteps) + 1]

    def _leaves(self) -> bool:
        return super()._leaves() or self._sde


@_register
class DPMSolverSinglestepScheduler(_Promoted, diffusers.DPMSolverSinglestepScheduler):
    """Lu et al. (2022a, 2022b), with the run's own levels for the inner ones: a step of order k
    ends k levels on, and a call makes it anew from its start with the estimates so far. Slot 0
    keeps its sample, 1 and 2 the estimates."""

    def _build(self) -> list[Row]:
        sigmas, stays = self._run, self._stays
        levels = self._preserving(sigmas[:-1] if stays else sigmas)
        points = [*levels.points, levels.end, *[levels.end] * stays]
        orders = [min(k, i + 1) for i, k in enumerate(self.order_list[self._start :])]
        rows = Rows(levels, self._clips)
        for i, known in enumerate(orders):
            at, now = points[i], DATA if self._data else noise_of(points[i])
            keep: dict[int, Weights] = {}
            if i + 1 < len(orders) and orders[i + 1] > known:
                keep = {0: SAMPLE, 1: now} if known == 1 else {2: now}
            weights, deviation = self._moved(points[i - known + 1 : i + 2], now)
            rows.add(at, None, weights, (deviation,), keep)
        return rows.rows

    def _moved(self, points: list[Point], now: Weights) -> tuple[dict[str, float], float]:
        """(x, the deviation of its noise) at the last of the points from that at the first, with
        estimates at all but the last, the newest of them ``now``."""
        start, end, kind = points[0], points[-1], self.config.solver_type
        if end.ratio == 0.0 or end.ratio == start.ratio:
            return first_order(start, end), 0.0
        h = end.log_snr - start.log_snr
        x, m0, d1, d2 = SAMPLE, now, {}, {}
        if len(points) > 2:
            x, m0 = {"h0": 1.0}, {"h1": 1.0}
            r = (points[-2].log_snr - start.log_snr) / h
            d1 = combined((1.0 / r, now), (-1.0 / r, m0))
        if len(points) > 3 and kind == "midpoint":
            kind = "heun"  # whose integral of the slope is exact
        elif len(points) > 3:
            r1 = (points[1].log_snr - start.log_snr) / h
            inner = combined((1.0 / r1, {"h2": 1.0}), (-1.0 / r1, m0))
            d2 = combined((2.0 / (r - r1), d1), (-2.0 / (r - r1), inner))
            d1 = combined((1.0, inner), (-0.5 * r1, d2))
        if not self._data:
            return noise_step(start, end, m0, d1, d2, False, kind, x), 0.0
        deviation = end.sigma * math.sqrt(-math.expm1(-2.0 * h)) if self._sde else 0.0
        return data_step(start, end, m0, d1, d2, float(self._sde), kind, x), deviation
