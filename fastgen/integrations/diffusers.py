"""diffusers' schedulers by their own names, a kernel a step.

    from fastgen.integrations import diffusers as fast
    pipe.scheduler = fast.convert(pipe.scheduler)             # or fast.convert(pipe)
    pipe.scheduler = fast.DDIMScheduler.from_config(pipe.scheduler.config)

Each class is a subclass of diffusers' own: configuration, timesteps, sigmas, ``add_noise``, loading
and saving are diffusers', and a pipeline saved with one records diffusers' class. The arithmetic of
``step`` alone is replaced, by one row of a plan: float64 on the host from diffusers' float32
levels, then one kernel. What a row cannot hold (dynamic thresholding, timesteps off the grid, churn
that is asked for, per-token timesteps) is left to diffusers' own ``step``.

noise: "torch" (the default) draws as diffusers does, from the generator or the global one, so that
a seed gives the image that it gave before; "fastgen" makes the noise in the kernel, a function of
(seed, sample, step, element): the seeds are drawn from the generators at a run's first step, and
with a list of generators an image's noise does not depend on its batch.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import diffusers
    from diffusers.utils.torch_utils import randn_tensor
except ImportError:
    raise ImportError("fastgen.integrations.diffusers needs diffusers (0.38 to 0.42)") from None

from .. import backends, solvers
from ..levels import NoiseLevels, Point, estimate_of
from ..ops import kernel
from ..ops.dispatch import is_eager, wants_gradient
from ..plan import Output, Plan, Row
from ..solvers.ddim import ddim_row
from ..solvers.ddpm import ddpm_row
from ..solvers.dpm import _multistep
from ..solvers.euler import down_and_up
from ..solvers.multistep import ADAMS_BASHFORTH, _adams, log_level
from ..solvers.rows import combined

_schedulers = diffusers.schedulers
logger = logging.getLogger("fastgen")
NOISES = ("torch", "fastgen")
NO_NOISE: tuple = ((), None, 0)  # normals, seed, sample ids
SHOWN = 6  # the slot of what is shown beside the sample: the estimate of x_0
_KINDS = {"epsilon": "epsilon", "sample": "sample", "original_sample": "sample",
          "v_prediction": "v", "flow_prediction": "flow"}  # fmt: skip
_CLASSES: dict[str, Any] = {}


# ---- one step ------------------------------------------------------------------------------------


def _is_whole(timestep: Any) -> bool:
    """An index where diffusers wants one of the timesteps themselves."""
    if isinstance(timestep, Tensor):
        return timestep.dtype in (torch.int32, torch.int64)
    return isinstance(timestep, int)


def _check(name: str, given: Tensor, sample: Tensor) -> None:
    if given.shape != sample.shape:
        raise ValueError(
            f"{name}: got shape {tuple(given.shape)}, expected the sample's {tuple(sample.shape)}"
        )


def _showing(row: Row, shown: dict[str, float]) -> Row:
    """The row, with the estimate of x_0 (or what is shown in its place) as its last output."""
    return Row(
        (*row.outputs, Output(shown, target=SHOWN)), row.denoised, row.clip, row.logvar,
        row.model_time, row.input_scale,
    )  # fmt: skip


def _estimate(row: Row, at: Point) -> dict[str, float]:
    if row.denoised != (0.0, 0.0):
        return {"denoised": 1.0}
    return {"x": at.estimate[0], "e": at.estimate[1]}


class _Fast:
    """What all classes share; ``_build`` gives the rows of a run, one a call of ``step``."""

    _noise, _compat = "torch", ""
    _rows: Any = None  # of the run, a list once its first step is taken
    _start = 0  # the step where the run began
    _kept: list[Tensor | None]
    _seeds: tuple[kernel.Seed, int | Tensor] | None = None
    config: Any  # diffusers' own
    timesteps: Tensor
    sigmas: Tensor
    alphas_cumprod: Tensor
    num_inference_steps: int | None
    step_index: int | None
    _step_index: int | None
    _init_step_index: Callable[[Any], None]
    step: Callable[..., Any]
    _build: Callable[[], list[Row]]  # the rows of a run from _start on, a call of step each
    _upcasts = False  # whether diffusers computes in float32 and shows the estimate in it

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, *,
                    noise: str = "torch", compat: str = "", **kwargs: Any) -> Any:  # fmt: skip
        """As diffusers'; noise: "torch" or "fastgen"; compat: "diffusers" for its numbers where
        they are a defect's."""
        if noise not in NOISES:
            raise ValueError(f"noise: got {noise!r}, expected 'torch' or 'fastgen'")
        if compat not in ("", "diffusers"):
            raise ValueError(f"compat: got {compat!r}, expected 'diffusers' or nothing")
        inherited: Any = super()
        made = inherited.from_config(config, return_unused_kwargs, **kwargs)
        new = made[0] if return_unused_kwargs else made
        new._noise, new._compat = noise, compat
        return made

    def __reduce__(self) -> Any:
        return _revived, (type(self).__name__,), self.__dict__

    def _begin(self, start: int = 0) -> None:
        """Rows of a run from a step on: the first ones of a multistep method read nothing yet."""
        if self._rows is None or start != self._start:
            self._start, self._left = start, self._leaves()
            self._rows = [] if self._left else self._built()
        self._kept, self._seeds = [None] * 7, None

    def _built(self) -> list[Row]:
        """The run's rows; levels that are no ladder down to data are left to diffusers."""
        sigmas = getattr(self, "sigmas", None)
        if sigmas is not None and bool(sigmas.isnan().any()):
            raise ValueError("sigmas: got NaN, expected finite numbers")
        try:
            rows = self._build()
            if self._counts and len(rows) != len(self.timesteps) - self._start:
                raise ValueError("timesteps that repeat")
            return rows
        except ValueError as error:
            logger.info("%s: step is diffusers' own: %s", type(self).__name__, error)
            self._left = True
            return []

    def _leaves(self) -> bool:
        """Whether this configuration is diffusers' own to step."""
        return bool(getattr(self.config, "thresholding", False))

    @property
    def _clips(self) -> float | None:
        config = self.config
        clipped = getattr(config, "clip_sample", False)
        return float(getattr(config, "clip_sample_range", 1.0)) if clipped else None

    @property
    def _prediction(self) -> str:
        return _KINDS[self.config.prediction_type]

    def _normals(
        self, row: Row, output: Tensor, generator: Any, given: Tensor | None, draws: bool,
        dtype: torch.dtype | None = None,
    ) -> tuple[tuple[Tensor, ...], kernel.Seed, int | Tensor]:  # fmt: skip
        """(normals, seed, sample ids) of a step; draws: whether diffusers would."""
        if given is not None:
            try:
                given = given.expand(output.shape)
            except RuntimeError:
                _check("variance_noise", given, output)
            return ((given,) if row.noises else ()), None, 0
        if self._noise == "fastgen":
            if not row.noises:
                return (), None, 0
            if self._seeds is None:
                self._seeds = _seeds(generator, output)
            return (), *self._seeds
        if not draws:
            return (), None, 0
        z = randn_tensor(output.shape, generator=generator, device=output.device,
                         dtype=dtype or output.dtype)  # fmt: skip
        return ((z,) if row.noises else ()), None, 0

    def _stepped(
        self, index: int, row: Row, sample: Tensor, output: Tensor, noise: tuple,
        return_dict: bool, logvar: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """What ``step`` returns: a row's results, the sample and what is shown beside it, straight
        from the CPU's kernel or by way of every check."""
        normals, seed, ids = noise
        history = tuple(self._kept[:4]) if self._keeps else ()
        kind = sample.dtype
        if kind is not output.dtype:
            kind = torch.promote_types(kind, output.dtype)
        casts = self._casts
        dtypes = [kind if not casts else output.dtype if casts == "output" else sample.dtype]
        others = row.outputs[1:]
        if others:
            wide = torch.float64 if kind is torch.float64 else torch.float32
            for other in others:
                dtypes.append(wide if self._upcasts or other.target != SHOWN else kind)
        results: Sequence[Tensor] = ()
        if logvar is None and sample.is_cpu and is_eager() and backends._native is not None:
            if not wants_gradient(sample, output, *normals, *history):
                own = sample.dtype
                outs = tuple([
                    torch.empty_like(sample) if d is own else torch.empty_like(sample, dtype=d)
                    for d in dtypes
                ])  # fmt: skip
                if backends._native.loop_step(
                    sample, output, None, normals, history, outs, row.packed, 1.0, seed, ids,
                    index + self._start, kernel.STEP_STREAMS, False, torch.get_num_threads(),
                ):  # fmt: skip
                    results = outs
        if not results:
            _check("model_output", output, sample)
            for tensor in normals:
                _check("noise", tensor, sample)
            if any(h is not None and h.shape != sample.shape for h in history):
                raise ValueError(f"sample: got shape {tuple(sample.shape)}, another than the run's")
            results = kernel.run(
                sample.shape, row, backend=kernel.choose(None, sample, output, results=dtypes),
                dtypes=dtypes, device=sample.device, like=sample, x=sample, cond=output,
                logvar=logvar, history=history, noise=normals, seed=seed, sample_ids=ids,
                step=index + self._start,
            )  # fmt: skip
        if self._keeps:
            for other, made in zip(others, results[1:], strict=True):
                if other.target != SHOWN:
                    self._kept[other.target] = made  # type: ignore[index]
        if self._counts:
            self._step_index += 1  # type: ignore[operator]
        shows = bool(others) and others[-1].target == SHOWN
        pair = (results[0], results[-1]) if shows else (results[0],)
        return self._output(*pair) if return_dict else pair

    _output: Any = _schedulers.scheduling_utils.SchedulerOutput
    _casts = ""  # "output" or "sample": whose dtype diffusers gives its result, else both promoted
    _keeps = True  # whether rows read former results
    _counts = True  # whether diffusers counts the steps


def _seeds(generator: Any, output: Tensor) -> tuple[kernel.Seed, int | Tensor]:
    """Seeds for a run: one for each generator, drawn where it lives."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    drawn = [
        torch.randint(2**63 - 1, (1,), generator=g, device="cpu" if g is None else g.device)
        for g in generators
    ]
    if len(drawn) == 1 and drawn[0].is_cpu:
        return int(drawn[0]), 0
    seeds = torch.cat(drawn).to(output.device)
    if len(drawn) == 1:
        return (seeds, 0), 0
    if len(drawn) != output.shape[0]:
        raise ValueError(f"generator: got {len(drawn)}, expected one for each of "
                         f"{output.shape[0]} samples")  # fmt: skip
    return (seeds, 1), torch.zeros_like(seeds)


def _revived(name: str) -> Any:
    return _CLASSES[name].__new__(_CLASSES[name])


def _register(cls: Any) -> Any:
    """The class under diffusers' name, with its signatures."""
    base: Any = cls.__bases__[-1]

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        base.set_timesteps(self, *args, **kwargs)
        self._rows = None

    cls.set_timesteps = set_timesteps
    step = cls.step  # a function of this class's own, which a family of classes may share
    made = types.FunctionType(step.__code__, step.__globals__, step.__name__, step.__defaults__,
                              step.__closure__)  # fmt: skip
    cls.step = functools.wraps(base.step)(made)
    cls.__doc__ = f"diffusers' {base.__name__}, with a kernel a step."
    cls.__name__ = cls.__qualname__ = base.__name__
    cls.__module__ = base.__module__  # what a saved pipeline records
    _CLASSES[cls.__name__] = cls
    return cls


# ---- schedulers of timesteps ---------------------------------------------------------------------


class _ByTimestep(_Fast):
    """Rows by timestep: these schedulers keep no count of their steps."""

    _keeps = _counts = _strays = False
    _places: dict[int, int]

    def _row_at(self, timestep: Any) -> int | None:
        """The row's index; None for a timestep that is not on the grid."""
        if self._rows is None:
            self._begin()
            self._places = {int(t): i for i, t in enumerate(self.timesteps.tolist())}
        index = None if self._left else self._places.get(int(timestep))
        if index == 0:
            self._seeds = None  # another run
        return index

    def _point(self, alpha_bar: float) -> Point:
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
        return Point(alpha, sigma, 0.0, 1.0, estimate_of(self._prediction, alpha, sigma))

    def _levels(self) -> list[tuple[int, float, float]]:
        """(t, alpha_bar at t, alpha_bar at the next one) on the scheduler's own grid."""
        table, grid = self.alphas_cumprod, self.timesteps.tolist()
        final = getattr(self, "final_alpha_cumprod", None)
        last = 1.0 if final is None else float(final)
        levels = [float(table[t]) for t in grid]
        following = [*levels[1:], last]
        if (
            self._strays and self._compat
        ):  # t - T // N, which leaves the grid where N does not divide T
            ratio = self.config.num_train_timesteps // self.num_inference_steps
            following = [float(table[t - ratio]) if t >= ratio else last for t in grid]
        return list(zip(grid, levels, following, strict=True))


class _Ddim(_ByTimestep):
    _strays = True  # off the grid, in diffusers

    def _build(self) -> list[Row]:
        self._variants: dict[tuple, list[Row]] = {}
        return self._variant(0.0, False)

    def _variant(self, eta: float, again: bool) -> list[Row]:
        rows = self._variants.get((eta, again))
        if rows is None:
            rows = []
            for t, a_t, a_s in self._levels():
                noisy = eta if a_t < a_s else 0.0
                row = ddim_row(a_t, a_s, self._prediction, self._clips, noisy, again, float(t))
                rows.append(_showing(row, _estimate(row, self._point(a_t))))
            self._variants[eta, again] = rows
        return rows

    def step(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False,
             generator=None, variance_noise=None, return_dict=True):  # fmt: skip
        index = None if self.num_inference_steps is None else self._row_at(timestep)
        if index is None or (variance_noise is not None and generator is not None):
            return super().step(model_output, timestep, sample, eta, use_clipped_model_output,
                                generator, variance_noise, return_dict)  # fmt: skip
        row = self._variant(float(eta), bool(use_clipped_model_output))[index]
        noise = self._normals(row, model_output, generator, variance_noise, eta > 0)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


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
        rows, table = [], self.alphas_cumprod
        ratio = self.config.num_train_timesteps // (self.num_inference_steps or 1)
        for t in self.timesteps.tolist():
            before = min(t - ratio, self.config.num_train_timesteps - 1)
            a_t = float(table[before] if before >= 0 else self.initial_alpha_cumprod)
            row = ddim_row(a_t, float(table[t]), self._prediction, self._clips)
            rows.append(_showing(row, _estimate(row, self._point(a_t))))
        return rows

    def step(self, model_output, timestep, sample, return_dict=True):
        index = None if self.num_inference_steps is None else self._row_at(timestep)
        if index is None:
            return super().step(model_output, timestep, sample, return_dict)
        return self._stepped(index, self._rows[index], sample, model_output, NO_NOISE, return_dict)


class _Ddpm(_ByTimestep):
    def _leaves(self) -> bool:
        return super()._leaves() or self.config.variance_type == "learned"

    def _build(self) -> list[Row]:
        rows, kind = [], self.config.variance_type
        self._learned = kind == "learned_range"
        name = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large",
                "learned_range": "learned"}.get(kind, kind)  # fmt: skip
        for t, a_t, a_s in self._levels():
            row = ddpm_row(a_t, a_s, self._prediction, self._clips, name, float(t))
            if kind == "learned_range" and row.noises:
                beta = 1.0 - a_t / a_s
                low = math.log(max(beta * (1.0 - a_s) / (1.0 - a_t), 1e-20))
                high = math.log(beta)
                row = Row(row.outputs, row.denoised, row.clip, (0.5 * (high - low),
                          0.5 * (high + low)), row.model_time)  # fmt: skip
            rows.append(_showing(row, _estimate(row, self._point(a_t))))
        return rows

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        index = self._row_at(timestep)
        if index is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        row, logvar = self._rows[index], None
        if self._learned:
            if model_output.shape[1] != 2 * sample.shape[1]:
                return super().step(model_output, timestep, sample, generator, return_dict)
            model_output, logvar = model_output.split(sample.shape[1], dim=1)
            logvar = logvar if row.noises else None
        noise = self._normals(row, model_output, generator, None, int(timestep) > 0)
        return self._stepped(index, row, sample, model_output, noise, return_dict, logvar)


