"""Parts of bench/gpu_check.py that need a device of their own: streams, graphs, sizes and times."""

from __future__ import annotations

import statistics

import torch

import fastgen
from fastgen import Output, Row, backends
from fastgen.bench.gpu_parts import Parity, made, row_of_everything

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
        late = torch.full_like(on_device[0], torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(20):
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
    return parity.result()


def graphs(device: torch.device, dry: bool) -> dict:
    """One captured step, replayed with other coefficients, seeds and inputs behind its pointers."""
    parity = Parity()
    shape = (3, 4, 32, 32)
    table = fastgen.stack_rows(
        [row_of_everything(2), Row((Output({"x": 0.5, "e": 2.0}, (1.5,)),) * 2)]
    )
    inputs = [[made(shape, FLOAT32, "contiguous", seed + turn) for seed in (2, 40, 80)]
              for turn in range(2)]  # fmt: skip
    seeds = [torch.tensor([1, -2, 3]), torch.tensor([2**62, 5, -6])]

    def call(rows, x, output, known, seed, index, backend, out=None):
        return fastgen.step(rows, x, output, known=known, uncond=output, guidance_scale=3.0,
                            seed=seed, row_index=index, outputs=2, out=out,
                            backend=backend)  # fmt: skip

    for backend in GPU_BACKENDS:
        static = [v.to(device) for v in inputs[0]]
        rows, seed = table.to(device), seeds[0].to(device)
        index = torch.zeros(1, dtype=torch.int64, device=device)
        outs = [torch.empty(shape, device=device) for _ in range(2)]
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            call(rows, *static, seed, index, backend, outs)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(rows, *static, seed, index, backend, outs)
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
                                 backend=backend)  # fmt: skip
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
    """Triton's error against float64, over PyTorch's own on the same input and dtype."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = [(1, 8, 6, 5, 4, 2, 1)]  # batch, channels in and out, size, kernel, stride, padding
    if not dry:
        cases += [(8, 512, 256, 16, 4, 2, 1), (8, 256, 128, 32, 4, 2, 1), (2, 100, 512, 1, 4, 1, 0)]
        cases += [(3, 33, 17, 19, 3, 2, 1), (4, 64, 3, 64, 4, 2, 1)]
    failures, rows = 0, []
    for dtype in (FLOAT32,) if dry else (FLOAT32, BFLOAT16, FLOAT16):
        for batch, inner, outer, size, kernel, stride, padding in cases:
            generator = torch.Generator().manual_seed(size)
            x = torch.randn(batch, inner, size, size, generator=generator).to(dtype)
            w = torch.randn(inner, outer, kernel, kernel, generator=generator)
            w = (w / (inner * kernel * kernel / stride**2) ** 0.5).to(dtype)
            arguments = {"stride": stride, "padding": padding}
            exact = torch.nn.functional.conv_transpose2d(x.double(), w.double(), **arguments)
            x, w = x.to(device), w.to(device)
            theirs = torch.nn.functional.conv_transpose2d(x, w, **arguments)
            ours = fastgen.conv_transpose2d(x, w, **arguments, backend="triton")
            again = fastgen.conv_transpose2d(x, w, **arguments, backend="triton")
            errors = [float((v.double().cpu() - exact).abs().max()) for v in (ours, theirs)]
            worst = max(2 * errors[1], torch.finfo(dtype).eps * float(exact.abs().max()))
            good = errors[0] <= worst and torch.equal(ours, again)
            failures += not good
            rows.append({"dtype": str(dtype), "shape": list(x.shape), "errors": errors})
            mark = "" if good else "BAD "
            print(f"{mark}{dtype} {tuple(x.shape)} {tuple(w.shape)} ours, torch's: {errors}")
    return {
        "failures": failures,
        "cases": rows,
        "summary": f"{failures} of {len(rows)} too inexact",
    }


def timing(device: torch.device, dry: bool) -> dict:
    """µs a call, launch included, and GB/s, beside a copy in the same run."""
    names = [n for n in GPU_BACKENDS if not backends.refusal("step", n, device.type, FLOAT32)]
    rows: list[dict] = []
    print(f"{'dtype':<9} {'elements':>9}  {'op':<24} {'µs':>9} {'GB/s':>8}")
    for dtype in (FLOAT32, BFLOAT16):
        for exponent in range(10, 27, 2):
            count = 1 << exponent
            x, output, out = (torch.randn(1, count, device=device).to(dtype) for _ in range(3))
            runs = {"copy": (2, lambda o=out, x=x: o.copy_(x))}
            for name in names:
                runs |= step_runs(name, x, output, out)
            for what, (tensors, call) in runs.items():
                micros = median_micros(call)
                speed = tensors * count * x.element_size() / micros / 1e3
                rows.append({"dtype": str(dtype), "elements": count, "op": what, "us": micros,
                             "gb_per_s": speed})  # fmt: skip
                print(f"{str(dtype)[6:]:<9} 2^{exponent:<7}  {what:<24} {micros:9.2f} {speed:8.0f}")
    top = {r["op"]: r["gb_per_s"] for r in rows if r["elements"] == 1 << 26 and "32" in r["dtype"]}
    share = {k: f"{v / top['copy']:.0%}" for k, v in top.items() if k != "copy"}
    return {"rows": rows, "summary": f"of the copy's bandwidth at 2^26 float32: {share}"}


def step_runs(name: str, x, output, out) -> dict:
    """op: (tensors read and written, call)."""
    return {
        f"{name} ddim_step": (3, lambda: fastgen.ddim_step(
            x, output, 0.4, 0.6, out=out, backend=name)),
        f"{name} ddpm_step": (3, lambda: fastgen.ddpm_step(
            x, output, 0.4, 0.6, seed=1, step=2, out=out, backend=name)),
        f"{name} randn": (1, lambda: fastgen.randn(
            x.shape, seed=1, device=x.device, dtype=x.dtype, out=out, backend=name)),
        f"{name} reparameterize": (3, lambda: fastgen.reparameterize(
            x, output, seed=1, step=0, out=out, backend=name)),
    }  # fmt: skip


def median_micros(call, rounds: int = 7, budget_us: float = 4000.0) -> float:
    """Median over rounds of as many calls as fill the budget."""
    for _ in range(3):
        call()

    def measured(repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / repeats

    repeats = max(5, min(400, int(budget_us / max(measured(3), 1.0))))
    return statistics.median(measured(repeats) for _ in range(rounds))
