"""What can be said of the GPU kernels without a GPU: ``python -m fastgen.bench.static_checks``.

Compiles csrc/cuda and the Triton kernels for every architecture of a release and holds each kernel
that promises bits to: no stack and no local memory; 16-byte accesses where its layout is dense; no
floating-point instruction but those that IEEE 754 defines; registers within a limit. Prints one
table; exits with 1 on a breach. Parts whose tools are missing are named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = (80, 90, 100)

# As in csrc/cuda/cuda.cmake.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")

# Most registers a thread, by the start of the kernel's name: 80 leaves a multiprocessor 24 warps;
# 168, for the kernels that hold every input and normal at once, 12.
REGISTERS = {
    "step_kernel<strided, many": 168,
    "step_kernel<float32, many": 168,
    "step_kernel<mixed, many": 168,
    "step_kernel<strided": 96,
    "step_kernel": 80,
    "reparameterize_kernel": 64,
    "backward_kernel": 80,
    "moments_kernel": 64,
    "divergence_kernel": 40,
    "rescale_kernel": 48,
    "triton everything": 255,
    "triton": 168,
}

# PTX instructions on floating-point values that every IEEE 754 machine rounds alike, or that do not
# round. An add or a multiply without .rn may be contracted by the assembler.
EXACT = re.compile(
    r"(add|sub|mul|div|sqrt)\.rn\.f32"
    r"|(setp?|selp|mov|ld|st|shfl|neg|abs|copysign|testp)(\.\w+(::\w+)*)*"
    r"|cvt\.rn\.f32\.[su](32|64)"
    r"|cvt\.f32\.(f16|bf16)"
    r"|cvt\.rn\.(bf16|f16|bf16x2|f16x2)\.f32"
)
INSTRUCTION = re.compile(r"[;{}\n]\s*(?:@!?%p\w+\s+)?([a-z]\w*(?:\.\w+(?:::\w+)*)*)(?=\s)")
FLOATING = re.compile(r"\.(b?f16|b?f16x2|f32|f64|tf32|e\dm\d)\b|^(ex2|lg2|sin|cos|tanh|fma|mad\.f)")


@dataclass
class Kernel:
    name: str
    architecture: int
    registers: int
    stack: int
    wide_loads: int = 0
    wide_stores: int = 0
    instructions: int = 0
    breaches: list[str] = field(default_factory=list)


def toolkit_program(name: str) -> str | None:
    """A program of the CUDA toolkit, or Triton's copy of it."""
    places = [os.environ.get("PATH", "")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        places.append(str(Path(nvcc).resolve().parent))
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(places))


def is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def sources() -> Path | None:
    """csrc/, in a checkout."""
    found = Path(__file__).resolve().parent.parent / "csrc"
    if not found.is_dir():  # an installed copy, run from a checkout
        found = Path.cwd() / "csrc"
    return found if (found / "cuda").is_dir() else None


def readable(symbol: str) -> str:
    """step_kernel<mixed, many, draws, by pointer> from what the compiler made of it."""
    match = re.search(r"\d+([a-z_]+_kernel)(I\w*?E+v)?", symbol)
    if match is None:
        return symbol
    name, arguments = match[1], match[2] or ""
    words = [
        ("float32", "mixed", "strided")[int(n)] for n in re.findall(r"LayoutE(\d)E", arguments)
    ]
    switches = [n == "1" for n in re.findall(r"Lb([01])E", arguments)]
    meanings = ["draws", "many", "by pointer"]
    words += sorted((m for on, m in zip(switches, meanings, strict=False) if on), key="many".__ne__)
    return f"{name}<{', '.join(words)}>" if words else name


def inexact(ptx: str) -> set[str]:
    """The instructions that are not on the list above."""
    found = {m for m in INSTRUCTION.findall(ptx) if FLOATING.search(m)}
    return {m for m in found if not EXACT.fullmatch(m)}


def inspect(cubin: Path, architecture: int, cuobjdump: str) -> dict[str, Kernel]:
    """Kernels by symbol: resources, widths and length of their machine code."""

    def dump(option: str) -> str:
        return subprocess.run(
            [cuobjdump, option, str(cubin)], check=True, capture_output=True, text=True
        ).stdout

    kernels = {}
    usage = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
    for symbol, registers, stack, local in usage.findall(dump("-res-usage")):
        size = int(stack) + int(local)
        kernels[symbol] = Kernel(symbol, architecture, int(registers), size)
    for part in re.split(r"Function : ", dump("-sass"))[1:]:
        symbol, code = part.split(None, 1)
        kernel = kernels[symbol]
        kernel.wide_loads = len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128", code))
        kernel.wide_stores = len(re.findall(r"\bSTG\.E\.(?:\w+\.)*128", code))
        kernel.instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE))
        if re.search(r"\b(LDL|STL)\b", code):
            kernel.breaches.append("local memory")
    return kernels


