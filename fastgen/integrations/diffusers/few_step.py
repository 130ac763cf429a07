"""Schedulers of distilled models and of flows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...levels import estimate_of
from ...plan import Output, Row
from ...solvers.rows import combined
from .base import (
    _DRAWS_WIDE,
    _WANTS_FLOAT,
    NO_NOISE,
    _is_whole,
    _register,
    _schedulers,
    _showing,
    _widened,
)
from .by_sigma import _BySigma, _Churned, _Drawing, _Strict


@_register
class LCMScheduler(_Drawing, diffusers.LCMScheduler):
    _output = _schedulers.scheduling_lcm.LCMSchedulerOutput
    _keeps = False
    _unread = 0

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

    def _leaves(self) -> bool:
        return super()._leaves() or len(self.timesteps) != self.num_inference_steps

    def _noise_at(self, index, row, output, sample, generator):
        both = torch.promote_types(sample.dtype, output.dtype)
        return self._normals(row, output, generator, None, row.noises > 0, both)


@_register
class TCDScheduler(_BySigma, diffusers.TCDScheduler):
    _output = _schedulers.scheduling_tcd.TCDSchedulerOutput
    _keeps = False
    _usual = (0.3,)

    def _leaves(self) -> bool:
        return super()._leaves() or len(self.timesteps) != self.num_inference_steps

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
        done = self._under_way(timestep, sample, model_output, return_dict,
                               generator if eta > 0 else False, (eta,))  # fmt: skip
        if done is not None:
            return done
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        row = self._rows_of(float(eta))[index]
        draws = eta > 0 and index + 1 < len(self._rows)
        both = torch.promote_types(sample.dtype, model_output.dtype)
        noise = self._normals(row, model_output, generator, None, draws, both)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class CMStochasticIterativeScheduler(_Strict, _Drawing, diffusers.CMStochasticIterativeScheduler):
    """Song et al. (2023), algorithm 1, with the boundary condition of appendix C."""

    _output = _schedulers.scheduling_consistency_models.CMStochasticIterativeSchedulerOutput
    _casts = ""

    def _build(self) -> list[Row]:
        config, rows = self.config, []
        least, data = float(self.sigmas[-1]), config.sigma_data
        for sigma, following in itertools.pairwise(self._run):
            skip = data**2 / ((sigma - least) ** 2 + data**2)
            out = (sigma - least) * data / math.sqrt(sigma**2 + data**2)
            added = math.sqrt(max(following**2 - least**2, 0.0)) if self._several else 0.0
            output = Output({"denoised": 1.0}, (config.s_noise * added,))
            rows.append(Row((output,), (skip, out), 1.0 if config.clip_denoised else None))
        return rows

    @property
    def _several(self) -> bool:
        return len(self.timesteps) > 1

    def _noise_at(self, index, row, output, sample, generator):
        return self._normals(row, output, generator, None, self._several)


@_register
class SCMScheduler(_BySigma, diffusers.SCMScheduler):
    """Lu & Song (2024), algorithm 4: x = cos(t) x_0 + sin(t) sigma_data z. The last timestep is the
    data's, for no call."""

    _output = _schedulers.scheduling_scm.SCMSchedulerOutput
    _keeps = False
    _strict = _DRAWS_WIDE

    @property
    def _calls(self) -> int:
        return len(self.timesteps) - 1

    def _leaves(self) -> bool:
        return self.config.prediction_type != "trigflow"

    def _build(self) -> list[Row]:
        rows = []
        for t, s in itertools.pairwise(self._host_timesteps[self._start :]):
            shown = {"x": math.cos(t), "e": -math.sin(t)}
            output = Output(combined((math.cos(s), shown)), (math.sin(s) * self.config.sigma_data,))
            rows.append(_showing(Row((output,), model_time=t), shown))
        return rows

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        wide = _widened(sample, model_output)
        if wide is sample and torch.get_default_dtype() == torch.float32:
            done = self._under_way(timestep, sample, model_output, return_dict, generator)
            if done is not None:
                return done
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, return_dict)
        row = self._rows[index]
        noise = self._normals(row, model_output, generator, None, True, torch.get_default_dtype())
        if wide is sample:
            return self._stepped(index, row, sample, model_output, noise, return_dict)
        following, shown = self._stepped(index, row, wide, model_output, noise, False)
        pair = following, shown.to(torch.promote_types(sample.dtype, model_output.dtype))
        return self._output(*pair) if return_dict else pair


class _Flow(_BySigma):
    """Straight paths x = (1 - sigma) x_0 + sigma eps, of which the network tells e = eps - x_0; or
    inverted ones, where sigma is the share of x_0, and e = x_0 - eps."""

    def _again(self, sigma: float, following: float) -> tuple[float, float, float]:
        """(a, alpha, sigma): the estimate of x_0 is x + a e, and alpha and sigma are the shares of
        it and of new noise at the next level."""
        if self.config.invert_sigmas and not self._compat:
            return 1.0 - sigma, following, 1.0 - following
        return -sigma, 1.0 - following, following


