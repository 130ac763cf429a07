"""Parts of bench/gpu_check.py: whole runs of the solvers and of diffusers' schedulers on a GPU."""

from __future__ import annotations

import contextlib
import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastgen
from fastgen import NoiseSchedule, solvers
from fastgen.bench import solver_errors
from fastgen.bench.gpu_parts import ROOT, Parity
from fastgen.bench.variants import captured

SHAPE = (3, 4, 16, 16)
STEPS = 6
DRAWS = {"fallback_random": True}  # compiled, torch draws the numbers that it draws otherwise


def network(x: Tensor, t: Tensor | None = None, cond: Any = None) -> Tensor:
    """Not linear, and of operations that round alike on every device."""
    return (x * 0.75).clamp(-1.0, 1.0) - (x * 0.25).clamp(-0.5, 0.5)


@contextlib.contextmanager
def without_waiting(dry: bool) -> Iterator[None]:
    """An error where the host waits for the device."""
    if dry:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Attempts:
    """Goes on after what fails, and counts it."""

    def __init__(self) -> None:
        self.parity, self.errors = Parity(), 0

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.errors += 1
            print(f"ERROR {what}: {type(error).__name__}: {error}"[:3000])
            if "CUDA error" in str(error) and "captur" not in str(error):
                raise  # a device that failed answers nothing else

    def result(self, **more: Any) -> dict:
        found = self.parity.result()
        found["failures"] += self.errors
        found["summary"] += f", {self.errors} raised an error"
        return found | more


def plans(dry: bool) -> dict[str, fastgen.Plan]:
    schedule = NoiseSchedule.linear()
    found = {
        "ddpm": solvers.ddpm(schedule, STEPS),
        "ddim, eta 1": solvers.ddim(schedule, STEPS, eta=1.0),
    }
    if not dry:
        made = {**solver_errors.SHOWN, **solver_errors.DRAWN}
        points = solver_errors.path("vp", STEPS)
        found |= {name: solver(points) for name, solver in made.items()}
        found["pndm"] = solvers.pndm(schedule, STEPS)
        found["lcm"] = solvers.lcm(schedule, STEPS)
    return found


def samplers(device: torch.device, dry: bool) -> dict:
    """``fastgen.sample`` against the CPU's bits, without a wait, and as one CUDA graph."""
    attempt, seeds = Attempts(), [5, 6, 2**62]
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for name, plan in plans(dry).items():
        with attempt(name):
            x = first * plan.initial_scale
            expected = fastgen.sample(network, plan, x=x, seed=seeds)
            x, key = x.to(device), torch.tensor(seeds, device=device)
            run = functools.partial(fastgen.sample, network, plan, x=x, seed=key)
            run()  # the plan's times are on the device now
            with without_waiting(dry):
                actual = run()
            attempt.parity(name, actual, expected)
            if dry:
                continue
            graph, result = captured(run)
            for again in (first * 0.5, first):
                x.copy_(again)
                graph.replay()
                expected = fastgen.sample(network, plan, x=again, seed=seeds)
                attempt.parity(f"{name}, replayed", result, expected)
    return attempt.result()


