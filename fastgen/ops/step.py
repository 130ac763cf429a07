"""One step of a sampler: the general step, and DDPM's and DDIM's with plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..plan import HISTORY, INPUTS, MAX_NOISES, MAX_OUTPUTS, ROW_FLOATS, Row
from ..solvers.ddim import ddim_row
from ..solvers.ddpm import ddpm_row
from . import kernel
from .dispatch import constant, is_eager

_ALWAYS = frozenset(("x", "e", "denoised"))
_SLOTS = tuple(f"h{k}" for k in range(HISTORY))


def step(
    row: Row | Tensor,
    x: Tensor,
    output: Tensor | None = None,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    known: Tensor | None = None,
    history: Sequence[Tensor | None] = (),
    logvar: Tensor | None = None,
    output_scale: Tensor | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | Sequence[Tensor] | None = None,
    step: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    row_index: Tensor | None = None,
    outputs: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """One launch of the general step: guidance, prediction, clip, linear combination, noise.

        e   = output_scale (u + g (c - u))
        d   = clip(a_x x + a_e e)
        y_j = sum_k C[j,k] in_k + sum_m S[j,m] z_m,  in = (x, e, u, d, known, h_0 ... h_6)

    row: a ``Row``; or float32 (72,), (B, 72): one per sample; or a ``Plan.table`` (N, 72) together
        with ``row_index``, an int64 tensor of one element that chooses the row on the device (for
        CUDA graphs: change it in place between replays). Its value is added to ``step``.
    x: the sample (B, ...). output, uncond: the network's outputs c and u, known: an image to mix
        in, logvar: a log-variance for z_0, all of x's shape, any floating dtype. history: h_0 ...
    guidance_scale: g, a float or one per sample; g = 1 gives c exactly. output_scale: (B,) float32.
    seed, sample_ids, step: where z_0, z_1 ... come from (streams 2, 8, 9, 10); with ``seed`` goes
        ``step``, or a row_index. Or noise: the normals themselves. Needed where the row draws any.
    outputs, dtypes: how many results (a Row knows) and of which dtypes; by default y_0 has x's and
        the others, as history, float32.
    out: a tensor a result; each may be one of the inputs. backend: as for ``ddpm_step``.

    Returns y_0, or the tuple (y_0, y_1, ...). Raises TypeError or ValueError for what does not fit.
    """
    if (
        type(row) is Row and len(row.outputs) == 1 and outputs in (None, 1) and dtypes is None
        and row_index is None and output_scale is None and (noise is None or row.noises == 1)
        and type(history) in (tuple, list) and len(history) <= HISTORY
        and (step is None or (type(step) is int and 0 <= step < checks.MAX_STEPS))
    ):  # fmt: skip
        result = _straight(row, x, output, uncond, known, logvar, history, guidance_scale, seed,
                           noise, step, sample_ids, out, backend)  # fmt: skip
        if result is not None:
            return result
    checks.tensor("x", x)
    shape, device = x.shape, x.device
    batch = shape[0]
    given = [("output", output), ("uncond", uncond), ("known", known), ("logvar", logvar)]
    if not isinstance(history, Sequence):
        raise TypeError(f"history: got {type(history).__name__}, expected a sequence of tensors")
    given += [(f"history[{k}]", h) for k, h in enumerate(history)]
    for name, tensor in given:
        if tensor is not None:
            checks.like(name, tensor, "x", x)
    if uncond is not None and output is None:
        raise ValueError("uncond: got a tensor without output")
    if len(history) > HISTORY:
        raise ValueError(f"history: got {len(history)} tensors, expected at most {HISTORY}")
    if noise is not None and not isinstance(noise, Tensor | Sequence):
        raise TypeError(f"noise: got {type(noise).__name__}, expected a tensor or a sequence")
    normals = (noise,) if isinstance(noise, Tensor) else tuple(noise or ())
    for m, tensor in enumerate(normals):
        checks.like(f"noise[{m}]", tensor, "x", x)
    if isinstance(row, Row):
        count = len(row.outputs)
        if outputs is not None and outputs != count:
            raise ValueError(f"outputs: got {outputs}, expected the row's {count}")
        _needs(row, output, uncond, known, history)
        if row_index is not None:
            raise ValueError("row_index: goes with a table of rows, got a Row")
        if row.noises > len(normals) and seed is None:
            raise ValueError(f"seed, noise: the row draws {row.noises} normals, got neither")
        if row.noises == 0:
            seed = None
    else:
        count = checks.integer("outputs", 1 if outputs is None else outputs, 1, MAX_OUTPUTS + 1)
        row = _rows(row, batch, device, row_index)
    if len(normals) > MAX_NOISES:
        raise ValueError(f"noise: got {len(normals)} tensors, expected at most {MAX_NOISES}")
    key: kernel.Seed = None
    ids: int | Tensor = 0
    step = 0 if step is None and (row_index is not None or seed is None) else checks.step(step)
    if seed is not None:
        checks.size(shape)
        key = checks.seed(seed, batch, device)
        ids = checks.sample_ids(sample_ids, batch, device)
    guidance = _guidance(guidance_scale, uncond, batch, device)
    if output_scale is not None:
        scale = checks.per_sample("output_scale", output_scale, batch, device)
        if not isinstance(scale, Tensor) or scale.numel() != batch:
            raise ValueError(f"output_scale: got {output_scale}, expected a tensor ({batch},)")
        output_scale = scale.float().contiguous()
    if dtypes is None:
        dtypes = (x.dtype,) + (torch.promote_types(x.dtype, torch.float32),) * (count - 1)
    else:
        _check_dtypes(dtypes, count)
    tensors = (x, output, uncond, known, logvar, *history, *normals)
    if isinstance(row, Tensor) and device.type == "cpu" and is_eager():  # a GPU would synchronise
        used = row
        if row_index is not None:
            used = row[checks.integer("row_index", int(row_index), 0, len(row))]
        _table_needs(used, seed, normals, given)
    outs = None
    if out is not None:
        if not isinstance(out, Tensor | Sequence):
            raise TypeError(f"out: got {type(out).__name__}, expected a tensor or a sequence")
        outs = [out] if isinstance(out, Tensor) else list(out)
        if len(outs) != count:
            raise ValueError(f"out: got {len(outs)} tensors, expected {count}, one an output")
        numbers = [t for t in (output_scale, guidance, row, row_index) if isinstance(t, Tensor)]
        for tensor, dtype in zip(outs, dtypes, strict=True):
            checks.out(tensor, shape, dtype, device, (*tensors, *numbers))
        checks.apart(outs)
    name = kernel.choose(backend, *tensors, results=dtypes)
    results = kernel.run(
        shape, row, backend=name, dtypes=dtypes, device=device, like=x, x=x, cond=output,
        uncond=uncond, known=known, logvar=logvar, history=tuple(history),
        noise=normals, row_index=row_index, guidance=guidance, output_scale=output_scale, seed=key,
        sample_ids=ids, step=step, out=outs,
    )  # fmt: skip
    return tuple(results) if count > 1 else results[0]


def _check_dtypes(dtypes: object, count: int) -> None:
    if not isinstance(dtypes, Sequence):
        raise TypeError(f"dtypes: got {type(dtypes).__name__}, expected a sequence, one an output")
    if len(dtypes) != count:
        raise ValueError(f"dtypes: got {len(dtypes)}, expected {count}, one an output")
    for j, dtype in enumerate(dtypes):
        if dtype not in checks.DTYPES:
            raise TypeError(
                f"dtypes[{j}]: got {dtype}, expected float32, bfloat16, float16 or float64"
            )


def _needs(row: Row, output, uncond, known, history) -> None:
    """Every input that the row reads is there."""
    reads = row.reads
    for name, argument, tensor in (("e", "output", output), ("u", "uncond", uncond),
                                   ("known", "known", known)):  # fmt: skip
        if name in reads and tensor is None:
            raise ValueError(f"{argument}: the row reads it, got None")
    for k in range(HISTORY):
        if f"h{k}" in reads and (k >= len(history) or history[k] is None):
            raise ValueError(f"history: the row reads slot {k}, got {len(history)} tensors")


def _table_needs(rows: Tensor, seed, normals: tuple, given: list) -> None:
    """The same for rows in a tensor: whatever has a weight is there."""
    start = ROW_FLOATS - MAX_OUTPUTS * MAX_NOISES
    weights = rows.detach()[..., 8:start].reshape(-1, len(INPUTS)).ne(0).any(0).tolist()
    drawn = rows.detach()[..., start:].reshape(-1, MAX_NOISES).ne(0).any(0).tolist()
    if seed is None and any(drawn[len(normals) :]):
        raise ValueError("seed, noise: the row draws normals, got neither")
    there = {name: tensor is not None for name, tensor in given}
    named = {"e": "output", "u": "uncond", "known": "known"}
    named |= {f"h{k}": f"history[{k}]" for k in range(HISTORY)}
    for name, used in zip(INPUTS, weights, strict=True):
        if used and name in named and not there.get(named[name], False):
            raise ValueError(f"{named[name]}: the row reads it, got None")


def _rows(rows: Tensor, batch: int, device: torch.device, row_index: Tensor | None) -> Tensor:
    if not isinstance(rows, Tensor):
        raise TypeError(f"row: got {type(rows).__name__}, expected a fastgen.Row or a tensor")
    if rows.dtype != torch.float32 or rows.device != device:
        raise ValueError(f"row: got {rows.dtype} on {rows.device}, expected float32 on {device}")
    if row_index is not None and not isinstance(row_index, Tensor):
        raise TypeError(f"row_index: got {type(row_index).__name__}, expected an int64 tensor")
    if rows.ndim == 1:
        rows = rows.view(1, -1)
    fits = rows.ndim == 2 and (row_index is not None or rows.shape[0] in (1, batch))
    if rows.ndim != 2 or rows.shape[1] != ROW_FLOATS or not fits:
        raise ValueError(f"row: got shape {tuple(rows.shape)}, expected ({batch}, {ROW_FLOATS})")
    if row_index is not None and (
        row_index.dtype != torch.int64 or row_index.numel() != 1 or row_index.device != device
    ):
        raise ValueError(f"row_index: expected one int64 on {device}, got {row_index}")
    return rows.contiguous()


def ddpm_step(
    x: Tensor,
    model_output: Tensor,
    alpha_bar: float,
    alpha_bar_prev: float,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    prediction: str = "epsilon",
    clip: float | tuple[float, float] | None = None,
    variance: str | Tensor = "fixed_small",
    seed: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    step: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_t to x_s by the ancestral step of DDPM: Ho, Jain & Abbeel (2020), eq. 6, 7 and 11.

    x: the sample (B, ...). model_output (and uncond): what the network predicts, of x's shape.
    alpha_bar, alpha_bar_prev: the cumulative signal level at t and at s, plain numbers with
        0 <= alpha_bar <= alpha_bar_prev <= 1 (0 is refused for epsilon prediction).
    prediction: "epsilon", "sample" or "v". clip: bounds of the estimate of x_0.
    variance: "fixed_small" (the posterior's, beta tilde), "fixed_large" (beta), or the logarithm of
        a learned variance, of x's shape.
    seed, sample_ids, step: where the noise comes from (stream 2); or noise: eps itself. None is
        drawn, and none of them needed, where alpha_bar_prev = 1.
    out: where to write, like x; it may be one of the inputs, but not overlap one partly.
    backend: "cpu", "cuda", "triton" or "reference"; by default the best that serves (see
        ``fastgen.info``).

    Returns the next sample in x's dtype. Raises TypeError or ValueError for what does not fit.
    """
    logvar = None
    if isinstance(variance, Tensor):
        logvar, variance = variance, "learned"
    elif not isinstance(variance, str) or variance not in ("fixed_small", "fixed_large"):
        raise ValueError(
            f"variance: got {variance!r}, expected 'fixed_small', 'fixed_large' or a tensor"
        )
    row = ddpm_row(
        constant(alpha_bar), constant(alpha_bar_prev), prediction, _bounds(clip), variance
    )
    return _one_step(row, x, model_output, uncond, guidance_scale, logvar, seed, noise, step,
                     sample_ids, out, backend)  # fmt: skip


