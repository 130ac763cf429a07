"""A sampler as a table: rows of numbers that one kernel runs."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks

HISTORY = 7
INPUTS = ("x", "e", "u", "denoised", "known", *(f"h{k}" for k in range(HISTORY)))
MAX_OUTPUTS = 4
MAX_NOISES = 4
ROW_FLOATS = 72
_WEIGHTS, _NOISE = 8, 8 + MAX_OUTPUTS * len(INPUTS)


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding, in place of a clip's fixed bounds: Saharia et al. (2022), section 2.3.

        s = the quantile of |d| over each sample, between 1 and maximum;  d = clip(d, -s, s) / s

    quantile: in [0, 1], between two of the sample's numbers by linear interpolation. maximum: at
    least 1, where s = 1 and so this is a clip to [-1, 1].

    Raises TypeError or ValueError for other numbers.
    """

    quantile: float = 0.995
    maximum: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= checks.number("quantile", self.quantile) <= 1.0:
            raise ValueError(f"quantile: got {self.quantile}, expected a number in [0, 1]")
        if self.maximum != math.inf and checks.number("maximum", self.maximum) < 1.0:
            raise ValueError(f"maximum: got {self.maximum}, expected at least 1")


Clip = float | tuple[float, float] | Threshold | None


def clip_bounds(clip: Clip) -> tuple[float, float] | Threshold | None:
    """A clip as a Row has it. Raises TypeError or ValueError for what is none."""
    if clip is None:
        return None
    if isinstance(clip, Threshold):
        return clip if clip.maximum > 1.0 else (-1.0, 1.0)
    return checks.interval("clip", clip)


