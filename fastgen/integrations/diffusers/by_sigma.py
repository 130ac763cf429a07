"""Schedulers of one step on sigmas, and what all those that count their steps share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
from torch import Tensor

from ... import solvers
from ...levels import NoiseLevels, Point, estimate_of
from ...plan import Output, Plan, Row
from ...solvers.euler import down_and_up
from .base import (
    _WANTS_FLOAT,
    _WANTS_SCALED,
    NO_NOISE,
    SHOWN,
    _estimate,
    _Fast,
    _is_whole,
    _register,
    _schedulers,
    _showing,
    element_of,
)


class _BySigma(_Fast):
    """Rows by diffusers' own count of steps."""

    _fresh: dict[str, Any] = {}  # noqa: RUF012

    def _next(self, timestep: Any) -> int:
        """The index of the step that is taken now, which diffusers counts; -1 where the step is its
        own."""
        place = self._step_index
        if place is None or self._rows is None:
            if not self._fresh:  # no timesteps yet: for diffusers to serve or to refuse
                return -1
            if place is None:
                self._find(timestep)
            place = self._step_index
            assert place is not None
            self._begin(place)
        if self._left:
            return -1
        index = place - self._start
        if index >= len(self._rows):
            raise IndexError("all steps were taken; run 'set_timesteps' again")
        return index

    def _find(self, timestep: Any) -> None:
        """The index of a run's first step, as diffusers finds it, but without a wait for a device
        that has the timesteps."""
        known = self._times is not None and element_of(self.timesteps, timestep) is not None
        if not known or getattr(self, "begin_index", None) is not None:
            self._init_step_index(timestep)
            return
        value = self._value(timestep)
        places = [i for i, time in enumerate(self._host_timesteps) if time == value]
        self._step_index = places[min(1, len(places) - 1)]

    @property
    def _run(self) -> list[float]:
        """The sigmas of the run, from where it began."""
        return self._host_sigmas[self._start :]

    def _exploding(self, sigmas: Sequence[float]) -> NoiseLevels:
        """Levels of x = x_0 + sigma eps, whose network sees x / sqrt(sigma^2 + 1)."""

        def at(sigma: float) -> Point:
            return Point(1.0, sigma, sigma, 1.0, self._estimate_at(sigma))

        return NoiseLevels(tuple(map(at, sigmas[:-1])), Point(1.0, sigmas[-1]), at)

    def _estimate_at(self, sigma: float) -> tuple[float, float]:
        """(a_x, a_e) of the estimate of x_0, on the scale of x = x_0 + sigma eps."""
        return estimate_of(self._prediction, 1.0, sigma)

    def _preserving(self, sigmas: Sequence[float]) -> NoiseLevels:
        """Levels of x = alpha (x_0 + sigma eps), or of straight paths where those are used."""
        flow = getattr(self.config, "use_flow_sigmas", False)
        ratios = [s / (1.0 - s) if flow and s < 1.0 else math.inf if flow else s for s in sigmas]

        def at(ratio: float) -> Point:
            if flow:
                sigma = ratio / (1.0 + ratio) if ratio < math.inf else 1.0
                alpha = 1.0 - sigma
            else:
                alpha = 1.0 / math.sqrt(1.0 + ratio * ratio)
                sigma = alpha * ratio
            return Point(alpha, sigma, ratio if ratio < math.inf else 0.0, 1.0,
                         estimate_of(self._prediction, alpha, sigma))  # fmt: skip

        end = at(ratios[-1]) if ratios[-1] > 0.0 else Point(1.0, 0.0)
        return self._ladder(tuple(map(at, ratios[:-1])), end, at)

    _ladder = NoiseLevels

    @property
    def _mixed(self) -> bool:
        """Whether what is predicted belongs to other paths than the sigmas, where diffusers has
        formulas of its own."""
        straight = bool(getattr(self.config, "use_flow_sigmas", False))
        return (self._prediction == "flow") != straight and self._prediction in ("flow", "v")

    @property
    def _stays(self) -> bool:
        """Whether the last step goes nowhere: the run ends on its last level, as with
        final_sigmas_type="sigma_min" and with sigmas of another spacing."""
        sigmas = self._run
        return sigmas[-1] > 0.0 and math.isclose(sigmas[-1], sigmas[-2], rel_tol=1e-6)

    def _to_the_end(self, steps: Callable[[list[float]], Sequence[Row]]) -> list[Row]:
        """The rows of steps along sigmas, and of a last one that goes nowhere."""
        sigmas = self._run
        if not self._stays:
            return list(steps(sigmas))
        rows = list(steps(sigmas[:-1])) if len(sigmas) > 2 else []
        return [*rows, Row((Output({"x": 1.0}),), model_time=sigmas[-1])]

    def _orders(self) -> list[int]:
        """Of each step of a multistep method: rising, and falling again at the end of few steps."""
        config = self.config
        orders = [min(config.solver_order, i + 1) for i in range(len(self.timesteps) - self._start)]
        if config.lower_order_final and len(self.timesteps) < 15:
            orders[-2:] = [min(order, 2) for order in orders[-2:]]
            orders[-1] = 1
        return orders

    def _eulers(self, solver: Callable[[NoiseLevels], Plan]) -> list[Row]:
        """A solver of one call a step."""

        def steps(sigmas: list[float]) -> list[Row]:
            levels = self._exploding(sigmas)
            return self._shown(solver(levels), levels.points)

        rows = self._to_the_end(steps)
        if self._stays:
            of_x, of_e = self._estimate_at(self._run[-1])
            rows[-1] = _showing(rows[-1], {"x": of_x, "e": of_e})
        return rows

    def _shown(self, plan: Plan, points: Sequence[Point]) -> list[Row]:
        return [_showing(row, _estimate(row, at))
                for row, at in zip(plan.rows, points, strict=True)]  # fmt: skip