@_register
class DDPMScheduler(_Ddpm, diffusers.DDPMScheduler):
    _output = _schedulers.scheduling_ddpm.DDPMSchedulerOutput


@_register
class DDPMParallelScheduler(_Ddpm, diffusers.DDPMParallelScheduler):
    _output = _schedulers.scheduling_ddpm_parallel.DDPMParallelSchedulerOutput


# ---- schedulers of sigmas ------------------------------------------------------------------------


class _BySigma(_Fast):
    """Rows by diffusers' own count of steps."""

    def _next(self, timestep: Any) -> int:
        """The index of the step that is taken now, which diffusers counts; -1 where the step is its
        own."""
        place = self._step_index
        if place is None or self._rows is None:
            if self.num_inference_steps is None:  # for diffusers to serve or to refuse
                return -1
            if place is None:
                self._init_step_index(timestep)
            place = self._step_index
            assert place is not None
            self._begin(place)
        if self._left:
            return -1
        index = place - self._start
        if index >= len(self._rows):
            raise IndexError("all steps were taken; run 'set_timesteps' again")
        return index

    @property
    def _run(self) -> list[float]:
        """The sigmas of the run, from where it began."""
        return self.sigmas[self._start :].tolist()

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
        return NoiseLevels(tuple(map(at, ratios[:-1])), end, at)

    def _orders(self) -> list[int]:
        """Of each step of a multistep method: rising, and falling again at the end of few steps."""
        config = self.config
        orders = [min(config.solver_order, i + 1) for i in range(len(self.timesteps) - self._start)]
        if config.lower_order_final and len(self.timesteps) < 15:
            orders[-2:] = [min(order, 2) for order in orders[-2:]]
            orders[-1] = 1
        return orders

    def _eulers(self, solver: Callable[[NoiseLevels], Plan]) -> list[Row]:
        """A solver of one call a step. Where the run ends on its last level, as with
        final_sigmas_type="sigma_min", the last step goes nowhere."""
        sigmas = self._run
        stays = sigmas[-1] == sigmas[-2]
        rows: list[Row] = []
        if not stays or len(sigmas) > 2:
            levels = self._exploding(sigmas[:-1] if stays else sigmas)
            rows = self._shown(solver(levels), levels.points)
        if stays:
            estimate = self._estimate_at(sigmas[-1])
            row = Row((Output({"x": 1.0}),), model_time=sigmas[-1])
            rows.append(_showing(row, {"x": estimate[0], "e": estimate[1]}))
        return rows

    def _shown(self, plan: Plan, points: Sequence[Point]) -> list[Row]:
        return [_showing(row, _estimate(row, at))
                for row, at in zip(plan.rows, points, strict=True)]  # fmt: skip


