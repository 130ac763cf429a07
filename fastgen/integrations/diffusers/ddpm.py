"""DDPM, and the schedulers that took its step for a purpose of their own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import torch
from torch import Tensor

from ... import checks
from ...plan import Output, Row
from ...sampling import blend
from ...solvers.ddim import ddim_row
from ...solvers.ddpm import ddpm_row
from .base import _constant, _estimate, _register, _schedulers, _showing
from .by_timestep import _ByTimestep, _Counted


class _Posterior(_ByTimestep):
    """DDPM's step, whose variance may be learned: further channels of the network's output."""

    variance_type: str

    @property
    def _learned(self) -> bool:
        """As the variance itself, or as where between beta tilde and beta its log lies."""
        return self.variance_type in ("learned", "learned_range")

    def _posteriors(self, levels: list[tuple[int, float, float]], variance: str) -> list[Row]:
        rows = []
        for t, a_t, a_s in levels:
            name = "learned" if self._learned else variance
            row = ddpm_row(a_t, a_s, self._prediction, self._clips, name, float(t))
            if self.variance_type == "learned_range" and row.noises:
                beta = 1.0 - a_t / a_s
                low = math.log(max(beta * (1.0 - a_s) / (1.0 - a_t), 1e-20))
                high = math.log(beta)
                row = Row(row.outputs, row.denoised, row.clip, (0.5 * (high - low),
                          0.5 * (high + low)), row.model_time)  # fmt: skip
            rows.append(_showing(row, _estimate(row, self._point(a_t))))
        return rows

    def _drawn(self, chosen: tuple, output: Tensor, sample: Tensor, generator: Any,
               return_dict: bool) -> Any:  # fmt: skip
        """What ``step`` returns; None where it is diffusers' own."""
        index, row, table = chosen
        logvar = None
        if row is None or (self._learned and output.shape[1] != 2 * sample.shape[1]):
            return None
        if self._learned:
            output, logvar = output.split(sample.shape[1], dim=1)
            if not row.noises:
                logvar = None
            elif self.variance_type == "learned":
                logvar = logvar.to(torch.promote_types(logvar.dtype, torch.float32)).log()
        noise = self._normals(row, output, generator, None, row.model_time > 0.0)
        return self._stepped(index, row, sample, output, noise, return_dict, logvar, table)


class _Ddpm(_Posterior):
    def _build(self) -> list[Row]:
        return self._posteriors(self._levels(), self.variance_type.removesuffix("_log"))

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        if not self._learned:
            done = self._under_way(timestep, sample, model_output, return_dict, generator)
            if done is not None:
                return done
        chosen = self._chosen(timestep, sample)
        done = self._drawn(chosen, model_output, sample, generator, return_dict)
        if done is not None:
            return done
        return super().step(model_output, timestep, sample, generator, return_dict)


@_register
class DDPMScheduler(_Ddpm, diffusers.DDPMScheduler):
    _output = _schedulers.scheduling_ddpm.DDPMSchedulerOutput


@_register
class DDPMParallelScheduler(_Ddpm, diffusers.DDPMParallelScheduler):
    _output = _schedulers.scheduling_ddpm_parallel.DDPMParallelSchedulerOutput


@_register
class UnCLIPScheduler(_Posterior, diffusers.UnCLIPScheduler):
    """Steps to the timestep that it is told, the next one of the grid; to t - 1 where it is not."""

    _output = _schedulers.scheduling_unclip.UnCLIPSchedulerOutput
    _usual = (False,)

    def _leaves(self) -> bool:
        predicts = self._prediction in ("epsilon", "sample")
        kinds = ("fixed_small_log", "learned_range")
        return super()._leaves() or not predicts or self.variance_type not in kinds

    def _build(self, near: bool) -> list[Row]:
        levels, table = self._levels(), self._alpha_bars
        if near:
            levels = [(t, a_t, table[t - 1] if t else 1.0) for t, a_t, _ in levels]
        return self._posteriors(levels, "fixed_small")

    def step(self, model_output, timestep, sample, prev_timestep=None, generator=None,
             return_dict=True):  # fmt: skip
        near, done = prev_timestep is None, None
        if not (near and self._compat):  # whose betas and alpha_bars differ by a rounding
            chosen = self._chosen(timestep, sample, (near,), prev_timestep, 1)
            done = self._drawn(chosen, model_output, sample, generator, return_dict)
        if done is not None:
            return done
        return super().step(model_output, timestep, sample, prev_timestep, generator, return_dict)


