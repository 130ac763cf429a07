"""What the GPU's ways of conv_transpose share with the CPU: Triton's kernel in its interpreter in
every tiling, the choice of a way, and the pass behind PyTorch's operator."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastgen
from fastgen import backends, testing
from fastgen.ops import conv_transpose_cpu
from fastgen.ops import conv_transpose_gpu as gpu
from shared import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("no Triton, or one too old", allow_module_level=True)
from fastgen.kernels import conv_transpose as kernels

interpreted = pytest.mark.skipif(
    not backends.triton_interpreted(), reason="on a GPU: see bench/gpu_device.py"
)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


OPS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
GEOMETRIES = {  # input, outputs, kernel, stride, padding, output_padding, groups, dilation
    "k4 s2 p1": ((2, 20, 5, 4), 3, (4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1)),
    "k3 s2, two groups": ((1, 36, 3, 4), 17, (3, 3), (2, 2), (1, 0), (1, 1), 2, (1, 1)),
    "k16 s8": ((1, 33, 5), 6, (16,), (8,), (4,), (0,), 1, (1,)),
    "dilation beside stride": ((1, 5, 4, 3), 4, (3, 2), (4, 3), (2, 1), (3, 1), 1, (2, 6)),
    "three dims": ((1, 9, 2, 3, 2), 5, (4, 2, 3), (2, 2, 1), (1, 0, 1), (0, 0, 0), 1, (1, 1, 2)),
    "one position": ((3, 18, 1, 1), 7, (4, 4), (1, 1), (0, 0), (0, 0), 1, (1, 1)),
    "stride beyond the kernel": ((1, 4, 3, 2), 3, (2, 1), (5, 3), (1, 0), (2, 2), 1, (1, 1)),
}


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_tiling(name, splits):
    shape, outputs, kernel, stride, padding, extra, groups, dilation = GEOMETRIES[name]
    x, weight = normal(*shape), normal(shape[1], outputs, *kernel, seed=1)
    bias, scale, shift = (normal(outputs * groups, seed=s) for s in (2, 3, 4))
    geometry = stride, padding, extra, groups, dilation

    def theirs(x, weight, bias, scale, shift):
        y = OPS[len(kernel)](x, weight, bias, *geometry)
        over = (-1, *[1] * len(kernel))
        return F.leaky_relu(y * scale.view(over) + shift.view(over), 0.1)

    operands = x, weight, bias, scale, shift
    exact = testing.oracle(theirs, *operands)
    sizes = kernels.Sizes.of(shape[2:], exact.shape[2:], kernel, stride, padding, dilation)
    for merged, (block_m, block_n) in itertools.product((False, True), ((16, 16), (64, 32))):
        if merged and not sizes.can_merge():
            continue
        config = kernels.Config(block_m, block_n, 16, 4, 2, merged, splits)
        out = torch.full(exact.shape, torch.nan)
        kernels.conv_transpose(x, weight, bias, *geometry, scale, shift, "leaky_relu", 0.1, out,
                               config)  # fmt: skip
        testing.assert_close_to_oracle(out, theirs(*operands), exact, 2.0)


def test_a_sum_is_split_where_tiles_are_few():
    def of(batch, inputs, outputs, size, processors=132):
        sizes = kernels.Sizes.of((size,) * 2, (2 * size,) * 2, (4, 4), (2, 2), (1, 1), (1, 1))
        return kernels.configs(sizes, batch, inputs, outputs, 1, "relu", torch.bfloat16, False,
                               processors)  # fmt: skip

    assert of(1, 1024, 512, 4)[0].splits > 1
    assert of(64, 1024, 512, 4)[0].splits == 1
    first = of(64, 256, 256, 16)[0]
    assert (first.block_m, first.block_n, first.merged) == (128, 256, False)
    few = of(64, 128, 3, 32)[0]
    assert (few.block_n, few.merged) == (16, True)
    for found in (of(1, 1, 1, 1), of(1, 100, 1, 7), of(3, 5, 2000, 2)):
        assert len(set(found)) == len(found) > 0
        assert all(min(c.block_m, c.block_n, c.block_k) >= 16 for c in found)


@interpreted
@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_tf32_rounds_to_nearest():
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 + 2**-20, -1 - 2**-12, float("inf"), 3e38])
    weight = torch.ones(1, 1, 1)
    out = torch.empty(1, 1, 6)
    kernels.conv_transpose(x.view(1, 1, 6), weight, None, (1,), (0,), (0,), 1, (1,), None, None,
                           None, 0.0, out, tf32=True)  # fmt: skip
    expected = [1.0, 1 + 2**-10, 1 + 2**-10, -1.0, float("inf"), float("nan")]
    expected[-1] = float(out[0, 0, 5])
    assert abs(expected[-1] / 3e38 - 1) < 2**-11
    assert out.flatten().tolist() == expected
    nan = torch.full((1, 1, 6), torch.nan).view(torch.int32).fill_(0x7FFFFFFF).view(torch.float32)
    kernels.conv_transpose(nan, weight, None, (1,), (0,), (0,), 1, (1,), None, None, None, 0.0,
                           out, tf32=True)  # fmt: skip
    assert out.isnan().all()


@interpreted
@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 1, 4), (3, 1100, 2)])
def test_the_pass_behind_pytorchs_operator(shape, dtype, planar):
    y = normal(*shape, dtype=dtype)
    y = y if planar else y.movedim(1, -1).contiguous().movedim(-1, 1)
    bias, scale, shift = (normal(shape[1], seed=s) for s in (2, 3, 4))
    for vectors in ((bias, scale, shift), (None, scale, None), (None, None, None)):
        for activation in ("relu", "tanh", None):
            ours, cpu = torch.empty_like(y), torch.empty_like(y)
            kernels.channel_epilogue(y, ours, planar, *vectors, activation, 0.2)
            conv_transpose_cpu._channel_epilogue(y, cpu, planar, *vectors, activation, 0.2)
            units = 4 * torch.finfo(dtype).eps  # of activations, and where sums are contracted
            assert torch.allclose(ours.float(), cpu.float(), rtol=units, atol=units)


# ---- the choice of a way -------------------------------------------------------------------------


def layer(backend="gpu", dtype=torch.bfloat16, weight=(64, 32, 4, 4), groups=1, tf32=False):
    dims = len(weight) - 2
    return gpu.Layer(backend, torch.device("cpu"), dtype, tf32, 4, (False,) * dims, weight,
                     (2,) * dims, groups, (1,) * dims, "relu", (False, False, False))  # fmt: skip


def backends_of(*arguments, **options):
    made = layer(*arguments, **options)
    dims = len(made.weight) - 2
    routes = gpu.routes_of(
        made, (2, made.weight[0], *[4] * dims), (2, 32, *[8] * dims), (1,) * dims
    )
    return list(dict.fromkeys(route.backend for route in routes))


def test_first_guesses(monkeypatch):
    monkeypatch.setattr(gpu, "serves", lambda backend, layer: True)
    assert backends_of() == ["torch", "triton"]
    assert backends_of(weight=(64, 3, 4, 4)) == ["triton", "torch", "cuda"]
    assert backends_of(weight=(64, 3, 4, 4), dtype=torch.float32) == ["cuda", "triton", "torch"]
    assert backends_of(weight=(64, 3, 4, 4), dtype=torch.float32, tf32=True)[0] == "triton"
    assert backends_of(weight=(64, 1, 4), groups=64) == ["cuda", "torch"]
    assert backends_of(weight=(64, 32, 4), groups=2) == ["torch", "triton"]
    assert backends_of("triton", weight=(64, 1, 4), groups=64) == ["triton"]
    monkeypatch.setattr(gpu, "serves", lambda backend, layer: False)
    assert backends_of(weight=(64, 1, 4), groups=64) == ["torch"]
    assert backends_of(weight=(64, 3, 4, 4)) == ["torch"]


@interpreted
def test_the_fastest_is_kept_for_sizes_like_it(monkeypatch):
    measured = []

    def milliseconds(run):
        measured.append(run.args[0])
        run()
        return {"torch": 2.0, "triton": 1.0 + 0.1 * len(measured)}[run.args[0].backend]

    monkeypatch.setattr(gpu, "is_measured", lambda input: True)
    monkeypatch.setattr(gpu, "milliseconds", milliseconds)
    monkeypatch.setattr(gpu, "chosen", {})
    x, weight = normal(1, 20, 9), normal(20, 24, 4, seed=1)
    whole = F.conv_transpose1d(x, weight, None, 2, 1)
    exact = testing.oracle(F.conv_transpose1d, x, weight, None, 2, 1)

    def ours(length):
        arguments = x[..., :length], weight, None, (2,), (1,), (0,), 1, (1,), None, None, None, 0.2
        shape = (1, 24, 2 * length)
        return gpu.conv_transpose(*arguments, None, shape, None, "gpu")

    for length in (9, 8, 7, 9):
        y = ours(length)
        there = 2 * length - 2  # beyond, the whole signal's has more inputs
        testing.assert_close_to_oracle(y[..., :there], whole[..., :there], exact[..., :there], 2.0)
    assert len(gpu.chosen) == 2  # of up to 16, and up to 8
    first = next(iter(gpu.chosen.values()))
    assert first == measured[1]
    assert [route.backend for route in measured[:2]] == ["torch", "triton"]


@interpreted
def test_phases_that_read_other_inputs_are_not_merged(monkeypatch):
    """A kernel of 3 is a multiple of the stride that one position has, and not of 2."""
    monkeypatch.setattr(gpu, "is_measured", lambda input: True)
    monkeypatch.setattr(gpu, "chosen", {})
    of = gpu.routes_of

    def products(*arguments):
        return [route for route in of(*arguments) if route.backend == "triton"][:1]

    monkeypatch.setattr(gpu, "routes_of", products)
    weight = normal(6, 5, 3, 3, seed=1)
    for shape in ((4, 6, 1, 1), (2, 6, 1, 2), (1, 6, 2, 2)):
        x = normal(*shape)
        y = gpu.conv_transpose(x, weight, None, (2, 2), (0, 0), (0, 0), 1, (1, 1), None, None, None,
                               0.0, None, F.conv_transpose2d(x, weight, None, 2).shape, None,
                               "gpu")  # fmt: skip
        exact = testing.oracle(F.conv_transpose2d, x, weight, None, 2)
        testing.assert_close_to_oracle(y, F.conv_transpose2d(x, weight, None, 2), exact, 2.0)
    assert [route.config.merged for route in gpu.chosen.values()] == [True, False, False]
    sizes = (1, 5, 5, 5)
    with pytest.raises(ValueError, match="merges phases"):
        kernels.conv_transpose(x, weight, None, (2, 2), (0, 0), (0, 0), 1, (1, 1), None, None,
                               None, 0.0, torch.empty(sizes),
                               kernels.Config(16, 16, 16, 4, 2, merged=True))  # fmt: skip


def test_without_memory_to_time_it_nothing_is_chosen(monkeypatch):
    def milliseconds(run):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "milliseconds", milliseconds)
    routes = [gpu.Route("torch"), gpu.Route("cuda")]
    assert gpu.fastest(routes, lambda route: None) is None


@interpreted
def test_deterministic_algorithms_take_the_first_guess(monkeypatch):
    x, weight = normal(1, 20, 9), normal(20, 24, 4, seed=1)
    found = []
    monkeypatch.setattr(gpu, "chosen", {})
    monkeypatch.setattr(gpu, "_run", lambda route, *arguments: found.append(route))

    def ours():
        gpu.conv_transpose(x, weight, None, (2,), (1,), (0,), 1, (1,), None, None, None, 0.2, None,
                           (1, 24, 18), None, "gpu")  # fmt: skip

    monkeypatch.setattr(gpu, "is_measured", lambda input: True)
    monkeypatch.setattr(gpu, "fastest", lambda routes, run: routes[-1])
    ours()
    monkeypatch.setattr(gpu, "is_measured", lambda input: False)
    ours()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    ours()
    assert [route.backend for route in found] == ["triton", "triton", "torch"]


def test_a_way_that_does_not_run_is_left_out(monkeypatch):
    class OutOfResources(Exception): ...

    def milliseconds(run):
        run()
        return 1.0

    def run(route):
        if route.backend == "triton":
            raise OutOfResources("shared memory")
        if route.backend == "cuda":
            raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "milliseconds", milliseconds)
    routes = [gpu.Route("triton"), gpu.Route("cuda"), gpu.Route("torch")]
    with pytest.warns(UserWarning, match="'cuda'.*no kernel image"):
        assert gpu.fastest(routes, run) == gpu.Route("torch")

    def wrong(route):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        gpu.fastest([gpu.Route("torch"), gpu.Route("cuda")], wrong)


def test_nothing_is_measured_on_the_cpu():
    assert not gpu.is_measured(normal(1))
    assert not gpu.is_tf32(normal(1))
    if not torch.cuda.is_available():
        before = dict(gpu.chosen)
        fastgen.conv_transpose1d(normal(1, 2, 3), normal(2, 2, 2))
        assert gpu.chosen == before