class _Plain(_BySigma):
    """The step of those that draw nothing and take no option."""

    def step(self, model_output, timestep, sample, return_dict=True):
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, return_dict)
        return self._stepped(index, self._rows[index], sample, model_output, NO_NOISE, return_dict)


@_register
class EulerDiscreteScheduler(_BySigma, diffusers.EulerDiscreteScheduler):
    _output = _schedulers.scheduling_euler_discrete.EulerDiscreteSchedulerOutput
    _upcasts, _casts, _keeps = True, "output", False

    def _build(self) -> list[Row]:
        return self._eulers(solvers.euler)

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
             s_noise=1.0, generator=None, return_dict=True):  # fmt: skip
        index = -1
        if s_churn == 0.0 and not _is_whole(timestep) and self.is_scale_input_called:
            index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                                generator, return_dict)  # fmt: skip
        row = self._rows[index]
        return self._stepped(index, row, sample, model_output, NO_NOISE, return_dict)


@_register
class EulerAncestralDiscreteScheduler(_BySigma, diffusers.EulerAncestralDiscreteScheduler):
    _output = _schedulers.scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput
    _upcasts, _casts, _keeps = True, "output", False

    def _leaves(self) -> bool:
        return self._prediction == "sample"

    def _build(self) -> list[Row]:
        return self._eulers(solvers.euler_ancestral)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        index = -1
        if not _is_whole(timestep) and self.is_scale_input_called:
            index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, return_dict)
        row = self._rows[index]
        noise = self._normals(row, model_output, generator, None, True)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class HeunDiscreteScheduler(_Plain, diffusers.HeunDiscreteScheduler):
    _output = _schedulers.scheduling_heun_discrete.HeunDiscreteSchedulerOutput

    def _build(self) -> list[Row]:
        sigmas = self._run
        levels = self._exploding([sigmas[0], *sigmas[1:-1:2], sigmas[-1]])
        plan = solvers.heun(levels, clip=self._clips)
        points = [p for i, p in enumerate(levels.points) for _ in range(2 if i else 1)]
        return self._shown(plan, points)


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
            self._preserving(self._run), None, "dpm", order=config.solver_order,
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
            lower_order_final=config.lower_order_final,
        ).rows)  # fmt: skip


