"""Schedulers of distilled models and of flows."""

from __future__ import annotations

import itertools
import math

import diffusers

from ...levels import estimate_of
from ...plan import Output, Row
from ...solvers.rows import combined
from .base import (
    _WANTS_FLOAT,
    NO_NOISE,
    _is_whole,
    _register,
    _schedulers,
    _showing,
)
from .by_sigma import _BySigma, _Drawing


@_register
class LCMScheduler(_Drawing, diffusers.LCMScheduler):
    _output = _schedulers.scheduling_lcm.LCMSchedulerOutput
    _keeps = False

    def _build(self) -> list[Row]:
        grid, table, rows = self._host_timesteps[self._start :], self._alpha_bars, []
        for i, t in enumerate(grid):
            a_t = table[t]
            alpha, sigma = math.sqrt(a_t), math.sqrt(1.0 - a_t)
            of_x, of_e = estimate_of(self._prediction, alpha, sigma)
            scaled = t * self.config.timestep_scaling
            skip = 0.25 / (scaled**2 + 0.25)
            out = scaled / math.sqrt(scaled**2 + 0.25)
            shown = {"x": skip, "denoised": out}
            last = i + 1 == len(grid)
            a_s = 1.0 if last else table[grid[i + 1]]
            weights = {name: math.sqrt(a_s) * w for name, w in shown.items()}
            row = Row((Output(weights, (math.sqrt(1.0 - a_s),)),), (of_x, of_e), self._clips,
                      model_time=float(t))  # fmt: skip
            rows.append(_showing(row, shown))
        return rows

    def _noise_at(self, index, row, output, sample, generator):
        return self._normals(row, output, generator, None, row.noises > 0)


@_register
class TCDScheduler(_BySigma, diffusers.TCDScheduler):
    _output = _schedulers.scheduling_tcd.TCDSchedulerOutput
    _keeps = False
    _usual = (0.3,)

    def _build(self, eta: float) -> list[Row]:
        grid, table = self._host_timesteps[self._start :], self._alpha_bars
        rows: list[Row] = []
        for t, s in itertools.pairwise([*grid, 0]):
            last = len(rows) + 1 == len(grid)
            alpha, sigma = math.sqrt(table[t]), math.sqrt(1.0 - table[t])
            a_u = table[math.floor((1.0 - eta) * s)]
            of_x, of_e = estimate_of(self._prediction, alpha, sigma)
            share = math.sqrt(1.0 - a_u) / sigma  # of eps = (x - alpha x_0) / sigma
            of_denoised = math.sqrt(a_u) - share * alpha
            shown = {"x": share + of_denoised * of_x, "e": of_denoised * of_e}
            ratio = 1.0 if last or eta == 0.0 else table[s] / a_u
            weights = combined((math.sqrt(ratio), shown))
            row = Row((Output(weights, (math.sqrt(1.0 - ratio),)),), model_time=float(t))
            rows.append(_showing(row, shown))
        return rows

    def step(self, model_output, timestep, sample, eta=0.3, generator=None, return_dict=True):
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta: got {eta}, expected a number in [0, 1]")
        done = self._under_way(timestep, sample, model_output, return_dict, eta > 0, (eta,))
        if done is not None:
            return done
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        row = self._rows_of(float(eta))[index]
        draws = eta > 0 and index + 1 < len(self._rows)
        noise = self._normals(row, model_output, generator, None, draws)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class FlowMatchEulerDiscreteScheduler(_BySigma, diffusers.FlowMatchEulerDiscreteScheduler):
    _output = _schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
    _casts, _keeps, _strict = "output", False, _WANTS_FLOAT

    def _step_of(self, row: Row) -> tuple:
        return row.packed, row.targets, self._random  # in a last step as well

    def _build(self) -> list[Row]:
        rows, sigmas = [], self._run
        random = self._random = getattr(self.config, "stochastic_sampling", False)
        for sigma, following in itertools.pairwise(sigmas):
            if random:
                output = Output({"x": 1.0 - following, "e": -(1.0 - following) * sigma},
                                (following,))  # fmt: skip
            else:
                output = Output({"x": 1.0, "e": following - sigma})
            rows.append(Row((output,)))
        return rows

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
             s_noise=1.0, generator=None, per_token_timesteps=None, return_dict=True):  # fmt: skip
        if per_token_timesteps is None:
            done = self._under_way(timestep, sample, model_output, return_dict)
            if done is not None:
                return done
        index = -1
        if per_token_timesteps is None and not _is_whole(timestep):
            index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                                generator, per_token_timesteps, return_dict)  # fmt: skip
        row = self._rows[index]
        noise = NO_NOISE
        if self._random:
            noise = self._normals(row, sample.float(), generator, None, True)
        return self._stepped(index, row, sample, model_output, noise, return_dict)
