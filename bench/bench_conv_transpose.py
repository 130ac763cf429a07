"""Transposed convolution, normalisation and activation in one op beside PyTorch's operators, on the
layers of a DCGAN generator and of a vocoder; contiguous and channels_last, both ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen import testing
from fastgen.bench.cases import DCGAN, VOCODER, Case
from fastgen.bench.variants import compiled, on_backends


class Layer:
    """One layer's operands, and the two ways to compute it."""

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        kernel: int,
        stride: int,
        padding: int,
        activation: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.dims, self.stride, self.padding = len(shape) - 2, stride, padding
        self.activation, self.device = activation, device
        self.x = normal(*shape).to(dtype)
        weight = 0.02 * normal(shape[1], outputs, *[kernel] * self.dims)
        # a parameter, as a network holds it
        self.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        self.norm = self.scale = self.shift = None
        if activation == "relu":
            mean, var = 0.1 * normal(outputs), normal(outputs).square() + 0.5
            gamma, beta = normal(outputs), normal(outputs)
            self.norm = (mean, var, gamma, beta)
            self.scale = gamma / (var + 1e-5).sqrt()
            self.shift = beta - mean * self.scale

    def eager(self, x: Tensor, weight: Tensor) -> Tensor:
        transpose = F.conv_transpose1d if self.dims == 1 else F.conv_transpose2d
        y = transpose(x, weight, None, self.stride, self.padding)
        if self.norm is not None:
            y = F.batch_norm(y, *(t.to(y.dtype) for t in self.norm))
        if self.activation == "leaky_relu":
            return F.leaky_relu(y, 0.2)
        return F.relu(y) if self.activation == "relu" else torch.tanh(y)

    def ours(self, x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
        transpose = fastgen.conv_transpose1d if self.dims == 1 else fastgen.conv_transpose2d
        return transpose(x, weight, None, self.stride, self.padding, scale=self.scale,
                         shift=self.shift, activation=self.activation, backend=backend)  # fmt: skip

    def case(self, op: str, label: str, reason: str) -> Case:
        y = self.ours(self.x, self.weight)
        per_input = 2 * self.weight[0].numel() * self.x.shape[1]
        flops = per_input * self.x[:, 0].numel()
        bytes_ = self.x.element_size() * (self.x.numel() + self.weight.numel() + y.numel())
        return Case(op, label, reason, bytes_, flops, tuple(self.x.shape))

    def race(self, race, case: Case) -> None:
        exact = testing.oracle(self.eager, self.x, self.weight)
        variants = {
            **on_backends("conv_transpose", self.on, case, self.device),
            "eager": self.eager,
            **compiled(self.eager, self.device),
            "compile freezing": torch.compile(
                Frozen(self), dynamic=False, options={"freezing": True}
            ),
        }
        if self.device.type == "cuda":
            mode = "max-autotune-no-cudagraphs"
            variants["compile autotuned"] = torch.compile(self.eager, dynamic=False, mode=mode)
        if self.dims == 2:
            x, weight = (t.to(memory_format=torch.channels_last) for t in (self.x, self.weight))
            weight = torch.nn.Parameter(weight, requires_grad=False)
            variants["fastgen channels_last"] = lambda *_: self.ours(x, weight)
            variants["eager channels_last"] = lambda *_: self.eager(x, weight)

        def check(name, result, given):
            layout = " channels_last" * name.endswith("channels_last")
            theirs = variants[f"eager{layout}"](*given)
            # a peer need only compute the same: its roundings are its own
            times = 2.0 if name.startswith("fastgen") else 10.0
            testing.assert_close_to_oracle(result, theirs, exact, times)

        race(case, variants, [(self.x, self.weight)], check)

    def on(self, backend: str | None):
        return lambda x, weight: self.ours(x, weight, backend)


class Frozen(torch.nn.Module):
    """A layer that holds its weight, which Inductor then may lay out as it likes."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.weight = layer, torch.nn.Parameter(layer.weight, requires_grad=False)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.layer.eager(x, self.weight)


DTYPES = {"": torch.float32, ", bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("layer", DCGAN, ids=lambda c: f"{c[0]}x{c[2]}x{c[2]} to {c[1]}")
def test_dcgan(batch, layer, dtype, race, device):
    inputs, outputs, size, stride, padding, activation = layer
    made = Layer((batch, inputs, size, size), outputs, 4, stride, padding, activation, device,
                 DTYPES[dtype])  # fmt: skip
    label = f"{inputs}x{size}x{size} to {outputs}, batch {batch}{dtype}"
    made.race(race, made.case("conv_transpose2d", label, "a layer of DCGAN's generator"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", VOCODER, ids=lambda c: f"{c[0]}x{c[2]} to {c[1]}")
def test_vocoder(layer, dtype, race, device):
    inputs, outputs, length, kernel, stride = layer
    padding = (kernel - stride) // 2
    made = Layer((1, inputs, length), outputs, kernel, stride, padding, "leaky_relu", device,
                 DTYPES[dtype])  # fmt: skip
    label = f"{inputs}x{length} to {outputs}, batch 1{dtype}"
    made.race(race, made.case("conv_transpose1d", label, "an upsampling layer of HiFi-GAN V1"))