@_register
class LCMScheduler(_BySigma, diffusers.LCMScheduler):
    _output = _schedulers.scheduling_lcm.LCMSchedulerOutput
    _keeps = False

    def _build(self) -> list[Row]:
        grid, rows = self.timesteps.tolist()[self._start :], []
        for i, t in enumerate(grid):
            a_t = float(self.alphas_cumprod[t])
            alpha, sigma = math.sqrt(a_t), math.sqrt(1.0 - a_t)
            of_x, of_e = estimate_of(self._prediction, alpha, sigma)
            scaled = t * self.config.timestep_scaling
            skip = 0.25 / (scaled**2 + 0.25)
            out = scaled / math.sqrt(scaled**2 + 0.25)
            shown = {"x": skip, "denoised": out}
            last = i + 1 == len(grid)
            a_s = 1.0 if last else float(self.alphas_cumprod[grid[i + 1]])
            weights = {name: math.sqrt(a_s) * w for name, w in shown.items()}
            row = Row((Output(weights, (math.sqrt(1.0 - a_s),)),), (of_x, of_e), self._clips,
                      model_time=float(t))  # fmt: skip
            rows.append(_showing(row, shown))
        return rows

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, return_dict)
        row = self._rows[index]
        noise = self._normals(row, model_output, generator, None, row.noises > 0)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class FlowMatchEulerDiscreteScheduler(_BySigma, diffusers.FlowMatchEulerDiscreteScheduler):
    _output = _schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
    _casts, _keeps = "output", False

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


