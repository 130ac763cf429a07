"""The compiled GPU kernels: no spills, 16-byte accesses, IEEE instructions only, few registers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from fastgen.bench import static_checks


def test_instructions_that_round_differently_are_found():
    ptx = """{ .reg .f32 %f<3>;
    mul.rn.f32 \t%f1, %f2, %f2; add.f32 %f1, %f2, %f2;
    @%p1 fma.rn.f32 %f1, %f2, %f2, %f1;
    { cvt.rn.bf16.f32 %rs1, %f1;}
    { ex2.approx.ftz.f32 %f1, %f1; }
    setp.lt.ftz.f32 %p1, %f1, %f2;
    setp.lt.f32 %p1, %f1, %f2; min.f32 %f1, %f1, %f2; add.s32 %r1, %r1, %r2;
    sqrt.approx.f32 %f1, %f1; ld.global.v4.f32 {%f1}, [%rd1]; cvt.rn.f32.u32 %f1, %r1; }"""
    assert static_checks.inexact(ptx) == {
        *(
            "setp.lt.ftz.f32",
            "add.f32",
            "fma.rn.f32",
            "ex2.approx.ftz.f32",
            "min.f32",
            "sqrt.approx.f32",
        )
    }


def test_every_kernel_keeps_the_limits():
    if static_checks.toolkit_program("cuobjdump") is None:
        pytest.skip("neither the CUDA toolkit's nor Triton's cuobjdump is here")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastgen.bench.static_checks"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def kernel(name="step_kernel<float32>", **numbers):
    known = {"registers": 70, "shared": 0, "stack": 0, "threads": 256}
    loads, stores = Counter({16: 7}), Counter({16: 4})
    given = {**known, "loads": loads, "stores": stores, **numbers}
    return static_checks.Kernel(name, 90, **given)


def test_warps_are_those_of_the_occupancy_calculator():
    assert kernel(registers=32).warps == 64
    assert kernel(registers=70).warps == 24  # 72 a thread: 28 warps, three blocks of eight
    assert kernel(registers=168, threads=128).warps == 12
    assert kernel(registers=255).warps == 8
    assert kernel(registers=16, threads=32).warps == 32  # 32 blocks at most
    assert kernel(registers=16, threads=1024).warps == 64
    assert kernel(registers=33, threads=64).warps == 48  # 12 warps a partition
    assert kernel(registers=16, shared=100 << 10).warps == 16  # two blocks' shared memory


def test_widths_are_read_off_the_instruction():
    cases = {"LDG.E": 4, "LDG.E.128": 16, "LDG.E.U16.CONSTANT": 2, "STG.E.EF.64": 8, "LDG.E.S8": 1,
             "LDGSTS.E.BYPASS.128.ZFILL": 16}  # fmt: skip
    for instruction, bytes_ in cases.items():
        assert static_checks.width(instruction) == bytes_


def test_kernels_have_the_names_of_their_choices():
    start = "_ZN7fastgen4cuda21conv_transpose_kernelI"
    names = {
        "NS0_8bfloat16ELi3ELi1ELb1ELb1EEvNS_6ParamsE": "<wide, bfloat16, 3 x 1>",
        "fLi1ELi4ELb0ELb1EEvNS_6ParamsE": "<staged, float32, 1 x 4>",
        "NS0_7float16ELi1ELi1ELb0ELb0EEvNS_6ParamsE": "<unstaged, float16, 1 x 1>",
    }
    for symbol, name in names.items():
        assert static_checks.readable(start + symbol) == "conv_transpose_kernel" + name


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        ({}, []),
        ({"stack": 8}, ["8 bytes of stack"]),
        ({"registers": 90}, ["more than 80 registers", "fewer than 24 warps"]),
        ({"loads": Counter({4: 7})}, ["no loads of 16 bytes"]),
        ({"stores": Counter()}, ["no stores of 16 bytes"]),
        ({"name": "another_kernel"}, ["no entry in static_limits.toml"]),
    ],
)
def test_a_breach_of_the_limits_is_named(change, breach):
    found = kernel(**change)
    static_checks.judge(found, static_checks.limits())
    assert found.breaches == breach
