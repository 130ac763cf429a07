"""The ways to run a computation here: fastgen's backends, torch.compile's modes, CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgen import backends
from fastgen.bench.cases import Case

Run = Callable[..., Any]
REFERENCE_MOST = 1 << 16  # elements; beyond, the reference is only slow


def on_backends(op: str, make: Callable[[str | None], Run], case: Case, device) -> dict[str, Run]:
    """``make(None)`` as "fastgen", and ``make(name)`` as "fastgen name" for each further backend
    that serves here. Triton's interpreter is none; the reference is timed where tensors are small.
    """
    default = backends.choose(op, None, device, torch.float32)
    found = {"fastgen": make(None)}
    for name in backends.OPS[op]:
        if name == default or backends.refusal(op, name, device.type, torch.float32):
            continue
        small = math.prod(case.shape) <= REFERENCE_MOST
        if small if name == "reference" else not (name == "triton" and device.type == "cpu"):
            found[f"fastgen {name}"] = make(name)
    return found


def compiled(function: Run, device) -> dict[str, Run]:
    """torch.compile of a function for one shape; on a GPU also with the CUDA graphs of its mode
    reduce-overhead. (max-autotune chooses among kernels for matrix products; a chain of pointwise
    operators has none.)
    """
    torch.compiler.reset()  # every case is compiled anew, far from the limit of recompilations
    found = {"compile": torch.compile(function, dynamic=False)}
    if device.type == "cuda":
        found["compile graphs"] = torch.compile(function, dynamic=False, mode="reduce-overhead")
    return found


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call, which runs once before it, and the results that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


class Replay:
    """One CUDA graph of a call on each set of inputs; called on the first set, all are run."""

    def __init__(self, run: Run, inputs: Sequence[tuple]) -> None:
        self.first = inputs[0]
        self.graph, self.results = captured(lambda: [run(*given) for given in inputs])

    def __call__(self, *given: Any) -> Any:
        if given[0] is self.first[0]:
            self.graph.replay()
        return self.results[0]


def replays(variants: dict[str, Run], inputs: Sequence[tuple]) -> dict[str, Run]:
    """The variants whose launches can be replayed from a CUDA graph; what cannot says why."""
    found: dict[str, Run] = {}
    for name, run in variants.items():
        if name.removesuffix(" channels_last") not in ("fastgen", "fastgen triton", "eager"):
            continue  # torch.compile has a mode of its own, and diffusers' steps synchronise
        try:
            found[f"{name} graph"] = Replay(run, inputs)
        except RuntimeError as error:
            print(f"{name}: not captured in a CUDA graph: {str(error).splitlines()[0]}")
    return found
