"""Schedulers of CogVideoX, on levels shifted by their signal-to-noise ratio."""

from __future__ import annotations

import math

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor

from ...plan import Output, Row
from ...solvers.ddim import ddim_row
from ...solvers.rows import combined
from .base import NO_NOISE, _check, _estimate, _register, _schedulers, _showing
from .by_timestep import _ByTimestep


@_register
class CogVideoXDDIMScheduler(_ByTimestep, diffusers.CogVideoXDDIMScheduler):
    """Neither clips nor draws, whatever its configuration and its arguments say."""

    _output = _schedulers.scheduling_ddim_cogvideox.DDIMSchedulerOutput
    _strays = True

    def _build(self) -> list[Row]:
        rows = []
        for t, a_t, a_s in self._levels():
            row = ddim_row(a_t, a_s, self._prediction, model_time=float(t))
            rows.append(_showing(row, _estimate(row, self._point(a_t))))
        return rows

    def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False,
             generator=None, variance_noise=None, return_dict=True):  # fmt: skip
        done = self._under_way(timestep, sample, model_output, return_dict)
        if done is not None:
            return done
        row = None
        if self.num_inference_steps is not None:
            index, row, table = self._chosen(timestep, sample)
        if row is None:
            return super().step(model_output, timestep, sample, eta, use_clipped_model_output,
                                generator, variance_noise, return_dict)  # fmt: skip
        return self._stepped(index, row, sample, model_output, NO_NOISE, return_dict, table=table)


@_register
class CogVideoXDPMScheduler(_ByTimestep, diffusers.CogVideoXDPMScheduler):
    """SDE-DPM-Solver++(2M), Lu et al. (2022b), whose former estimate is given, as slot 0: of first
    order without one, and in the last step."""

    _output = _schedulers.scheduling_dpm_cogvideox.DDIMSchedulerOutput
    _keeps = _strays = True
    _usual = (False,)

    @property
    def _ratio(self) -> int:
        return self.config.num_train_timesteps // self.num_inference_steps

    def _build(self, second: bool) -> list[Row]:
        rows, levels = [], self._levels()
        for i, (t, a_t, a_s) in enumerate(levels):
            at, to = self._point(a_t), self._point(a_s)
            shrunk = at.alpha * to.sigma / (at.sigma * to.alpha)  # exp(-h)
            share = 1.0 - shrunk**2
            last = t < self._ratio if self._compat else i + 1 == len(levels)
            extra = 0.0
            if second and i > 0 and not last:
                before = at.log_snr - self._point(levels[i - 1][1]).log_snr
                extra = 0.5 * (to.log_snr - at.log_snr) / before
            estimate = {"x": at.estimate[0], "e": at.estimate[1]}
            weights = combined(
                (shrunk * to.sigma / at.sigma, {"x": 1.0}),
                (to.alpha * share * (1.0 + extra), estimate),
                (-to.alpha * share * extra, {"h0": 1.0}),
            )
            output = Output(weights, (to.sigma * math.sqrt(share),))
            rows.append(_showing(Row((output,), model_time=float(t)), estimate))
        return rows

    def step(self, model_output, old_pred_original_sample, timestep, timestep_back, sample, eta=0.0,
             use_clipped_model_output=False, generator=None, variance_noise=None,
             return_dict=False):  # fmt: skip
        old, back, row = old_pred_original_sample, timestep_back, None
        second = old is not None
        both = torch.promote_types(sample.dtype, model_output.dtype)
        fits = not second or (back is not None and torch.promote_types(both, old.dtype) == both)
        if fits and self.num_inference_steps is not None:
            back = back if second else None
            index, row, table = self._chosen(timestep, sample, (second,), back, -1)
        if row is None:
            return super().step(model_output, old, timestep, timestep_back, sample, eta,
                                use_clipped_model_output, generator, variance_noise,
                                return_dict)  # fmt: skip
        first = None
        if second:
            _check("old_pred_original_sample", old, sample)
            if self._noise == "torch" and row.model_time >= self._ratio:  # drawn there for nothing
                first = randn_tensor(sample.shape, generator=generator, device=sample.device,
                                     dtype=sample.dtype)  # fmt: skip
        noise = self._normals(row, sample, generator, None, True)
        if first is not None and torch.compiler.is_compiling():  # which leaves out what is not read
            noise = ((*noise[0], first), *noise[1:])
        self._kept[0] = old
        result = self._stepped(index, row, sample, model_output, noise, return_dict, table=table)
        self._kept[0] = None
        return result
