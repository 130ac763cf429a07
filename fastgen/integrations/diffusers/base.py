"""A step of any of the schedulers, as a row of a plan."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Sequence
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
from ...ops.dispatch import is_eager
from ...plan import Clip, Output, Row, Threshold

_schedulers = diffusers.schedulers
logger = logging.getLogger("fastgen")
NOISES = ("torch", "fastgen")
NO_NOISE: tuple = ((), None, 0)  # normals, seed, sample ids
SHOWN = 6  # the slot of what is shown beside the sample: the estimate of x_0
# The dtype of each result, as csrc/quick.cpp has them: that of the sample, of the network's output,
# of both together, or float32. By (_casts, _upcasts, how many, whether something is shown).
_FLOAT32, _OF_SAMPLE, _OF_OUTPUT, _OF_BOTH = 0, 3, 4, 5
_RESULTS = {
    (casts, upcasts, count, shows): (
        {"": _OF_BOTH, "output": _OF_OUTPUT, "sample": _OF_SAMPLE}[casts],
        *[_FLOAT32] * (count - 1 - shows),
        *[_FLOAT32 if upcasts else _OF_BOTH] * shows,
    )
    for casts in ("", "output", "sample")
    for upcasts in (False, True)
    for count in range(1, 5)
    for shows in (False, True)
}
_KINDS = {"epsilon": "epsilon", "sample": "sample", "original_sample": "sample",
          "v_prediction": "v", "flow_prediction": "flow"}  # fmt: skip
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

    def new_loop(self) -> Any:
        """A scheduler of the same timesteps for a run of its own, as ``set_timesteps`` left this
        one: the numbers are shared, the state of the run is not. For threads, a scheduler each.

        Raises ValueError before ``set_timesteps``."""
        if "_fresh" not in vars(self):
            raise ValueError("new_loop: run 'set_timesteps' first")
        new = _revived(type(self).__name__)
        made = vars(self) if self._rows is not None and self._start == 0 else {}
        state = {name: value for name, value in made.items() if name not in self._fresh}
        vars(new).update({name: _own(value) for name, value in self._fresh.items()} | state)
        new._fresh, new._rows = self._fresh, made.get("_rows")
        new._kept, new._seeds = [None] * 7, None
        return new

    def __reduce__(self) -> Any:
        return _revived, (type(self).__name__,), self.__dict__

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
        no ladder down to data."""
        if self._leaves():
            return None
        sigmas = getattr(self, "sigmas", None)
        if sigmas is not None and bool(sigmas.isnan().any()):
            raise ValueError("sigmas: got NaN, expected finite numbers")
        self._start, self._variants = start, {}
        try:
            rows = self._rows_of(*self._usual)
            if self._counts and len(rows) != len(self.timesteps) - start:
                raise ValueError("timesteps that repeat")
            return rows
        except ValueError as error:
            logger.info("%s: step is diffusers' own: %s", type(self).__name__, error)
            return None

    @_constant
    def _rows_of(self, *options: Any) -> list[Row]:
        """The rows of the run with options of ``step``'s own."""
        rows = self._variants.get(options)
        if rows is None:
            rows = self._variants[options] = self._build(*options)
        return rows

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
        if self._levels_of is not self.alphas_cumprod and self.alphas_cumprod.is_cpu:
            self._levels_of, self._host_levels = self.alphas_cumprod, self.alphas_cumprod.tolist()
        return self._host_levels or self.alphas_cumprod.tolist()

    def _leaves(self) -> bool:
        """Whether this configuration is diffusers' own to step."""
        config = self.config
        return getattr(config, "thresholding", False) and config.sample_max_value < 1.0

    @property
    def _clips(self) -> Clip:
        config = self.config
        if getattr(config, "thresholding", False):
            return Threshold(config.dynamic_thresholding_ratio, config.sample_max_value)
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
        # a graph leaves out a draw that nothing is given
        return ((z,) if row.noises or is_compiling() else ()), None, 0

    def _stepped(
        self, index: int | Tensor, row: Row, sample: Tensor, output: Tensor, noise: tuple,
        return_dict: bool, logvar: Tensor | None = None, table: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """What ``step`` returns: a row's results, the sample and what is shown beside it, straight
        from the CPU's kernel or by way of every check. table: of which an index on the device
        chooses the row."""
        normals, seed, ids = noise
        outputs = row.outputs
        shows = outputs[-1].target == SHOWN
        history = tuple(self._kept) if self._keeps else ()
        place = index + self._start
        codes = _RESULTS[self._casts, self._upcasts, len(outputs), shows]
        results: Sequence[Tensor] | None = None
        fixed = logvar is None and table is None and row.threshold is None
        if fixed and is_eager() and backends._native is not None:
            results = backends._native.scheduler_step(
                sample, output, normals, history, codes, row.packed, seed, ids, place,
                kernel.STEP_STREAMS, torch.is_grad_enabled(), torch.get_num_threads(),
            )  # fmt: skip
        if results is None:
            results = self._checked(place, row, sample, output, noise, history, logvar, table,
                                    codes)  # fmt: skip
        if self._keeps:
            for kept, made in zip(outputs[1:], results[1:], strict=True):
                if kept.target != SHOWN:
                    self._kept[kept.target] = made  # type: ignore[index]
        if self._counts:
            self._step_index += 1  # type: ignore[operator]
        pair = (results[0], results[-1]) if shows else (results[0],)
        return self._output(*pair) if return_dict else pair

    def _checked(
        self, place: int | Tensor, row: Row, sample: Tensor, output: Tensor, noise: tuple,
        history: tuple, logvar: Tensor | None, table: Tensor | None, codes: tuple[int, ...],
    ) -> Sequence[Tensor]:  # fmt: skip
        """A row's results, by way of every check."""
        normals, seed, ids = noise
        _check("model_output", output, sample)
        for tensor in normals:
            _check("noise", tensor, sample)
        if any(h is not None and h.shape != sample.shape for h in history):
            raise ValueError(f"sample: got shape {tuple(sample.shape)}, another than the run's")
        both = torch.promote_types(sample.dtype, output.dtype)
        wide = torch.promote_types(both, torch.float32)
        kinds = {_OF_SAMPLE: sample.dtype, _OF_OUTPUT: output.dtype, _OF_BOTH: both, _FLOAT32: wide}
        dtypes = [kinds[code] for code in codes]
        step, row_index = (0, place) if isinstance(place, Tensor) else (place, None)
        return kernel.run(
            sample.shape, row if table is None else table,
            backend=kernel.choose(None, sample, output, results=dtypes), dtypes=dtypes,
            device=sample.device, like=sample, x=sample, cond=output, logvar=logvar,
            history=history, noise=normals, seed=seed, sample_ids=ids, step=step,
            row_index=row_index,
        )  # fmt: skip

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


def _own(value: Any) -> Any:
    """A container of its own with the same contents."""
    return type(value)(value) if type(value) in (list, dict) else value


def _revived(name: str) -> Any:
    return _CLASSES[name].__new__(_CLASSES[name])


def _register(cls: Any) -> Any:
    """The class under diffusers' name, with its signatures."""
    base: Any = cls.__bases__[-1]

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        base.set_timesteps(self, *args, **kwargs)
        # on a device its numbers are read now, where a step would wait for them
        self._rows, self._times = None, None if self.timesteps.is_cpu else self.timesteps.tolist()
        self._fresh = {name: _own(value) for name, value in vars(self).items() if name != "_fresh"}
        if self._times is not None:
            self._begin()

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
