"""Transposed convolution + normalisation + activation against PyTorch's eager operators.

The layers of DCGAN's 64 x 64 generator (Radford et al., 2016), kernel 4. Each case's answer is
checked against float64 before it is timed; the variants run turn about. Milliseconds, medians.

    python -m fastgen.bench.bench_conv_transpose [--batch 1 16] [--dtype float32] [--repeats 15]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen.bench.timing import interleaved, machine

# C_in, C_out, input size, stride, padding, activation
DCGAN = (
    (100, 1024, 1, 1, 0, "relu"),
    (1024, 512, 4, 2, 1, "relu"),
    (512, 256, 8, 2, 1, "relu"),
    (256, 128, 16, 2, 1, "relu"),
    (128, 3, 32, 2, 1, "tanh"),
)


class Layer:
    """One layer's operands, and the two ways to compute it."""

    def __init__(self, case: tuple, batch: int, dtype: torch.dtype) -> None:
        inputs, outputs, size, self.stride, self.padding, self.activation = case
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.x = normal(batch, inputs, size, size).to(dtype)
        self.weight = (0.02 * normal(inputs, outputs, 4, 4)).to(dtype)
        self.norm = None
        if self.activation == "relu":
            mean, var = 0.1 * normal(outputs), normal(outputs).square() + 0.5
            self.norm = (mean, var, normal(outputs), normal(outputs))
        self.folded: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.norm is not None:
            mean, var, gamma, beta = self.norm
            scale = gamma / (var + 1e-5).sqrt()
            self.folded = (scale, beta - mean * scale)

    def eager(self, x: Tensor, weight: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, weight, None, self.stride, self.padding)
        if self.norm is None:
            return y.tanh()
        mean, var, gamma, beta = (t.to(torch.promote_types(x.dtype, torch.float32))
                                  for t in self.norm)  # fmt: skip
        return F.batch_norm(y, mean, var, gamma, beta).relu()

    def ours(self, x: Tensor, weight: Tensor) -> Tensor:
        scale, shift = self.folded
        return fastgen.conv_transpose2d(x, weight, None, self.stride, self.padding, scale=scale,
                                        shift=shift, activation=self.activation)  # fmt: skip

    def check(self) -> None:
        """Ours against the folded formula, within twice what PyTorch's operators are off by."""
        y = F.conv_transpose2d(self.x.double(), self.weight.double(), None, self.stride,
                               self.padding)  # fmt: skip
        scale, shift = self.folded
        if scale is not None and shift is not None:
            y = y * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
        exact = y.relu() if self.activation == "relu" else y.tanh()
        budget = (self.eager(self.x, self.weight) - exact).abs().max()
        error = (self.ours(self.x, self.weight) - exact).abs().max()
        assert error <= 2 * budget, f"error {error:.3g}, PyTorch's own {budget:.3g}"

    def variants(self) -> dict[str, Callable[[], object]]:
        """Each way, contiguous and channels_last."""
        x, weight = self.x, self.weight
        last = x.to(memory_format=torch.channels_last)
        weight_last = weight.to(memory_format=torch.channels_last)
        return {
            "torch": lambda: self.eager(x, weight),
            "torch cl": lambda: self.eager(last, weight_last),
            "ours": lambda: self.ours(x, weight),
            "ours cl": lambda: self.ours(last, weight_last),
        }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    print(f"{machine()}, {args.dtype}, milliseconds")
    print(f"{'batch':>5} {'layer':>17} {'torch':>8} {'torch cl':>8} {'ours':>8} {'ours cl':>8} "
          f"{'speed-up':>8}")  # fmt: skip
    for batch in args.batch:
        for case in DCGAN:
            layer = Layer(case, batch, getattr(torch, args.dtype))
            layer.check()
            timings = interleaved(layer.variants(), rounds=args.repeats)
            ms = {name: timing.median / 1e3 for name, timing in timings.items()}
            name = f"{case[0]}x{case[2]}x{case[2]} -> {case[1]}"
            best = min(ms["torch"], ms["torch cl"]) / min(ms["ours"], ms["ours cl"])
            print(f"{batch:5} {name:>17} " + " ".join(f"{ms[k]:8.3f}" for k in ms)
                  + f" {best:8.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
