"""A plan is a table of finite numbers that cannot change, checked when it is built."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgen
from fastgen import Output, Plan, Row, solvers, stack_rows
from fastgen.plan import INPUTS, ROW_FLOATS

X = Output({"x": 1.0})
NEXT = Row((X,))
NAN, INF = math.nan, math.inf


def plans() -> dict[str, Plan]:
    schedule = fastgen.NoiseSchedule.cosine()
    return {
        "ddpm": solvers.ddpm(schedule, 5),
        "ddim": solvers.ddim(schedule, 5, 0.5, clip=1.0, use_clipped_model_output=True),
        "dpmpp_2m": solvers.dpmpp_2m(schedule, 5, prediction="v", clip=(-1.0, 2.0)),
    }


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [NAN, INF, -INF, 1e39])
def test_a_number_that_float32_cannot_hold_is_refused(number):
    for make in (
        lambda: Row((Output({"x": number}),)),
        lambda: Row((Output(noise=(0.0, number)),)),
        lambda: Row((X, Output({"h6": number}, target=0))),
        lambda: Row((X,), denoised=(number, 0.0)),
        lambda: Row((X,), denoised=(0.0, number)),
        lambda: Row((X,), logvar=(number, 0.0)),
        lambda: Row((X,), logvar=(1.0, number)),
        lambda: Row((X,), model_time=number),
        lambda: Row((X,), input_scale=number),
    ):
        with pytest.raises(ValueError, match="expected a finite number"):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Output(None), "weights: got NoneType"),
        (lambda: Output([("x", 1.0)]), "weights: got list"),
        (lambda: Output({"x": "1"}), r"weights\['x'\]: got str"),
        (lambda: Output(noise=1.0), "noise: got 1.0"),
        (lambda: Output(noise=None), "noise: got None"),
        (lambda: Row(X), "outputs: got Output"),
        (lambda: Row(None), "outputs: got None"),
        (lambda: Row(({"x": 1.0},)), "outputs: got .*expected Outputs"),
        (lambda: Row((X,), denoised=1.0), "denoised: got 1.0"),
        (lambda: Row((X,), denoised=(1.0,)), "denoised: got"),
        (lambda: Row((X,), logvar=("a", 1.0)), "logvar: got str"),
        (lambda: Row((X,), clip="12"), "clip: got '12'"),
        (lambda: stack_rows(NEXT), "rows: got Row"),
        (lambda: stack_rows([X]), "rows: got"),
        (lambda: solvers.ddim([0.1], 1), "schedule: got list, expected a fastgen.NoiseSchedule"),
        (lambda: solvers.ddpm(None, 1), "schedule: got NoneType"),
        (lambda: solvers.dpmpp_2m("linear", 1), "levels: got str"),
        (lambda: Plan(None), "rows: got NoneType"),
        (lambda: Plan((X,)), "rows: got a Output"),
        (lambda: Plan((NEXT,), initial_scale="1"), "initial_scale: got str"),
    ],
)
def test_what_is_no_table_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Output({"y": 1.0}), "weights.*'y'"),
        (lambda: Output({"h7": 1.0}), "weights.*'h7'"),
        (lambda: Output({"d": 1.0}), "weights.*'d'"),
        (lambda: Output(noise=(0.0,) * 5), "noise.*5"),
        (lambda: Output(target="y"), "target.*'y'"),
        (lambda: Output(target=7), "target.*7"),
        (lambda: Output(target=-1), "target.*-1"),
        (lambda: Output(target=1.0), r"target.*1\.0"),
        (lambda: Output(target=None), "target.*None"),
        (lambda: Row(()), "outputs.*0"),
        (lambda: Row((X, *(Output(target=k) for k in range(4)))), "outputs.*5"),
        (lambda: Row((X,), clip=(1.0, -1.0)), "clip"),
        (lambda: Row((X,), clip=(NAN, 1.0)), "clip"),
        (lambda: Row((X,), clip=(0.0, NAN)), "clip"),
        (lambda: Plan(()), "rows"),
        (lambda: Plan((NEXT,), initial_scale=NAN), "initial_scale"),
        (lambda: Plan((NEXT,), initial_scale=INF), "initial_scale"),
        (lambda: Plan((NEXT,), initial_scale=-1.0), "initial_scale"),
        (lambda: Plan((Row((Output(target=0),)),)), r"rows\[0\].*first output"),
        (lambda: Plan((Row((Output({"x": 2.0}, target="input"), X)),)), r"rows\[0\].*first output"),
        (lambda: Plan((NEXT, Row((X, X)))), r"rows\[1\].*same target"),
        (lambda: Plan((Row((X, Output(target=3), Output(target=3))),)), r"rows\[0\].*same target"),
        (lambda: Plan((NEXT, Row((X,), input_scale=0.5))), r"rows\[1\].*input_scale"),
    ],
)
def test_a_table_that_cannot_run_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_history_is_read_only_after_it_was_written():
    write = Row((X, Output({"denoised": 1.0}, target=2)), denoised=(1.0, 0.0))
    read = Row((Output({"x": 1.0, "h2": 0.5}),))
    unread = Row((Output({"x": 1.0, "h2": 0.0}),))  # a zero weight reads nothing
    for rows in [(read,), (NEXT, read), (unread, read), (read, write)]:
        with pytest.raises(ValueError, match=r"h2.*before it is written"):
            Plan(rows)
    both = Row((Output({"h2": 1.0}), Output({"x": 1.0}, target=2)))
    with pytest.raises(ValueError, match=r"rows\[0\]"):
        Plan((both,))  # what a row writes is there for later rows
    assert Plan((write, both, read)).history == 3
    assert Plan((write, NEXT, read)).history == 3  # nor is it forgotten between
    assert Plan((unread,)).history == 0


def test_a_scaled_network_input_is_made_by_the_row_before():
    make = Row((X, Output({"x": 0.5}, target="input")))
    scaled = Row((X,), input_scale=0.5)
    assert len(Plan((make, scaled))) == 2
    assert len(Plan((scaled,))) == 1  # the loop itself scales the first


def test_a_clip_may_be_open_at_an_end():
    row = Row((X,), clip=(-INF, 1.0))
    assert row.floats[2:4].tolist() == [-INF, 1.0]
    assert Row((X,), clip=(0.0, 0.0)).floats[2:4].tolist() == [0.0, 0.0]
    assert NEXT.floats[2:4].tolist() == [-INF, INF]


# ---- a value that cannot change ------------------------------------------------------------------


def test_a_plan_cannot_be_changed():
    weights, outputs, rows = {"x": 1.0}, [X], [NEXT]
    output, row, plan = Output(weights, [0.5]), Row(outputs), Plan(rows)
    weights["x"] = 2.0
    outputs.append(X)
    rows.append(NEXT)
    assert output.weights == {"x": 1.0}
    assert output.noise == (0.5,)
    assert row.outputs == (X,)
    assert plan.rows == (NEXT,)
    with pytest.raises(TypeError):
        output.weights["x"] = 2.0
    for value in (output, row, plan):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)
    with pytest.raises(ValueError, match="read-only"):
        row.floats[0] = 1.0
    table = plan.table()
    table.zero_()  # a copy: the caller's own
    assert plan.table()[0].tolist() == row.floats.tolist()


@pytest.mark.parametrize("name", plans())
def test_a_plan_survives_pickle_and_copy(name):
    plan = plans()[name]
    table = plan.table()  # caches are filled before
    for other in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert other == plan
        assert hash(other) == hash(plan)
        assert torch.equal(other.table(), table)
        assert [row.packed for row in other.rows] == [row.packed for row in plan.rows]
        with pytest.raises(ValueError, match="read-only"):
            other.rows[0].floats[0] = 1.0
        with pytest.raises(TypeError):
            other.rows[0].outputs[0].weights["x"] = 2.0


def test_plans_are_equal_by_their_numbers():
    assert plans() == plans()
    assert len(set(plans().values()) | set(plans().values())) == 3
    assert hash(Output({"x": 1.0, "e": 2.0})) == hash(Output({"e": 2.0, "x": 1.0}))
    assert dataclasses.replace(NEXT, model_time=1.0) != NEXT


# ---- as the kernels read it ----------------------------------------------------------------------


def struct_of_the_header() -> type[ctypes.Structure]:
    """``StepRow`` as csrc/params.h declares it."""
    header = (Path(__file__).parents[1] / "csrc" / "params.h").read_text()
    sizes = {"kInputs": len(INPUTS), "kOutputs": 4, "kNoises": 4}
    body = re.search(r"struct StepRow \{(.*?)\};", header, re.DOTALL)[1]
    fields = []
    for line in re.sub(r"//.*", "", body).split(";"):
        for name in line.strip().removeprefix("float").split(","):
            word, *counts = re.findall(r"\w+", name) or [""]
            kind = ctypes.c_float
            for count in reversed(counts):
                kind = kind * sizes.get(count, int(count) if count.isdigit() else 0)
            if word:
                fields.append((word, kind))
    return type("StepRow", (ctypes.Structure,), {"_fields_": fields})


def test_a_row_is_packed_as_the_header_says():
    StepRow = struct_of_the_header()
    assert ctypes.sizeof(StepRow) == 4 * ROW_FLOATS == 288
    counter = iter(range(1, 100))
    outputs = tuple(
        Output(
            {name: float(next(counter)) for name in INPUTS},
            tuple(float(next(counter)) for _ in range(4)),
            target="x" if j == 0 else j,
        )
        for j in range(4)
    )
    row = Row(outputs, denoised=(0.25, -0.5), clip=(-1.5, 2.5), logvar=(0.125, -0.75))
    packed = StepRow.from_buffer_copy(row.packed)
    assert (packed.denoise_x, packed.denoise_e) == row.denoised
    assert (packed.clip_low, packed.clip_high) == row.clip
    assert (packed.logvar_scale, packed.logvar_offset) == row.logvar
    for j, output in enumerate(outputs):
        # in the order of the header's enum Input: x, e, u, denoised, known, history
        assert list(packed.weights[j]) == [output.weights[name] for name in INPUTS]
        assert list(packed.noise[j]) == list(output.noise)
    assert INPUTS[:6] == ("x", "e", "u", "denoised", "known", "h0")
    assert row.floats.dtype == np.float32
    assert row.packed == row.floats.tobytes()


def test_what_a_row_does_not_name_is_zero():
    floats = Row((Output({"e": 3.0}),), logvar=(0.0, 0.0), clip=(0.0, 0.0)).floats
    assert np.flatnonzero(floats).tolist() == [8 + INPUTS.index("e")]


def test_numbers_are_rounded_to_float32_once():
    value = 1.0 + 2.0**-24 + 2.0**-50  # just above the middle of two float32: up
    assert Row((Output({"x": value}),)).floats[8] == np.float32(1.0 + 2.0**-23)


# ---- what a plan knows of itself -----------------------------------------------------------------


def test_a_row_knows_what_it_reads_and_draws():
    row = Row(
        (Output({"denoised": 1.0, "known": 0.0}, (0.0, 1.0)), Output({"u": 2.0}, target=0)),
        denoised=(0.0, 1.0),
    )
    assert row.reads == {"denoised", "e", "u"}
    assert row.noises == 2  # z_0 is there, if only with a weight of zero
    assert NEXT.noises == 0
    assert Row((Output(noise=(0.0, 0.0)),)).noises == 0
    assert NEXT.reads == {"x"}


def test_a_plan_knows_its_length_history_and_noise():
    ddpm, ddim, multistep = plans().values()
    assert [len(p) for p in (ddpm, ddim, multistep)] == [5, 5, 5]
    assert [p.network_calls for p in (ddpm, ddim, multistep)] == [5, 5, 5]
    assert [p.history for p in (ddpm, ddim, multistep)] == [0, 0, 2]
    assert [p.stochastic for p in (ddpm, ddim, multistep)] == [True, True, False]
    assert not solvers.ddim(fastgen.NoiseSchedule.linear(), 5).stochastic


def test_the_table_is_the_rows_and_the_times_are_the_networks():
    plan = plans()["dpmpp_2m"]
    table, times = plan.table(), plan.times()
    assert table.dtype == torch.float32
    assert table.shape == (5, ROW_FLOATS)
    assert table.numpy().tobytes() == b"".join(row.packed for row in plan.rows)
    assert times.dtype == torch.int64
    assert times.tolist() == [999, 799, 599, 399, 199]
    levels = Plan((Row((X,), model_time=0.1), Row((X,), model_time=14.6)), discrete=False)
    assert levels.times().dtype == torch.float32
    assert levels.times().tolist() == np.float32([0.1, 14.6]).tolist()
    stacked = stack_rows([plan.rows[3], plan.rows[0]])
    assert torch.equal(stacked, table[[3, 0]])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Output(noise=0.5),
        lambda: Output({"x": "1"}),
        lambda: Row(Output({"x": 1.0})),
        lambda: Plan([1]),
    ],
)
def test_what_is_no_table_is_refused(make):
    with pytest.raises(TypeError, match="got"):
        make()


def test_a_discrete_plan_has_integer_times():
    row = Row((Output({"x": 1.0}),), model_time=0.5)
    with pytest.raises(ValueError, match="model_time"):
        Plan((row,))
    assert len(Plan((row,), discrete=False)) == 1


def test_plans_are_told_apart_by_their_digest():
    schedule = fastgen.NoiseSchedule.cosine(100)
    plans = [fastgen.solvers.ddim(schedule, 4, eta) for eta in (0.0, 0.5)]
    plans += [fastgen.solvers.ddim(schedule, 5), fastgen.solvers.ddpm(schedule, 4)]
    assert len({plan.digest for plan in plans}) == 4
    assert fastgen.solvers.ddim(schedule, 4).digest == plans[0].digest
