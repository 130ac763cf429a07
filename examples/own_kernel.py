"""A Triton kernel of your own, checked as fastgen's are and timed beside eager PyTorch.

python examples/own_kernel.py    (without a GPU: TRITON_INTERPRET=1 before it, and no times)
"""

import os

import torch
import triton
import triton.language as tl

from fastgen import testing
from fastgen.bench.timing import interleaved, report


@triton.jit
def gated(x, gate, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, i < count).to(tl.float32)
    tl.store(out + i, tl.load(x + i, i < count) * (g / (1 + tl.exp(-g))), i < count)


def swiglu(x, gate):
    x, gate, out = x.contiguous(), gate.contiguous(), torch.empty(x.shape, device=x.device)
    gated[(triton.cdiv(x.numel(), 1024),)](x, gate, out, x.numel(), BLOCK=1024)
    return out


def eager(x, gate):
    return x * torch.nn.functional.silu(gate)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("no GPU: set TRITON_INTERPRET=1")
    for seed, shape in enumerate([(1,), (7, 5), (2, 3, 1025), (4, 4096)]):
        x, gate = (
            testing.random_layout(testing.sample_tensor(shape, seed=s).to(device), seed)
            for s in (seed, seed + 100)
        )
        with testing.poisoned_empty():
            actual = swiglu(x, gate)
        exact = testing.oracle(eager, x, gate)
        testing.assert_close_to_oracle(actual, eager(x, gate), exact, times=2.0)
    print("the error is at most twice eager PyTorch's")
    if device == "cuda":
        pair = tuple(torch.randn(2, 1 << 24, device=device))
        timings = interleaved({"ours": swiglu, "eager": eager}, [pair])
        report("swiglu, 2^24 elements", [("float32", timings)], ours="ours")
