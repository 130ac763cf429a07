"""Schedulers that read their former estimates."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import diffusers

from ... import solvers
from ...plan import Output, Row
from ...solvers.multistep import ADAMS_BASHFORTH, _adams, log_level
from ...solvers.rows import Weights, combined
from ...solvers.sa import _sa
from .base import (
    _WANTS_SCALED,
    NO_NOISE,
    _Fast,
    _register,
    _schedulers,
    _seeds,
)
from .by_sigma import _BySigma, _Drawing, _Plain


@_register
class LMSDiscreteScheduler(_BySigma, diffusers.LMSDiscreteScheduler):
    _output = _schedulers.scheduling_lms_discrete.LMSDiscreteSchedulerOutput
    _usual, _strict = (4,), _WANTS_SCALED

    def _build(self, order: int) -> list[Row]:
        levels = self._exploding(self._run)
        return self._shown(solvers.lms(levels, order=order), levels.points)

    def step(self, model_output, timestep, sample, order=4, return_dict=True):
        done = self._under_way(timestep, sample, model_output, return_dict, False, (order,))
        if done is not None:
            return done
        index = -1
        if self.is_scale_input_called and 1 <= order <= 4:
            index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, order, return_dict)
        row = self._rows_of(order)[index]
        return self._stepped(index, row, sample, model_output, NO_NOISE, return_dict)


@_register
class UniPCMultistepScheduler(_Plain, diffusers.UniPCMultistepScheduler):
    _casts = "sample"

    def _leaves(self) -> bool:
        flows = self._prediction == "flow" and not self.config.predict_x0
        return super()._leaves() or self.config.solver_p is not None or flows or self._mixed

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
        return super()._leaves() or self.config.algorithm_type != "deis" or self._mixed


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
class SASolverScheduler(_Drawing, diffusers.SASolverScheduler):
    _casts = "sample"

    @functools.wraps(diffusers.SASolverScheduler.__init__)  # type: ignore[misc]
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.tau_func is None:  # a lambda there, which keeps it from being pickled
            del self.tau_func

    @staticmethod
    def tau_func(t: Any) -> float:
        """diffusers' default."""
        return 1.0 if 200 <= t <= 800 else 0.0

    def _leaves(self) -> bool:
        config = self.config
        flows = self._prediction == "flow" and not self.predict_x0
        orders = config.predictor_order, config.corrector_order
        return (super()._leaves() or config.variance_type is not None or flows or self._mixed
                or not all(1 <= order <= 4 for order in orders))  # fmt: skip

    def _build(self) -> list[Row]:
        config, sigmas, stays = self.config, self._run, self._stays
        levels = self._preserving(sigmas[:-1] if stays else sigmas)
        times = self._host_timesteps[self._start : self._start + len(levels)]
        return list(_sa(
            levels, self._clips, config.predictor_order, config.corrector_order,
            [float(self.tau_func(t)) for t in times], self.predict_x0, config.lower_order_final,
            stays, True,
        ).rows)  # fmt: skip

    def _noise_at(self, index, row, output, sample, generator):
        if self._noise == "fastgen" and self._seeds is None:  # a first row may draw nothing
            self._seeds = _seeds(generator, output)
        return super()._noise_at(index, row, output, sample, generator)


@_register
class PNDMScheduler(_Fast, diffusers.PNDMScheduler):
    """``counter`` counts its calls. Slots 0 to 2: estimates of the noise; 3 and 4: the sum of a
    Runge-Kutta step and its first sample. Without those steps, as latent diffusion uses it, the
    second call, at the second timestep, corrects the first one."""

    _counts = False
    _grid: list[int]

    def _leaves(self) -> bool:
        return self._prediction == "sample"

    def _build(self) -> list[Row]:
        ratio = self.config.num_train_timesteps // (self.num_inference_steps or 1)
        self._grid = self._host_timesteps[self._start :]
        plain = self.config.skip_prk_steps
        if not plain and self._start:
            raise ValueError("begun within its Runge-Kutta steps")
        rows = [] if plain else self._runge_kutta(ratio // 2)
        for i, t in list(enumerate(self._grid))[len(rows) :]:
            again = plain and i == 1
            at, to = (t + ratio, t) if again else (t, t - ratio)
            x = {"h4": 1.0} if again else {"x": 1.0}
            kept = i - 9 if not plain else i - 1 if i else 0  # which estimate this call's is
            keep: dict[int, dict[str, float]] = {} if again else {kept % 3: {"e": 1.0}}
            if plain and i == 0:
                keep[4] = {"x": 1.0}
            if again:
                noise = {"e": 0.5, "h0": 0.5}
            else:
                factors = ADAMS_BASHFORTH[min(kept, 3)]
                former = [{f"h{(kept - k) % 3}": 1.0} for k in range(1, len(factors))]
                noise = combined(*zip(factors, [{"e": 1.0}, *former], strict=True))
            rows.append(self._row(t, at, to, x, noise, keep))
        return rows

    def _runge_kutta(self, half: int) -> list[Row]:
        rows = []
        for i, t in enumerate(self._grid[: len(self.prk_timesteps)]):
            place, to = i % 4, t if i % 2 else t - half
            at = self._grid[i - place]
            share = 1 / 3 if place in (1, 2) else 1 / 6
            total = {"h3": 1.0 if place else 0.0, "e": share}
            if place == 3:
                rows.append(self._row(t, at, to, {"h4": 1.0}, total, {}))
                continue
            keep: dict[int, dict[str, float]] = {3: total}
            if place == 0:
                keep |= {i // 4: {"e": 1.0}, 4: {"x": 1.0}}
            rows.append(self._row(t, at, to, {"h4" if place else "x": 1.0}, {"e": 1.0}, keep))
        return rows

    def _row(self, t: int, at: int, to: int, x: Weights, noise: Weights,
             keep: Mapping[int, Weights]) -> Row:  # fmt: skip
        """Liu et al. (2022), eq. 9."""
        table = self._alpha_bars
        a_t, a_s = table[at], table[to] if to >= 0 else float(self.final_alpha_cumprod)
        if self._prediction == "v":
            noise = combined((math.sqrt(a_t), noise), (math.sqrt(1.0 - a_t), x))
        below = a_t * math.sqrt(1.0 - a_s) + math.sqrt(a_t * (1.0 - a_t) * a_s)
        weights = combined((math.sqrt(a_s / a_t), x), ((a_t - a_s) / below, noise))
        outputs = [Output(weights), *(Output(w, target=slot) for slot, w in keep.items())]
        return Row(tuple(outputs), model_time=float(t))

    def step(self, model_output, timestep, sample, return_dict=True):
        index, t = self.counter, int(self._value(timestep))
        if index == 0 and self.num_inference_steps is not None:
            places = self._host_timesteps
            if t not in places:
                return super().step(model_output, timestep, sample, return_dict)
            self._begin(places.index(t))
        if self._rows is None or self._left:
            return super().step(model_output, timestep, sample, return_dict)
        if index == 1 and self._grid[:1] == self._grid[1:2] != [t]:  # begun at the second of both
            kept = self._kept
            self._begin(self._start + 1)
            self._kept = kept
        if index >= len(self._grid) or t != self._grid[index]:
            raise ValueError(f"timestep: got {t}, expected the timesteps one after the other")
        row = self._rows[index]
        result = self._stepped(index, row, sample, model_output, NO_NOISE, return_dict)
        self.counter += 1
        return result
