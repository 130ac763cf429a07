"""``fastgen bench``: it times what is right, names what is wrong or became slower, and draws."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import fastgen
from fastgen import cli
from fastgen.bench import report
from fastgen.bench.timing import interleaved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quick run of one benchmark, beside eager PyTorch alone."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    status = cli.main(["bench", "forward", "--against", "eager,copy_", "--quick", "--save",
                       str(file), "--draw", str(file.parent)])  # fmt: skip
    assert status == 0
    return file


def test_a_run_holds_every_case_with_the_machine(saved):
    results = report.load(saved)
    assert results.machine["torch"] == torch.__version__
    assert results.machine["threads"] == torch.get_num_threads()
    assert results.machine["gemm_gflops"] > 1
    variants = {"fastgen", "fastgen reference", "eager", "copy_"}
    assert {r.variant for r in results.records} == variants
    cases = results.cases("add_noise")
    assert [case for _, case in cases] == ["(1, 16, 8)", "(1, 4, 64, 64)", "(8, 4, 128, 128)",
                                           "(16, 3, 512, 512)"]  # fmt: skip
    ours = cases["add_noise", "(1, 4, 64, 64)"]["fastgen"]
    assert ours.bytes == 2 * 4 * 16384
    assert ours.allocated == 65536
    assert 0 < ours.minimum <= ours.quartile <= ours.median <= ours.p99
    assert ours.gbps == pytest.approx(ours.bytes / ours.median / 1e3)


def test_the_table_has_a_line_a_case(saved, capsys):
    report.show(report.load(saved))
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    for part in ("add_noise", "(8, 4, 128, 128)", "eager", "of copy_'s"):
        assert part in text


def test_pictures_are_drawn(saved):
    assert (saved.parent / "speedup.png").read_bytes().startswith(b"\x89PNG")
    assert (saved.parent / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert not (saved.parent / "sizes.png").exists()  # sizes were not timed


@pytest.mark.filterwarnings("ignore::pytest.PytestAssertRewriteWarning")
def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys, tmp_path):
    right = fastgen.add_noise
    monkeypatch.setattr(fastgen, "add_noise", lambda x, a, **more: -right(x, a, **more) + 1)
    file = tmp_path / "results.json"
    status = cli.main(["bench", "forward", "--against", "copy_", "--quick", "--save", str(file)])
    assert status == 1
    text = capsys.readouterr().out
    assert "wrong, and so not timed: fastgen: the noise has" in text
    assert {r.variant for r in report.load(file).records} == {"copy_"}


def test_ctrl_c_ends_a_run_at_once(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastgen, "add_noise", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "forward", "--against", " copy_ ,", "--quick"])
    assert stop.value.code == 130
    assert "fastgen: interrupted" in capsys.readouterr().err


def changed(results, factor, variants=("fastgen",)):
    def record(r):
        if r.variant not in variants:
            return r
        times = {n: factor * getattr(r, n) for n in ("median", "p99", "minimum", "quartile")}
        return dataclasses.replace(r, **times)

    return dataclasses.replace(results, records=[record(r) for r in results.records])


def steady(results):
    """The same with a spread as on a quiet machine."""
    records = [dataclasses.replace(r, spread=0.03) for r in results.records]
    return dataclasses.replace(results, records=records)


def test_a_file_without_the_cases_is_refused_before_anything_is_timed(saved, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "guidance", "--compare", str(saved)])
    assert stop.value.code == 2
    assert "has none of the cases" in capsys.readouterr().err


def test_what_became_slower_is_named(saved):
    results = steady(report.load(saved))
    assert report.slower(results, results) == {}
    assert report.slower(results, changed(results, 1.05)) == {}
    assert report.slower(results, changed(results, 0.5)) == {}
    lines = list(report.slower(results, changed(results, 1.15)).values())
    assert len(lines) == 4
    assert lines[0].startswith("add_noise (1, 16, 8), fastgen: 1.15 times the time, beside its")
    # a slower machine is no slower kernel, and a faster one hides none
    everything = ("fastgen", "fastgen reference", "eager", "copy_")
    assert report.slower(results, changed(results, 1.15, everything)) == {}
    faster = changed(changed(results, 0.5, everything), 1.15)
    assert len(report.slower(results, faster)) == 4


def test_noise_is_no_slowdown(saved):
    results = report.load(saved)
    loud = dataclasses.replace(
        results, records=[dataclasses.replace(r, spread=0.4) for r in results.records]
    )
    assert report.slower(loud, changed(loud, 1.15)) == {}


def test_runs_of_another_kind_are_told_apart(saved):
    results = report.load(saved)
    other = dataclasses.replace(results, machine={**results.machine, "torch": "2.7", "threads": 64})
    assert report.differences(results, results) == []
    assert report.differences(results, other) == [
        f"threads: {torch.get_num_threads()} then, 64 now",
        f"torch: {torch.__version__} then, 2.7 now",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "op: got 'nope', expected one of step,"),
        (["forward", "--against", "jax"], "--against: got 'jax', expected some of eager,"),
        (["forward", "--device", "tpu"], "--device: got 'tpu', expected cpu, or cuda where"),
        (["forward", "--save", "/nowhere/at/all.json"], "cannot be written"),
        (["forward", "--draw", "/nowhere"], "--draw: /nowhere is not a folder"),
        (["forward", "--compare", "/nowhere.json"], "No such file"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"benchmarks": []}'])
def test_a_file_of_another_kind_is_refused(text, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="is no result of `fastgen bench`"):
        report.load(file)


def test_a_peer_that_is_not_installed_is_left_out_by_name(saved, tmp_path, capsys):
    data = json.loads(saved.read_text())
    data["machine_info"]["fastgen"].pop("diffusers", None)
    file = tmp_path / "without.json"
    file.write_text(json.dumps(data))
    report.show(report.load(file))
    assert "left out, since it is not installed: diffusers" in capsys.readouterr().out


def test_variants_are_called_on_every_input_in_turn():
    seen = []
    interleaved({"a": lambda x: seen.append(x)}, [(1,), (2,), (3,)], rounds=2, round_us=10)
    assert seen == [1, 2, 3] * (len(seen) // 3)


X, E, U = torch.randn(3, 1, 16, 8)
OVERHEAD = {  # a call's time over a bare torch.add's at (1, 16, 8), at most
    "ddim_step": (lambda: fastgen.ddim_step(X, E, 0.5, 0.6), 7),
    "ddpm_step": (lambda: fastgen.ddpm_step(X, E, 0.5, 0.6, seed=0, step=1), 8),
    "step": (lambda: fastgen.step(ROW, X, E), 7),
    "step with history": (lambda: fastgen.step(PAST, X, E, history=(U,)), 8),
    "sample in 20 steps": (lambda: fastgen.sample(lambda x, t, c: x, PLAN, x=X), 260),
    "cfg_combine": (lambda: fastgen.cfg_combine(X, E, 2.0), 6),
    "combine": (lambda: fastgen.combine([X, E, U], [0.5, 1.0, 2.0]), 13),
    "add_noise": (lambda: fastgen.add_noise(X, 0.5, seed=0, step=1), 8),
    "reparameterize": (lambda: fastgen.reparameterize(X, E, seed=0, step=1), 6),
    "randn": (lambda: fastgen.randn((1, 16, 8), seed=0), 11),
    "gaussian_kl": (lambda: fastgen.gaussian_kl(X, E), 20),
    "conv_transpose1d": (lambda: fastgen.conv_transpose1d(X, WEIGHT), 60),
}
PLAN = fastgen.solvers.ddim(fastgen.NoiseSchedule.linear(), 20)
PAST = fastgen.Row((fastgen.Output({"x": 0.5, "h0": 0.5}),))
ROW = fastgen.Row((fastgen.Output({"x": 0.5, "e": 0.5}),))
WEIGHT = torch.ones(16, 1, 1)


@pytest.mark.parametrize("name", OVERHEAD)
def test_a_call_costs_a_few_additions(name):
    """In the same run, turn about, the fastest round of each: a ratio and no time."""
    call, most = OVERHEAD[name]
    with torch.inference_mode():
        timings = interleaved({"add": lambda: torch.add(X, E), "ours": call}, rounds=15,
                              round_us=1000.0)  # fmt: skip
    ratio = timings["ours"].minimum / timings["add"].minimum
    assert ratio <= most, f"{ratio:.1f} additions"


def test_importing_fastgen_imports_no_compiler():
    """torch._dynamo alone takes longer than torch itself."""
    code = (
        "import sys, torch; had = set(sys.modules); import fastgen; print(set(sys.modules) - had)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch._dynamo", "triton", "sympy", "hypothesis", "rich", "matplotlib"):
        assert f"'{heavy}'" not in done.stdout


def test_a_comparison_with_nothing_is_no_success(saved, tmp_path, capsys):
    data = json.loads(saved.read_text())
    data["benchmarks"] = []
    file = tmp_path / "nothing.json"
    file.write_text(json.dumps(data))
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "forward", "--against", "copy_", "--quick", "--compare", str(file)])
    assert stop.value.code == 2
    assert "has none of the cases" in capsys.readouterr().err