def compile_cuda(file: Path, architecture: int, folder: Path) -> tuple[Path, str]:
    """The cubin and the PTX that it was made from."""
    kept = folder / f"{file.stem}.{architecture}"
    kept.mkdir()
    cubin = kept / "kernels.cubin"
    subprocess.run(
        ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), "--keep",
         "--keep-dir", str(kept), str(file)],
        check=True,
    )  # fmt: skip
    return cubin, next(kept.glob("*.ptx")).read_text()


def cuda_kernels(csrc: Path, architectures, cuobjdump: str, folder: Path) -> Iterator[Kernel]:
    jobs = [(file, a) for a in architectures for file in sorted((csrc / "cuda").glob("*.cu"))]
    jobs.sort(key=lambda job: job[0].stem != "step")  # the longest first
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compile_cuda(*job, folder), jobs))
    for (_, architecture), (cubin, ptx) in zip(jobs, results, strict=True):
        breaches = {}
        for text in re.split(r"(?=\.entry )", ptx)[1:]:
            breaches[re.match(r"\.entry (\w+)", text)[1]] = inexact(text)
        for symbol, kernel in inspect(cubin, architecture, cuobjdump).items():
            kernel.name = readable(symbol)
            kernel.breaches += [f"PTX {m}" for m in sorted(breaches[symbol])]
            if "float32" in kernel.name or "mixed" in kernel.name:
                if not kernel.wide_loads:
                    kernel.breaches.append("no 16-byte load")
                if not kernel.wide_stores and not kernel.name.startswith("moments"):
                    kernel.breaches.append("no 16-byte store")
            yield kernel


def triton_kernels(architectures, cuobjdump: str, folder: Path) -> Iterator[Kernel]:
    from fastgen.kernels import aot

    for architecture in architectures:
        for case, (name, ptx, binary) in enumerate(aot.compile_all(architecture)):
            cubin = folder / f"triton.{architecture}.{case}.cubin"
            cubin.write_bytes(binary)
            for kernel in inspect(cubin, architecture, cuobjdump).values():
                kernel.name = f"triton {name}"
                kernel.breaches += [f"PTX {m}" for m in sorted(inexact(ptx))]
                yield kernel


def judge(kernel: Kernel) -> None:
    """Adds the breaches that are the same for every kernel, and drops those of matrix products,
    which promise no bits: the table shows what they use."""
    if "conv_transpose" in kernel.name:
        kernel.breaches.clear()
        return
    if kernel.stack:
        kernel.breaches.append(f"{kernel.stack} bytes of stack")
    limit = next((v for k, v in REGISTERS.items() if kernel.name.startswith(k)), None)
    if limit is None:
        kernel.breaches.append("no register limit in REGISTERS")
    elif kernel.registers > limit:
        kernel.breaches.append(f"more than {limit} registers")


def show(kernels: list[Kernel]) -> None:
    line = "{:<48} {:>6} {:>9} {:>5} {:>13} {:>6}  {}"
    print(
        line.format("kernel", "arch", "registers", "stack", "16-byte ld/st", "length", "breaches")
    )
    for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
        wide, breaches = f"{k.wide_loads}/{k.wide_stores}", "; ".join(k.breaches)
        values = (f"sm_{k.architecture}", k.registers, k.stack, wide, k.instructions, breaches)
        print(line.format(k.name, *values).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", help="80, 90, 100; default all three")
    options = parser.parse_args(arguments)
    architectures = options.arch or ARCHITECTURES
    cuobjdump = toolkit_program("cuobjdump")
    if cuobjdump is None:
        print("static checks: left out, neither the CUDA toolkit's nor Triton's cuobjdump is here")
        return 0
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csrc = sources()
        if csrc is None or shutil.which("nvcc") is None:
            print("CUDA kernels: left out,", "no nvcc" if csrc else "no csrc/cuda here")
        else:
            kernels += cuda_kernels(csrc, architectures, cuobjdump, folder)
        if importlib.util.find_spec("triton") is None:
            print("Triton kernels: left out, triton is not installed")
        elif not is_importable("fastgen.kernels.aot"):
            print("Triton kernels: left out, fastgen.kernels.aot is not here")
        elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            print("Triton kernels: left out, TRITON_INTERPRET is set")
        else:
            kernels += triton_kernels(architectures, cuobjdump, folder)
    for kernel in kernels:
        judge(kernel)
    show(kernels)
    broken = sum(bool(k.breaches) for k in kernels)
    print(f"{len(kernels)} kernels, {broken} with a breach")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
