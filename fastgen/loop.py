"""A run of a sampler, held by the caller: the sample, its history and where the run stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import backends, checks
from .ops import kernel
from .ops.brownian import motion, ticks_of
from .ops.dispatch import is_eager, is_plain
from .plan import MAX_NOISES, MAX_OUTPUTS, Output, Plan, Row


class Loop:
    """One run of a plan: the sample, its history, the row it is at and the seeds of its noise.

        loop = Loop(plan, x, seed=0)
        while not loop.done:
            loop.step(model(loop.model_input, loop.time))
        result = loop.x

    plan: what a solver returned. x: the first sample (B, ...), which a Loop reads and never writes
    (a network that writes into its input would). seed, sample_ids: of the step noise; needed where
    the plan draws any, unless every step is given its ``noise``. guidance_scale: g, a float or one
    per sample, for steps that are given ``uncond``. guided: whether the network is called once with
    [uncond, cond], so that ``model_input`` and ``time`` have 2 B rows. start: the row to begin
    with, whose sample x is; its noise is that of a run that came there. brownian: the noise of all
    steps is one path of ``fastgen.brownian`` over sigma / (alpha + sigma), so that a run of more
    steps follows the path of one of fewer.

    Two buffers hold the sample turn and turn about, and nothing is allocated from step to step: a
    sample is overwritten two steps later, so clone what you keep of ``x``.
    To change the sample between steps, assign to ``x``. ``state_dict`` and ``load_state_dict``
    interrupt a run and go on, with the same bits. Gradients are not recorded: for those, call
    ``fastgen.step``. backend: as for every op.

    index: how many steps were taken.

    Raises TypeError or ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        guidance_scale: float | Sequence[float] | Tensor = 1.0,
        guided: bool = False,
        start: int = 0,
        brownian: bool = False,
        backend: str | None = None,
    ) -> None:
        checks.instance("plan", plan, Plan)
        checks.tensor("x", x)
        if any("known" in row.reads for row in plan.rows):
            raise ValueError("plan: a row reads 'known', which a Loop does not carry: fastgen.step")
        start = checks.integer("start", start, 0, len(plan))
        if plan.unwritten(start):
            raise ValueError(
                f"start: got {start}, but {plan.solver or 'the plan'} reads what former rows keep; "
                "plan what is left, as in solver(levels[start:]), or load a state"
            )
        self.plan, self._x, self.index = plan, x.detach(), 0
        self._history: list[Tensor | None] = [None] * plan.history
        self._batch, self._guided = x.shape[0], guided
        self._backend = backend
        name = kernel.choose(backend, x)  # refuses now what cannot serve
        self._straight = name in ("cpu", "cuda")
        self._inference = torch.is_inference_mode_enabled()
        self._seed: kernel.Seed = None
        self._ids: int | Tensor = 0
        self._ids = checks.sample_ids(sample_ids, self._batch, x.device)
        if seed is not None:
            checks.size(x.shape)
            self._seed = checks.seed(seed, self._batch, x.device)
        self._ticks = ticks_of(plan, seed) if brownian else None
        guidance = checks.per_sample("guidance_scale", guidance_scale, self._batch, x.device)
        self._guidance: float | Tensor = guidance
        self._packed_guidance: float | tuple[Tensor, int]
        if isinstance(guidance, Tensor):
            self._guidance = guidance.float().resolve_neg().contiguous()
            self._packed_guidance = (self._guidance, int(guidance.numel() > 1))
        else:
            self._packed_guidance = float(guidance)
        keys = (self._seed[0] if isinstance(self._seed, tuple) else None, self._ids, guidance)
        self._straight &= is_plain(*(t for t in keys if isinstance(t, Tensor)))
        self._rows = (
            [_with_input(row) for row in plan.rows[:-1]] if guided else list(plan.rows[:-1])
        )
        self._rows.append(plan.rows[-1])
        # Of each row: whether the plan's makes the next input, and whether it writes it to the
        # other half of the network's batch as well.
        self._makes = [_makes_input(row) for row in plan.rows]
        self._fills = [guided and _makes_input(row) for row in self._rows]
        copies = 2 if guided else 1
        shape = (copies * self._batch, *x.shape[1:])
        self._buffers = [_empty(x, shape), _empty(x, shape)] if len(plan) > 1 else []
        self._halves = [
            (b[: self._batch], b[self._batch :]) if guided else (b,) for b in self._buffers
        ]
        times = plan.times(x.device).unsqueeze(1).expand(-1, copies * self._batch)
        self._times = times.unbind()
        self._made_input = _empty(x, shape) if any(self._makes) else None
        self._move(start, x)
        self._input = self._input_anew()

    def __repr__(self) -> str:
        return f"Loop({self.plan!r}, {self.index} steps taken, x {tuple(self._x.shape)})"

    @property
    def x(self) -> Tensor:
        """The sample (B, ...). Assigning to it (its shape; any floating dtype) changes the run: the
        network sees the new sample. A change in place is seen once ``loop.x = loop.x`` is run."""
        return self._x

    @x.setter
    @torch.no_grad()
    def x(self, value: Tensor) -> None:
        checks.like("x", value, "x", self._x)
        if self.index == 0:
            self._x = value.detach().to(self._x.dtype)
        elif value is not self._x:
            self._x.copy_(value)
        if not self.done:
            self._input = self._input_anew()

    @property
    def done(self) -> bool:
        """Whether all steps were taken."""
        return self.index == len(self.plan)

    @property
    def row(self) -> Row:
        """The row that the next step runs; IndexError when the run is done."""
        self._refuse_when_done()
        return self.plan.rows[self.index]

    @property
    def history(self) -> tuple[Tensor | None, ...]:
        """What the rows keep, by slot; a later step overwrites it."""
        return tuple(self._history)

    def _refuse_when_done(self) -> None:
        if self.done:
            raise IndexError(f"the run is done: all {len(self.plan)} steps were taken")

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: ``index``, ``x``, ``history`` and, where the network's input is not
        x itself, ``input``; copied, for ``torch.save``. ``plan`` tells it from other plans' states.

        The rest of a run is its plan, seed, sample_ids and guidance_scale, which the caller has.
        """
        history = [None if h is None else h.clone() for h in self._history]
        scaled = not self.done and self.row.input_scale != 1.0
        made = self._input[: self._batch].clone() if scaled else None
        return {"plan": self.plan.digest, "index": self.index, "x": self._x.clone(),
                "history": history, "input": made}  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where another run of the same plan, shape and seed stood.

        Raises ValueError or TypeError for a state that does not fit, before anything is changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: got {type(state).__name__}, expected what state_dict returned")
        missing = {"plan", "index", "x", "history", "input"} - set(state)
        if missing:
            raise ValueError(f"state: lacks {', '.join(sorted(missing))}")
        if state["plan"] != self.plan.digest:
            raise ValueError(f"state['plan']: is another plan's than this run's {self.plan!r}")
        index = checks.integer("state['index']", state["index"], 0, len(self.plan) + 1)
        history = list(state["history"])
        if len(history) != len(self._history):
            raise ValueError(
                f"state['history']: got {len(history)} slots, expected {len(self._history)}"
            )
        x = checks.like("state['x']", state["x"], "x", self._x)
        if state["input"] is not None:
            checks.like("state['input']", state["input"], "x", self._x)
        for slot, kept in enumerate(history):
            if kept is not None:
                checks.like(f"state['history'][{slot}]", kept, "x", self._x)
        there = {f"h{slot}" for slot, kept in enumerate(history) if kept is not None}
        lacking = self.plan.unwritten(index, there)
        if lacking:
            raise ValueError(f"state['history']: lacks slot {lacking[1][0][1]}, which is read")
        self._history = [None if h is None else h.to(self._history_dtype, copy=True)
                        for h in history]  # fmt: skip
        if 0 < index < len(self.plan):
            self._move(index, x)
        else:
            self.index, self._x = index, x.to(self._x.dtype, copy=True)
        if self.done:
            return
        made = state["input"]
        self._input = self._input_anew(None if made is None else made.to(self._x.dtype, copy=True))

    @torch.no_grad()
    def _move(self, index: int, x: Tensor) -> None:
        """To a row, with its sample copied to where the row before would have written it."""
        self.index = index
        if index > 0:
            self._x = self._buffers[(index - 1) % 2][: self._batch]
            self._x.copy_(x)

    @property
    def model_input(self) -> Tensor:
        """What the network is called with: the sample times ``input_scale``, (B or 2 B, ...)."""
        return self._input

    @property
    def time(self) -> Tensor:
        """What the network is told: (B or 2 B,) int64 timesteps, or float32 noise levels.

        IndexError when the run is done.
        """
        self._refuse_when_done()
        return self._times[self.index]

    def step(
        self,
        output: Tensor,
        uncond: Tensor | None = None,
        *,
        noise: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Moves the sample one row on by the network's output (of model_input's shape if guided:
        its halves are then uncond and cond). noise: the row's normals z_0, ..., of x's shape,
        instead of those that the seed gives. Returns the new sample, which the step after the next
        overwrites.

        Raises ValueError or TypeError for an output that does not fit, IndexError when done.
        """
        if self._inference and not torch.is_inference_mode_enabled():
            raise ValueError("the Loop was made under torch.inference_mode, whose tensors are "
                             "written there alone")  # fmt: skip
        normals = () if noise is None else (noise,) if isinstance(noise, Tensor) else tuple(noise)
        if self._ticks and not normals and not self.done and self.row.noises:
            first, last = self._ticks[self.index : self.index + 2]
            name = backends.choose("step", self._backend, self._x.device, torch.float32)
            normals = (motion(self._x.shape, last, first, True, self._seed, self._ids,
                              self._x.device, name),)  # fmt: skip
        if self._step_straight(output, uncond, normals):
            return self._x
        with torch.no_grad():
            return self._step(output, uncond, normals)

    def _step_straight(
        self, output: Tensor, uncond: Tensor | None, normals: tuple[Tensor, ...]
    ) -> bool:
        """The straight path on the CPU: one native call that looks at the tensors and runs; False
        where anything is out of the ordinary, for ``_step`` to serve or to refuse with a reason."""
        if not self._straight or self.index == len(self._rows) or not is_eager():
            return False
        row = self._rows[self.index]
        halves = self._guided and uncond is None
        if row.threshold:
            return False
        if not halves and uncond is None and ("u" in row.reads or not is_one(self._guidance)):
            return False
        drawn = row.noises > len(normals)
        if drawn and self._seed is None:
            return False
        targets = self._targets()
        seed = self._seed if drawn else None
        if not backends._native.loop_step(
            self._x, output, uncond, normals, tuple(self._history), targets, row.packed,
            self._packed_guidance, seed, self._ids, self.index, kernel.STEP_STREAMS, halves,
            torch.get_num_threads(),
        ):  # fmt: skip
            return False
        increment_version(targets)
        self._move_to(targets)
        return True

    def _step(self, output: Tensor, uncond: Tensor | None, normals: tuple[Tensor, ...]) -> Tensor:
        row = self.row
        if self._guided and uncond is None:
            checks.like("output", output, "model_input", self._input)
            uncond, output = output[: self._batch], output[self._batch :]
        else:
            checks.like("output", output, "x", self.x)
            if uncond is not None:
                checks.like("uncond", uncond, "x", self.x)
        if uncond is None and ("u" in row.reads or not is_one(self._guidance)):
            raise ValueError("uncond: got None, but the run is guided or its row reads it")
        for m, z in enumerate(normals):
            checks.like(f"noise[{m}]", z, "x", self.x)
        if len(normals) > MAX_NOISES:
            raise ValueError(f"noise: got {len(normals)} tensors, expected at most {MAX_NOISES}")
        if row.noises > len(normals) and self._seed is None:
            raise ValueError(
                f"seed: got None, but {self.plan.solver or 'the plan'} draws noise; give the Loop "
                "a seed, or the step its noise"
            )
        targets = self._targets()
        normals = tuple(_kept_apart(z, targets) for z in normals)
        output = _kept_apart(output, targets)
        uncond = None if uncond is None else _kept_apart(uncond, targets)
        kernel.run(
            self.x.shape, self._rows[self.index],
            backend=kernel.choose(self._backend, self.x, output, uncond),
            dtypes=[t.dtype for t in targets], device=self.x.device, x=self.x, cond=output,
            uncond=uncond, history=tuple(self._history), guidance=self._guidance,
            noise=normals, seed=self._seed if row.noises > len(normals) else None,
            sample_ids=self._ids, step=self.index, out=targets,
        )  # fmt: skip
        self._move_to(targets)
        return self.x

    def _move_to(self, targets: tuple[Tensor, ...]) -> None:
        """To the next row, once the targets were written."""
        self._x = targets[0]
        if len(targets) > 1:
            slots = self._rows[self.index].targets
            for target, kept in zip(slots[1:], targets[1:], strict=True):
                if isinstance(target, int):
                    self._history[target] = kept
        self.index += 1
        if self.index < len(self._rows):
            self._input = self._next_input()

    def _targets(self) -> tuple[Tensor, ...]:
        """Where each output of the row goes."""
        index, outputs = self.index, self._rows[self.index].outputs
        last = index + 1 == len(self._rows)
        halves = (torch.empty_like(self._x),) if last else self._halves[index % 2]
        if len(outputs) == 1:
            return halves[:1]
        return (halves[0], *[self._target(output.target, halves) for output in outputs[1:]])

    def _target(self, target: object, halves: tuple[Tensor, ...]) -> Tensor:
        if not isinstance(target, int):
            made = self._makes[self.index]
            return self._made_input[: self._batch] if made else halves[1]  # type: ignore[index]
        kept = self._history[target]
        return torch.empty_like(self._x, dtype=self._history_dtype) if kept is None else kept

    def _next_input(self) -> Tensor:
        before = self.index - 1
        made = self._makes[before]
        whole = self._made_input if made else self._buffers[before % 2]
        assert whole is not None
        if self._guided and (made or not self._fills[before]):
            whole[self._batch :].copy_(whole[: self._batch])
        return whole

    def _input_anew(self, made: Tensor | None = None) -> Tensor:
        """The network input from the sample alone, or as a step made it, which may round otherwise,
        for one half of the batch."""
        scale = self.row.input_scale
        x = self._x if scale == 1.0 else self._scaled(self._x, scale) if made is None else made
        if self.index == 0:
            return torch.cat([x, x]) if self._guided else x
        whole = self._buffers[(self.index - 1) % 2] if scale == 1.0 else self._made_input
        assert whole is not None
        for half in whole.split(self._batch) if self._batch else ():
            if half.data_ptr() != x.data_ptr():
                half.copy_(x)
        return whole

    @property
    def _history_dtype(self) -> torch.dtype:
        return torch.promote_types(self._x.dtype, torch.float32)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        row = Row((Output({"x": scale}),))
        backend = kernel.choose(self._backend, x)
        return kernel.run(x.shape, row, backend=backend, dtypes=(x.dtype,), device=x.device,
                          like=x, x=x)[0]  # fmt: skip


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for samples of x's memory format, perhaps more of them."""
    strides = torch.empty_like(x, device="meta").stride()
    order = sorted(range(x.ndim), key=lambda dim: -strides[dim])
    return torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)


def _makes_input(row: Row) -> bool:
    """Whether the row makes the next network input itself; otherwise that is the next sample."""
    return any(output.target == "input" for output in row.outputs)


def _with_input(row: Row) -> Row:
    """The row, writing the next sample a second time: the other half of the network's batch."""
    if len(row.outputs) == MAX_OUTPUTS or _makes_input(row):
        return row
    return replace(row, outputs=(*row.outputs, replace(row.outputs[0], target="input")))


def _kept_apart(output: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """The network's output, copied where it is a view of memory that the step writes: of an input
    two steps old, or of history."""
    return output.clone() if any(checks.overlaps_partly(t, output) for t in targets) else output


def is_one(guidance: object) -> bool:
    """Whether guidance is a plain number that leaves the network's output as it is."""
    return isinstance(guidance, int | float) and guidance == 1
