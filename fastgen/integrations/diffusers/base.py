"""A step of any of the schedulers, as a row of a plan."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

try:
    import diffusers
    from diffusers.utils.torch_utils import randn_tensor
except ImportError:
    raise ImportError("fastgen.integrations.diffusers needs diffusers (0.38 to 0.42)") from None

from ... import backends
from ...levels import Point
from ...ops import kernel
from ...plan import Clip, Output, Row, Threshold
from .reuse import Last, Run, alike, copied, own

_schedulers = diffusers.schedulers
logger = logging.getLogger("fastgen")
NOISES = ("torch", "fastgen")
NO_NOISE: tuple = ((), None, 0)  # normals, seed, sample ids
SHOWN = 6  # the slot of what is shown beside the sample: the estimate of x_0
# What the compiled module is told of a class, as csrc/scheduler.cpp numbers it: whose dtype the
# next sample has, by _casts; that what is shown is float32; that rows read former results; that an
# index is no timestep, that the sample must have been scaled; that rows are found by timestep.
_WHOSE = {"sample": 3, "output": 4, "": 5}
_SHOWN_WIDE, _KEEPS, _WANTS_FLOAT, _WANTS_SCALED, _BY_TIMESTEP = 8, 16, 32, 64, 128
_DRAWS_WIDE = 256
_KINDS = {"epsilon": "epsilon", "sample": "sample", "original_sample": "sample",
          "v_prediction": "v", "flow_prediction": "flow"}  # fmt: skip
_OF_A_RUN = ("_rows", "_left", "_start", "_variants", "_steps", "_tables", "_places", "_grid",
             "_kept", "_seeds")  # fmt: skip
_MADE = ("_variants", "_steps", "_tables", "_grid")
_CLASSES: dict[str, Any] = {}


def _is_whole(timestep: Any) -> bool:
    """An index where diffusers wants one of the timesteps themselves."""
    if isinstance(timestep, Tensor):
        return timestep.dtype in (torch.int32, torch.int64)
    return isinstance(timestep, int)


def element_of(tensor: Tensor, element: Any) -> int | None:
    """Which element of a tensor of one dim a view of it is, by its place in memory: known without a
    look at a device. None for any other tensor, and for one that is not on a device."""
    if not isinstance(element, Tensor) or element.is_cpu or is_compiling():
        return None
    if element.numel() != 1 or element.dtype != tensor.dtype or element.device != tensor.device:
        return None
    if element.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
        return None
    offset = int(element.storage_offset()) - int(tensor.storage_offset())
    place, rest = divmod(offset, tensor.stride(0))
    return place if rest == 0 and 0 <= place < len(tensor) else None


def _check(name: str, given: Tensor, sample: Tensor) -> None:
    if given.shape != sample.shape:
        raise ValueError(
            f"{name}: got shape {tuple(given.shape)}, expected the sample's {tuple(sample.shape)}"
        )


def _widened(sample: Tensor, output: Tensor) -> Tensor:
    """The sample, in float32 where it and the output together are not: diffusers' result is."""
    both = torch.promote_types(sample.dtype, output.dtype)
    return sample if both.itemsize >= 4 else sample.float()


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


def _constant(method: Any) -> Any:
    """A method whose result is a constant to torch.compile, made when the graph is."""
    method._dynamo_marked_constant = True
    return method


