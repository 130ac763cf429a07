"""Parts of bench/gpu_check.py that need a device of their own: streams, graphs and sizes."""

from __future__ import annotations

import functools
import itertools
import subprocess

import torch

import fastgen
from fastgen import Output, Row, backends
from fastgen.bench.gpu_parts import Parity, made, row_of_everything
from fastgen.bench.variants import captured

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
GPU_BACKENDS = ("cuda", "triton")


def streams(device: torch.device, dry: bool) -> dict:
    """The kernels run on the current stream: behind what is queued there, and not elsewhere."""
    parity = Parity()
    shape = (4, 4, 64, 64)
    x, output = made(shape, FLOAT32, "contiguous", 2), made(shape, BFLOAT16, "contiguous", 4)
    expected = fastgen.ddpm_step(x, output, 0.4, 0.6, seed=3, step=1, backend="cpu")
    expected_z = fastgen.reparameterize(x, output, seed=1, step=0, return_kl=True, backend="cpu")
    slow = torch.randn(4096, 4096, device=device)
    for backend in GPU_BACKENDS:
        side = torch.cuda.Stream()
        on_device = x.to(device), output.to(device)
        # compiled now, which would outlast the queue
        fastgen.ddpm_step(*on_device, 0.4, 0.6, seed=3, step=1, backend=backend)
        fastgen.reparameterize(*on_device, seed=1, step=0, return_kl=True, backend=backend)
        late = torch.full_like(on_device[0], torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(100):
                slow = slow @ slow * 1e-3
            late.copy_(on_device[0])
            y = fastgen.ddpm_step(late, on_device[1], 0.4, 0.6, seed=3, step=1, backend=backend)
            z = fastgen.reparameterize(
                late, on_device[1], seed=1, step=0, return_kl=True, backend=backend
            )
            if side.query():
                print(f"{backend}: the queue was empty too soon to prove anything")
        side.synchronize()
        parity(f"{backend} ddpm_step", y, expected)
        parity(f"{backend} reparameterize", z, expected_z)
        two_at_once(parity, backend, [v.to(device) for v in (x, output)], expected)
    return parity.result()


def two_at_once(parity: Parity, backend: str, operands: list[torch.Tensor], expected) -> None:
    """Two streams run the same kernels at the same time, each on memory of its own."""
    sides = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for side, kept in zip(sides, results, strict=True):
            with torch.cuda.stream(side):
                kept.append(fastgen.ddpm_step(*operands, 0.4, 0.6, seed=3, step=1, backend=backend))
    torch.cuda.synchronize()
    for kept in results:
        parity(f"{backend} on two streams at once", tuple(kept), (expected,) * len(kept))


def graphs(device: torch.device, dry: bool) -> dict:
    """One captured step, replayed with other coefficients, seeds and inputs behind its pointers."""
    parity = Parity()
    shape = (3, 4, 32, 32)
    table = fastgen.stack_rows(
        [row_of_everything(2), Row((Output({"x": 0.5, "e": 2.0}, (1.5,)),) * 2)]
    )
    inputs = [[made(shape, FLOAT32, "contiguous", seed + turn) for seed in (2, 40, 80, 12, 22)]
              for turn in range(2)]  # fmt: skip
    seeds = [torch.tensor([1, -2, 3]), torch.tensor([2**62, 5, -6])]

    def call(rows, x, output, known, h0, h3, seed, index, backend, out=None):
        return fastgen.step(rows, x, output, known=known, uncond=output, guidance_scale=3.0,
                            history=[h0, None, None, h3], seed=seed, row_index=index, outputs=2,
                            out=out, backend=backend)  # fmt: skip

    for backend in GPU_BACKENDS:
        static = [v.to(device) for v in inputs[0]]
        rows, seed = table.to(device), seeds[0].to(device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        outs = [torch.empty(shape, device=device) for _ in range(2)]
        arguments = rows, *static, seed, index, backend, outs
        graph, _ = captured(functools.partial(call, *arguments))
        for turn in (0, 1, 0):
            for ours, new in zip(static, inputs[turn], strict=True):
                ours.copy_(new)
            seed.copy_(seeds[turn])
            index.fill_(turn)
            graph.replay()
            expected = call(table, *inputs[turn], seeds[turn], torch.tensor([turn]), "cpu")
            parity(f"{backend} replay {turn}", tuple(outs), tuple(expected))
    return parity.result()


def compiled(device: torch.device, dry: bool) -> dict:
    """torch.compile(fullgraph=True) over a loop of steps: the same bits, and one compilation."""
    parity = Parity()
    shape = (2, 4, 32, 32)
    table = fastgen.stack_rows([row_of_everything(1), Row((Output({"x": 0.5, "e": 2.0}, (1.5,)),))])
    for backend in GPU_BACKENDS:

        def loop(x, output, rows, seed, indices, backend=backend):
            for index in indices:
                x = fastgen.step(rows, x, output, known=output, seed=seed, row_index=index,
                                 history=[x, None, None, output], backend=backend)  # fmt: skip
            return x

        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            fast = torch.compile(loop, fullgraph=True)
            for seed in (3, 9):
                x, output = (made(shape, FLOAT32, "contiguous", seed + i) for i in (1, 2))
                keys, order = torch.tensor([seed, seed + 1]), [torch.tensor([i]) for i in (1, 0, 1)]
                expected = loop(x, output, table, keys, order, "cpu")
                arguments = [v.to(device) for v in (x, output, table, keys)]
                actual = fast(*arguments, [i.to(device) for i in order])
                parity(f"{backend} compiled loop, seed {seed}", actual, expected)
    return parity.result()


def large(device: torch.device, dry: bool) -> dict:
    """More than 2^31 elements: noise against the CPU's for the same samples; strided operands."""
    parity = Parity()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        return {"summary": "less than 40 GiB free: left out"}
    batch, width = 2048, (1 << 20) + 1032
    for backend in GPU_BACKENDS:
        z = fastgen.randn((batch, width), seed=5, dtype=BFLOAT16, device=device, backend=backend)
        for sample in (0, 2046, 2047):
            expected = fastgen.randn((1, width), seed=5, sample_ids=[sample], dtype=BFLOAT16,
                                     backend="cpu")  # fmt: skip
            parity(f"{backend} randn, sample {sample}", z[sample : sample + 1], expected)
        del z
        few = made((1, width), BFLOAT16, "contiguous", 3)
        repeated = few.to(device).expand(batch, width)
        y = fastgen.combine([repeated, repeated], [0.5, -2.0], backend=backend)
        expected = fastgen.combine([few, few], [0.5, -2.0], backend="cpu")
        for sample in (0, 2047):
            parity(
                f"{backend} combine of expanded, sample {sample}", y[sample : sample + 1], expected
            )
        del y, repeated
        torch.cuda.empty_cache()
    return parity.result()


def conv_transpose(device: torch.device, dry: bool) -> dict:
    """The error against float64 of every way to run it, over PyTorch's own on the same input and
    dtype, with TF32 and without."""
    # batch, channels in and out of a group, groups, size, kernel, stride, padding
    cases = [(1, 8, 6, 1, (5, 5), 4, 2, 1), (1, 6, 1, 2, (7,), 4, 2, 1)]
    if not dry:
        cases += [
            (8, 512, 256, 1, (16, 16), 4, 2, 1), (8, 256, 128, 1, (32, 32), 4, 2, 1),
            (1, 1024, 512, 1, (4, 4), 4, 2, 1), (2, 100, 512, 1, (1, 1), 4, 1, 0),
            (3, 33, 17, 1, (19, 19), 3, 2, 1), (4, 64, 3, 1, (64, 64), 4, 2, 1),
            (1, 512, 256, 1, (86,), 16, 8, 4), (2, 128, 64, 1, (777,), 4, 2, 1),
            (1, 64, 1, 1, (4001,), 4, 2, 1), (2, 32, 3, 1, (9, 10, 11), 4, 2, 1),
            (3, 1, 1, 96, (31, 33), 4, 2, 1), (2, 4, 8, 16, (20, 21), 3, 2, 1),
        ]  # fmt: skip
    dtypes = (FLOAT32,) if dry else (FLOAT32, BFLOAT16, FLOAT16)
    failures, rows = 0, []
    for dtype, case in itertools.product(dtypes, cases):
        for tf32 in (False, True) if dtype is FLOAT32 and not dry else (False,):
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            errors, repeated = conv_transpose_errors(device, dtype, *case)
            theirs, scale = errors.pop("torch"), errors.pop("largest")
            worst = max(2 * theirs, torch.finfo(dtype).eps * scale)
            bad = [name for name, error in errors.items() if not error <= worst]
            bad += [f"{name} repeats not its bits" for name, same in repeated.items() if not same]
            failures += bool(bad)
            rows.append({"dtype": str(dtype), "tf32": tf32, "case": case, "theirs": theirs,
                         "errors": errors})  # fmt: skip
            mark = f"BAD {bad} " if bad else ""
            print(f"{mark}{dtype}{' tf32' * tf32} {case}: torch's {theirs:.3g}, {errors}")
    from fastgen.ops.conv_transpose_gpu import chosen

    for layer, route in chosen.items():
        print(f"{tuple(layer.weight)} groups {layer.groups} of 2^{layer.positions} positions "
              f"{layer.dtype}{' tf32' * layer.tf32}: {route}")  # fmt: skip
    return {
        "failures": failures,
        "cases": rows,
        "summary": f"{failures} of {len(rows)} too inexact",
    }


def conv_transpose_errors(
    device, dtype, batch, inner, outer, groups, size, kernel, stride, padding
) -> tuple[dict, dict]:
    """By way: the largest error, PyTorch's and the largest value among them; whether a second call
    gave the same bits."""
    dims = len(size)
    theirs = getattr(torch.nn.functional, f"conv_transpose{dims}d")
    ours = getattr(fastgen, f"conv_transpose{dims}d")
    generator = torch.Generator().manual_seed(sum(size))
    x = torch.randn(batch, inner * groups, *size, generator=generator).to(dtype)
    w = torch.randn(inner * groups, outer, *[kernel] * dims, generator=generator)
    w = (w / (inner * (kernel / stride) ** dims) ** 0.5).to(dtype)
    arguments = {"stride": stride, "padding": padding, "groups": groups}
    exact = theirs(x.double(), w.double(), **arguments)
    x, w = x.to(device), w.to(device)
    errors = {"largest": float(exact.abs().max())}
    errors["torch"] = float((theirs(x, w, **arguments).double().cpu() - exact).abs().max())
    repeated = {}
    for name in (*GPU_BACKENDS, None):
        if name and backends.refusal("conv_transpose", name, device.type, dtype):
            continue
        last = torch.channels_last if dims < 3 else torch.channels_last_3d
        for layout in (None, last):
            way = f"{name or 'chosen'}{' channels_last' if layout else ''}"
            y = ours(x, w, **arguments, backend=name, memory_format=layout)
            again = ours(x, w, **arguments, backend=name, memory_format=layout)
            errors[way] = float((y.double().cpu() - exact).abs().max())
            repeated[way] = torch.equal(y, again)
    return errors, repeated


def benchmarks(device: torch.device, dry: bool, folder) -> dict:
    """The benchmarks' cases on this device, their tables and pictures."""
    from fastgen.bench import report
    from fastgen.bench.run import run

    ops = ["forward"] if dry else [
        "sizes", "step", "guidance", "forward", "noise", "reparameterize", "conv_transpose", "fuse",
        "sampling",
    ]  # fmt: skip
    file = folder / "bench.json"
    file.touch()
    status = run(ops, file, against="eager,copy_" if dry else "", quick=True, device=device.type)
    results = report.load(file)
    report.show(results)
    report.draw(results, folder)
    return {"failures": status, "summary": f"{len(results.records)} variants timed"}


def limits(device: torch.device, dry: bool, folder) -> dict:
    """What the benchmarks' results must reach on a GPU."""
    from fastgen.bench import report, static_checks
    from fastgen.bench.gpu_limits import Machine, verdicts

    if not (folder / "bench.json").exists():
        return {"summary": "nothing was timed: left out"}
    results = report.load(folder / "bench.json")
    counts = static_checks.limits()["normals"]
    if dry:
        machine = Machine(132, 1.98e9, counts["sm_90"])
    else:
        properties = torch.cuda.get_device_properties(0)
        name = f"sm_{properties.major}{properties.minor}"
        slots = counts.get(name, counts["sm_90"])
        machine = Machine(properties.multi_processor_count, clock(), slots)
    found = verdicts(results, machine)
    missed = [v for v in found if not v.good]
    print(*found, sep="\n")
    summary = f"{len(missed)} of {len(found)} limits missed"
    return {"failures": 0 if dry else len(missed), "summary": summary,
            "verdicts": [str(v) for v in found]}  # fmt: skip


def clock() -> float:
    """The multiprocessors' highest, in Hz."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    return 1e6 * float(subprocess.check_output(query, text=True).splitlines()[0])
