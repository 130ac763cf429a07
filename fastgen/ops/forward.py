"""The forward process: from data to noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import backends, checks
from ..cache import cached_constant
from ..plan import INPUTS, MAX_NOISES, MAX_OUTPUTS, ROW_FLOATS, Output, Row
from . import kernel
from .dispatch import constant
from .noise import FORWARD_DIFFUSION
from .reparameterize import noise_source


def add_noise(
    x0: Tensor,
    alpha_bar: float | Sequence[float] | Tensor,
    *,
    seed: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    step: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    return_noise: bool = False,
    return_velocity: bool = False,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) eps: Ho, Jain & Abbeel (2020), eq. 4.

    x0: (B, ...). alpha_bar: a in [0, 1], a float or one per sample (B,); a tensor's values are the
        caller's to keep in range (looking would synchronise a GPU).
    seed, sample_ids, step: where eps comes from (stream 4 of the noise contract); ``step`` must be
        given with ``seed``. Or noise: eps itself, of x0's shape.
    return_noise: also eps. return_velocity: also v = sqrt(a) eps - sqrt(1 - a) x_0 (Salimans & Ho
        2022, appendix D). All have x0's dtype.
    out: where to write x_t, like x0; it may be x0 itself. backend: as for ``ddpm_step``.

    Returns x_t, or a tuple (x_t, eps, v) of what was asked for. Raises TypeError or ValueError for
    what does not fit.
    """
    if isinstance(alpha_bar, Sequence) and not isinstance(alpha_bar, str | bytes):
        levels = [checks.alpha_bar("alpha_bar", a) for a in alpha_bar]
        alpha_bar = torch.tensor(levels, dtype=torch.float64, device=getattr(x0, "device", None))
    alpha_bar = constant(alpha_bar)
    if (
        x0 is not None
        and backend is None and sample_ids is None and not (return_noise or return_velocity)
        and type(alpha_bar) is float and (seed is None) != (noise is None)
        and (seed is None or step is not None)
    ):  # fmt: skip
        quick_row = _row(checks.alpha_bar("alpha_bar", alpha_bar), False, False)
        result = kernel.quick(quick_row, x0, noise=noise, seed=seed, step=step,
                              streams=(FORWARD_DIFFUSION,), out=out)  # fmt: skip
        if result is not None:
            return result
    checks.tensor("x0", x0)
    checks.size(x0.shape)
    batch, device = x0.shape[0], x0.device
    seed_words, ids, step_count = noise_source(seed, noise, sample_ids, step, x0)
    level = checks.per_sample("alpha_bar", alpha_bar, batch, device)
    if isinstance(level, Tensor):
        row: Row | Tensor = _rows(level, return_noise, return_velocity)
    else:
        row = _row(checks.alpha_bar("alpha_bar", level), return_noise, return_velocity)
    count = 1 + return_noise + return_velocity
    outs: list[Tensor] | None = None
    if out is not None:
        checks.out(out, x0.shape, x0.dtype, device, (x0, noise))
        outs = [out] + [backends.empty_like(x0) for _ in range(count - 1)]
    results = kernel.run(
        x0.shape, row, backend=kernel.choose(backend, x0, noise), dtypes=(x0.dtype,) * count,
        device=device, like=x0, x=x0, noise=() if noise is None else (noise,), seed=seed_words,
        sample_ids=ids, step=step_count, streams=(FORWARD_DIFFUSION,), out=outs,
    )  # fmt: skip
    return tuple(results) if count > 1 else results[0]


def diffused(
    x0: Tensor,
    level: tuple[float, float],
    dtype: torch.dtype,
    seed: kernel.Seed,
    sample_ids: int | Tensor,
    step: int,
    backend: str | None,
) -> Tensor:
    """alpha x_0 + sigma eps of a level (alpha, sigma), eps as ``add_noise`` draws it."""
    row = _at_level(*level)
    return kernel.run(
        x0.shape, row, backend=kernel.choose(backend, x0, results=(dtype,)), dtypes=(dtype,),
        device=x0.device, like=x0, x=x0, seed=seed if row.noises else None, sample_ids=sample_ids,
        step=step, streams=(FORWARD_DIFFUSION,),
    )[0]  # fmt: skip


@cached_constant
def _at_level(alpha: float, sigma: float) -> Row:
    return Row((Output({"x": alpha}, (sigma,)),))


@cached_constant
def _row(level: float, return_noise: bool, return_velocity: bool) -> Row:
    signal, sigma = np.sqrt(level), np.sqrt(1.0 - level)
    outputs = [Output({"x": signal}, noise=(sigma,))]
    if return_noise:
        outputs.append(Output(noise=(1.0,), target=0))
    if return_velocity:
        outputs.append(Output({"x": -sigma}, noise=(signal,), target=1))
    return Row(tuple(outputs))


def _rows(level: Tensor, return_noise: bool, return_velocity: bool) -> Tensor:
    """The same rows, one per sample, where alpha_bar is a tensor: made on its device."""
    level = level.double()
    signal, sigma = level.sqrt().float(), (1.0 - level).sqrt().float()
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    columns = [zero] * ROW_FLOATS
    columns[2], columns[3] = zero - torch.inf, zero + torch.inf
    outputs = [(signal, sigma)]
    if return_noise:
        outputs.append((zero, one))
    if return_velocity:
        outputs.append((-sigma, signal))
    for j, (weight, scale) in enumerate(outputs):
        columns[8 + j * len(INPUTS)] = weight
        columns[8 + MAX_OUTPUTS * len(INPUTS) + j * MAX_NOISES] = scale
    return torch.stack(columns, dim=1)
