"""The compiled module as a file, as a guest in the process, and as a choice of instruction sets."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import _native

ROOT = Path(__file__).parents[1]

SYMTAB, DYNAMIC = 2, 6  # section types
NEEDED = 1  # dynamic tag
WEAK, UNIQUE = 2, 10  # symbol bindings


class Elf:
    """The few parts of a 64-bit little-endian ELF file that the tests look at."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01"
        (table,) = struct.unpack_from("<Q", self.data, 0x28)
        size, count = struct.unpack_from("<HH", self.data, 0x3A)
        # name, type, flags, address, offset, size, link, info, alignment, entry size
        self.sections = [
            struct.unpack_from("<IIQQQQIIQQ", self.data, table + i * size) for i in range(count)
        ]

    def entries(self, kind: int, form: str) -> Iterator[tuple[tuple, int]]:
        """Each entry of the sections of a kind, with the offset of the strings that it names."""
        for section in self.sections:
            if section[1] == kind:
                body = self.data[section[4] : section[4] + section[5]]
                for entry in struct.iter_unpack(form, body):
                    yield entry, self.sections[section[6]][4]

    def string(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode()

    def needed(self) -> set[str]:
        found = self.entries(DYNAMIC, "<qQ")
        return {self.string(names + value) for (tag, value), names in found if tag == NEEDED}

    def mergeable(self) -> list[str]:
        """Symbols defined here that the linker may replace by another object's definition."""
        return [
            self.string(names + name)
            for (name, info, _, section, _, _), names in self.entries(SYMTAB, "<IBBHQQ")
            if info >> 4 in (WEAK, UNIQUE) and section != 0
        ]


def run_python(code: str) -> str:
    """The output of a fresh interpreter, which has a minute and must end well."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def restored_isa() -> Iterator[None]:
    before = _native.isa()
    yield
    _native.choose_isa(before)


def test_module_needs_only_the_language_runtime() -> None:
    allowed = (
        "libc.",
        "libm.",
        "libdl.",
        "libpthread.",
        "librt.",
        "libstdc++.",
        "libgcc_s.",
        "ld-",
    )
    needed = Elf(Path(_native.__file__)).needed()
    assert not {name for name in needed if not name.startswith(allowed)}


def test_kernels_of_an_instruction_set_cannot_be_merged_with_anothers() -> None:
    """A function with a weak symbol would be linked once, perhaps as its AVX-512 copy."""
    objects = sorted(ROOT.glob("build/cp*/CMakeFiles/cpu_*.dir/**/*.o"))
    objects = [path for path in objects if "cpu_common.dir" not in str(path)]  # of no set's own
    if not objects:
        pytest.skip("the object files are not here: fastgen was not built in this checkout")
    mergeable = {path.relative_to(ROOT): Elf(path).mergeable() for path in objects}
    assert not {path: names for path, names in mergeable.items() if names}


def test_version_is_the_distributions() -> None:
    assert _native.version == version("fastgen-samplers") == fastgen.__version__


def test_import_brings_no_openmp_runtime_but_torchs() -> None:
    output = run_python("""
import pathlib
def runtimes():
    maps = pathlib.Path("/proc/self/maps").read_text().split()
    return sorted({name for name in maps if "omp" in name.rpartition("/")[2]})
import torch
before = runtimes()
import fastgen
from fastgen import _native
fastgen.randn((4, 100_000), seed=0)
print(before == runtimes(), any(_native.parallel_runtime() in name for name in before), before)
""")
    assert output.startswith("True True"), output


def test_kernels_work_in_a_child_after_a_parallel_region() -> None:
    run_python("""
import os, signal, torch, fastgen
torch.set_num_threads(4)
torch.ones(1 << 20).exp()
before = fastgen.randn((4, 100_000), seed=0, backend="cpu")
child = os.fork()
if child == 0:
    signal.alarm(20)
    after = fastgen.randn((4, 100_000), seed=0, backend="cpu")
    # compared by NumPy: torch's own threads do not outlive a fork
    os._exit(0 if before.numpy().tobytes() == after.numpy().tobytes() else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
""")


@pytest.mark.usefixtures("restored_isa")
def test_every_instruction_set_can_be_chosen_and_gives_the_same_bits() -> None:
    assert _native.isa() == _native.available_isas()[-1]
    results = []
    for isa in _native.available_isas():
        _native.choose_isa(isa)
        assert _native.isa() == isa
        results.append(fastgen.randn((3, 1037), seed=5, backend="cpu"))
    for result in results[1:]:
        assert torch.equal(result.view(torch.int32), results[0].view(torch.int32))


@pytest.mark.usefixtures("restored_isa")
def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    before = _native.isa()
    with pytest.raises(ValueError, match="mmx"):
        _native.choose_isa("mmx")
    with pytest.raises(TypeError):
        _native.choose_isa(512)
    assert _native.isa() == before
