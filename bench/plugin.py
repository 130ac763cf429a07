"""The pytest plugin of the benchmarks: each case's variants are checked, then timed turn about in
one test, and stored by pytest-benchmark."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import fastgen
from fastgen import backends
from fastgen.bench.cases import PEERS, Case
from fastgen.bench.timing import Timing, host_us, interleaved, processor
from fastgen.bench.variants import replays

SMALL = 1 << 24  # bytes, of what may lie in a cache
Check = Callable[[str, Any, tuple], None]  # (variant, its result, what it was given)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgen")
    group.addoption("--against", default="", help="peers to time, by commas; all by default")
    group.addoption("--quick", action="store_true", help="fewer and shorter rounds")
    group.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fastgen"] = {
        "version": fastgen.__version__,
        "torch": torch.__version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": backends.native().isa(),
        "quick": config.getoption("--quick"),
        **_versions("triton", "diffusers", "k-diffusion", "numpy"),
        **_gpu(config.getoption("--device")),
        **_rates(config.getoption("--device")),
    }


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpu(device: str) -> dict[str, str]:
    if device != "cuda":
        return {}
    facts = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        facts["driver"] = subprocess.check_output(query, text=True).splitlines()[0]
    return facts


def _rates(device: str) -> dict[str, float]:
    """What the machine can do: GFLOP/s of matrix products, GB/s of a copy beyond the caches."""
    n = 1024 if device == "cpu" else 8192
    found = {}
    for name, dtype in (("gemm_gflops", torch.float32), ("gemm_gflops_bf16", torch.bfloat16)):
        a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        run = {"gemm": lambda a, b, c=c: torch.mm(a, b, out=c)}
        timing = interleaved(run, [(a, b)], rounds=9)["gemm"]
        found[name] = 2 * n**3 / timing.minimum / 1e3
    x, y = (torch.ones(1 << 25, device=device) for _ in range(2))
    timing = interleaved({"copy": lambda x: y.copy_(x)}, [(x,)], rounds=9)["copy"]
    return found | {"copy_gbps": 8 * x.numel() / timing.minimum / 1e3}


@pytest.fixture
def device(request) -> torch.device:
    """Where the operands lie."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _settled():
    """malloc as the activations of a network leave it: it then keeps the memory of a few megabytes
    that is freed, which every variant would else fetch from the system again, page by page."""
    torch.empty(7 << 20)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def race(benchmark, request, device) -> Callable[..., None]:
    """Times the variants of a case: ``race(case, variants, inputs, check)``.

    variants: by name; "fastgen" and peers, of which ``--against`` leaves some out. inputs: tuples
    that the variants are called with in turn. check: raises AssertionError for a wrong result;
    that variant is not timed, and fails the test once the others were.
    """
    quick = request.config.getoption("--quick")
    against = [name for name in request.config.getoption("--against").split(",") if name]

    def wanted(name: str) -> bool:
        peer = name.split()[0]
        return peer not in PEERS or not against or peer in against

    def run(
        case: Case,
        variants: dict[str, Callable[..., Any]],
        inputs: Sequence[tuple],
        check: Check,
        rounds: int = 25,
    ) -> None:
        chosen, wrong = {}, []
        for name, variant in variants.items():
            if not wanted(name):
                continue
            try:
                check(name, variant(*inputs[0]), inputs[0])
            except AssertionError as error:
                wrong.append(f"{name}: {error}".splitlines()[0])
            else:
                chosen[name] = variant
        if device.type == "cuda" and case.bytes <= SMALL:
            for name, replay in replays(chosen, inputs).items():
                replay(*inputs[0])  # which runs all; the last may have written over the others'
                check(name, replay.results[-1], inputs[-1])
                chosen[name] = replay
        timings = {}
        if chosen:
            rounds, round_us = (min(9, rounds), 1500.0) if quick else (rounds, 4000.0)
            timings = interleaved(chosen, inputs, rounds=rounds, round_us=round_us)
        for name, timing in timings.items():
            cost = _cost(chosen[name], inputs, device)
            _store(benchmark, case, name, timing, cost | {"file": request.path.stem[6:]})
        if wrong:
            pytest.fail("wrong, and so not timed: " + "; ".join(wrong), pytrace=False)

    return run


