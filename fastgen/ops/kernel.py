"""One launch of the step kernel: what every pointwise op comes down to.

``launch`` goes straight to a backend; ``torch.ops.fastgen.step`` is the same call for compile,
transforms and gradients, with all numbers in tensors so that nothing is frozen into a graph.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks
from ..cache import cached_constant
from ..plan import MAX_NOISES, MAX_OUTPUTS, Output, Row
from ..reference.arithmetic import per_sample_rows
from ..reference.noise import key_tensors, normal
from ..reference.step import step as reference_step
from ..reference.step_gradients import step_gradients
from ..reference.threshold import thresholded
from .dispatch import LIBRARY, is_eager, is_plain, wants_gradient
from .recorded import as_of, attach

MAX_KERNEL_DIMS = 8  # beyond, tensors are flattened by a copy
STEP_STREAMS = (2, 8, 9, 10)  # of z_0 ... z_3, in the noise contract

Seed = int | tuple[Tensor, int] | None


def choose(
    backend: str | None,
    *tensors: Tensor | None,
    op: str = "step",
    results: Sequence[torch.dtype] = (),
) -> str:
    """The backend that serves these tensors and makes results of these dtypes; float64 anywhere
    takes the reference."""
    dtype, device = torch.float64 if torch.float64 in results else torch.float32, None
    for tensor in tensors:
        if tensor is not None:
            device = tensor.device
            if tensor.dtype is torch.float64:
                dtype = torch.float64
    assert device is not None
    return backends.choose(op, backend, device, dtype)


def call(backend: str, stem: str, function: str, device: torch.device, *arguments) -> None:
    """A kernel by the backend's name: ``_native.function`` or ``kernels.stem.function``."""
    if backend == "cpu":
        getattr(backends._native, function)(*arguments, torch.get_num_threads(), None)
    elif backend == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(backends._native, function)(*arguments, 1, stream)
    else:
        module = importlib.import_module(f"fastgen.kernels.{stem}")
        getattr(module, function)(*arguments)


def is_quick(seed: object, step: object, out: object = None) -> bool:
    """Whether a call may try the straight path: eager, with one plain seed or none, and an output,
    if any, that may be written."""
    return (
        backends._native is not None
        and (
            seed is None
            or (
                (type(seed) is int and 0 <= seed < 1 << 64)
                and (type(step) is int and 0 <= step < checks.MAX_STEPS)
            )
        )
        and is_eager()
        and not (isinstance(out, Tensor) and checks.is_frozen(out))
    )


def quick(
    row: Row,
    *operands: Tensor | None,
    noise: Tensor | None = None,
    guidance: object = 1.0,
    seed: object = None,
    step: object = 0,
    streams: tuple[int, ...] = STEP_STREAMS,
    out: Tensor | None = None,
) -> Tensor | None:
    """The straight path for one output on the CPU: a single native call that checks its operands
    (x, cond, uncond, known, logvar, history ...) and runs; None where anything is out of the
    ordinary, for the general path to serve or to refuse with a reason.
    """
    if type(guidance) is not float or row.threshold is not None or not is_quick(seed, step, out):
        return None
    grad = torch.is_grad_enabled()
    step = 0 if seed is None else step
    arguments = (operands, noise, out, row.packed, guidance, seed, step, streams)
    result = backends._native.quick_step(*arguments, grad, torch.get_num_threads())
    if result is not NotImplemented:
        if out is not None:
            torch.autograd.graph.increment_version(out)
        return result
    if out is not None or not wants_gradient(*operands, noise):
        return None
    result = backends._native.quick_step(*arguments, False, torch.get_num_threads())
    if result is NotImplemented:
        return None
    given = () if noise is None else (noise,)
    drawn = (seed, 0, step, streams)
    return attach([result], row, operands[:5], operands[5:], given, guidance, None, drawn)[0]


