"""``fastgen.testing``: what it lets pass, and what it finds."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from fastgen import testing
from fastgen.testing import assert_bitwise, assert_close_to_oracle, laid_out, sample_tensor, ulps
from shared import HAS_TRITON

NAN = math.nan


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (
            torch.tensor([0.0]),
            torch.tensor([-0.0]),
            "1 of 1 elements differ, the first at \\(0,\\)",
        ),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), r"at \(1,\): 2.0 instead of 3.0"),
        (torch.tensor([NAN]), torch.tensor([1.0]), "nan instead of 1.0"),
        (torch.ones(2), torch.ones(2, 1), r"shape \(2,\), expected \(2, 1\)"),
        (torch.ones(2), torch.ones(2).double(), "torch.float32, expected torch.float64"),
        ((torch.ones(2),), (torch.ones(2), torch.ones(2)), "got 1 entries, expected 2"),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, r"got keys \['a'\], expected \['b'\]"),
        ((torch.ones(1), 2), (torch.ones(1), 3), "got 2, expected 3"),
        ((torch.ones(1), None), (torch.ones(1), torch.ones(1)), "got None"),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), "1 of 1 elements differ"),
    ],
)
def test_bits_that_differ_are_named(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_bitwise(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equal_bits_pass_in_any_layout(dtype):
    value = sample_tensor((3, 4, 5), dtype, seed=3, special=True)
    for layout in testing.LAYOUTS[:-1]:
        assert_bitwise(laid_out(value, layout), value)
    assert_bitwise({"a": [value, torch.arange(3)]}, {"a": [value.clone(), torch.arange(3)]})
    assert_bitwise(torch.tensor([NAN]).to(dtype), -torch.tensor([NAN]).to(dtype))


def test_ulps_count_the_numbers_between():
    one = torch.ones(1)
    assert ulps(one, one) == 0
    assert ulps(torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)) == 2
    assert ulps(torch.tensor([0.0]), torch.tensor([-0.0])) == 0
    assert ulps(torch.tensor([1e-45]), torch.tensor([-1e-45])) == 2
    assert ulps(torch.ones(1).bfloat16(), torch.full((1,), 1.0078125).bfloat16()) == 1
    assert ulps(torch.tensor([NAN]), torch.tensor([NAN])) == 0
    assert ulps(torch.tensor([NAN]), torch.tensor([1.0])) == 1 << 62
    assert ulps(torch.ones(0), torch.ones(0)) == 0
    assert ulps(torch.tensor([2.5]).double(), torch.tensor([-2.5]).double()) == 2 * 0x4004 << 48
    with pytest.raises(ValueError, match="are not of one dtype and shape"):
        ulps(torch.ones(3), torch.ones(1))
    with pytest.raises(TypeError, match=r"got torch.int64"):
        ulps(torch.ones(3).long(), torch.ones(3).long())


def test_the_oracle_sees_float64_alone():
    seen = testing.oracle(
        lambda x, *, more: (x.dtype, more["y"].dtype, more["n"].dtype, more["s"]),
        torch.ones(2),
        more={"y": torch.ones(1).half(), "n": torch.ones(1, dtype=torch.int32), "s": "text"},
    )
    assert seen == (torch.float64, torch.float64, torch.int32, "text")


def test_the_error_budget_is_a_multiple_of_the_references():
    exact = torch.randn(100, dtype=torch.float64)
    reference = exact.float() + 1e-3
    assert_close_to_oracle(exact.float() + 1.9e-3, reference, exact)
    with pytest.raises(AssertionError, match="the error is 3 times the reference's, allowed 2"):
        assert_close_to_oracle(exact.float() + 3e-3, reference, exact)
    assert_close_to_oracle(exact.float() + 3e-3, reference, exact, times=4.0)
    # a reference that is right by chance allows roundings of the largest value
    integers = torch.arange(9.0)
    unit = torch.finfo(torch.float32).eps * 8
    assert_close_to_oracle(integers + unit, integers, integers.double())
    with pytest.raises(AssertionError, match="the error is"):
        assert_close_to_oracle(integers + 3 * unit, integers, integers.double())


@pytest.mark.parametrize("wrong", [NAN, math.inf])
def test_a_result_that_is_not_finite_is_no_small_error(wrong):
    exact = torch.ones(3, dtype=torch.float64)
    actual = torch.tensor([1.0, wrong, 1.0])
    with pytest.raises(AssertionError, match="the error is inf"):
        assert_close_to_oracle(actual, torch.ones(3), exact)
    assert_close_to_oracle(actual, actual, torch.tensor([1.0, wrong, 1.0]).double())


def test_memory_is_poisoned_inside_alone():
    with testing.poisoned_empty():
        assert torch.empty(1000).isnan().all()
        assert torch.empty_like(torch.ones(1000, dtype=torch.bfloat16)).isnan().all()
        assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()

    def careless(x):
        out = torch.empty_like(x)
        out[:-1] = 2 * x[:-1]
        return out

    with testing.poisoned_empty(), pytest.raises(AssertionError, match="1 of 100 elements"):
        assert_bitwise(careless(torch.ones(100)), torch.full((100,), 2.0))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_are_what_they_are_called(layout):
    value = torch.randn(3, 4, 5)
    placed = laid_out(value, layout)
    strides = {"reversed": (1, 3, 12), "strided": (44, 11, 2), "half": (40, 5, 1),
               "expanded": (20, 0, 1)}  # fmt: skip
    assert placed.stride() == strides.get(layout, (20, 5, 1))
    offsets = {"strided": 1, "offset": 1, "half": 20}
    assert placed.storage_offset() == offsets.get(layout, 0)
    expected = value[:, :1].expand(3, 4, 5) if layout == "expanded" else value
    assert torch.equal(placed, expected)
    assert laid_out(torch.tensor(1.0), layout) == 1
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        assert torch.equal(laid_out(value.to(dtype), layout), expected.to(dtype))


def test_a_random_layout_keeps_the_values():
    value = torch.randn(3, 4, 5)
    strides = set()
    for seed in range(20):
        placed = testing.random_layout(value, seed)
        assert torch.equal(placed, value)
        strides.add((placed.stride(), placed.storage_offset()))
    assert len(strides) == 5
    with pytest.raises(ValueError, match="layout: got 'diagonal'"):
        laid_out(value, "diagonal")


@settings(max_examples=20, derandomize=True)
@given(testing.shapes(empty=False), testing.dtypes(), testing.layouts(expanded=False))
def test_strategies_make_tensors(shape, dtype, layout):
    value = sample_tensor(shape, dtype, layout, seed=1)
    assert value.shape == shape
    assert value.dtype == dtype
    assert torch.equal(value, sample_tensor(shape, dtype, seed=1))


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton, or one too old")
def test_the_example_of_a_kernel_of_ones_own_runs():
    example = Path(__file__).parent.parent / "examples" / "own_kernel.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "at most twice" in done.stdout


@pytest.mark.parametrize("value", [NAN, float("inf"), float("-inf")])
def test_a_kernel_that_swallows_what_is_not_finite_is_found(value):
    there = torch.tensor([1.0, value])
    testing.assert_close_to_oracle(there, there, there.double())
    with pytest.raises(AssertionError, match="inf times"):
        testing.assert_close_to_oracle(torch.tensor([1.0, 0.0]), there, there.double())