class _Fast:
    """What all classes share; ``_build`` gives the rows of a run, one a call of ``step``."""

    _noise, _compat = "torch", ""
    _rows: Any = None  # of the run, a list once its first step is taken
    _times: list[float] | None = None  # the timesteps, where they are on a device
    _read: tuple[Tensor, int, list[float]] | None = None  # sigmas of a device
    _levels_of: Tensor | None = None
    _host_levels: list[float] = []  # noqa: RUF012
    _fresh: dict[str, Any]  # what set_timesteps left
    _start = 0  # the step where the run began
    _kept: list[Tensor | None]
    _seeds: tuple[kernel.Seed, int | Tensor] | None = None
    config: Any  # diffusers' own
    timesteps: Tensor
    sigmas: Tensor
    alphas_cumprod: Tensor
    num_inference_steps: int | None
    step_index: int | None
    begin_index: int | None
    _step_index: int | None
    _init_step_index: Callable[[Any], None]
    step: Callable[..., Any]
    _build: Callable[..., list[Row]]  # the rows of a run from _start on, a call of step each
    _usual: tuple = ()  # what _build takes of step's own options, as most runs have them
    _variants: dict[tuple, list[Row]]  # by these options
    _tables: dict[tuple, Tensor]  # on devices
    _steps: dict[tuple, list[tuple | None]]  # of these, what the compiled module reads
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

    def register_to_config(self, **options: Any) -> None:
        """As diffusers'; the rows of another configuration are no longer this one's."""
        inherited: Any = super()
        inherited.register_to_config(**options)
        self._forget()

    def new_loop(self) -> Any:
        """A scheduler of the same timesteps for a run of its own, as ``set_timesteps`` left this
        one: the numbers are shared, the state of the run is not. For threads, a scheduler each.

        Raises ValueError before ``set_timesteps``."""
        if "_fresh" not in vars(self):
            raise ValueError("new_loop: run 'set_timesteps' first")
        new = _revived(type(self).__name__)
        made = vars(self) if self._rows is not None and self._start == 0 else {}
        state = {name: value for name, value in made.items() if name not in self._fresh}
        vars(new).update({name: own(value) for name, value in self._fresh.items()} | state)
        new._fresh, new._rows = self._fresh, made.get("_rows")
        new._kept, new._seeds = [None] * 7, None
        return new

    def __reduce__(self) -> Any:
        return _revived, (type(self).__name__,), self.__dict__

    def _forget(self) -> None:
        """Leaves the run behind, as new timesteps do."""
        for name in _OF_A_RUN:
            vars(self).pop(name, None)

    def _begin(self, start: int = 0) -> None:
        """Rows of a run from a step on: the first ones of a multistep method read nothing yet."""
        if self._rows is None or start != self._start:
            self._start = start
            rows = self._built(start)
            self._left = rows is None
            self._rows = [] if rows is None else rows
        self._kept, self._seeds = [None] * 7, None

    @_constant
    def _built(self, start: int) -> list[Row] | None:
        """The rows of a run from a step on; None where it is diffusers' own, as levels are that are
        no ladder down to data. Those of the last run where it was no other."""
        holder = vars(self).setdefault("_last", Last())
        state, last = self._state(), holder.run
        if last is None or last.start != start or not alike(last.state, state):
            self._start, self._variants, self._steps, self._tables = start, {}, {}, {}
            rows = self._built_anew(start)
            if rows is None:
                self._variants, self._steps = {}, {}  # of which some may be there
            made = {name: vars(self)[name] for name in _MADE if name in vars(self)}
            holder.run = last = Run(start, state, rows, made)
        vars(self).update(last.made)
        return last.rows

    def _state(self) -> dict[str, Any]:
        """All that rows are made from, in copies."""
        apart = {*_OF_A_RUN, "_fresh", "_last", "_levels_of", "_host_levels", "_read",
                 "is_scale_input_called"}  # fmt: skip
        if self._times is not None:
            apart.add("timesteps")
        state = {name: copied(value) for name, value in vars(self).items() if name not in apart}
        if isinstance(state.get("sigmas"), Tensor) and not self.sigmas.is_cpu:
            state["sigmas"] = self._host_sigmas
        return state

    @property
    def _host_sigmas(self) -> list[float]:
        """The sigmas on the host; those on a device are read once."""
        sigmas = self.sigmas
        if sigmas.is_cpu:
            return sigmas.tolist()
        version = 0 if sigmas.is_inference() else sigmas._version
        if self._read is None or self._read[0] is not sigmas or self._read[1] != version:
            self._read = sigmas, version, sigmas.tolist()
        return self._read[2]

    def _built_anew(self, start: int) -> list[Row] | None:
        if self._leaves():
            return None
        if getattr(self, "sigmas", None) is not None and any(map(math.isnan, self._host_sigmas)):
            raise ValueError("sigmas: got NaN, expected finite numbers")
        try:
            rows = self._rows_of(*self._usual)
            if self._counts and len(rows) != self._calls - start:
                raise ValueError("timesteps that repeat")
            return rows
        except (ValueError, IndexError, ZeroDivisionError) as error:
            logger.info("%s: step is diffusers' own: %s", type(self).__name__, error)
            return None

    @_constant
    def _rows_of(self, *options: Any) -> list[Row]:
        """The rows of the run with options of ``step``'s own."""
        rows = self._variants.get(options)
        if rows is None:
            rows = self._variants[options] = self._build(*options)
            self._steps[options] = [None if row.threshold else self._step_of(row) for row in rows]
        return rows

    def _step_of(self, row: Row) -> tuple | None:
        """What the compiled module reads of a row; None where more is to be done at its step."""
        return row.packed, row.targets, row.noises or self._unread

    @property
    def _calls(self) -> int:
        """How many calls of ``step`` the timesteps are for."""
        return len(self.timesteps)

    @property
    def _host_timesteps(self) -> list[Any]:
        """The timesteps, on the host."""
        return self.timesteps.tolist() if self._times is None else self._times

    def _value(self, timestep: Any) -> Any:
        """A timestep's number; one of ``timesteps`` on a device is not waited for."""
        if self._times is not None:
            element = element_of(self.timesteps, timestep)
            if element is not None:
                return self._times[element]
        return timestep.item() if isinstance(timestep, Tensor) else timestep

    @property
    def _alpha_bars(self) -> list[float]:
        """alphas_cumprod on the host, which add_noise moves to its device."""
        levels = self.alphas_cumprod
        if levels.is_cpu and (self._levels_of is None or not alike(self._levels_of, levels)):
            self._levels_of, self._host_levels = levels.clone(), levels.tolist()
        return self._host_levels or levels.tolist()

    def _leaves(self) -> bool:
        """Whether this configuration is diffusers' own to step."""
        return self._option("thresholding") and self.config.sample_max_value < 1.0

    @property
    def _clips(self) -> Clip:
        config = self.config
        if self._option("thresholding"):
            return Threshold(config.dynamic_thresholding_ratio, config.sample_max_value)
        if not self._option("clip_sample"):
            return None
        return float(self._option("clip_sample_range", 1.0))

    def _option(self, name: str, default: Any = False) -> Any:
        """Of the configuration, where the class has such an option: others are not read."""
        return getattr(self.config, name, default) if name in self._options else default

    @property
    def _prediction(self) -> str:
        given = self.config.prediction_type
        if given not in _KINDS:
            raise ValueError(f"prediction_type: got {given!r}, expected one of {', '.join(_KINDS)}")
        return _KINDS[given]

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
        # a graph leaves out a draw that nothing is given
        return ((z,) if row.noises or is_compiling() else ()), None, 0

    def _under_way(
        self, timestep: Any, sample: Tensor, output: Tensor, return_dict: bool,
        generator: Any = False, options: tuple | None = None,
    ) -> Any:  # fmt: skip
        """What ``step`` returns, in one call of the compiled module, for a run that is under way;
        None where anything is out of the ordinary. generator: False where diffusers draws none."""
        if is_compiling() or backends._native is None:
            return None
        results = backends._native.scheduler_step_under_way(
            self.__dict__, self._rule, self._usual if options is None else options, timestep,
            sample, output, kernel.STEP_STREAMS, generator if self._noise == "torch" else False,
        )  # fmt: skip
        return _made(self._output, *results) if return_dict and results is not None else results

    def _stepped(
        self, index: int | Tensor, row: Row, sample: Tensor, output: Tensor, noise: tuple,
        return_dict: bool, logvar: Tensor | None = None, table: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """What ``step`` returns: a row's results, the sample and what is shown beside it, straight
        from the CPU's kernel or by way of every check. table: of which an index on the device
        chooses the row."""
        place, results = index + self._start, None
        eager = not is_compiling()
        fixed = logvar is None and table is None and row.threshold is None
        if fixed and eager and backends._native is not None:
            results = backends._native.scheduler_step(
                row.packed, row.targets, self._rule, self._kept if self._keeps else None, sample,
                output, noise, place, kernel.STEP_STREAMS,
            )  # fmt: skip
        if results is None:
            results = self._checked(place, row, sample, output, noise, logvar, table)
        if self._counts:
            self._step_index += 1  # type: ignore[operator]
        if not return_dict:
            return results
        return _made(self._output, *results) if eager else self._output(*results)

    def _checked(
        self, place: int | Tensor, row: Row, sample: Tensor, output: Tensor, noise: tuple,
        logvar: Tensor | None, table: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(the sample, what is shown beside it), by way of every check."""
        normals, seed, ids = noise
        history = tuple(self._kept) if self._keeps else ()
        _check("model_output", output, sample)
        for tensor in normals:
            _check("noise", tensor, sample)
        if any(h is not None and h.shape != sample.shape for h in history):
            raise ValueError(f"sample: got shape {tuple(sample.shape)}, another than the run's")
        both = torch.promote_types(sample.dtype, output.dtype)
        wide = torch.promote_types(both, torch.float32)
        first = {"sample": sample.dtype, "output": output.dtype, "": both}[self._casts]
        dtypes = [first, *[wide] * (len(row.outputs) - 1)]
        shows = row.targets[-1] == SHOWN
        if shows and not self._upcasts:
            dtypes[-1] = both
        step, row_index = (0, place) if isinstance(place, Tensor) else (place, None)
        results = kernel.run(
            sample.shape, row if table is None else table,
            backend=kernel.choose(None, sample, output, results=dtypes), dtypes=dtypes,
            device=sample.device, like=sample, x=sample, cond=output, logvar=logvar,
            history=history, noise=normals, seed=seed, sample_ids=ids, step=step,
            row_index=row_index,
        )  # fmt: skip
        if self._keeps:
            for target, made in zip(row.targets[1:], results[1:], strict=True):
                if target != SHOWN:
                    self._kept[target] = made  # type: ignore[index]
        return (results[0], results[-1]) if shows else (results[0],)

    _output: Any = _schedulers.scheduling_utils.SchedulerOutput
    _casts = ""  # "output" or "sample": whose dtype diffusers gives its result, else both promoted
    _keeps = True  # whether rows read former results
    _counts = True  # whether diffusers counts the steps
    _options: frozenset[str] = frozenset()  # what its configuration may say
    _unread = -1  # 0 where diffusers draws no noise that a row does not take
    _strict = 0  # _WANTS_FLOAT, _WANTS_SCALED, _DRAWS_WIDE
    _rule = 0  # all of it as one number


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


def _made(cls: Any, *values: Any) -> Any:
    """``cls(*values)``, a dict and a dataclass in one, in a fraction of its own time."""
    made = cls.__new__(cls)
    for name, value in itertools.zip_longest(cls.__dataclass_fields__, values):
        made.__dict__[name] = value
        if value is not None:
            OrderedDict.__setitem__(made, name, value)
    return made


def _revived(name: str) -> Any:
    return _CLASSES[name].__new__(_CLASSES[name])


def _needs_timestep(method: Any) -> bool:
    """Whether a class's ``scale_model_input`` looks for the step that is taken."""
    parameter = method and inspect.signature(method).parameters.get("timestep")
    return parameter is not None and parameter.default is parameter.empty


def _register(cls: Any) -> Any:
    """The class under diffusers' name, with its signatures."""
    base: Any = cls.__bases__[-1]

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        base.set_timesteps(self, *args, **kwargs)
        # on a device its numbers are read now, where a step would wait for them
        self._times = None if self.timesteps.is_cpu else self.timesteps.tolist()
        self._forget()
        vars(self).setdefault("_last", Last())
        self._fresh = {name: own(value) for name, value in vars(self).items() if name != "_fresh"}
        if self._times is not None:
            self._begin()

    cls.set_timesteps = set_timesteps
    cls._options = frozenset(inspect.signature(base.__init__).parameters)
    cls._rule = (_WHOSE[cls._casts] + cls._upcasts * _SHOWN_WIDE + cls._keeps * _KEEPS
                 + cls._strict + (not cls._counts) * _BY_TIMESTEP)  # fmt: skip
    name = "step" if hasattr(base, "step") else "step_pred"
    step = getattr(cls, name)  # of this class's own, which a family of classes may share
    made = types.FunctionType(step.__code__, step.__globals__, step.__name__, step.__defaults__,
                              step.__closure__)  # fmt: skip
    setattr(cls, name, functools.wraps(getattr(base, name))(made))
    scale: Any = getattr(cls, "scale_model_input", None)
    if hasattr(cls, "_find") and _needs_timestep(scale):

        @functools.wraps(scale)
        def scale_model_input(self, sample, timestep, *args, **kwargs):
            if self._step_index is None and self._fresh and not is_compiling():
                self._find(timestep)  # without a wait
            return scale(self, sample, timestep, *args, **kwargs)

        cls.scale_model_input = scale_model_input
    cls.__doc__ = f"diffusers' {base.__name__}, with a kernel a step."
    cls.__name__ = cls.__qualname__ = base.__name__
    cls.__module__ = base.__module__  # what a saved pipeline records
    _CLASSES[cls.__name__] = cls
    return cls
