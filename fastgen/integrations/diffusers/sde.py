"""Schedulers whose noise is of a Brownian tree, torchsde's, without which diffusers has none."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from torch import Tensor

from ... import solvers
from ...plan import Row
from ...solvers.dpm import _multistep
from .base import _register, _schedulers
from .by_sigma import _BySigma, _Drawing, _Edm


@_register
class CosineDPMSolverMultistepScheduler(
    _Edm, _Drawing, diffusers.CosineDPMSolverMultistepScheduler
):
    noise_sampler: Any
    _draws = False  # a tree does

    def _leaves(self) -> bool:
        orders = self.config.solver_order in (1, 2)
        return super()._leaves() or self._prediction == "sample" or not orders

    def _build(self) -> list[Row]:
        config, orders = self.config, self._orders()
        if config.euler_at_final or config.final_sigmas_type == "zero":
            orders[-1] = 1
        return self._to_the_end(lambda sigmas: _multistep(
            self._exploding(sigmas), None, "dpm", order=config.solver_order,
            kind=config.solver_type, eta=1.0, orders=orders,
        ).rows)  # fmt: skip

    def _noise_at(self, index, row, output, sample, generator):
        given = None
        if self._noise == "torch":
            if self.noise_sampler is None:
                several = isinstance(generator, list)
                seed = [g.initial_seed() for g in generator] if several else None
                if generator is not None and not several:
                    seed = generator.initial_seed()
                both = torch.promote_types(sample.dtype, output.dtype)
                self.noise_sampler = BrownianTreeNoiseSampler(
                    output.to(both), self.config.sigma_min, self.config.sigma_max, seed
                )
            if row.noises:
                at, to = self.sigmas[index + self._start :][:2]
                given = self.noise_sampler(at, to).to(output.device)
        return self._normals(row, output, generator, given, False)


@_register
class DPMSolverSDEScheduler(_BySigma, diffusers.DPMSolverSDEScheduler):
    """Two calls a step. ``sample`` and ``mid_point_sigma``, once a first call is done, tell its
    ``scale_model_input`` which of the two it is. Without the tree the noise of a step holds that of
    its first part, as the tree's does."""

    noise_sampler: Any
    _usual = (1.0,)
    _output = _schedulers.scheduling_dpmsolver_sde.DPMSolverSDESchedulerOutput

    def _leaves(self) -> bool:
        return self._prediction == "sample"

    def _build(self, s_noise: float) -> list[Row]:
        sigmas = self._run
        if self._start % 2:
            raise ValueError("begun inside a step")
        levels = self._exploding([sigmas[0], *sigmas[1:-1:2], sigmas[-1]])
        plan = solvers.dpmpp_sde(levels, s_noise=s_noise, correlated=self._noise != "torch")
        return self._shown(plan, [levels.at(row.model_time) for row in plan.rows])

    def step(self, model_output, timestep, sample, return_dict=True, s_noise=1.0):
        index = self._next(timestep) if s_noise >= 0.0 else -1
        if index < 0:
            return super().step(model_output, timestep, sample, return_dict, s_noise)
        row, second = self._rows_of(float(s_noise))[index], index % 2 == 1
        start, end = self.sigmas[index + self._start - second :][:2]
        start, end = start.log().neg(), end.log().neg()
        if not second:  # to the middle, by diffusers' float32: a path is read at the very time
            end = start + (end - start) * 0.5
        given = self._drawn(sample, start.neg().exp(), end.neg().exp(), row)
        if self._noise != "torch" and self._seeds is None and self.noise_sampler_seed is not None:
            self._seeds = (self.noise_sampler_seed, 0)
        noise = self._normals(row, model_output, None, given, False)
        result = self._stepped(index, row, sample, model_output, noise, return_dict)
        if index + 1 < len(self._rows):
            self.sample = None if second else sample
            self.mid_point_sigma = None if second else end.neg().exp()
        return result

    def _drawn(self, sample: Tensor, start: Tensor, end: Tensor, row: Row) -> Tensor | None:
        """The path's way from one level to another, over its deviation."""
        if self._noise != "torch":
            return None
        if self.noise_sampler is None:
            low, high = self.sigmas[self.sigmas > 0].min(), self.sigmas.max()
            self.noise_sampler = BrownianTreeNoiseSampler(
                sample, low.item(), high.item(), self.noise_sampler_seed
            )
        return self.noise_sampler(start, end) if row.noises else None
