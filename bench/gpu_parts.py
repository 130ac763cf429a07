"""The parts of bench/gpu_check.py: ``python bench/gpu_parts.py NAME RESULT.json [--dry]``."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path and Path(sys.path[0]).resolve() == ROOT / "bench":
    sys.path.pop(0)  # its modules are fastgen.bench's


def use_tree(native: str) -> None:
    """fastgen as the tree has it, with the module that was built into the folder ``native``."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(
        "fastgen._native", next(Path(native).glob("_native*"))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastgen._native"] = module
    for name in ("kernels", "bench"):
        package = types.ModuleType(f"fastgen.{name}")
        package.__path__ = [str(ROOT / name)]
        sys.modules[f"fastgen.{name}"] = package


if "FASTGEN_CHECK_TREE" in os.environ:
    use_tree(os.environ["FASTGEN_CHECK_TREE"])

import torch  # noqa: E402

import fastgen  # noqa: E402
from fastgen import Output, Row, backends  # noqa: E402
from fastgen.testing import LAYOUTS, bits, laid_out, sample_tensor  # noqa: E402

FLOAT32, BFLOAT16, FLOAT16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
SHAPES = ((1, 8), (3, 3, 5, 7), (2, 4, 6, 8)) if DRY else (
    (1, 8), (1, 1), (7, 20), (3, 3, 5, 7), (2, 4, 64, 64), (2, 1023), (2, 3, 100, 96),
    (300, 3, 16, 16), (70000, 4), (2, 4, 3, 24, 40),
)  # fmt: skip
MIXES = ((FLOAT32, FLOAT32), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16), (FLOAT32, BFLOAT16),
         (BFLOAT16, FLOAT32))  # fmt: skip


def made(shape, dtype, layout: str, seed: int, device=None) -> torch.Tensor:
    """The same values and strides on any device."""
    return laid_out(sample_tensor(shape, dtype, seed=seed, special=True).to(device), layout)


def candidates(op: str) -> list[str]:
    """The backends to hold against the CPU's, the best first."""
    wanted = ("triton",) if DRY else ("cuda", "triton", "reference")
    found = []
    for name in wanted:
        reason = backends.refusal(op, name, DEVICE.type, FLOAT32)
        if reason:
            print(f"{op}: {name} left out: {reason}")
        else:
            found.append(name)
    if not DRY and "cuda" not in found:
        raise SystemExit("the CUDA backend cannot serve")
    return found