class _Kdpm2(_BySigma):
    """Levels twice in diffusers' list, since each step calls the network twice. ``sample``, once a
    first call is done, tells its ``scale_model_input`` which of the two it is."""

    _eta = 0.0

    def _leaves(self) -> bool:
        return self._prediction == "sample"

    def _stepped(self, index: int, row: Row, sample: Tensor, *others: Any) -> Any:
        result = super()._stepped(index, row, sample, *others)
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
class KDPM2AncestralDiscreteScheduler(_Kdpm2, diffusers.KDPM2AncestralDiscreteScheduler):
    _output = (
        _schedulers.scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput
    )
    _eta = 1.0

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, generator, return_dict)
        row = self._rows[index]
        noise = self._normals(row, model_output, generator, None, index % 2 == 1)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class DEISMultistepScheduler(_Plain, diffusers.DEISMultistepScheduler):
    def _build(self) -> list[Row]:
        levels, order = self._preserving(self._run), self.config.solver_order
        return list(_adams(levels, order, None, "deis", log_level, self._orders()).rows)

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
class TCDScheduler(_BySigma, diffusers.TCDScheduler):
    _output = _schedulers.scheduling_tcd.TCDSchedulerOutput
    _keeps = False

    def _build(self) -> list[Row]:
        self._variants: dict[float, list[Row]] = {}
        return self._variant(0.3)

    def _variant(self, eta: float) -> list[Row]:
        rows = self._variants.get(eta)
        if rows is None:
            rows = self._variants[eta] = []
            grid, table = self.timesteps.tolist()[self._start :], self.alphas_cumprod.tolist()
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
        index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        row = self._variant(float(eta))[index]
        draws = eta > 0 and index + 1 < len(self._rows)
        noise = self._normals(row, model_output, generator, None, draws)
        return self._stepped(index, row, sample, model_output, noise, return_dict)


