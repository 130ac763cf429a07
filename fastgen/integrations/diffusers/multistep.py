"""Schedulers that read their former estimates."""

from __future__ import annotations

import math

import diffusers
import torch

from ... import solvers
from ...plan import Output, Row
from ...solvers.dpm import _multistep
from ...solvers.multistep import ADAMS_BASHFORTH, _adams, log_level
from ...solvers.rows import combined
from .base import (
    NO_NOISE,
    _Fast,
    _register,
    _schedulers,
)
from .by_sigma import _BySigma, _Plain


@_register
class LMSDiscreteScheduler(_BySigma, diffusers.LMSDiscreteScheduler):
    _output = _schedulers.scheduling_lms_discrete.LMSDiscreteSchedulerOutput

    def _build(self) -> list[Row]:
        self._variants: dict[int, list[Row]] = {}
        return self._variant(4)

    def _variant(self, order: int) -> list[Row]:
        if order not in self._variants:
            levels = self._exploding(self._run)
            self._variants[order] = self._shown(solvers.lms(levels, order=order), levels.points)
        return self._variants[order]

    def step(self, model_output, timestep, sample, order=4, return_dict=True):
        index = -1
        if self.is_scale_input_called and 1 <= order <= 4:
            index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, order, return_dict)
        row = self._variant(order)[index]
        return self._stepped(index, row, sample, model_output, NO_NOISE, return_dict)


@_register
class DPMSolverMultistepScheduler(_BySigma, diffusers.DPMSolverMultistepScheduler):
    def _leaves(self) -> bool:
        config = self.config
        flows = self._prediction == "flow" and not config.algorithm_type.endswith("++")
        return super()._leaves() or config.variance_type is not None or flows

    def _build(self) -> list[Row]:
        config, orders = self.config, self._orders()
        self._sde = config.algorithm_type.startswith("sde")
        if config.euler_at_final or config.final_sigmas_type == "zero":
            orders[-1] = 1
        return list(_multistep(
            self._preserving(self._run), self._clips, "dpm", order=config.solver_order,
            noise=not config.algorithm_type.endswith("++"), kind=config.solver_type,
            eta=float(self._sde), orders=orders, published=True,
        ).rows)  # fmt: skip

    def step(self, model_output, timestep, sample, generator=None, variance_noise=None,
             return_dict=True):  # fmt: skip
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, variance_noise,
                                return_dict)  # fmt: skip
        row, sde = self._rows[index], self._sde
        given = variance_noise if sde else None
        noise = self._normals(row, model_output, generator, given, sde, torch.float32)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class UniPCMultistepScheduler(_Plain, diffusers.UniPCMultistepScheduler):
    _casts = "sample"

    def _leaves(self) -> bool:
        flows = self._prediction == "flow" and not self.config.predict_x0
        return super()._leaves() or self.config.solver_p is not None or flows

    def _build(self) -> list[Row]:
        config = self.config
        return list(solvers.unipc(
            self._preserving(self._run), order=config.solver_order,
            variant=config.solver_type, data=config.predict_x0,
            without_corrector=tuple(i + 1 - self._start for i in self.disable_corrector),
            lower_order_final=config.lower_order_final, clip=self._clips,
        ).rows)  # fmt: skip


@_register
class DEISMultistepScheduler(_Plain, diffusers.DEISMultistepScheduler):
    def _build(self) -> list[Row]:
        levels, order = self._preserving(self._run), self.config.solver_order
        return list(_adams(levels, order, self._clips, "deis", log_level, self._orders()).rows)

    def _leaves(self) -> bool:
        return super()._leaves() or self.config.algorithm_type != "deis"


@_register
class IPNDMScheduler(_Plain, diffusers.IPNDMScheduler):
    def _build(self) -> list[Row]:
        alphas, sigmas = self.alphas.tolist(), self.betas.tolist()
        rows: list[Row] = []
        for place in range(self._start, len(self.timesteps)):
            i = place - self._start
            now = {"x": sigmas[place], "e": alphas[place]}  # the estimate of the noise
            factors = ADAMS_BASHFORTH[min(i, 3)]
            former = [{f"h{(i - k) % 4}": 1.0} for k in range(1, len(factors))]
            noise = combined(*zip(factors, [now, *former], strict=True))
            of_x = alphas[place + 1] / max(alphas[place], 1e-8)
            of_noise = sigmas[place + 1] - of_x * sigmas[place]
            weights = combined((of_x, {"x": 1.0}), (of_noise, noise))
            rows.append(Row((Output(weights), Output(now, target=i % 4)), model_time=0.0))
        return rows


@_register
class PNDMScheduler(_Fast, diffusers.PNDMScheduler):
    """Without its Runge-Kutta steps, as latent diffusion uses it. ``counter`` counts its calls."""

    _counts = False
    _grid: list[int]

    def _leaves(self) -> bool:
        return not self.config.skip_prk_steps or self._prediction == "sample"

    def _build(self) -> list[Row]:
        ratio = self.config.num_train_timesteps // (self.num_inference_steps or 1)
        table, final = self.alphas_cumprod.tolist(), float(self.final_alpha_cumprod)
        self._grid, rows = self.timesteps.tolist()[self._start :], []
        for i, t in enumerate(self._grid):
            # the second call, at the second timestep, corrects the first step
            at, to = (t + ratio, t) if i == 1 else (t, t - ratio)
            x = {"h3": 1.0} if i == 1 else {"x": 1.0}
            kept = i - 1 if i else 0  # which estimate this call's is, but for the second's
            keep: dict[int, dict[str, float]] = {} if i == 1 else {kept % 3: {"e": 1.0}}
            if i == 0:
                keep[3] = {"x": 1.0}
            if i == 1:
                noise = {"e": 0.5, "h0": 0.5}
            else:
                factors = ADAMS_BASHFORTH[min(kept, 3)]
                former = [{f"h{(kept - k) % 3}": 1.0} for k in range(1, len(factors))]
                noise = combined(*zip(factors, [{"e": 1.0}, *former], strict=True))
            a_t, a_s = table[at], table[to] if to >= 0 else final
            if self._prediction == "v":
                noise = combined((math.sqrt(a_t), noise), (math.sqrt(1.0 - a_t), x))
            below = a_t * math.sqrt(1.0 - a_s) + math.sqrt(a_t * (1.0 - a_t) * a_s)
            weights = combined((math.sqrt(a_s / a_t), x), ((a_t - a_s) / below, noise))
            outputs = [Output(weights), *(Output(w, target=slot) for slot, w in keep.items())]
            rows.append(Row(tuple(outputs), model_time=float(t)))
        return rows

    def step(self, model_output, timestep, sample, return_dict=True):
        index, t = self.counter, int(timestep)
        if index == 0 and self.num_inference_steps is not None:
            places = self.timesteps.tolist()
            if t not in places:
                return super().step(model_output, timestep, sample, return_dict)
            self._begin(places.index(t))
        if self._rows is None or self._left:
            return super().step(model_output, timestep, sample, return_dict)
        if index >= len(self._grid) or t != self._grid[index]:
            raise ValueError(f"timestep: got {t}, expected the timesteps one after the other")
        row = self._rows[index]
        result = self._stepped(index, row, sample, model_output, NO_NOISE, return_dict)
        self.counter += 1
        return result