def diffusers(device: torch.device, dry: bool) -> dict:
    """Each scheduler: the CPU's bits, without a wait; in one CUDA graph; compiled; and, with
    torch's noise, diffusers' own image. Then the times of whole loops."""
    try:
        import diffusers as theirs
    except ImportError:
        return {"summary": "diffusers is not installed: left out"}
    sys.path.append(str(ROOT / "tests"))
    from test_diffusers import GRIDS, advance, times_of

    from fastgen.integrations import diffusers as fast

    def begun(
        name: str,
        where: torch.device,
        noise: str = "fastgen",
        compat: str = "",
        whole: bool = False,
    ):  # whole: told where it begins, which a compiled loop cannot look for
        made = getattr(theirs, name)()
        if noise != "diffusers":
            made = fast.convert(made, noise=noise, compat=compat)
        made.set_timesteps(STEPS, device=where, **GRIDS.get(name, {}))
        if hasattr(made, "set_sigmas"):
            made.set_sigmas(STEPS)
        if whole and hasattr(made, "set_begin_index"):
            made.set_begin_index(0)
        return made

    def loop(made, x, generator=None):
        takes = inspect.signature(getattr(made, "step", None) or made.step_pred).parameters
        options = {"generator": generator} if "generator" in takes else {}
        times = times_of(made)
        for i in range(len(times)):
            if hasattr(made, "scale_model_input"):
                made.scale_model_input(x, times[i])
            x = advance(made, network(x), i, x, times, **options, return_dict=False)[0]
        return x

    attempt = Attempts()
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    names = [n for n in sorted(fast._CLASSES) if "noise_sampler" not in vars(getattr(theirs, n)())]
    for name in names[:3] if dry else names:
        with attempt(name):
            seed = torch.Generator().manual_seed(3)
            expected = loop(begun(name, torch.device("cpu")), first, seed)
            made, x = begun(name, device), first.to(device)
            seed.manual_seed(3)
            with without_waiting(dry):
                actual = loop(made, x, seed)
            attempt.parity(name, actual, expected)
        with attempt(f"{name}, torch's noise"):
            ends = []
            for noise in ("torch", "diffusers"):
                on_device = torch.Generator(device).manual_seed(3)
                made = begun(name, device, noise, compat="diffusers")
                # UnCLIP's last step is diffusers' own there
                with without_waiting(dry or noise == "diffusers" or name == "UnCLIPScheduler"):
                    ends.append(loop(made, x, on_device))
            error = float((ends[0] - ends[1]).abs().max() / ends[1].abs().max())
            # 1e-3: a rounding over the root of the first alpha_bar, 2.4e-9, is 1.2e-3
            if not error < (1e-3 if name == "UnCLIPScheduler" else 1e-4):
                raise AssertionError(f"differs from diffusers' by {error:.3g} of the largest value")
        if not dry:
            with attempt(f"{name}, in a graph"):
                in_a_graph(attempt, name, begun(name, device), loop, x)
    compiled = () if dry else ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler",
                               "DPMSolverMultistepScheduler")  # fmt: skip
    for name in compiled:
        with attempt(f"{name}, compiled"):
            torch._dynamo.reset()
            ends = []
            for call in (torch.compile(steps, fullgraph=True, options=DRAWS), steps):
                torch.manual_seed(0)
                ends.append(call(begun(name, device, "torch", whole=True), x, network))
            attempt.parity(f"{name}, compiled", ends[0], ends[1].cpu())
    times = {} if dry else loop_times(begun, device)
    return attempt.result(times=times)


def in_a_graph(attempt: Attempts, name: str, made, loop, x: Tensor) -> None:
    """A loop whose seed is in the graph."""
    key = torch.Generator().manual_seed(3)

    def run():
        key.manual_seed(3)
        return loop(made.new_loop(), x, key)

    graph, result = captured(run)
    kept = x.clone()
    for scale in (0.5, 1.0):
        x.copy_(kept * scale)
        graph.replay()
        replayed = result.clone()
        attempt.parity(f"{name}, replayed", replayed, run().cpu())


def loop_times(begun, device: torch.device) -> dict:
    """Microseconds a step of a run, its new timesteps among it, as the host sees it: the device is
    waited for at the end. In a graph the timesteps are there already."""
    found = {}
    for shape in ((1, 16, 8), (1, 4, 64, 64), (8, 4, 128, 128)):
        x = torch.randn(shape, device=device)
        for name in ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "LCMScheduler",
                     "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                     "FlowMatchEulerDiscreteScheduler"):  # fmt: skip
            runs: dict[str, Callable[[], Any]] = {}
            for noise in ("diffusers", "torch", "fastgen"):
                made = begun(name, device, noise)
                runs[noise] = functools.partial(whole_run, made, x, device)
                runs[noise]()
            runs["one graph"] = captured(lambda made=made, x=x: steps(made.new_loop(), x))[0].replay
            taken: dict[str, list[float]] = {noise: [] for noise in runs}
            for _ in range(15):
                for noise, run in runs.items():
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    run()
                    torch.cuda.synchronize()
                    taken[noise].append((time.perf_counter() - start) / STEPS * 1e6)
            medians = {noise: statistics.median(values) for noise, values in taken.items()}
            found[f"{name} {shape}"] = medians
            print(f"{name:33} {shape!s:17}", *(f"{n} {v:.1f}" for n, v in medians.items()))
    return found


def whole_run(scheduler, x: Tensor, device: torch.device) -> Tensor:
    scheduler.set_timesteps(STEPS, device=device)
    return steps(scheduler, x)


def steps(scheduler, x: Tensor, model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """All of a run; without a model, of the same output at every step."""
    y = x
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(y, t)
        output = x if model is None else model(y)
        y = scheduler.step(output, t, y, return_dict=False)[0]
    return y