@_register
class EDMEulerScheduler(_BySigma, diffusers.EDMEulerScheduler):
    _output = _schedulers.scheduling_edm_euler.EDMEulerSchedulerOutput
    _upcasts, _casts, _keeps = True, "output", False

    def _build(self) -> list[Row]:
        return self._eulers(solvers.euler)

    def _estimate_at(self, sigma: float) -> tuple[float, float]:
        of_x, of_e = estimate_of("edm", 1.0, sigma, self.config.sigma_data)
        return of_x, of_e if self._prediction == "epsilon" else -of_e

    def step(self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
             s_noise=1.0, generator=None, return_dict=True, pred_original_sample=None):  # fmt: skip
        index = -1
        plain = s_churn == 0.0 and pred_original_sample is None and not _is_whole(timestep)
        if plain and self.is_scale_input_called:
            index = self._next(timestep)
        if index < 0:
            return super().step(model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise,
                                generator, return_dict, pred_original_sample)  # fmt: skip
        return self._stepped(index, self._rows[index], sample, model_output, NO_NOISE, return_dict)


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


# ---- conversion ----------------------------------------------------------------------------------


def convert(x: Any, *, noise: str | None = None, compat: str | None = None) -> Any:
    """A scheduler's counterpart here with its configuration; or a pipeline, whose scheduler is
    swapped, itself. noise, compat: as for ``from_config``; what is converted again keeps them. What
    was done is logged ("fastgen", INFO).

    Raises ValueError for a scheduler that has none, with the names of those that have; TypeError
    for what is neither.
    """
    if not isinstance(x, diffusers.SchedulerMixin):
        if not hasattr(x, "scheduler"):
            raise TypeError(f"x: got {type(x).__name__}, expected a scheduler or a pipeline")
        x.scheduler = convert(x.scheduler, noise=noise, compat=compat)
        return x
    name = type(x).__name__
    if name not in _CLASSES:
        raise ValueError(f"x: {name} has no counterpart here; these have: {', '.join(_CLASSES)}")
    noise = getattr(x, "_noise", "torch") if noise is None else noise
    compat = getattr(x, "_compat", "") if compat is None else compat
    made = _CLASSES[name].from_config(x.config, noise=noise, compat=compat)
    logger.info("%s: step is fastgen's, with noise from %s", name, noise)
    return made


__all__ = ["convert", *_CLASSES]