@_register
class FlowMatchEulerDiscreteScheduler(_Flow, diffusers.FlowMatchEulerDiscreteScheduler):
    _output = _schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
    _casts, _keeps, _strict = "output", False, _WANTS_FLOAT + _DRAWS_WIDE

    @property
    def _random(self) -> bool:
        return getattr(self.config, "stochastic_sampling", False)

    def _step_of(self, row: Row) -> tuple:
        return row.packed, row.targets, row.noises or -int(self._random)

    def _build(self) -> list[Row]:
        rows, sigmas, random = [], self._run, self._random
        for sigma, following in itertools.pairwise(sigmas):
            if random:
                of_e, alpha, added = self._again(sigma, following)
                output = Output({"x": alpha, "e": alpha * of_e}, (added,))
            else:
                output = Output({"x": 1.0, "e": following - sigma})
            rows.append(Row((output,)))
        return rows

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
             s_noise=1.0, generator=None, per_token_timesteps=None, return_dict=True):  # fmt: skip
        if per_token_timesteps is None:
            done = self._under_way(timestep, sample, model_output, return_dict, generator)
            if done is not None:
                return done
        index = -1
        if per_token_timesteps is None and not _is_whole(timestep):
            index = self._next(timestep)
        if index < 0:
            if per_token_timesteps is not None:
                model_output = self._for_tokens(model_output, timestep)
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                                generator, per_token_timesteps, return_dict)  # fmt: skip
        row = self._rows[index]
        noise = NO_NOISE
        if self._random:
            noise = self._normals(row, sample.float(), generator, None, True)
        return self._stepped(index, row, sample, model_output, noise, return_dict)

    def _for_tokens(self, output: Tensor, timestep: Any) -> Tensor:
        """The output as diffusers' own step takes it where tokens have levels of their own. It is
        given -e there, which only its steps without noise take as such."""
        if self._step_index is None and not _is_whole(timestep):
            self._find(timestep)  # without a wait
        return -output if self._random and not self._compat else output


@_register
class FlowMatchHeunDiscreteScheduler(_Churned, diffusers.FlowMatchHeunDiscreteScheduler):
    """Heun's method in sigma: two calls a step, one in the last. Slot 0: the sample half a step
    on."""

    _output = _schedulers.scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteSchedulerOutput
    _keeps = is_scale_input_called = True
    _strict = _WANTS_FLOAT

    def _build(self, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> list[Row]:
        if self._start % 2:
            raise ValueError("begun inside a step")
        rows, sigmas = [], self._run
        for sigma, end in itertools.pairwise([*sigmas[::2], sigmas[-1]]):
            gamma = self._gamma(s_churn) if s_tmin <= sigma <= s_tmax else 0.0
            higher = sigma * (1.0 + gamma)
            added = (s_noise * math.sqrt(higher**2 - sigma**2),)
            step = end - higher
            of_e = sigma / higher * step if self._compat else step
            first = Output({"x": 1.0, "e": of_e}, added)
            if end == 0.0:
                rows.append(Row((first,), model_time=higher))
                break
            half = Output({"x": 1.0, "e": 0.5 * of_e}, added, 0)
            rows.append(Row((first, half), model_time=higher))
            rows.append(Row((Output({"h0": 1.0, "e": 0.5 * step}),), model_time=higher))
        return rows


@_register
class FlowMatchLCMScheduler(_Flow, diffusers.FlowMatchLCMScheduler):
    """The estimate of x_0 and noise again; ``scale_factors`` of another size, which is no row's."""

    _output = _schedulers.scheduling_flow_match_lcm.FlowMatchLCMSchedulerOutput
    _casts, _keeps, _strict = "output", False, _WANTS_FLOAT + _DRAWS_WIDE
    _usual = (False,)
    _init_size: Any

    def _build(self, resized: bool) -> list[Row]:
        """resized: of x_0, of whose estimate the rows tell, in place of the sample."""
        rows = []
        for sigma, following in itertools.pairwise(self._run):
            of_e, alpha, added = self._again(sigma, following)
            weights = {"x": alpha} if resized else {"x": alpha, "e": alpha * of_e}
            rows.append(Row((Output(weights, (added,)),), (1.0, of_e)))
        return rows

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        factors = self._scale_factors if self._upscale_mode else None
        if not factors:
            done = self._under_way(timestep, sample, model_output, return_dict, generator)
            if done is not None:
                return done
        if self._init_size is None or self._step_index is None:
            self._init_size = model_output.shape[2:]
        index = -1
        if not _is_whole(timestep) and (not factors or len(factors) + 1 == len(self.timesteps)):
            index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, return_dict)
        row, place = self._rows[index], index + self._start
        if factors and place < len(factors):
            row = self._rows_of(True)[index]
            size = [round(factors[place] * length) for length in self._init_size]
            estimate = torch.add(sample.float(), model_output, alpha=row.denoised[1])
            sample = interpolate(estimate, size=size, mode=self._upscale_mode)
            model_output = sample.to(model_output.dtype)  # its dtype is the result's
        wide = torch.promote_types(torch.float32, model_output.dtype)
        noise = self._normals(row, model_output, generator, None, True, wide)
        return self._stepped(index, row, sample, model_output, noise, return_dict)