class _Plain(_BySigma):
    """The step of those that draw nothing and take no option."""

    def step(self, model_output, timestep, sample, return_dict=True):
        done = self._under_way(timestep, sample, model_output, return_dict)
        if done is not None:
            return done
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, return_dict)
        return self._stepped(index, self._rows[index], sample, model_output, NO_NOISE, return_dict)


class _Drawing(_BySigma):
    """The step of those that draw and take no option."""

    _draws = True

    def _noise_at(self, index: int, row: Row, output: Tensor, sample: Tensor, generator: Any):
        return self._normals(row, output, generator, None, True)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        done = self._under_way(timestep, sample, model_output, return_dict,
                               generator if self._draws else False)  # fmt: skip
        if done is not None:
            return done
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, return_dict)
        row = self._rows[index]
        noise = self._noise_at(index, row, model_output, sample, generator)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


class _Strict(_BySigma):
    """Those that refuse an index as timestep, and warn where the sample was not scaled."""

    is_scale_input_called: bool
    _upcasts, _casts, _keeps = True, "output", False
    _strict = _WANTS_FLOAT + _WANTS_SCALED

    def _next(self, timestep: Any) -> int:
        if _is_whole(timestep) or not self.is_scale_input_called:
            return -1
        return super()._next(timestep)


class _Churned(_Strict):
    """Euler's method, to whose sample noise may be added first: Karras et al. (2022), algorithm 2,
    but that the network has seen the sample without it."""

    _usual = (0.0, 0.0, math.inf, 1.0)
    _strays = False  # whether diffusers takes the estimate of v at the level before the noise

    def _build(self, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> list[Row]:
        gamma = self._gamma(s_churn)
        if gamma == 0.0:
            return self._eulers(solvers.euler)
        return [
            self._lifted(sigma, end, gamma, s_noise) if s_tmin <= sigma <= s_tmax else row
            for row, (sigma, end) in zip(
                self._rows_of(*self._usual), itertools.pairwise(self._run), strict=True
            )
        ]

    def _gamma(self, s_churn: float) -> float:
        return max(0.0, min(s_churn / (len(self.sigmas) - 1), math.sqrt(2.0) - 1.0))

    def _lifted(self, sigma: float, end: float, gamma: float, s_noise: float) -> Row:
        """The step from sigma by way of the higher level (1 + gamma) sigma."""
        higher = sigma * (1.0 + gamma)
        strays = self._strays and self._compat and self._prediction == "v"
        added = s_noise * math.sqrt(higher**2 - sigma**2)
        of_x, of_e = self._estimate_at(sigma if strays else higher)
        rest = end / higher
        kept = rest + (1.0 - rest) * of_x
        return Row((
            Output({"x": kept, "e": (1.0 - rest) * of_e}, (kept * added,)),
            Output({"x": of_x, "e": of_e}, (of_x * added,), SHOWN),
        ), model_time=higher)  # fmt: skip

    def _churning(
        self, index: int, output: Tensor, sample: Tensor, churn: tuple, generator: Any,
        return_dict: bool,
    ) -> Any:  # fmt: skip
        """What ``step`` returns; churn: s_churn, s_tmin, s_tmax and s_noise."""
        row, noise = self._rows[index], NO_NOISE
        if churn[0]:
            plain, row = row, self._rows_of(*churn)[index]
            lifts = row.model_time > plain.model_time
            noise = self._normals(row, output, generator, None, lifts)
        return self._stepped(index, row, sample, output, noise, return_dict)

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
             s_noise=1.0, generator=None, return_dict=True):  # fmt: skip
        if s_churn == 0.0:
            done = self._under_way(timestep, sample, model_output, return_dict)
            if done is not None:
                return done
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                                generator, return_dict)  # fmt: skip
        return self._churning(index, model_output, sample, (s_churn, s_tmin, s_tmax, s_noise),
                              generator, return_dict)  # fmt: skip