@dataclass(frozen=True)
class Output:
    """One output of a step: ``sum weights[name] * name + sum noise[m] * z_m``.

    weights: from an input's name ("x", "e", "u", "denoised", "known", "h0" ... "h6") to its factor.
    noise: factors of z_0, z_1, ... (at most 4).
    target: "x", the next sample; "input", the next network input; or a history slot 0 ... 6.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    noise: tuple[float, ...] = ()
    target: str | int = "x"

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise TypeError(f"weights: got {type(self.weights).__name__}, expected a mapping")
        if not isinstance(self.noise, Sequence) or isinstance(self.noise, str):
            raise TypeError(f"noise: got {self.noise}, expected a factor a normal, as in (1.0,)")
        for name, weight in self.weights.items():
            checks.number(f"weights[{name!r}]", weight)
        for m, factor in enumerate(self.noise):
            checks.number(f"noise[{m}]", factor)
        unknown = set(self.weights) - set(INPUTS)
        if unknown:
            raise ValueError(f"weights: unknown input {sorted(unknown)[0]!r}, expected {INPUTS}")
        if len(self.noise) > MAX_NOISES:
            raise ValueError(f"noise: got {len(self.noise)} factors, expected at most {MAX_NOISES}")
        slot = type(self.target) is int and self.target in range(HISTORY)
        if not slot and self.target not in ("x", "input"):
            raise ValueError(
                f"target: got {self.target!r}, expected 'x', 'input' or a slot below {HISTORY}"
            )
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        object.__setattr__(self, "noise", tuple(float(s) for s in self.noise))

    def __hash__(self) -> int:
        return hash((frozenset(self.weights.items()), self.noise, self.target))

    def __reduce__(self):
        return Output, (dict(self.weights), self.noise, self.target)


@dataclass(frozen=True)
class Row:
    """One step of a sampler.

        e   = u + g (c - u)
        d   = clip(denoised[0] x + denoised[1] e)
        y_j = outputs[j], a linear combination of x, e, u, d, known, history and normals

    outputs: the first is the next sample. denoised: (a_x, a_e). clip: (low, high), a Threshold or
    None.
    logvar: (b, b_0): z_0 is multiplied by exp((b logvar + b_0) / 2) where a step is given a
    log-variance. model_time: what the network is told. input_scale: c_in, what x is multiplied by
    before the network sees it. level: (alpha, sigma) of the sample that the row is given, x = alpha
    x_0 + sigma eps, for runs that begin with an image or keep a part of one; None: not told.

    Derived: floats, the row as the kernels read it, (72,) float32 laid out as csrc/params.h has it,
    and packed, its bytes; targets, of the outputs; noises, how many normals an element takes (0:
    deterministic); reads, the inputs whose weight is not zero, with what the denoised sample is
    made from; threshold, the clip where it is a Threshold, of which the floats know nothing.

    A number beneath float32's smallest normal one, 2^-126, is zero. Raises ValueError or TypeError
    for what is no finite number (clip excepted) and for too many outputs.
    """

    outputs: tuple[Output, ...]
    denoised: tuple[float, float] = (0.0, 0.0)
    clip: Clip = None
    logvar: tuple[float, float] = (1.0, 0.0)
    model_time: float = 0.0
    input_scale: float = 1.0
    level: tuple[float, float] | None = None
    floats: np.ndarray = field(init=False, repr=False, compare=False)
    packed: bytes = field(init=False, repr=False, compare=False)
    targets: tuple[str | int, ...] = field(init=False, repr=False, compare=False)
    noises: int = field(init=False, repr=False, compare=False)
    reads: frozenset[str] = field(init=False, repr=False, compare=False)
    threshold: Threshold | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.outputs, Sequence):
            raise TypeError(f"outputs: got {self.outputs}, expected a sequence of Outputs")
        object.__setattr__(self, "outputs", tuple(self.outputs))
        if not all(isinstance(output, Output) for output in self.outputs):
            raise TypeError(f"outputs: got {self.outputs}, expected Outputs")
        if not 1 <= len(self.outputs) <= MAX_OUTPUTS:
            raise ValueError(f"outputs: got {len(self.outputs)}, expected 1 to {MAX_OUTPUTS}")
        object.__setattr__(self, "clip", clip_bounds(self.clip))
        for name in ("denoised", "logvar", "level"):
            pair = getattr(self, name)
            if name == "level" and pair is None:
                continue
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise TypeError(f"{name}: got {pair!r}, expected a pair of floats")
            for number in pair:
                checks.number(name, number)
        for name in ("model_time", "input_scale"):
            checks.number(name, getattr(self, name))
        filled = self._fill()
        floats = np.zeros(ROW_FLOATS, dtype=np.float32)
        threshold = self.clip if isinstance(self.clip, Threshold) else None
        if threshold:
            floats[2:4] = -math.inf, math.inf
            floats[6:8] = threshold.quantile, threshold.maximum
        else:
            floats[2:4] = self.clip or (-math.inf, math.inf)  # type: ignore[assignment]
        floats[list(filled)] = list(filled.values())
        floats.flags.writeable = False
        reads = {INPUTS[(c - _WEIGHTS) % len(INPUTS)] for c in filled if _WEIGHTS <= c < _NOISE}
        if "denoised" in reads:
            reads |= {name for c, name in enumerate(("x", "e")) if c in filled}
        noises = max(((c - _NOISE) % MAX_NOISES + 1 for c in filled if c >= _NOISE), default=0)
        object.__setattr__(self, "floats", floats)
        object.__setattr__(self, "packed", floats.tobytes())
        object.__setattr__(self, "targets", tuple(output.target for output in self.outputs))
        object.__setattr__(self, "noises", noises)
        object.__setattr__(self, "reads", frozenset(reads))
        object.__setattr__(self, "threshold", threshold)

    def __reduce__(self):  # without the cached arrays, which would come back writeable
        return Row, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def _fill(self) -> dict[int, float]:
        """The coefficients that are not zero, by their column, but for the clip's."""
        row = dict(zip((0, 1, 4, 5), (*self.denoised, *self.logvar), strict=True))
        for j, output in enumerate(self.outputs):
            for name, weight in output.weights.items():
                row[_WEIGHTS + j * len(INPUTS) + INPUTS.index(name)] = weight
            row |= enumerate(output.noise, _NOISE + j * MAX_NOISES)
        return {column: number for column, number in row.items() if abs(number) >= checks.SMALLEST}