@_register
class DDPMWuerstchenScheduler(_Counted, diffusers.DDPMWuerstchenScheduler):
    """On timesteps from 1 to 0, given one a sample."""

    _output = _schedulers.scheduling_ddpm_wuerstchen.DDPMWuerstchenSchedulerOutput
    _casts = "output"

    def _level(self, t: float) -> float:
        offset, scaler = self.config.s, self.scaler
        t = 1.0 - (1.0 - t) ** scaler if scaler > 1 else t**scaler
        first, now = (math.cos(0.5 * math.pi * (u + offset) / (1.0 + offset)) for u in (0.0, t))
        return min(max((now / first) ** 2, 0.0001), 0.9999)

    def _build(self) -> list[Row]:
        rows = []
        for t, s in itertools.pairwise(self._host_timesteps):
            row = ddpm_row(self._level(t), self._level(s), model_time=t)
            if s == 0.0:
                row = Row((Output(row.outputs[0].weights),), model_time=t)
            rows.append(row)
        return rows

    @_constant
    def _placed(self) -> dict[Any, int]:
        return {t: i for i, t in enumerate(self._host_timesteps[:-1])}

    def _place_of(self, timestep: Any) -> int | None:
        place = self._places.get(self._value(timestep))
        if place is None:
            place = int(self._sought(timestep, timestep.device, -1))
        return place if 0 <= place < len(self._rows) else None

    def _is_hidden(self, timestep: Any) -> bool:
        return isinstance(timestep, Tensor) and (timestep.ndim > 0 or super()._is_hidden(timestep))

    def _sought(self, timestep: Any, device: torch.device, absent: int) -> Tensor:
        """As near as the timestep's dtype tells, which may be half the grid's."""
        away, place = (self.timesteps.to(device) - timestep.view(-1, 1)).abs().min(1)
        eps = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0.0
        near = away <= eps * timestep.view(-1).abs()
        return torch.where(near, place, absent)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        row, strays = None, self._compat and timestep.dtype != self.timesteps.dtype
        if not strays and timestep.ndim == 1 and len(timestep) in (1, len(sample)):
            same = len(timestep) == 1 or timestep.stride(0) == 0
            index, row, table = self._chosen(timestep[0] if same else timestep, sample)
        if row is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise = self._normals(row, model_output, generator, None, True)
        return self._stepped(index, row, sample, model_output, noise, return_dict, table=table)


@_register
class RePaintScheduler(_Counted, diffusers.RePaintScheduler):
    """Lugmayr et al. (2022), eq. 8: slot 0 is the image, slot 1 what is known at the next level."""

    _output = _schedulers.scheduling_repaint.RePaintSchedulerOutput
    _keeps, _prediction = True, "epsilon"
    _usual = (0.0,)

    @_constant
    def _placed(self) -> dict[int, int]:
        return {t: i for i, t in enumerate(sorted(set(self._host_timesteps), reverse=True))}

    def _build(self, eta: float) -> list[Row]:
        rows, grid, table = [], list(self._placed()), self._alpha_bars
        for t, s in itertools.pairwise([*grid, -1]):
            a_t, a_s = table[t], table[s] if s >= 0 else 1.0
            row = ddim_row(a_t, a_s, "epsilon", self._clips, eta)
            known = Output({"h0": math.sqrt(a_s)}, (math.sqrt(1.0 - a_s),), 1)
            row = Row((*row.outputs, known), row.denoised, row.clip, model_time=float(t))
            rows.append(_showing(row, _estimate(row, self._point(a_t))))
        return rows

    def _sought(self, timestep: Any, device: torch.device, absent: int) -> Tensor:
        """By the grid's even spacing, since ``timesteps`` has some of it twice."""
        steps = len(self._rows)
        ratio = self.config.num_train_timesteps // steps
        k = timestep // ratio
        there = (timestep == k * ratio) & (k >= 0) & (k < steps)
        return torch.where(there, steps - 1 - k, absent)

    def step(self, model_output, timestep, sample, original_image, mask, generator=None,
             return_dict=True):  # fmt: skip
        row, shape, image = None, sample.shape, original_image
        fits = image.shape == mask.shape == shape or (
            torch.broadcast_shapes(image.shape, mask.shape, shape) == shape
        )
        fits &= image.dtype in (sample.dtype, *checks.DTYPES[:3])
        if fits and self.num_inference_steps is not None:
            index, row, table = self._chosen(timestep, sample, (float(self.eta),))
        if row is None:
            return super().step(model_output, timestep, sample, image, mask, generator, return_dict)
        noise = self._normals(row, model_output, generator, None, True)
        self._kept[0] = image.expand(shape)
        made, shown = self._stepped(index, row, sample, model_output, noise, False, table=table)
        known: Any = self._kept[1]
        self._kept = [None] * 7
        dtype = torch.promote_types(torch.promote_types(made.dtype, mask.dtype), image.dtype)
        made = blend(made.to(known.dtype), known, mask.to(known.dtype)).to(dtype)
        return self._output(made, shown) if return_dict else (made, shown)