def ddim_step(
    x: Tensor,
    model_output: Tensor,
    alpha_bar: float,
    alpha_bar_prev: float,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    prediction: str = "epsilon",
    clip: float | tuple[float, float] | None = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    seed: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    step: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_t to x_s by DDIM: Song, Meng & Ermon (2021), eq. 12.

    alpha_bar_prev may also lie below alpha_bar, with eta = 0: from data towards noise (inversion).
    eta: 0 is deterministic and draws no noise; 1 has DDPM's variance (eq. 16).
    use_clipped_model_output: epsilon is derived again from the clipped estimate of x_0.
    The other arguments, the result and what is raised are ``ddpm_step``'s.
    """
    row = ddim_row(
        constant(alpha_bar), constant(alpha_bar_prev), prediction, _bounds(clip), constant(eta),
        use_clipped_model_output,
    )  # fmt: skip
    return _one_step(row, x, model_output, uncond, guidance_scale, None, seed, noise, step,
                     sample_ids, out, backend)  # fmt: skip


def _bounds(clip):  # rows are cached by their arguments
    return tuple(map(constant, clip)) if isinstance(clip, list | tuple) else constant(clip)


def _guidance(scale, uncond: Tensor | None, batch: int, device: torch.device) -> float | Tensor:
    guidance = checks.per_sample("guidance_scale", scale, batch, device)
    if uncond is None and (isinstance(guidance, Tensor) or guidance != 1.0):
        raise ValueError(f"guidance_scale: got {scale} without uncond, which it weighs against")
    return guidance.float() if isinstance(guidance, Tensor) else guidance


def _straight(row, x, output, uncond, known, logvar, history, guidance, seed, noise, step_count,
              sample_ids, out, backend) -> Tensor | None:  # fmt: skip
    """A row of one output straight to the kernel, where all that it takes is there; or None."""
    if backend is not None or sample_ids is not None or x is None or output is None:
        return None
    draws = row.noises > 0
    if draws and ((seed is None) == (noise is None) or (noise is None and step_count is None)):
        return None  # without a source of noise, or with two
    if uncond is None and type(guidance) is float and guidance != 1.0:
        return None
    if not (row.reads <= _ALWAYS or row.reads <= _there(uncond, known, history)):
        return None
    return kernel.quick(
        row, x, output, uncond, known, logvar, *history, noise=noise if draws else None,
        guidance=guidance, seed=seed if draws else None, step=step_count, out=out,
    )  # fmt: skip


def _there(uncond, known, history) -> frozenset[str]:
    """The inputs that a row may read, of a call with x and output."""
    names = [("u", uncond), ("known", known), *zip(_SLOTS, history, strict=False)]
    return _ALWAYS | {name for name, tensor in names if tensor is not None}


def _one_step(row, x, output, uncond, guidance, logvar, seed, noise, step_count, sample_ids, out,
              backend) -> Tensor:  # fmt: skip
    """``step`` for one output of x and the network's, with errors that name its arguments."""
    result = _straight(row, x, output, uncond, None, logvar, (), guidance, seed, noise, step_count,
                       sample_ids, out, backend)  # fmt: skip
    if result is not None:
        return result
    checks.tensor("x", x)
    checks.like("model_output", output, "x", x)
    shape, device = x.shape, x.device
    if uncond is not None:
        checks.like("uncond", uncond, "x", x)
    if logvar is not None:
        checks.like("variance", logvar, "x", x)
    guidance = _guidance(guidance, uncond, shape[0], device)
    key: kernel.Seed = None
    ids: int | Tensor = 0
    normals: tuple[Tensor, ...] = ()
    if row.noises:
        if noise is not None:
            normals = (checks.like("noise", noise, "x", x),)
            if seed is not None:
                raise ValueError("seed, noise: got both, expected one of them")
        elif seed is None:
            raise ValueError("seed, noise: this step draws noise, got neither")
        else:
            step_count = checks.step(step_count)
            checks.size(shape)
            key = checks.seed(seed, shape[0], device)
            ids = checks.sample_ids(sample_ids, shape[0], device)
    outs = None
    if out is not None:
        scale = guidance if isinstance(guidance, Tensor) else None
        read = (x, output, uncond, logvar, *normals, scale)
        outs = [checks.out(out, shape, x.dtype, device, read)]
    return kernel.run(
        shape, row, backend=kernel.choose(backend, x, output, uncond, logvar, *normals),
        dtypes=(x.dtype,), device=device, like=x, x=x, cond=output, uncond=uncond, logvar=logvar,
        noise=normals, guidance=guidance, seed=key, sample_ids=ids, step=step_count or 0, out=outs,
    )[0]  # fmt: skip
