"""Schedulers whose rows are found by timestep, and the first of them, DDIM."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...levels import Point, estimate_of
from ...plan import Output, Row, stack_rows
from ...solvers.ddim import ddim_row
from .base import (
    NO_NOISE,
    _constant,
    _estimate,
    _Fast,
    _register,
    _schedulers,
    _showing,
    _widened,
    element_of,
)


@dataclass(frozen=True, eq=False)
class _Table:
    """Rows, and one that is NaN, for torch.compile to have as a constant."""

    floats: np.ndarray


class _ByTimestep(_Fast):
    """Rows by timestep: these schedulers keep no count of their steps."""

    _keeps = _counts = _strays = False
    _places: dict[Any, int]
    _number: Callable[[Any], Any] = int  # what a timestep is

    def _begin(self, start: int = 0) -> None:
        super()._begin(start)
        self._places = self._placed()

    def _row_at(self, timestep: Any) -> int | None:
        """The row's index; None for a timestep that is not on the grid."""
        if self._rows is None:
            self._begin()
        return None if self._left else self._found(timestep)

    def _place_of(self, timestep: Any) -> int | None:
        number = timestep if self._times is None else self._value(timestep)
        return self._places.get(self._number(number))

    def _found(self, timestep: Any) -> int | None:
        place = self._place_of(timestep)
        if place == 0:
            self._seeds = None  # another run
        return place

    def _is_hidden(self, timestep: Any) -> bool:
        """Whether the host does not know which timestep it is."""
        hidden = isinstance(timestep, Tensor) and (not timestep.is_cpu or is_compiling())
        return hidden and element_of(self.timesteps, timestep) is None

    def _sought(self, timestep: Any, device: torch.device, absent: int) -> Tensor:
        """The row's index, found on a device; absent: where the timestep is not on the grid."""
        matches = self.timesteps.to(device) == timestep
        return torch.where(matches.any(), matches.int().argmax(), absent)

    def _chosen(
        self, timestep: Any, sample: Tensor, key: tuple = (), other: Any = None, by: int = 0
    ) -> tuple[Any, Row | None, Tensor | None]:
        """(index, row, table): a row, None off the grid; or, for a timestep that the host does not
        know, an index to a table of all rows, whose last is NaN for what is off the grid. key: the
        options of the rows. other: a timestep that must be on the grid too, ``by`` places on."""
        if self._rows is None:
            self._begin()
        if self._left:
            return None, None, None
        rows = self._rows_of(*key)
        hidden = [t for t in (timestep, other) if self._is_hidden(t)]
        if not hidden or rows[0].threshold:
            place = self._found(timestep)
            if place is None or (other is not None and self._place_of(other) != place + by):
                return None, None, None
            return place, rows[place], None
        device = hidden[0].device
        found = self._sought(timestep, device, len(rows))
        if other is not None:
            beside = self._sought(other, device, -len(rows)) == found + by
            found = torch.where(beside, found, len(rows))
        like = next((row for row in rows if row.noises), rows[0])
        table = self._table_on(sample.device, key)
        return found.view(-1).to(sample.device), like, table

    def _table_on(self, device: torch.device, key: tuple) -> Tensor:
        """The table, which goes to a device once."""
        if is_compiling() or device.type == "meta":
            return torch.as_tensor(self._table(key).floats, device=device)
        if (device, key) not in self._tables:
            self._tables[device, key] = torch.as_tensor(self._table(key).floats, device=device)
        return self._tables[device, key]

    @_constant
    def _table(self, key: tuple) -> _Table:
        table = stack_rows(self._rows_of(*key))
        return _Table(torch.cat([table, torch.full_like(table[:1], math.nan)]).numpy())

    @_constant
    def _placed(self) -> dict[Any, int]:
        return {self._number(t): i for i, t in enumerate(self._host_timesteps)}

    def _point(self, alpha_bar: float) -> Point:
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
        return Point(alpha, sigma, 0.0, 1.0, estimate_of(self._prediction, alpha, sigma))

    def _levels(self) -> list[tuple[int, float, float]]:
        """(t, alpha_bar at t, alpha_bar at the next one) on the scheduler's own grid."""
        table, grid = self._alpha_bars, self._host_timesteps
        final = getattr(self, "final_alpha_cumprod", None)
        last = 1.0 if final is None else float(final)
        levels = [table[t] for t in grid]
        following = [*levels[1:], last]
        if (
            self._strays and self._compat
        ):  # t - T // N, which leaves the grid where N does not divide T
            ratio = self.config.num_train_timesteps // self.num_inference_steps
            following = [table[t - ratio] if t >= ratio else last for t in grid]
        return list(zip(grid, levels, following, strict=True))