@pytest.fixture
def record(benchmark, request) -> Callable[..., None]:
    """Keeps one time of what is done once: ``record(case, variant, seconds, **facts)``."""

    def kept(case: Case, name: str, seconds: float, **facts: Any) -> None:
        cost = {"allocated": 0, "operators": 0, "launches": 0, "file": request.path.stem[6:]}
        _store(benchmark, case, name, Timing((1e6 * seconds,), 1), cost | facts)

    return kept


def _store(benchmark, case: Case, name: str, timing: Timing, more: dict) -> None:
    benchmark.name, benchmark.group = f"{case.op} {case.label} {name}", f"{case.op} {case.label}"
    benchmark.fullname, benchmark._mode = benchmark.name, "race"
    benchmark.param = benchmark.params = None
    benchmark.extra_info = {
        "op": case.op, "case": case.label, "reason": case.reason, "variant": name,
        "bytes": case.bytes, "flops": case.flops, "shape": list(case.shape), **more,
    }  # fmt: skip
    stats = benchmark._make_stats(timing.calls)
    for us in timing.rounds:
        stats.update(us * timing.calls / 1e6)


def _cost(run: Callable[..., Any], inputs: Sequence[tuple], device: torch.device) -> dict:
    """Of one call: bytes allocated on the host (less what an operator frees itself), calls of
    PyTorch's operators; on a GPU launches, and the host's microseconds."""
    activities, more = [torch.profiler.ProfilerActivity.CPU], {}
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        more = {"host": host_us(run, inputs)}
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run(*inputs[0])
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profile.events() or []
    named = [e for e in events if e.name != "[memory]"]
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in named)
    kernels = [e for e in events if "cuda" in str(e.device_type).lower()]
    operators = [e for e in events if e.name.startswith("aten::") and e.cpu_parent is None]
    return {
        **{"allocated": allocated, "operators": len(operators), "launches": len(kernels)},
        **more,
    }


def close_to(expected: Callable[..., torch.Tensor], times: float = 1e-5) -> Check:
    """A check that every variant gives what a formula gives, but for roundings of it all."""

    def check(name: str, result: Any, given: tuple) -> None:
        if name in ("copy_", "empty kernel") or name.startswith("torch"):
            return  # another computation, timed for scale
        value = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", result)
        want = expected(*given)
        error = (value - want).abs().max() / want.abs().max()
        assert error <= times, f"differs by {float(error):.3g} of the largest value"

    return check


def drawn_from(mean: Callable[..., torch.Tensor], sigma: Callable[..., Any]) -> Check:
    """A check that every variant gives normals of a mean and deviation: by their moments."""

    def check(name: str, result: Any, given: tuple) -> None:
        if name == "copy_":
            return
        value = result[0] if isinstance(result, tuple) else getattr(result, "prev_sample", result)
        z = (value - mean(*given)) / sigma(*given)
        spread = 6 / z.numel() ** 0.5
        assert abs(z.mean()) < spread, f"the noise has mean {float(z.mean()):.3g}"
        assert abs(z.std() - 1) < spread, f"the noise has deviation {float(z.std()):.3g}"

    return check


def tensors(
    shape: tuple[int, ...], count: int, device: torch.device
) -> list[tuple[torch.Tensor, ...]]:
    """Sets of random tensors: several where they are small enough to lie in a cache."""
    small = 4 * count * torch.Size(shape).numel() <= SMALL

    def made() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(shape, device=device) for _ in range(count))

    return [made() for _ in range(4 if small else 2)]