@_register
class EulerDiscreteScheduler(_Churned, diffusers.EulerDiscreteScheduler):
    _output = _schedulers.scheduling_euler_discrete.EulerDiscreteSchedulerOutput
    _strays = True


@_register
class EulerAncestralDiscreteScheduler(_Strict, _Drawing, diffusers.EulerAncestralDiscreteScheduler):
    _output = _schedulers.scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput

    def _leaves(self) -> bool:
        return self._prediction == "sample"

    def _build(self) -> list[Row]:
        return self._eulers(solvers.euler_ancestral)


class _Edm(_BySigma):
    """With the preconditioning of Karras et al. (2022), table 1; its v is the opposite."""

    def _estimate_at(self, sigma: float) -> tuple[float, float]:
        of_x, of_e = estimate_of("edm", 1.0, sigma, self.config.sigma_data)
        return of_x, of_e if self._prediction == "epsilon" else -of_e


@_register
class EDMEulerScheduler(_Edm, _Churned, diffusers.EDMEulerScheduler):
    _output = _schedulers.scheduling_edm_euler.EDMEulerSchedulerOutput

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
             s_noise=1.0, generator=None, return_dict=True, pred_original_sample=None):  # fmt: skip
        if pred_original_sample is None:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                                generator, return_dict)  # fmt: skip
        return super(_Churned, self).step(model_output, timestep, sample, s_churn, s_tmin, s_tmax,
                                          s_noise, generator, return_dict,
                                          pred_original_sample)  # fmt: skip


@_register
class HeunDiscreteScheduler(_Plain, diffusers.HeunDiscreteScheduler):
    _output = _schedulers.scheduling_heun_discrete.HeunDiscreteSchedulerOutput

    def _build(self) -> list[Row]:
        sigmas = self._run
        levels = self._exploding([sigmas[0], *sigmas[1:-1:2], sigmas[-1]])
        plan = solvers.heun(levels, clip=self._clips)
        points = [p for i, p in enumerate(levels.points) for _ in range(2 if i else 1)]
        return self._shown(plan, points)


class _Kdpm2(_BySigma):
    """Levels twice in diffusers' list, since each step calls the network twice. ``sample``, once a
    first call is done, tells its ``scale_model_input`` which of the two it is."""

    _eta = 0.0

    def _step_of(self, row: Row) -> None:
        return None

    def _leaves(self) -> bool:
        return self._prediction == "sample"

    def _stepped(self, index: Any, row: Row, sample: Tensor, *others: Any, **named: Any) -> Any:
        result = super()._stepped(index, row, sample, *others, **named)
        self.sample = sample if index % 2 == 0 else None
        return result

    def _build(self) -> list[Row]:
        sigmas = self._run
        levels = self._exploding([sigmas[0], *[s for s in sigmas[1::2] if s > 0.0], 0.0])
        points = []
        for at, end in levels.pairs:
            down, _ = down_and_up(at, end, self._eta)
            points.append(at)
            if down.sigma > 0.0:
                points.append(levels.at(math.sqrt(at.ratio * down.ratio)))
        return self._shown(solvers.dpm2(levels, eta=self._eta), points)


@_register
class KDPM2DiscreteScheduler(_Kdpm2, _Plain, diffusers.KDPM2DiscreteScheduler):
    _output = _schedulers.scheduling_k_dpm_2_discrete.KDPM2DiscreteSchedulerOutput


@_register
class KDPM2AncestralDiscreteScheduler(_Kdpm2, _Drawing, diffusers.KDPM2AncestralDiscreteScheduler):
    _output = (
        _schedulers.scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput
    )
    _eta = 1.0

    def _noise_at(self, index, row, output, sample, generator):
        return self._normals(row, output, generator, None, index % 2 == 1)