def run(
    shape: Sequence[int],
    row: Row | Tensor,
    *,
    backend: str,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    like: Tensor | None = None,
    x: Tensor | None = None,
    cond: Tensor | None = None,
    uncond: Tensor | None = None,
    known: Tensor | None = None,
    logvar: Tensor | None = None,
    history: tuple[Tensor | None, ...] = (),
    noise: tuple[Tensor, ...] = (),
    row_index: Tensor | None = None,
    guidance: float | Tensor = 1.0,
    output_scale: Tensor | None = None,
    seed: Seed = None,
    sample_ids: int | Tensor = 0,
    step: int = 0,
    streams: tuple[int, ...] = STEP_STREAMS,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The outputs of one row, of ``dtypes``; arguments are checked already.

    ``like``: the tensor whose memory format the outputs take.
    ``row``: a Row, or float32 (R, 72) on the device: one for all samples, one per sample (R = B),
    or, with ``row_index`` (int64, one element), a table from which that row is taken; the index is
    also added to the noise's ``step``.
    """
    if isinstance(row, Row) and row.threshold is not None:
        estimate = run(
            shape, _estimate(*row.denoised), backend=backend,
            dtypes=(torch.float64 if torch.float64 in dtypes else torch.float32,), device=device,
            x=x, cond=cond, uncond=uncond, guidance=guidance, output_scale=output_scale,
        )[0]  # fmt: skip
        row = thresholded(_row_tensor(row, device), estimate, row.threshold)
    if len(shape) > MAX_KERNEL_DIMS and backend != "reference":

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else per_sample_rows(tensor)

        results = run(
            (shape[0], math.prod(shape[1:])), row, backend=backend, dtypes=dtypes, device=device,
            x=flat(x), cond=flat(cond), uncond=flat(uncond), known=flat(known),
            logvar=flat(logvar), history=tuple(map(flat, history)),
            noise=tuple(map(per_sample_rows, noise)), row_index=row_index,
            guidance=guidance, output_scale=output_scale, seed=seed, sample_ids=sample_ids,
            step=step, streams=streams,
        )  # fmt: skip
        return _written(out, [y.reshape(tuple(shape)) for y in results])
    tensors = (x, cond, uncond, known, logvar, output_scale, *history, *noise, *(out or ()))
    if isinstance(row, Tensor):
        tensors += (row,)
    if isinstance(guidance, Tensor):
        tensors += (guidance,)
    if isinstance(seed, tuple):
        tensors += (seed[0],)
    if isinstance(sample_ids, Tensor):
        tensors += (sample_ids,)
    if row_index is not None:
        tensors += (row_index,)
    recording = out is None and isinstance(row, Row)  # a table may be on a GPU, out of sight
    if backend != "reference" and is_plain(*tensors, recording=recording):
        if out is None:
            made = _allocate(shape, dtypes, device, like)
        else:
            made = list(out)
        launch(backend, shape, row, x, cond, uncond, known, logvar, history, noise, row_index,
               guidance, output_scale, seed, sample_ids, step, streams, made)  # fmt: skip
        if out is not None:
            torch.autograd.graph.increment_version(made)
        elif isinstance(row, Row) and wants_gradient(*tensors):
            made = attach(made, row, (x, cond, uncond, known, logvar), history, noise, guidance,
                          output_scale, (seed, sample_ids, step, streams))  # fmt: skip
        return made
    rows = row if isinstance(row, Tensor) else _row_tensor(row, device)
    if not isinstance(guidance, Tensor):
        guidance = torch.full((1,), guidance, dtype=torch.float32, device=device)
    seeds, ids = key_tensors(seed, sample_ids, shape[0] if shape else 0, device)
    slots = sum(1 << k for k, h in enumerate(history) if h is not None)
    arguments = (
        x, cond, uncond, known, logvar, [h for h in history if h is not None], slots, list(noise),
        rows, row_index, guidance, output_scale, seeds, ids, step, list(streams),
    )  # fmt: skip
    if backend == "reference":
        results = _reference(*arguments, list(shape), len(dtypes))
        results = [y.to(dtype) for y, dtype in zip(results, dtypes, strict=True)]
    else:
        results = torch.ops.fastgen.step(
            *arguments, [checks.DTYPES.index(d) for d in dtypes], list(shape), device, backend
        )
    return _written(out, results)


def _written(out: Sequence[Tensor] | None, results: list[Tensor]) -> list[Tensor]:
    if out is None:
        return results
    return [written(o, y) for o, y in zip(out, results, strict=True)]


def written(out: Tensor, result: Tensor) -> Tensor:
    """``out`` with a result copied into it; ValueError where that would lose a gradient."""
    if torch.is_grad_enabled() and result.requires_grad:
        raise ValueError("out: an input requires grad, and writing into out has no gradient")
    return out.copy_(result)


def launch(
    backend, shape, row, x, cond, uncond, known, logvar, history, noise, row_index, guidance,
    output_scale, seed, sample_ids, step, streams, out,
) -> None:  # fmt: skip
    """Writes into ``out``, straight through the backend named."""
    if isinstance(row, Tensor):
        rows, packed = row, int(row.shape[0] > 1 and row_index is None)
        if row_index is not None and row_index.is_cpu:  # a GPU's would synchronise
            at = checks.integer("row_index", int(row_index), 0, len(row))
            if seed is not None:
                checks.step(step + at)
    else:
        rows, packed = None, row.packed
    if isinstance(guidance, Tensor):
        guidance = (guidance.float().contiguous(), int(guidance.numel() > 1))
    arguments = (
        tuple(shape), x, cond, uncond, known, logvar, history, noise, tuple(out), packed, rows,
        row_index, guidance, output_scale, seed, sample_ids, step, streams,
    )  # fmt: skip
    call(backend, "step", "step", out[0].device, *arguments)


def _allocate(
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    like: Tensor | None,
) -> list[Tensor]:
    if like is not None:
        return [backends.empty_like(like, dtype) for dtype in dtypes]
    made = [torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes]
    return [backends.on_huge_pages(tensor) for tensor in made]


@cached_constant
def _estimate(of_x: float, of_e: float) -> Row:
    """What a row with these numbers makes of x and e, before its clip."""
    return Row((Output({"denoised": 1.0}),), (of_x, of_e))


def _row_tensor(row: Row, device: torch.device) -> Tensor:
    # torch.compile makes a tensor of an array by itself; elsewhere the row must not be shared
    tensor = torch.as_tensor if torch.compiler.is_compiling() else torch.tensor
    return tensor(row.floats, device=device).view(1, -1)


# ---- the registered op ---------------------------------------------------------------------------

LIBRARY.define(
    "step(Tensor? x, Tensor? cond, Tensor? uncond, Tensor? known, Tensor? logvar, "
    "Tensor[] history, int slots, Tensor[] noise, Tensor rows, Tensor? row_index, "
    "Tensor guidance, Tensor? output_scale, Tensor? seeds, Tensor? sample_ids, SymInt step, "
    "int[] streams, int[] dtypes, SymInt[] shape, Device device, str backend) -> Tensor[]"
)


def _step_kernel(x, cond, uncond, known, logvar, history, slots, noise, rows, row_index, guidance,
                 output_scale, seeds, sample_ids, step, streams, dtypes, shape, device,
                 backend):  # fmt: skip
    out = _outputs(dtypes, shape, device, x if x is not None else cond)
    contiguous = [None if t is None else t.contiguous() for t in (output_scale, seeds, sample_ids)]
    output_scale, seeds, sample_ids = contiguous
    launch(backend, shape, rows.contiguous(), x, cond, uncond, known, logvar,
           tuple(_in_slots(history, slots)), tuple(noise), row_index, guidance.contiguous(),
           output_scale, None if seeds is None else (seeds, int(seeds.numel() > 1)), sample_ids,
           step, tuple(streams), out)  # fmt: skip
    return out


def _step_fake(x, cond, uncond, known, logvar, history, slots, noise, rows, row_index, guidance,
               output_scale, seeds, sample_ids, step, streams, dtypes, shape, device,
               backend):  # fmt: skip
    return _outputs(dtypes, shape, device, x if x is not None else cond)


def _outputs(codes, shape, device, like) -> list[Tensor]:
    return _allocate(shape, [checks.DTYPES[code] for code in codes], device, like)


def _in_slots(history: Sequence[Tensor], slots: int) -> list[Tensor | None]:
    """h_0 ... again, of which the registered op takes those that are there: ``slots``, a bit for
    each."""
    if slots < 0 or slots.bit_count() != len(history):
        raise ValueError(f"slots: {slots:b} has other bits than the {len(history)} tensors given")
    there = iter(history)
    return [next(there) if slots >> k & 1 else None for k in range(slots.bit_length())]


def _drawn(noise: list[Tensor], rows: Tensor, row_index, seeds, sample_ids, step, streams,
           shape) -> list[Tensor]:  # fmt: skip
    """z_0 ...: those given, and behind them those that the seed gives."""
    if seeds is None:
        return list(noise)
    if row_index is not None:
        step = row_index.view(()) + step
    used = len(streams)
    looked_at = rows.device.type == "cpu" and is_eager()  # elsewhere it would synchronise
    if looked_at and not rows.requires_grad:  # a weight of zero has a gradient
        scales = rows.detach()[:, -MAX_OUTPUTS * MAX_NOISES :].view(-1, MAX_OUTPUTS, MAX_NOISES)
        columns = (scales != 0).any(0).any(0)
        used = int((columns * torch.arange(1, MAX_NOISES + 1)).max())
    return list(noise) + [
        normal(shape, seeds, sample_ids, step, streams[m]) for m in range(len(noise), used)
    ]


def _reference(x, cond, uncond, known, logvar, history, slots, noise, rows, row_index, guidance,
               output_scale, seeds, sample_ids, step, streams, shape, outputs):  # fmt: skip
    if row_index is not None:
        rows = rows.index_select(0, row_index.view(1))
    z = _drawn(noise, rows, row_index, seeds, sample_ids, step, streams, shape)
    return reference_step(shape, x, cond, uncond, known, logvar, _in_slots(history, slots), z, rows,
                          guidance, output_scale, outputs)  # fmt: skip


def _setup(ctx, inputs, output) -> None:
    (x, cond, uncond, known, logvar, history, slots, noise, rows, row_index, guidance, output_scale,
     seeds, sample_ids, step, streams, dtypes, shape, device, backend) = inputs  # fmt: skip
    ctx.save_for_backward(x, cond, uncond, known, logvar, rows, row_index, guidance, output_scale,
                          seeds, sample_ids, *history, *noise)  # fmt: skip
    ctx.lengths = (len(history), len(noise))
    ctx.plain = (step, streams, shape, slots)


def _backward(ctx, grads):
    (x, cond, uncond, known, logvar, table, row_index, guidance, output_scale, seeds,
     sample_ids, *rest) = ctx.saved_tensors  # fmt: skip
    step, streams, shape, slots = ctx.plain
    history, noise = rest[: ctx.lengths[0]], rest[ctx.lengths[0] :]
    rows = table if row_index is None else table.index_select(0, row_index.view(1))
    drawn = _drawn(noise, rows, row_index, seeds, sample_ids, step, streams, shape)
    found = step_gradients(grads, x, cond, uncond, known, logvar, _in_slots(history, slots), drawn,
                           rows, guidance, output_scale, table.requires_grad)  # fmt: skip
    of_rows = found.rows
    if of_rows is not None and row_index is not None:
        of_rows = torch.zeros_like(table).index_add(0, row_index.view(1), of_rows)

    return (
        as_of(x, found.x), as_of(cond, found.cond), as_of(uncond, found.uncond),
        as_of(known, found.known), as_of(logvar, found.logvar),
        [as_of(v, g) for v, g in zip(_in_slots(history, slots), found.history, strict=True)
         if v is not None], None,
        [as_of(v, g) for v, g in zip(noise, found.noise, strict=False)],
        of_rows, None, as_of(guidance, found.guidance), as_of(output_scale, found.output_scale),
        *[None] * 8,
    )  # fmt: skip


LIBRARY.impl("step", _step_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::step", _step_fake, lib=LIBRARY)
torch.library.register_autograd("fastgen::step", _backward, setup_context=_setup, lib=LIBRARY)
