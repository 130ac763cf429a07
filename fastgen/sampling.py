"""From noise to samples in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import checks
from .loop import Loop, is_one
from .ops.forward import diffused
from .ops.noise import INITIAL_LATENT, randn
from .plan import Plan

Model = Callable[..., Any]


@torch.no_grad()
def sample(
    model: Model,
    plan: Plan,
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    image: Tensor | None = None,
    state: Mapping[str, Any] | None = None,
    start: int = 0,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    guidance_scale: float | Sequence[float] | Tensor | None = None,
    cond: Any = None,
    uncond: Any = None,
    brownian: bool = False,
    progress: bool = False,
    callback: Callable[[Loop], None] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Runs a plan from noise, or from where else a run may begin, to samples.

    model: called as ``model(x, t, cond)``: x (rows, ...), t (rows,) on x's device, int64 for
        discrete schedules and float32 for noise levels; a result with ``.sample`` is accepted.
    shape: (B, ...) of the samples, drawn from ``seed`` by ``fastgen.randn``; or x: the first sample
        itself; or image: data (B, ...), to which the noise of the first row's level is added; or
        state: a ``Loop.state_dict`` from which the run goes on with the same bits.
        dtype, device: of the samples drawn (float32, and torch's default device).
    start: with x or image, the row to begin with: the larger, the more of an image is kept. Its
        noise is that of the whole run, so x of a former run goes on with the same bits (where the
        network's input is x itself; a state has them in any case).
    known, mask: to fill in a part of an image: known (B, ...) is the whole image, and mask, bool or
        floating and broadcast to it, is 1 where it is sampled and 0 where it is kept. What is kept
        is known with fresh noise of each step's level: Song et al. (2021), appendix I.2; Lugmayr et
        al. (2022), eq. 8, whose jumps are rows of ``solvers.repaint``.
    seed, sample_ids: of all noise; the seed is needed only where some is drawn.
    cond, uncond: any tree of tensors with the batch first. With guidance_scale g (a float or one
        per sample) the network is called once a step with [uncond, cond], and its outputs become
        u + g (c - u); with g = 1.0 it is called with cond alone, which gives the same. A tensor of
        one row is that of every sample. What is no tensor, or has no dims, goes to the network as
        it is, and must be the same in both.
    brownian: whether the noise of all steps is one path, which does not change with their number:
        see ``Loop``.
    progress: shows a bar. callback: called with the ``Loop`` after every step; it may assign
        to ``loop.x``, and must clone what it keeps of it, since a later step overwrites it.

    For a run with other arguments of the network, a backend, or an early end, write the loop over a
    ``Loop`` yourself.

    Returns (B, ...). Gradients are not recorded. Raises TypeError or ValueError for what does not
    fit.
    """
    checks.instance("plan", plan, Plan)
    if isinstance(shape, Tensor):
        raise TypeError("shape: got a Tensor; the first sample itself goes in as x=")
    if guidance_scale is None and uncond is not None:
        raise ValueError("guidance_scale: got None, but uncond is there to be weighed against")
    if uncond is None and guidance_scale is not None and not is_one(guidance_scale):
        raise ValueError("uncond: got None, but guidance_scale weighs cond against it")
    if (known is None) != (mask is None):
        raise ValueError("known, mask: got one of them, expected both or neither")
    start = checks.integer("start", start, 0, len(plan))
    first = {"shape": shape, "x": x, "image": image, "state": state}
    x = _first_sample(plan, first, start, seed, sample_ids, dtype, device)
    if seed is None and known is not None:
        raise ValueError("seed: got None, but the noise of what is known is drawn from it")
    if seed is None and plan.stochastic:
        raise ValueError(f"seed: got None, but {plan.solver or 'the plan'} draws noise")
    reads_uncond = any("u" in row.reads for row in plan.rows)
    guided = guidance_scale is not None and (reads_uncond or not is_one(guidance_scale))
    if guided:
        if cond is None:
            raise ValueError("cond: got None, but guidance takes cond and uncond")
        cond = _both(uncond, cond, x.shape[0])
    loop = Loop(
        plan,
        x,
        seed=seed,
        sample_ids=sample_ids,
        guidance_scale=guidance_scale if guided else 1.0,  # type: ignore[arg-type]
        guided=guided,
        start=start,
        brownian=brownian,
    )
    if state is not None:
        loop.load_state_dict(state)
    keep = None
    if known is not None and mask is not None:
        keep = _keeping(loop, checks.like("known", known, "x", x), mask, seed, sample_ids)
        if state is None:
            loop.x = keep(start)
    for _ in _steps(len(plan) - loop.index, progress):
        output = model(loop.model_input, loop.time, cond)
        prediction: Any = getattr(output, "sample", output)
        loop.step(prediction)
        if keep is not None:
            loop.x = keep(loop.index)
        if callback is not None:
            callback(loop)
            if not loop.done and loop.row.input_scale == 1.0:
                loop.x = loop.x  # the network sees what was changed in place
    return loop.x


