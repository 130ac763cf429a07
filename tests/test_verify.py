"""``fastgen verify``: what it passes, and that it finds a wrong kernel with its smallest case."""

from __future__ import annotations

import json

import pytest
import torch

import fastgen
from fastgen import backends, cli, verify


def test_every_op_keeps_its_promise_on_the_cpu():
    verdicts = list(verify.verify(only=["cpu"], cases=5, seed=3))
    assert {v.op for v in verdicts} == set(verify.OPS)
    assert {v.dtype for v in verdicts} == {"float32", "bfloat16", "float16"}
    for v in verdicts:
        assert not v.what, (v.what, v.line)
        assert v.cases == 5
        assert v.ratio <= verify.TIMES
        assert v.bitwise or not verify.OPS[v.op].exact


def test_the_same_seed_draws_the_same_cases():
    def drawn(seed):
        seen = []
        check = verify.check

        def watch(op, backend, **case):
            seen.append(repr(case))
            return check(op, backend, **case)

        verify.check = watch
        try:
            list(verify.verify(["combine"], ["cpu"], cases=5, seed=seed))
        finally:
            verify.check = check
        return seen

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.fixture
def flipped_sign(monkeypatch):
    """A kernel that gives every sample but the first the wrong sign."""
    right = fastgen.combine

    def wrong(outputs, weights, *, out=None, backend=None):
        result = right(outputs, weights, out=out, backend=backend)
        if backend == "cpu":
            result[1:] = -result[1:]
        return result

    monkeypatch.setattr(fastgen, "combine", wrong)


def test_a_flipped_sign_is_found_with_its_smallest_case(flipped_sign, capsys):
    verdicts = list(verify.verify(["combine"], ["cpu"], cases=60))
    for v in verdicts:
        assert "bits differ" in v.what
        assert not v.bitwise
        namespace: dict = {}
        with pytest.raises(verify.Breach, match="combine on cpu: bits differ"):
            exec(v.line, namespace)
        # two samples, the fewest that show it, and nothing that need not be there
        assert f"dtype={v.dtype!r}, shape=(2,), layout='contiguous'" in v.line
        assert "weights=[1.0], seed=0" in v.line


def test_the_command_says_so_and_exits_with_1(flipped_sign, capsys, tmp_path):
    file = tmp_path / "verdicts.json"
    assert cli.main(["verify", "combine", "--backend", "cpu", "--save", str(file)]) == 1
    text = capsys.readouterr().out
    assert "3 broken" in text
    assert "from fastgen.verify import check; check('combine', 'cpu', " in text
    saved = json.loads(file.read_text())
    assert len(saved["verdicts"]) == 3
    assert saved["torch"] == torch.__version__
    assert all(v["line"] for v in saved["verdicts"])


def test_the_command_passes_what_is_right(capsys):
    assert cli.main(["verify", "ddim_step", "randn", "--backend", "cpu", "--cases", "3"]) == 0
    text = capsys.readouterr().out
    assert "every promise kept" in text
    assert text.count("ddim_step") == 3


def test_an_error_of_the_op_is_a_breach(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fastgen, "randn", broken)
    (verdict, *_) = verify.verify(["randn"], ["cpu"], cases=2)
    assert verdict.what == "RuntimeError: no such kernel"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "op: got 'nope'"),
        (["--backend", "tpu"], "backend: got 'tpu'"),
        (["--cases", "0"], "--cases: got 0"),
        (["--save", "/nowhere/at/all.json"], "--save: /nowhere/at/all.json cannot be written"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA backend serves here")
def test_a_backend_that_serves_nowhere_is_named():
    assert "cuda" not in verify.served("step")
    with pytest.raises(ValueError, match="cuda serves none of these ops"):
        list(verify.verify(["randn"], ["cuda"]))
    assert set(verify.served("conv_transpose")) <= set(backends.BACKENDS)


def test_a_formula_that_every_backend_gets_wrong_is_found(monkeypatch):
    right = fastgen.ddim_step

    def wrong(x, e, a_t, a_s, **more):
        return right(x, e, a_t, min(1.0, a_s * 1.001), **more)

    monkeypatch.setattr(fastgen, "ddim_step", wrong)
    found = list(verify.verify(["ddim_step"], ["cpu"], cases=20))
    assert all(v.what == "the reference is not the paper's formula" for v in found)
    assert "check('ddim_step', 'cpu'" in found[0].line
