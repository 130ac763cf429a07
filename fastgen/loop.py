"""A run of a sampler: the state that the caller holds, and the loop over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import checks
from .ops import kernel
from .ops.noise import INITIAL_LATENT
from .plan import MAX_OUTPUTS, Output, Plan, Row


class Loop:
    """One run of a plan: the sample, its history, the row it is at and the seeds of its noise.

        loop = Loop(plan, x, seed=0)
        while not loop.done:
            loop.step(model(loop.model_input, loop.time))
        result = loop.x

    x: the first sample (B, ...), which is read and never written. seed, sample_ids: of the step
    noise; needed where the plan draws any. guidance_scale: g, a float or one per sample, for steps
    that are given ``uncond``. guided: whether the network is called once with [uncond, cond], so
    that ``model_input`` and ``time`` have 2 B rows.

    Two buffers hold the sample turn and turn about; nothing is allocated from step to step.
    Gradients are not recorded: for those, call ``fastgen.step``.
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
        backend: str | None = None,
    ) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: got {type(plan).__name__}, expected a fastgen.Plan")
        checks.tensor("x", x)
        if any("known" in row.reads for row in plan.rows):
            raise ValueError("plan: a row reads 'known', which a Loop does not carry: fastgen.step")
        if plan.stochastic and seed is None:
            raise ValueError(f"seed: got None, but {plan.solver or 'the plan'} draws noise")
        self.plan, self.x, self.index = plan, x.detach(), 0
        self.history: list[Tensor | None] = [None] * plan.history
        self._batch, self._guided = x.shape[0], guided
        self._backend = backend
        kernel.choose(backend, x)  # refuses now what cannot serve
        self._seed: kernel.Seed = None
        self._ids: int | Tensor = 0
        if seed is not None:
            checks.size(x.shape)
            self._seed = checks.seed(seed, self._batch, x.device)
            self._ids = checks.sample_ids(sample_ids, self._batch, x.device)
        guidance = checks.per_sample("guidance_scale", guidance_scale, self._batch, x.device)
        self._guidance = guidance.float() if isinstance(guidance, Tensor) else guidance
        self._rows = (
            [_with_input(row) for row in plan.rows[:-1]] if guided else list(plan.rows[:-1])
        )
        self._rows.append(plan.rows[-1])
        copies = 2 if guided else 1
        shape = (copies * self._batch, *x.shape[1:])
        self._buffers = [x.new_empty(shape), x.new_empty(shape)] if len(plan) > 1 else []
        self._times = plan.times(x.device)
        first = plan.rows[0].input_scale
        self._input = self.x if first == 1.0 else self._scaled(self.x, first)
        if guided:
            self._input = torch.cat([self._input, self._input])
        self._made_input = x.new_empty(shape) if any(map(_makes_input, plan.rows)) else None

    @property
    def done(self) -> bool:
        return self.index == len(self.plan)

    @property
    def row(self) -> Row:
        """The row that the next step runs; IndexError when the run is done."""
        return self.plan.rows[self.index]

    @property
    def model_input(self) -> Tensor:
        """What the network is called with: the sample times ``input_scale``, (B or 2 B, ...)."""
        return self._input

    @property
    def time(self) -> Tensor:
        """What the network is told: (B or 2 B,) int64 timesteps, or float32 noise levels."""
        return self._times[self.index].expand(self._input.shape[0])

    @torch.no_grad()
    def step(self, output: Tensor, uncond: Tensor | None = None) -> Tensor:
        """Moves the sample one row on by the network's output (of model_input's shape if guided:
        its halves are then uncond and cond). Returns the new sample.

        Raises ValueError or TypeError for an output that does not fit, IndexError when done.
        """
        row = self.row
        if self._guided and uncond is None:
            checks.like("output", output, "model_input", self._input)
            uncond, output = output[: self._batch], output[self._batch :]
        else:
            checks.like("output", output, "x", self.x)
            if uncond is not None:
                checks.like("uncond", uncond, "x", self.x)
        if uncond is None and ("u" in row.reads or not _is_one(self._guidance)):
            raise ValueError("uncond: got None, but the run is guided or its row reads it")
        targets = self._targets(row)
        kernel.run(
            self.x.shape, self._rows[self.index],
            backend=kernel.choose(self._backend, self.x, output, uncond),
            dtypes=[t.dtype for t in targets], device=self.x.device, x=self.x, cond=output,
            uncond=uncond, history=tuple(self.history), guidance=self._guidance,
            seed=self._seed if row.noises else None, sample_ids=self._ids, step=self.index,
            out=targets,
        )  # fmt: skip
        self.x = targets[0]
        self.index += 1
        if not self.done:
            self._input = self._next_input()
        return self.x

    def _targets(self, row: Row) -> list[Tensor]:
        """Where each output of a row goes."""
        last = self.index + 1 == len(self.plan)
        whole = torch.empty_like(self.x) if last else self._buffers[self.index % 2]
        targets = [whole[: self._batch]]
        for output in self._rows[self.index].outputs[1:]:
            if isinstance(output.target, int):
                if self.history[output.target] is None:
                    dtype = torch.promote_types(self.x.dtype, torch.float32)
                    self.history[output.target] = torch.empty_like(self.x, dtype=dtype)
                targets.append(self.history[output.target])  # type: ignore[arg-type]
            elif _makes_input(row):
                targets.append(self._made_input[: self._batch])  # type: ignore[index]
            else:
                targets.append(whole[self._batch :])
        return targets

    def _next_input(self) -> Tensor:
        made = _makes_input(self.plan.rows[self.index - 1])
        whole = self._made_input if made else self._buffers[(self.index - 1) % 2]
        assert whole is not None
        copied = not made and _makes_input(self._rows[self.index - 1])
        if self._guided and not copied:
            whole[self._batch :].copy_(whole[: self._batch])
        return whole

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        row = Row((Output({"x": scale}),))
        backend = kernel.choose(self._backend, x)
        return kernel.run(x.shape, row, backend=backend, dtypes=(x.dtype,), device=x.device,
                          like=x, x=x)[0]  # fmt: skip