def _first_sample(plan, sources, start, seed, sample_ids, dtype, device) -> Tensor:
    """From the one source that is given."""
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        raise ValueError(f"{', '.join(sources)}: got {' and '.join(given) or 'none'}, expected one")
    name, source = given[0], sources[given[0]]
    if name == "state":
        source = source.get("x") if isinstance(source, Mapping) else source
    if start and name not in ("x", "image"):
        raise ValueError(f"start: got {start}, which goes with x or image, not with {name}")
    if name != "shape":
        if dtype is not None or device is not None:
            raise ValueError(f"dtype, device: go with shape; {name} has its own")
        checks.tensor(name, source)
    if seed is None and name in ("shape", "image"):
        raise ValueError("seed: got None, but the first sample is drawn from it")
    if name == "image":
        return _noised(source, source.dtype, plan, start, seed, sample_ids)
    if name != "shape":
        return source
    if plan.initial_scale == 1.0:
        return randn(source, seed=seed, sample_ids=sample_ids, dtype=dtype, device=device)
    z = randn(source, seed=seed, sample_ids=sample_ids, stream=INITIAL_LATENT, device=device)
    return z.mul_(plan.initial_scale).to(dtype or torch.float32)


def _noised(image, dtype, plan, index, seed, sample_ids) -> Tensor:
    """An image with the noise of the sample before a row."""
    level = plan.level(index)
    checks.size(image.shape)
    key = checks.seed(seed, image.shape[0], image.device)
    ids = checks.sample_ids(sample_ids, image.shape[0], image.device)
    return diffused(image, level, dtype, key, ids, index, None)


def _keeping(loop, known, mask, seed, sample_ids) -> Callable[[int], Tensor]:
    """The sample before a row, with what is known where the mask is 0."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        checks.tensor("mask", mask, batch=False)
    try:
        mask = mask.expand(known.shape)
    except RuntimeError:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to known's "
            f"{tuple(known.shape)}"
        ) from None

    def keep(index: int) -> Tensor:
        noised = _noised(known, loop.x.dtype, loop.plan, index, seed, sample_ids)
        if mask.dtype == torch.bool:
            return torch.where(mask, loop.x, noised)
        return blend(noised, loop.x, mask.to(loop.x.dtype))

    return keep


def blend(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """start + share (end - start), each operation rounded as it is on any device; where share is 1,
    end to the bit."""
    return torch.where(share == 1, end, start + share * (end - start))


def _both(uncond: Any, cond: Any, batch: int) -> Any:
    """[uncond, cond] along the batch, leaf by leaf."""
    try:
        return pytree.tree_map(lambda c, u: _concatenate(u, c, batch), cond, uncond)
    except _Mismatch as error:
        raise ValueError(str(error)) from None
    except ValueError as error:  # of the trees
        kind = type(uncond).__name__
        raise ValueError(f"uncond: got a {kind} that is not built as cond: {error}") from None


class _Mismatch(Exception):
    """A leaf of uncond that does not go with cond's."""


def _concatenate(uncond: Any, cond: Any, batch: int) -> Any:
    if not isinstance(cond, Tensor) or cond.ndim == 0:
        if not _are_equal(uncond, cond):
            raise _Mismatch(
                f"uncond: got {uncond!r} where cond has {cond!r}, and these do not lie along the "
                "batch: make tensors of them, a row a sample"
            )
        return cond
    if not isinstance(uncond, Tensor):
        raise TypeError(f"uncond: got {type(uncond).__name__} where cond has a torch.Tensor")
    halves = []
    for name, value in (("uncond", uncond), ("cond", cond)):
        if value.ndim == 0 or value.shape[0] not in (1, batch):
            raise _Mismatch(
                f"{name}: got shape {tuple(value.shape)}, expected {batch} rows (the batch) or one"
            )
        halves.append(value.expand(batch, *value.shape[1:]))
    if halves[0].shape != halves[1].shape:
        raise _Mismatch(
            f"uncond: got shape {tuple(uncond.shape)}, expected cond's {tuple(cond.shape)}, "
            "or one row of it"
        )
    return torch.cat(halves)


def _are_equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    try:
        return bool(a == b)
    except Exception:  # what cannot be compared is not known to be equal
        return False


def _steps(count: int, progress: bool):
    if not progress:
        return range(count)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress: needs tqdm (pip install fastgen-samplers[cli])") from None
    return tqdm(range(count), desc="sampling", unit="step")