class Parity:
    """Counts calls whose bits differ from the CPU backend's."""

    def __init__(self) -> None:
        self.calls = self.failures = 0
        self.shown = 0

    def __call__(self, what: str, actual, expected) -> None:
        pairs = zip(
            actual if isinstance(actual, tuple) else (actual,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        )
        self.calls += 1
        wrong = [int((bits(a.cpu()) != bits(e)).sum()) for a, e in pairs]
        if any(wrong):
            self.failures += 1
            if self.failures <= 20:
                print(f"DIFFERENT {what}: elements {wrong}")

    def result(self) -> dict:
        return {
            "calls": self.calls, "failures": self.failures,
            "summary": f"{self.failures} of {self.calls} calls differ",
        }  # fmt: skip


def row_of_everything(outputs: int) -> Row:
    names = ("x", "e", "u", "denoised", "known", "h0", "h3")
    weights = [{n: 0.3 + 0.1 * j - 0.07 * k for k, n in enumerate(names)} for j in range(outputs)]
    del weights[0]["u"]
    return Row(
        tuple(Output(w, noise=(0.5, 0.0, -0.25), target="x" if j == 0 else j)
              for j, w in enumerate(weights)),
        denoised=(1.25, -0.75), clip=(-1.0, 0.8), logvar=(0.5, -0.25),
    )  # fmt: skip


def pointwise_calls(shape, dtype, other, layout) -> Iterator[tuple[str, Callable]]:
    """(name, call(backend, device)) of every pointwise op."""
    batch = shape[0]

    def t(seed, device, kind=dtype):
        return made(shape, kind, layout if seed % 2 else "contiguous", seed, device)

    levels = torch.linspace(0.1, 0.9, batch).tolist()
    many = tuple(range(1000, 1000 + batch))
    table = fastgen.stack_rows([row_of_everything(2)] * 3)
    table[1] *= 0.5
    yield (
        "randn",
        lambda b, d: fastgen.randn(
            shape, seed=2**64 - 5, sample_ids=many, step=3, device=d, dtype=dtype, backend=b
        ),
    )
    yield (
        "add_noise",
        lambda b, d: fastgen.add_noise(
            t(1, d), levels, seed=7, step=2, return_noise=True, return_velocity=True, backend=b
        ),
    )
    yield (
        "add_noise given",
        lambda b, d: fastgen.add_noise(t(1, d), 0.3, noise=t(2, d, other), backend=b),
    )
    yield (
        "combine",
        lambda b, d: fastgen.combine(
            [t(1, d), t(2, d, other), t(3, d), t(5, d), t(7, d, other)],
            [0.5, -1.5, 0.0, 2.0, 0.1],
            backend=b,
        ),
    )
    yield "cfg_combine", lambda b, d: fastgen.cfg_combine(t(1, d), t(3, d, other), 7.5, backend=b)
    yield (
        "cfg_combine per sample",
        lambda b, d: fastgen.cfg_combine(
            t(1, d), t(3, d, other), [1.0 + i % 3 for i in range(batch)], backend=b
        ),
    )
    yield (
        "ddpm_step",
        lambda b, d: fastgen.ddpm_step(
            t(1, d), t(3, d, other), 0.4, 0.6, clip=1.0, seed=list(many), step=5, backend=b
        ),
    )
    yield (
        "ddpm_step learned",
        lambda b, d: fastgen.ddpm_step(
            t(1, d),
            t(3, d, other),
            0.4,
            0.6,
            uncond=t(5, d, other),
            guidance_scale=3.0,
            prediction="v",
            variance=t(7, d, other),
            seed=1,
            step=5,
            backend=b,
        ),
    )
    yield "ddim_step", lambda b, d: fastgen.ddim_step(t(1, d), t(3, d, other), 0.4, 0.6, backend=b)
    yield "ddim_step in place", lambda b, d: in_place(t(2, d), t(3, d, other), b)

    def operands(d):
        return {
            **{"uncond": t(3, d, other), "guidance_scale": 2.0, "known": t(4, d)},
            **{"logvar": t(5, d, other), "seed": 11, "step": 4},
            "history": [t(6, d, FLOAT32), None, None, t(7, d, FLOAT32)],
        }

    yield (
        "step",
        lambda b, d: fastgen.step(
            row_of_everything(3), t(1, d), t(2, d, other), **operands(d), backend=b
        ),
    )
    yield (
        "step of a table",
        lambda b, d: fastgen.step(
            table.to(d),
            t(1, d),
            t(2, d, other),
            **operands(d),
            outputs=2,
            row_index=torch.tensor([1], device=d),
            backend=b,
        ),
    )
    yield (
        "step of rows",
        lambda b, d: fastgen.step(
            table[torch.arange(batch) % 3].to(d),
            t(1, d),
            t(2, d, other),
            **operands(d),
            outputs=2,
            backend=b,
        ),
    )


def in_place(x: torch.Tensor, output: torch.Tensor, backend: str) -> torch.Tensor:
    return fastgen.ddim_step(x, output, 0.4, 0.6, out=x, backend=backend)


def reduction_calls(shape, dtype, other, layout) -> Iterator[tuple[str, Callable]]:
    def t(seed, device, kind=dtype):
        values = made(shape, kind, layout if seed % 2 else "contiguous", seed, device)
        return values.nan_to_num(1.0, 2.0, -2.0) if values.is_contiguous() else values

    def calm(seed, device, kind=dtype):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(kind).to(device)

    for name, make in (("", calm), (" of special values", t)):
        yield (
            "reparameterize" + name,
            lambda b, d, make=make: fastgen.reparameterize(
                make(1, d),
                make(3, d, other),
                seed=5,
                step=1,
                return_kl=True,
                clamp=(-2.0, 1.0),
                backend=b,
            ),
        )
        yield (
            "gaussian_kl" + name,
            lambda b, d, make=make: fastgen.gaussian_kl(make(1, d), make(3, d, other), backend=b),
        )
        yield (
            "rescale" + name,
            lambda b, d, make=make: fastgen.cfg_combine(
                make(1, d), make(3, d, other), 7.5, rescale=0.7, backend=b
            ),
        )


def gradient_calls(shape, dtype, other, layout) -> Iterator[tuple[str, Callable]]:
    def gradients(backend, device, kl):
        mean = made(shape, dtype, layout, 1, device).detach().requires_grad_()
        logvar = made(shape, other, layout, 3, device).detach().requires_grad_()
        grad = made(shape, dtype, "contiguous", 4, device)
        z = fastgen.reparameterize(mean, logvar, seed=3, step=0, return_kl=kl, backend=backend)
        weights = torch.linspace(0.5, 2.0, shape[0]).to(device)
        outputs, grads = (z, (grad, weights)) if kl else ((z,), (grad,))
        return torch.autograd.grad(outputs, (mean, logvar), grads)

    yield "backward", lambda b, d: gradients(b, d, False)
    yield "backward with kl", lambda b, d: gradients(b, d, True)


def parity_of(calls, op: str, shapes) -> dict:
    """Every call on every backend against the CPU's, for all layouts and mixes of dtypes."""
    parity, names = Parity(), candidates(op)
    for i, shape in enumerate(shapes):
        for j, (dtype, other) in enumerate(MIXES[1:2] if DRY else MIXES):
            for k, layout in enumerate(LAYOUTS[1:2] if DRY else LAYOUTS):
                for what, call in calls(shape, dtype, other, layout):
                    expected = call("cpu", torch.device("cpu"))
                    for name in names:
                        # eager PyTorch is slow and has no layouts: once a dtype is enough. Its
                        # gradients are autograd's, of an exponential that is not ours.
                        if name == "reference" and (layout != "contiguous" or "backward" in what):
                            continue
                        # Triton compiles long: a shape in three, each layout with one mix
                        if name == "triton" and not DRY and (i % 3 or (i + j + k) % len(MIXES)):
                            continue
                        label = f"{what} {name} {shape} {dtype} {other} {layout}"
                        try:
                            parity(label, call(name, DEVICE), expected)
                        except (RuntimeError, ValueError, TypeError) as error:
                            parity.calls += 1
                            parity.failures += 1
                            print(f"ERROR {label}: {error}"[:500])
                            if "CUDA" in str(error):
                                raise
        print(f"{shape}: {parity.calls} calls, {parity.failures} differ", flush=True)
    return parity.result()


def small() -> dict:
    """One call of every kernel on small tensors, for the sanitizer to watch."""
    calls = 0
    for shape in ((2, 3, 5, 7), (2, 1030)):
        for dtype, other in MIXES[1:2] if DRY else MIXES[1::2]:
            for layout in ("contiguous", "strided"):
                for make in (pointwise_calls, reduction_calls, gradient_calls):
                    for _, call in make(shape, dtype, other, layout):
                        for name in ("triton",) if DRY else ("cuda", "triton"):
                            call(name, DEVICE)
                            calls += 1
    x, weight = torch.randn(2, 5, 4, 4), torch.randn(5, 3, 4, 4)
    fastgen.conv_transpose2d(x.to(DEVICE), weight.to(DEVICE), stride=2, padding=1,
                             activation="tanh", backend="triton")  # fmt: skip
    if not DRY:
        torch.cuda.synchronize()
    print("small: every kernel ran")
    return {"summary": f"{calls + 1} calls"}


def beyond_caches() -> dict:
    """One call of each step kernel on tensors of 256 MB, for the counters."""
    x, e, out = (torch.randn(1, 1 << 26, device=DEVICE) for _ in range(3))
    for name in ("cuda", "triton"):
        fastgen.ddim_step(x, e, 0.4, 0.6, out=out, backend=name)
        fastgen.ddpm_step(x, e, 0.4, 0.6, seed=1, step=2, out=out, backend=name)
        fastgen.randn(x.shape, seed=1, device=DEVICE, out=out, backend=name)
        fastgen.reparameterize(x, e, seed=1, step=0, out=out, backend=name)
    torch.cuda.synchronize()
    return {}


def machine() -> dict:
    facts = {
        "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "architectures": backends.native().cuda_architectures,
        "isa": backends.native().isa(),
    }  # fmt: skip
    if importlib.util.find_spec("triton"):
        facts["triton"] = importlib.import_module("triton").__version__
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        facts["refusal"] = backends.refusal("step", "cuda", "cuda", FLOAT32)
    for key, value in facts.items():
        print(f"{key}: {value}")
    if facts.get("refusal"):
        raise SystemExit(f"the CUDA backend cannot serve: {facts['refusal']}")
    return facts | {"summary": str(facts.get("gpu", "no GPU"))}


def static() -> dict:
    """In a process of its own, where Triton compiles."""
    command = [sys.executable, "-m", "fastgen.bench.static_checks"]
    if "FASTGEN_CHECK_TREE" in os.environ:
        command = [sys.executable, str(ROOT / "bench" / "static_checks.py")]
    architectures = [] if DRY else ["--arch", "".join(map(str, torch.cuda.get_device_capability()))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command + architectures, env=environment, text=True, capture_output=True)
    print(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines()
    return {"failures": done.returncode, "summary": lines[-1] if lines else ""}


def main() -> int:
    name, file = sys.argv[1], Path(sys.argv[2])
    parts: dict[str, Callable[[], dict]] = {
        "machine": machine,
        "pointwise": lambda: parity_of(pointwise_calls, "step", SHAPES),
        "reductions": lambda: parity_of(
            reduction_calls, "reparameterize", (*SHAPES, *(() if DRY else ((2, 3, 700, 1024),)))
        ),
        "gradients": lambda: parity_of(gradient_calls, "reparameterize", SHAPES),
        "small": small,
        "static": static,
    }
    if name in parts:
        result = parts[name]()
    elif name in ("benchmarks", "limits"):
        from fastgen.bench import gpu_device

        result = getattr(gpu_device, name)(DEVICE, DRY, file.parent)
    elif DRY and name not in ("conv_transpose", "samplers", "diffusers"):
        result = {"summary": "needs a GPU: left out"}
    elif name in ("sanitizer", "counters"):
        from fastgen.bench import gpu_tools

        result = getattr(gpu_tools, name)()
    elif name in ("samplers", "diffusers"):
        from fastgen.bench import gpu_samplers

        result = getattr(gpu_samplers, name)(DEVICE, DRY)
    elif name == "beyond_caches":
        result = beyond_caches()
    else:
        from fastgen.bench import gpu_device

        result = getattr(gpu_device, name)(DEVICE, DRY)
    file.write_text(json.dumps(result))
    print(result.get("summary", ""))
    return 1 if result.get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
