"""Noise as a function of (seed, sample id, step, stream, element): the noise contract."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import backends, checks
from ..plan import Output, Row
from . import kernel

INITIAL_LATENT = 1  # streams of the noise contract
STEP_NOISE = 2
REPARAMETERIZE = 3
FORWARD_DIFFUSION = 4

_ROW = Row((Output(noise=(1.0,)),))


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words from a counter (four words) and a key (two words).

    Philox4x32-10 of Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3"
    (SC 2011). Raises ValueError for a wrong count of words or a word outside [0, 2^32).
    """
    for name, words in (("counter", counter), ("key", key)):
        if not isinstance(words, Sequence | np.ndarray | Tensor):
            raise TypeError(f"{name}: got {type(words).__name__}, expected a sequence of words")
    if len(counter) != 4 or len(key) != 2:
        raise ValueError(
            f"counter, key: got {len(counter)} and {len(key)} words, expected four and two"
        )
    counter = tuple(checks.integer("counter", word, 0, 1 << 32) for word in counter)
    key = tuple(checks.integer("key", word, 0, 1 << 32) for word in key)
    return backends.native().philox4x32(counter, key)


def randn(
    shape: Sequence[int],
    *,
    seed: int | Sequence[int] | Tensor,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int = 0,
    stream: int = INITIAL_LATENT,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard normal noise that depends on nothing but its arguments.

    shape: (B, ...); dimension 0 is the batch.
    seed: int in [0, 2^64), or one per sample: a sequence, or an int64 tensor (two's complement).
    sample_ids: int64, one per sample; 0 ... B-1 by default. A sample's noise is that of its id,
        wherever it stands in whichever batch.
    step, stream: which of a sample's noises; step in [0, 2^24), stream in [0, 256). The defaults
        give the initial latent that ``fastgen.sample`` draws.
    dtype: float32 (default), bfloat16, float16 or float64; the float32 normals, rounded once.
    out: where to write, of ``shape``; dtype and device are then its own. backend: as for
        ``ddpm_step``.

    Returns a tensor of ``shape``: Box-Muller on Philox4x32-10, |z| <= 6.764; the same bits on every
    backend. Raises TypeError or ValueError for what does not fit the above.
    """
    if out is not None:
        checks.tensor("out", out)
    if dtype is None and device is None and backend is None and sample_ids is None:
        if (
            seed is not None
            and type(stream) is int
            and 0 <= stream < 256
            and kernel.is_quick(seed, step)
        ):
            given = out
            if out is None and type(shape) in (tuple, torch.Size) and len(shape) > 0:
                with contextlib.suppress(RuntimeError, TypeError):  # the checks below say why
                    given = backends.on_huge_pages(torch.empty(shape, dtype=torch.float32))
            if given is not None and tuple(shape) == given.shape:
                result = kernel.quick(_ROW, seed=seed, step=step, streams=(stream,), out=given)
                if result is not None:
                    return result
    if out is not None:
        dtype = dtype or out.dtype
        device = device if device is not None else out.device
    shape = checks.shape(shape)
    device = torch.empty(0, device=device).device
    dtype = dtype or torch.float32
    if dtype not in checks.DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected float32, bfloat16, float16 or float64")
    key = checks.seed(seed, shape[0], device)
    ids = checks.sample_ids(sample_ids, shape[0], device)
    step = checks.step(step)
    stream = checks.integer("stream", stream, 0, 256)
    outs = None
    if out is not None:
        outs = [checks.out(out, shape, dtype, device, ())]
    name = backends.choose("step", backend, device, dtype)
    return kernel.run(shape, _ROW, backend=name, dtypes=(dtype,), device=device, seed=key,
                      sample_ids=ids, step=step, streams=(stream,), out=outs)[0]  # fmt: skip
