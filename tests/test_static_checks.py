"""The compiled GPU kernels: no spills, 16-byte accesses, IEEE instructions only, few registers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from fastgen.bench import static_checks


def test_instructions_that_round_differently_are_found():
    ptx = """{ .reg .f32 %f<3>;
    mul.rn.f32 \t%f1, %f2, %f2; add.f32 %f1, %f2, %f2;
    @%p1 fma.rn.f32 %f1, %f2, %f2, %f1;
    { cvt.rn.bf16.f32 %rs1, %f1;}
    { ex2.approx.ftz.f32 %f1, %f1; }
    setp.lt.f32 %p1, %f1, %f2; min.f32 %f1, %f1, %f2; add.s32 %r1, %r1, %r2;
    sqrt.approx.f32 %f1, %f1; ld.global.v4.f32 {%f1}, [%rd1]; cvt.rn.f32.u32 %f1, %r1; }"""
    assert static_checks.inexact(ptx) == {
        *("add.f32", "fma.rn.f32", "ex2.approx.ftz.f32", "min.f32", "sqrt.approx.f32")
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