@dataclass(frozen=True, repr=False)
class Plan:
    """A whole sampling run: what a solver returns.

    A solver computes in float64; a row holds its numbers rounded once to float32.

    rows: one a step. initial_scale: standard deviation of the first sample. discrete: whether
    ``model_time`` is an integer timestep (int64 for the network) or a noise level (float32).
    solver: its name, for people. end: (alpha, sigma) of the result, (1, 0) for data.

    Raises ValueError where a row reads a history slot that no earlier row has written (a row may
    read a slot that it writes: it reads what was there before), where a discrete plan has a time
    that is no integer, or where an input that must be scaled is not made by the row before.
    """

    rows: tuple[Row, ...]
    initial_scale: float = 1.0
    discrete: bool = True
    solver: str = ""
    end: tuple[float, float] = (1.0, 0.0)

    def __post_init__(self) -> None:
        if not isinstance(self.rows, Sequence):
            raise TypeError(f"rows: got {type(self.rows).__name__}, expected a sequence of Rows")
        object.__setattr__(self, "rows", tuple(self.rows))
        strangers = [type(row).__name__ for row in self.rows if not isinstance(row, Row)]
        if strangers:
            raise TypeError(f"rows: got a {strangers[0]}, expected Rows")
        if not self.rows:
            raise ValueError("rows: got none, expected at least one step")
        if checks.number("initial_scale", self.initial_scale) < 0:
            raise ValueError(f"initial_scale: got {self.initial_scale}, expected at least 0")
        for i, row in enumerate(self.rows):
            if self.discrete and row.model_time != int(row.model_time):
                raise ValueError(
                    f"rows[{i}]: model_time {row.model_time} is no timestep; discrete=False?"
                )
            if row.targets[0] != "x":
                raise ValueError(f"rows[{i}]: the first output must be the next sample")
            if len(set(row.targets)) != len(row.targets):
                raise ValueError(f"rows[{i}]: two outputs with the same target")
            last = i + 1 == len(self.rows)
            scaled = not last and self.rows[i + 1].input_scale != 1.0
            if scaled and "input" not in row.targets:
                raise ValueError(
                    f"rows[{i + 1}]: input_scale is not 1, so rows[{i}] must make the network input"
                )
        lacking = self.unwritten()
        if lacking:
            raise ValueError(f"rows[{lacking[0]}]: reads {lacking[1]} before it is written")

    def __len__(self) -> int:
        return len(self.rows)

    def unwritten(
        self, start: int = 0, there: Collection[str] = ()
    ) -> tuple[int, list[str]] | None:
        """(row, slots) where a run of the rows from ``start`` on first reads history, as in "h0",
        that is not there and that none of them has written; None where there is no such row."""
        written = set(there)
        for i, row in enumerate(self.rows[start:], start):
            lacking = {name for name in row.reads if name[0] == "h"} - written
            if lacking:
                return i, sorted(lacking)
            written |= {f"h{target}" for target in row.targets}
        return None

    def level(self, index: int) -> tuple[float, float]:
        """(alpha, sigma) of the sample before a row, or of the result (``len(plan)``).

        Raises ValueError where the solver did not tell it."""
        level = self.end if index == len(self) else self.rows[index].level
        if level is None:
            raise ValueError(f"plan: {self.solver or 'its solver'} tells no level of rows[{index}]")
        return level

    def __repr__(self) -> str:
        kind = "stochastic" if self.stochastic else "deterministic"
        return f"Plan({self.solver or 'unnamed'}, {len(self)} steps, {kind})"

    @property
    def network_calls(self) -> int:
        """How often a run calls the network."""
        return len(self.rows)

    @functools.cached_property
    def history(self) -> int:
        """How many history slots the rows write."""
        slots = [o.target for row in self.rows for o in row.outputs if isinstance(o.target, int)]
        return max(slots, default=-1) + 1

    @functools.cached_property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(row.noises for row in self.rows)

    @functools.cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of SHA-256 over the numbers of the rows: equal for equal plans."""
        numbers = hashlib.sha256()
        for row in self.rows:
            targets = [output.target for output in row.outputs]
            told = (float(row.model_time), float(row.input_scale), targets)
            numbers.update(row.packed + repr(told).encode())
        return numbers.hexdigest()[:16]

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """(steps, 72) float32: all coefficients, for a step whose row is chosen on the device.

        Raises ValueError where a row has a Threshold, which makes its numbers anew each time."""
        return stack_rows(self.rows, device)

    def times(self, device: torch.device | str | None = None) -> Tensor:
        """(steps,) what the network is told: int64 timesteps or float32 noise levels.

        Copied to a GPU once: a later call waits for nothing and can be captured in a CUDA graph."""
        dtype = torch.int64 if self.discrete else torch.float32
        where = str(torch.device("cpu" if device is None else device))
        if where in self._times:
            return self._times[where].clone()
        times = [row.model_time for row in self.rows]
        made = torch.tensor(times, dtype=dtype, device=device)
        if type(made) is Tensor and made.is_cuda and str(made.device) == where:
            self._times[where] = made.clone()
        return made

    @functools.cached_property
    def _times(self) -> dict[str, Tensor]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_times"}


def stack_rows(rows: Sequence[Row], device: torch.device | str | None = None) -> Tensor:
    """(B, 72) float32: a row per sample, for ``fastgen.step``.

    Raises TypeError or ValueError for what is no sequence of at least one Row, or has a Threshold.
    """
    if not isinstance(rows, Sequence) or not all(isinstance(row, Row) for row in rows):
        raise TypeError(f"rows: got {rows}, expected a sequence of Rows")
    if not rows:
        raise ValueError("rows: got none, expected one a sample")
    if any(row.threshold for row in rows):
        raise ValueError("rows: got one with a Threshold, which is no row of fixed numbers")
    return torch.tensor(np.stack([row.floats for row in rows]), device=device)
