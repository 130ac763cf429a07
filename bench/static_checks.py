"""What can be said of the GPU kernels without a GPU: ``python -m fastgen.bench.static_checks``.

Compiles csrc/cuda and the Triton kernels for every architecture of a release and holds each kernel
to static_limits.toml: registers, resident warps, the width of its accesses, no spills; and one that
promises bits to the floating-point instructions that IEEE 754 defines. Prints one table; exits with
1 on a breach. Parts whose tools are missing are named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = (80, 90, 100)
# Of a multiprocessor: bytes of shared memory, warps (48 on the GPUs without HBM).
MULTIPROCESSOR = {80: (164 << 10, 64), 90: (228 << 10, 64), 100: (228 << 10, 64)}

# As in csrc/cuda/cuda.cmake.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")

# PTX instructions on floating-point values that every IEEE 754 machine rounds alike, or that do not
# round. An add or a multiply without .rn may be contracted by the assembler.
EXACT = re.compile(
    r"(add|sub|mul|div|sqrt)\.rn\.f32"
    r"|(setp?|selp|mov|ld|st|shfl|neg|abs|copysign|testp)(\.(?!ftz)\w+(::\w+)*)*"
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
    shared: int  # bytes a block
    stack: int  # bytes a thread
    threads: int = 0  # a block, at most
    loads: Counter[int] = field(default_factory=Counter)  # from global memory, by their bytes
    stores: Counter[int] = field(default_factory=Counter)
    instructions: int = 0
    breaches: list[str] = field(default_factory=list)

    @property
    def warps(self) -> int:
        """Resident on a multiprocessor: by the registers, given to warps in steps of 256, and by
        shared memory, of which each block takes 1 KiB more (CUDA C++ Programming Guide, compute
        capabilities)."""
        a_block = max(1, -(-self.threads // 32))
        a_warp = max(1, -(-self.registers * 32 // 256)) * 256
        for_registers = 4 * (16384 // a_warp) // a_block  # four partitions with as many each
        shared, warps = MULTIPROCESSOR.get(self.architecture, (100 << 10, 48))
        return min(warps // a_block, 32, for_registers, shared // (self.shared + 1024)) * a_block


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
    """step_kernel<mixed, many, draws, by pointer> from what the compiler made of it, or
    conv_transpose_kernel<wide, bfloat16, 3 x 1> with the channels and samples of a thread."""
    match = re.search(r"\d+([a-z_]+_kernel)(I\w*?E+v)?", symbol)
    if match is None:
        return symbol
    name, arguments = match[1], match[2] or ""
    if name.startswith("conv_transpose"):
        channels, samples, wide, staged = map(int, re.findall(r"L[ib](\d+)E", arguments))
        kind = "wide" if wide else "staged" if staged else "unstaged"
        dtype = next((d for d in ("bfloat16", "float16") if d in arguments), "float32")
        return f"{name}<{kind}, {dtype}, {channels} x {samples}>"
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
    usage = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    for symbol, *numbers in usage.findall(dump("-res-usage")):
        registers, stack, shared, local = map(int, numbers)
        kernels[symbol] = Kernel(symbol, architecture, registers, shared, stack + local)
    for part in re.split(r"Function : ", dump("-sass"))[1:]:
        symbol, code = part.split(None, 1)
        kernel = kernels[symbol]
        kernel.loads = Counter(map(width, re.findall(r"\bLDG(?:STS)?\.E[.\w]*", code)))
        kernel.stores = Counter(map(width, re.findall(r"\bSTG\.E[.\w]*", code)))
        kernel.instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE))
        if re.search(r"\b(LDL|STL)\b", code):
            kernel.breaches.append("local memory")
    return kernels


def width(access: str) -> int:
    """Bytes that a thread moves by LDG.E.128.CONSTANT and the like; without a number, four."""
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", access)
    return int(found[1]) // 8 if found else 4


def threads_of(ptx: str) -> int:
    """Of a block, by what the kernel was compiled for."""
    found = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", ptx)
    return math.prod(int(n or 1) for n in found.groups()) if found else 1024


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
        entries = {re.match(r"\.entry (\w+)", text)[1]: text
                   for text in re.split(r"(?=\.entry )", ptx)[1:]}  # fmt: skip
        for symbol, kernel in inspect(cubin, architecture, cuobjdump).items():
            kernel.name = readable(symbol)
            kernel.threads = threads_of(entries[symbol])
            if not kernel.name.startswith("conv_transpose"):  # sums promise no bits
                kernel.breaches += [f"PTX {m}" for m in sorted(inexact(entries[symbol]))]
            yield kernel


def triton_kernels(architectures, cuobjdump: str, folder: Path) -> Iterator[Kernel]:
    from fastgen.kernels import aot

    for architecture in architectures:
        for case, (name, ptx, binary, shared) in enumerate(aot.compile_all(architecture)):
            cubin = folder / f"triton.{architecture}.{case}.cubin"
            cubin.write_bytes(binary)
            for kernel in inspect(cubin, architecture, cuobjdump).values():
                kernel.name, kernel.shared = f"triton {name}", shared
                kernel.threads = threads_of(ptx)
                if not name.startswith(("conv_transpose", "channel_epilogue")):  # promise no bits
                    kernel.breaches += [f"PTX {m}" for m in sorted(inexact(ptx))]
                yield kernel


def limits() -> dict:
    return tomllib.loads((Path(__file__).parent / "static_limits.toml").read_text())


def judge(kernel: Kernel, limits: dict) -> None:
    """Adds the breaches of the limits that hold the kernel."""
    if kernel.stack:
        kernel.breaches.append(f"{kernel.stack} bytes of stack")
    held = next((e for e in limits["kernel"] if kernel.name.startswith(e["name"])), None)
    if held is None:
        kernel.breaches.append("no entry in static_limits.toml")
        return
    if kernel.registers > held["registers"]:
        kernel.breaches.append(f"more than {held['registers']} registers")
    if kernel.warps < held["warps"]:
        kernel.breaches.append(f"fewer than {held['warps']} warps")
    for what, found in (("loads", kernel.loads), ("stores", kernel.stores)):
        if what in held and max(found, default=0) < held[what]:
            kernel.breaches.append(f"no {what} of {held[what]} bytes")


def normals_cost(kernels: list[Kernel]) -> dict[int, int]:
    """By architecture, the instructions of four normals: what the step kernel has more of where it
    draws them. Each takes an issue slot of a warp, which is what bounds noise on a large GPU."""
    lengths = {(k.name, k.architecture): k.instructions for k in kernels}
    return {
        architecture: lengths["step_kernel<float32, draws>", architecture] - plain
        for (name, architecture), plain in lengths.items()
        if name == "step_kernel<float32>"
    }


def show(kernels: list[Kernel]) -> None:
    line = "{:<46} {:>6} {:>9} {:>6} {:>6} {:>5} {:>5} {:>12} {:>12} {:>6}  {}"
    print(line.format("", "", "", "shared", "", "", "", "loads", "stores", "instr.", ""))
    print(line.format("kernel", "arch", "registers", "bytes", "spills", "warps", "of 64",
                      "count x bytes", "", "", "breaches"))  # fmt: skip
    for k in sorted(kernels, key=lambda k: (k.name, k.architecture)):
        loads, stores = (
            " ".join(f"{count}x{size}" for size, count in sorted(found.items(), reverse=True))
            for found in (k.loads, k.stores)
        )
        values = (f"sm_{k.architecture}", k.registers, k.shared, k.stack, k.warps,
                  f"{k.warps / 64:.0%}", loads, stores, k.instructions,
                  "; ".join(k.breaches))  # fmt: skip
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
    held = limits()
    for kernel in kernels:
        judge(kernel, held)
    show(kernels)
    broken = sum(bool(k.breaches) for k in kernels)
    for architecture, count in normals_cost(kernels).items():
        most = held["normals"].get(f"sm_{architecture}", held["normals"]["sm_100"])
        broken += count > most
        print(f"four normals on sm_{architecture}: {count} instructions, at most {most}")
    print(f"{len(kernels)} kernels, {broken} with a breach")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