def _makes_input(row: Row) -> bool:
    """Whether the row makes the next network input itself; otherwise that is the next sample."""
    return any(output.target == "input" for output in row.outputs)


def _with_input(row: Row) -> Row:
    """The row, writing the next sample a second time: the other half of the network's batch."""
    if len(row.outputs) == MAX_OUTPUTS or _makes_input(row):
        return row
    return replace(row, outputs=(*row.outputs, replace(row.outputs[0], target="input")))


def _is_one(guidance: float | Tensor) -> bool:
    return isinstance(guidance, float) and guidance == 1.0


Model = Callable[..., Any]


@torch.no_grad()
def sample(
    model: Model,
    plan: Plan,
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    guidance_scale: float | Sequence[float] | Tensor | None = None,
    cond: Any = None,
    uncond: Any = None,
    progress: bool = False,
    callback: Callable[[Loop], None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Runs a plan from noise to samples.

    model: called as ``model(x, t, cond)``: x (rows, ...), t (rows,) on x's device, int64 for
        discrete schedules and float32 for noise levels; a result with ``.sample`` is accepted.
    shape: (B, ...) of the samples, drawn from ``seed`` by ``fastgen.randn``; or x: the first sample
        itself. dtype, device: of the samples drawn (float32, and torch's default device).
    seed, sample_ids: of all noise; the seed is needed only where some is drawn.
    cond, uncond: any tree of tensors with the batch first. With guidance_scale g (a float or one
        per sample) the network is called once a step with [uncond, cond], and its outputs become
        u + g (c - u).
    progress: shows a bar. callback: called with the ``Loop`` after every step.

    Returns (B, ...). Gradients are not recorded. Raises TypeError or ValueError for what does not
    fit.
    """
    if (shape is None) == (x is None):
        raise ValueError(
            f"shape, x: got {'neither' if x is None else 'both'}, expected one of them"
        )
    if (guidance_scale is None) != (uncond is None):
        raise ValueError("guidance_scale, uncond: guidance takes both, got one of them")
    if x is None:
        if seed is None:
            raise ValueError("seed: got None, but the first sample is drawn from it")
        x = _first_sample(plan, shape, seed, sample_ids, dtype, device)
    elif dtype is not None or device is not None:
        raise ValueError("dtype, device: go with shape; x has its own")
    guided = guidance_scale is not None
    if guided:
        if cond is None:
            raise ValueError("cond: got None, but guidance takes cond and uncond")
        cond = pytree.tree_map(_concatenate, uncond, cond)
    loop = Loop(
        plan,
        x,
        seed=seed if plan.stochastic else None,
        sample_ids=sample_ids,
        guidance_scale=1.0 if guidance_scale is None else guidance_scale,
        guided=guided,
    )
    for _ in _steps(len(plan), progress):
        output = model(loop.model_input, loop.time, cond)
        prediction: Any = getattr(output, "sample", output)
        loop.step(prediction)
        if callback is not None:
            callback(loop)
    return loop.x


def _first_sample(plan, shape, seed, sample_ids, dtype, device) -> Tensor:
    """Normals of the noise contract's first stream, times the plan's initial scale."""
    from .ops.noise import randn

    if plan.initial_scale == 1.0:
        return randn(shape, seed=seed, sample_ids=sample_ids, dtype=dtype, device=device)
    z = randn(shape, seed=seed, sample_ids=sample_ids, stream=INITIAL_LATENT, device=device)
    return z.mul_(plan.initial_scale).to(dtype or torch.float32)


def _concatenate(uncond: Any, cond: Any) -> Any:
    return torch.cat([uncond, cond]) if isinstance(cond, Tensor) else cond


def _steps(count: int, progress: bool):
    if not progress:
        return range(count)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress: needs tqdm (pip install fastgen-samplers[cli])") from None
    return tqdm(range(count), desc="sampling", unit="step")