class _Counted(_ByTimestep):
    """Noise by a count of the calls, where a timestep does not tell them apart."""

    _calls = 0

    def _begin(self, start: int = 0) -> None:
        super()._begin(start)
        self._calls = 0

    def _found(self, timestep: Any) -> int | None:
        place = super()._found(timestep)
        if place == 0:
            self._calls = 0
        return place

    def _stepped(
        self, index: int | Tensor, row: Row, sample: Tensor, output: Tensor, noise: tuple,
        return_dict: bool, logvar: Tensor | None = None, table: Tensor | None = None,
    ) -> Any:  # fmt: skip
        if isinstance(index, Tensor) and table is not None:
            table = table.index_select(0, index)
        self._calls += 1
        return super()._stepped(self._calls - 1, row, sample, output, noise, return_dict, logvar,
                                table)  # fmt: skip


class _Ddim(_ByTimestep):
    _strays = True  # off the grid, in diffusers
    _usual = (0.0, False)

    def _build(self, eta: float, again: bool) -> list[Row]:
        rows = []
        for t, a_t, a_s in self._levels():
            noisy = eta if a_t < a_s else 0.0
            row = ddim_row(a_t, a_s, self._prediction, self._clips, noisy, again, float(t))
            rows.append(_showing(row, _estimate(row, self._point(a_t))))
        return rows

    def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False,
             generator=None, variance_noise=None, return_dict=True):  # fmt: skip
        if variance_noise is None:
            options = (eta, use_clipped_model_output)
            done = self._under_way(timestep, sample, model_output, return_dict,
                                   generator if eta > 0 else False, options)  # fmt: skip
            if done is not None:
                return done
        row = None
        if self.num_inference_steps is not None and (variance_noise is None or generator is None):
            key = (float(eta), bool(use_clipped_model_output))
            index, row, table = self._chosen(timestep, sample, key)
        if row is None:
            return super().step(model_output, timestep, sample, eta, use_clipped_model_output,
                                generator, variance_noise, return_dict)  # fmt: skip
        noise = self._normals(row, model_output, generator, variance_noise, eta > 0)
        return self._stepped(index, row, sample, model_output, noise, return_dict, table=table)


@_register
class DDIMScheduler(_Ddim, diffusers.DDIMScheduler):
    _output = _schedulers.scheduling_ddim.DDIMSchedulerOutput


@_register
class DDIMParallelScheduler(_Ddim, diffusers.DDIMParallelScheduler):
    _output = _schedulers.scheduling_ddim_parallel.DDIMParallelSchedulerOutput


@_register
class DDIMInverseScheduler(_ByTimestep, diffusers.DDIMInverseScheduler):
    _output = _schedulers.scheduling_ddim_inverse.DDIMSchedulerOutput

    def _build(self) -> list[Row]:
        rows, table = [], self._alpha_bars
        ratio = self.config.num_train_timesteps // (self.num_inference_steps or 1)
        for t in self._host_timesteps:
            before = min(t - ratio, self.config.num_train_timesteps - 1)
            a_t = table[before] if before >= 0 else float(self.initial_alpha_cumprod)
            row = ddim_row(a_t, table[t], self._prediction, self._clips)
            rows.append(_showing(row, _estimate(row, self._point(a_t))))
        return rows

    def step(self, model_output, timestep, sample, return_dict=True):
        index = None if self.num_inference_steps is None else self._row_at(timestep)
        if index is None:
            return super().step(model_output, timestep, sample, return_dict)
        return self._stepped(index, self._rows[index], sample, model_output, NO_NOISE, return_dict)


@_register
class ScoreSdeVeScheduler(_ByTimestep, diffusers.ScoreSdeVeScheduler):
    """Song et al. (2021), eq. 47, in ``step_pred``; ``step_correct``, whose step depends on norms
    over the batch, is diffusers' own."""

    _output = _schedulers.scheduling_sde_ve.SdeVeOutput
    _number = float
    discrete_sigmas: Tensor

    @functools.wraps(diffusers.ScoreSdeVeScheduler.set_sigmas)
    def set_sigmas(self, *args, **kwargs):
        super().set_sigmas(*args, **kwargs)
        self._forget()
        new = {"sigmas": self.sigmas, "discrete_sigmas": self.discrete_sigmas}
        self._fresh = self._fresh | new

    def _build(self) -> list[Row]:
        times, sigmas = torch.tensor(self._host_timesteps), self.discrete_sigmas.tolist()
        places = (times * (len(times) - 1)).long().tolist()
        if max(places) >= len(sigmas):
            raise ValueError("more timesteps than sigmas")
        rows = []
        for place in places:
            end = sigmas[place - 1] if place else 0.0
            variance = sigmas[place] ** 2 - end**2
            shown = {"x": 1.0, "e": variance}
            rows.append(_showing(Row((Output(shown, (math.sqrt(variance),)),)), shown))
        return rows

    def step_pred(self, model_output, timestep, sample, generator=None, return_dict=True):
        wide, row = _widened(sample, model_output), None
        done = self._under_way(timestep, wide, model_output, return_dict, generator)
        if done is not None:
            return done
        if not isinstance(timestep, Tensor) or timestep.numel() == 1:
            index, row, table = self._chosen(timestep, sample)
        if row is None:
            return super().step_pred(model_output, timestep, sample, generator, return_dict)
        noise = self._normals(row, sample, generator, None, True)
        return self._stepped(index, row, wide, model_output, noise, return_dict, table=table)
