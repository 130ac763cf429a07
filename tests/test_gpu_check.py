"""The parts of gpu-check that need no GPU: limits, the tools' outputs, parts that fail or hang."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

from fastgen.bench import gpu_check, gpu_tools
from fastgen.bench.gpu_limits import Machine, verdicts
from fastgen.bench.report import Record, Results

H200 = Machine(132, 1.98e9, 304)


def record(op, case, variant, median, shape, tensors=3, **more):
    size = 4
    for extent in shape:
        size *= extent
    facts = {"file": "step", "reason": "", "p99": median, "minimum": median, "quartile": median,
             "spread": 0.02, "flops": 0, "allocated": 0, "operators": 0, "launches": 1,
             "bytes": tensors * size, **more}  # fmt: skip
    return Record(op=op, case=case, variant=variant, median=median, shape=shape, **facts)


def judged(*records):
    return {v.what: v for v in verdicts(Results({}, list(records)), H200)}


def test_a_large_step_is_held_to_the_copys_bandwidth():
    shape, case = (1, 1 << 26), "(1, 67108864)"
    copy = record("sizes", case, "copy_", 125.0, shape, 2)  # 4.3 TB/s
    fast = record("sizes", case, "fastgen", 200.0, shape)
    slow = dataclasses.replace(fast, median=240.0)
    what = f"sizes {case}, fastgen, share of copy_'s bandwidth"
    assert judged(copy, fast)[what].good
    assert judged(copy, fast)[what].measured == pytest.approx(1.5 * 125 / 200)
    assert not judged(copy, slow)[what].good
    # in the caches no share is asked for
    small = [dataclasses.replace(r, shape=(1, 1 << 20)) for r in (copy, fast)]
    assert what not in judged(*small)


def test_generators_are_held_to_their_best_peer():
    case, shape = "DCGAN, batch 64, bfloat16", (64, 100)
    peers = [record("fuse", case, "eager", 300.0, shape),
             record("fuse", case, "compile autotuned", 260.0, shape)]  # fmt: skip
    ours = record("fuse", case, "fastgen channels_last graph", 200.0, shape)
    what = f"fuse {case}, the best peer's time over ours"
    assert judged(*peers, ours, record("fuse", case, "fastgen", 400.0, shape))[what].good
    assert not judged(*peers, record("fuse", case, "fastgen", 201.0, shape))[what].good
    assert not judged(*peers)  # ours was not timed
    assert not judged(*peers, dataclasses.replace(ours, case="DCGAN, batch 1, bfloat16"))
    layer = "256x688 to 128, batch 1"
    found = judged(record("conv_transpose1d", layer, "eager", 30.0, shape),
                   record("conv_transpose1d", layer, "fastgen", 20.0, shape))  # fmt: skip
    assert [v.good for v in found.values()] == [True]


def test_noise_is_held_to_what_instructions_allow():
    assert H200.normals == pytest.approx(4 * 132 * 4 * 32 * 1.98e9 / 304)
    shape, case = (1, 1 << 26), "(1, 67108864)"
    copy = record("randn", case, "copy_", 125.0, shape, 2)
    what = f"randn {case}, fastgen, share of bandwidth or instructions"
    least = (1 << 26) / H200.normals * 1e6  # µs of instructions alone: more than its bytes take
    assert least > 125.0 / 2
    assert judged(copy, record("randn", case, "fastgen", least / 0.81, shape, 1))[what].good
    assert not judged(copy, record("randn", case, "fastgen", least / 0.79, shape, 1))[what].good


def test_launches_the_host_and_torch_compile_have_limits():
    shape, case = (1, 16, 8), "(1, 16, 8)"
    ours = record("ddim_step", case, "fastgen", 3.5, shape, host=5.0)
    empty = record("ddim_step", case, "empty kernel", 2.0, shape)
    peer = record("ddim_step", case, "compile", 3.4, shape)
    assert all(v.good for v in judged(ours, empty, peer).values())
    bad = dataclasses.replace(ours, launches=2, host=7.0, median=4.5, quartile=4.5)
    missed = {w for w, v in judged(bad, empty, peer).items() if not v.good}
    assert missed == {
        f"ddim_step {case}, fastgen, launches",
        f"ddim_step {case}, fastgen, host µs",
        f"ddim_step {case}, µs above an empty kernel",
        f"ddim_step {case}, time over torch.compile's",
    }
    # the reference is eager PyTorch, and a graph is replayed as one
    others = [dataclasses.replace(bad, variant=f"fastgen {n}") for n in ("reference", "graph")]
    assert not any("launches" in what for what in judged(*others))


RAN = "small: every kernel ran\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (RAN + "========= ERROR SUMMARY: 0 errors", 0),
        (RAN + "========= ERROR SUMMARY: 3 errors", 3),
        (RAN + "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 2),
        ("========= Error: Device not supported", None),
        (RAN + "========= ERROR SUMMARY: 1,234 errors", 1234),
        ("========= ERROR SUMMARY: 5 errors", 5),  # which ended the program
        ("========= ERROR SUMMARY: 0 errors", None),  # it ended before the kernels did
        ("stopped after 110 s", None),
    ],
)
def test_the_sanitizers_verdict_is_read(text, found):
    assert gpu_tools.errors(text) == found


def test_the_counters_are_read():
    names = list(gpu_tools.METRICS)
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    values = dict(zip(names, ("1,234.5", "4e12", "88.1"), strict=True))
    lines = [f'"{i}","7","step_kernel","{name}","u","{value}"'
             for i in (0, 1) for name, value in values.items()]  # fmt: skip
    lines.append(f'"3","7","other","{names[0]}","u","n/a"')
    rows = gpu_tools.kernels("\n".join(["==PROF== Connected", head, *lines, '"2","7","cut"']))
    assert rows == [{"kernel": "step_kernel", names[0]: 1234.5, names[1]: 4e12, names[2]: 88.1}] * 2
    assert gpu_tools.kernels("==ERROR== ERR_NVGPUCTRPERM") == []


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch, capsys):
    parts = tmp_path / "gpu_parts.py"
    parts.write_text(
        "import json, sys, time\n"
        "name, file = sys.argv[1:3]\n"
        "print('in', name)\n"
        "if name == 'hangs': time.sleep(60)\n"
        "if name == 'fails': sys.exit(3)\n"
        "open(file, 'w').write(json.dumps({'summary': 'all well'}))\n"
    )
    monkeypatch.setattr(gpu_check, "BENCH", tmp_path)
    names = ("hangs", "fails", "works")
    monkeypatch.setattr(
        gpu_check, "PARTS", tuple((name, 6 if name == "works" else 1) for name in names)
    )
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)
    out = tmp_path / "out"
    assert gpu_check.main(["--dry", "--no-build", "--out", str(out)]) == 1
    results = json.loads((out / "results.json").read_text())
    assert [results[name]["passed"] for name in names] == [False, False, True]
    assert results["hangs"]["exit_code"] == 124
    assert results["fails"]["exit_code"] == 3
    assert results["works"]["summary"] == "all well"
    assert "in works" in (out / "log.txt").read_text()
    assert "in works" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PARTS", (("machine", 60),))
    out = tmp_path / "out"
    assert gpu_check.main(["--dry", "--no-build", "--minutes", "0.01", "--out", str(out)]) == 1
    found = json.loads((out / "results.json").read_text())["machine"]
    assert (found["passed"], found["summary"]) == (None, "no time left")


def test_without_a_gpu_or_torch_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    assert "DRY=1 rehearses without one" in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "has no torch; make gpu-check PYTHON=" in gpu_check.without_gpu()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--minutes", "nan"], "--minutes"), (["--minutes", "-1"], "--minutes"),
     (["--out", "/proc/nowhere"], "--out")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--dry", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_that_a_part_started_is_left_behind(tmp_path):
    log = gpu_check.Log(tmp_path / "log.txt")
    code = (
        "import subprocess, sys; print('\\xff'); sys.stdout.buffer.write(b'\\xff\\n');"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    )
    start = time.monotonic()
    assert gpu_check.run([sys.executable, "-c", code], 30, log) == 0
    assert time.monotonic() - start < 10
    child = int((tmp_path / "log.txt").read_text().split()[-1])
    status = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 10  # a killed process takes a moment to go
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, f"process {child} is still there"
        time.sleep(0.01)
