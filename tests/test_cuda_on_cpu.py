"""The CUDA kernels, compiled for the CPU with an emulation of thread blocks, give the CPU's bits
(the transposed convolution: errors of at most twice PyTorch's).

What only a GPU can show (the machine code, speed, streams, graphs) is bench/gpu_check.py's.
"""

from __future__ import annotations

import importlib.util
import math
import random
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_conv_transpose import ACTIVATIONS, Case

import fastgen
from fastgen import Loop, NoiseSchedule, backends, solvers
from fastgen.ops import kernel
from fastgen.testing import assert_bitwise, assert_close_to_oracle

ROOT = Path(__file__).resolve().parent.parent
FLOAT32, BFLOAT16, FLOAT16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT64 = torch.float64
INFINITY = float("inf")
CPU, CUDA = (1, None), (1, 0)  # threads, stream: a stream means the CUDA kernels

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir() or shutil.which("g++") is None, reason="needs csrc/ and g++"
)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """fastgen._native built with csrc/cuda on the emulator of tests/cuda_on_cpu."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-fvisibility=hidden", "-ffp-contract=off",
             "-fno-math-errno", "-fno-trapping-math"]  # fmt: skip
    emulated = ["-I", str(ROOT / "tests/cuda_on_cpu"), "-include", "cuda_runtime.h", "-x", "c++"]
    python = [
        *("-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]),
        *('-DFASTGEN_CUDA="emulated"', '-DFASTGEN_VERSION="0"', "-DFASTGEN_EMULATED"),
    ]
    one_isa = ["-DFASTGEN_ISA=baseline"]
    every_isa = ("dispatch", "parallel", "phases", "cutting")
    commands = [(file, emulated) for file in (ROOT / "csrc/cuda").glob("*.cu")]
    for file in (ROOT / "csrc/cpu").glob("*.cpp"):
        if file.stem == "multiply_bf16":  # of other instruction sets
            continue
        commands.append((file, [] if file.stem in every_isa else one_isa))
    commands += [(file, python) for file in (ROOT / "csrc").glob("*.cpp")]
    objects = [str(folder / f"{file.parent.name}_{file.stem}.o") for file, _ in commands]

    def compile_one(command, target):
        file, extra = command
        subprocess.run(["g++", *flags, *extra, "-c", str(file), "-o", target], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, commands, objects))
    library = str(folder / "_native.so")
    subprocess.run(["g++", "-shared", "-o", library, *objects, "-ldl"], check=True)
    spec = importlib.util.spec_from_file_location("_native", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backends._meet(module, lambda device: 0)
    return module


def bits(tensor):
    words = tensor.contiguous().view(torch.int32 if tensor.dtype == FLOAT32 else torch.int16)
    return torch.where(tensor.isnan(), -1, words)


class Maker:
    """Random tensors of one shape, each in some layout, with a few special values."""

    def __init__(self, seed, shape, layouts, dtypes, special=True):
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.layouts, self.dtypes, self.special = shape, layouts, dtypes, special

    def __call__(self, writable=False):
        dtype = self.choose.choice(self.dtypes)
        layout = self.choose.choice(self.layouts)
        if writable and layout == "expanded":
            layout = "contiguous"
        values = torch.randn(self.shape, generator=self.generator).to(dtype)
        flat = values.view(-1)
        for special in (float("nan"), INFINITY, -INFINITY, -0.0, 1e-40, 3e38):
            if self.special and flat.numel() > 64:
                flat[self.choose.randrange(flat.numel())] = special
        if layout == "permuted" and values.ndim > 1:
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        if layout == "offset":
            room = values.new_empty(values.numel() + 1)
            return room[1:].view(self.shape).copy_(values)
        if layout == "sliced":
            room = values.new_zeros([2 * n + 1 for n in self.shape])
            return room[tuple(slice(1, 2 * n + 1, 2) for n in self.shape)].copy_(values)
        if layout == "half" and values.ndim > 1:
            room = values.new_zeros((self.shape[0], 2 * self.shape[1], *self.shape[2:]))
            return room[:, self.shape[1] :].copy_(values)
        if layout == "expanded" and values.ndim > 1:
            return values[:, :1].expand(self.shape)
        return values

    def maybe(self, probability=0.6):
        return self() if self.choose.random() < probability else None


SHAPES = [
    (1, 8),
    (2, 4, 16, 16),
    (3, 3, 5, 7),
    (5, 1),
    (70, 20),
    (2, 2049),
    (1, 4096),
    (2, 3, 40, 24),
]
LAYOUTS = [
    (["contiguous"], [FLOAT32]),
    (["contiguous"], [BFLOAT16, FLOAT32]),
    (["contiguous", "half"], [FLOAT16, BFLOAT16]),
    (["permuted"], [FLOAT32, FLOAT16]),
    (["contiguous", "permuted", "offset", "sliced", "half", "expanded"], list(DTYPES)),
]


def random_rows(choose, count, many):
    """(count, 72): weights of which about half are zero."""
    rows = torch.zeros(count, 72)
    for row in rows:
        row[0], row[1] = choose.choice([0.0, 1.25, -0.5]), choose.choice([0.0, -0.75])
        row[2], row[3] = choose.choice([(-INFINITY, INFINITY), (-1.0, 0.5)])
        row[4], row[5] = 0.5, -0.25
        for i in range(8, 72):
            if choose.random() < 0.5:
                row[i] = choose.uniform(-2, 2)
        if not many:
            row[8:56].view(4, 12)[:, [4, *range(7, 12)]] = 0
            row[56:].view(4, 4)[:, 1:] = 0
    return rows


@pytest.mark.parametrize(("layouts", "dtypes"), LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(native, shape, layouts, dtypes):
    for seed in range(6):
        make = Maker(seed, shape, layouts, dtypes)
        choose, batch = make.choose, shape[0]
        many = choose.random() < 0.5
        x, cond, uncond, known, logvar = (make.maybe(0.8) for _ in range(5))
        history = tuple(make.maybe() for _ in range(7 if many else 2))
        noise = tuple(make.maybe(0.3) for _ in range(4 if many else 1))
        out = [make(writable=True) for _ in range(choose.randint(1, 4))]
        rows, pointer = random_rows(choose, batch + 3, many), None
        match choose.choice(["value", "shared", "per sample", "pointer"]):
            case "value":
                row, rows = rows[0].numpy().tobytes(), None
            case "shared":
                row = 0
            case "per sample":
                row = 1
            case "pointer":
                row, pointer = 0, torch.tensor(2)
        guidance = choose.choice([1.0, 7.5, "tensor", "scalar"])
        if guidance == "tensor":
            guidance = (torch.tensor([1.0, 3.0, 0.0] * batch)[:batch].contiguous(), 1)
        elif guidance == "scalar":
            guidance = (torch.tensor([2.5]), 0)
        scale = torch.rand(batch) if choose.random() < 0.3 else None
        ids = choose.choice([0, 2**62, torch.arange(batch).flip(0)])
        keys = choose.choice([None, 7, 2**64 - 1, (torch.arange(batch) - 3, 1)])
        results = []
        for target in (CPU, CUDA):
            outs = [o.clone(memory_format=torch.preserve_format).fill_(9.0) for o in out]
            native.step(
                *(shape, x, cond, uncond, known, logvar, history, noise, tuple(outs)),
                *(row, rows, pointer, guidance, scale, keys, ids, 5, (2, 8, 9, 10), *target),
            )
            results.append([bits(o) for o in outs])
        for on_cpu, on_cuda in zip(*results, strict=True):
            assert torch.equal(on_cpu, on_cuda), (seed, row if isinstance(row, int) else "value")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_in_place(native, dtype):
    shape = (2, 4, 16, 16)
    row = random_rows(random.Random(3), 1, many=False)[0].numpy().tobytes()
    make = Maker(1, shape, ["contiguous"], [dtype])
    x, cond = make(), make()
    results = []
    for target in (CPU, CUDA):
        y = x.clone()
        native.step(shape, y, cond, None, None, None, (), (), (y,), row, None, None, 1.0, None, 3,
                    0, 0, (2,), *target)  # fmt: skip
        results.append(bits(y))
    assert torch.equal(*results)


@pytest.mark.parametrize(("layouts", "dtypes"), LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1100000)], ids=str)
def test_reparameterize(native, shape, layouts, dtypes):
    if shape[1] > 5000 and dtypes != [BFLOAT16, FLOAT32]:
        pytest.skip("one layout is enough for the tree's second level")
    batch = shape[0]
    chunks = -(-torch.Size(shape[1:]).numel() // 1024)
    for seed in range(1 if shape[1] > 5000 else 4):
        make = Maker(seed, shape, layouts, dtypes, special=seed > 0)
        mean, logvar, noise = make(), make(), make.maybe(0.4)
        clamp = make.choose.choice([(-INFINITY, INFINITY), (-1.0, 0.75)])
        key = None if noise is not None else 11
        out, with_kl = make(writable=True), seed % 2 == 0
        results = []
        for target in (CPU, CUDA):
            y = out.clone(memory_format=torch.preserve_format)
            kl, partials = torch.full((batch,), 9.0), torch.empty(batch * chunks)
            if seed % 4 != 0:
                partials.fill_(float("nan"))
            native.reparameterize(shape, mean, logvar, noise, None if seed == 2 else y,
                                  kl if with_kl else None, partials if with_kl else None, clamp,
                                  None if seed == 2 else key, 4, 9, 3, *target)  # fmt: skip
            results.append((bits(y), bits(kl)))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        grad_out, grad_kl = make.maybe(), torch.randn(batch) if seed % 2 else None
        gives_noise = noise is not None and grad_out is not None
        grads = [make(writable=True) for _ in range(3)]
        results = []
        for target in (CPU, CUDA):
            g = [v.clone(memory_format=torch.preserve_format) for v in grads]
            native.reparameterize_backward(
                *(shape, mean, logvar, noise, grad_out, grad_kl, g[0], g[1]),
                *(g[2] if gives_noise else None, clamp, key, 4, 9, 3, *target),
            )
            results.append([bits(v) for v in g])
        for on_cpu, on_cuda in zip(*results, strict=True):
            assert torch.equal(on_cpu, on_cuda)


@pytest.mark.parametrize(("layouts", "dtypes"), LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1100000)], ids=str)
def test_rescale(native, shape, layouts, dtypes):
    if shape[1] > 5000 and dtypes != [FLOAT32]:
        pytest.skip("one layout is enough for the tree's second level")
    batch = shape[0]
    chunks = -(-torch.Size(shape[1:]).numel() // 1024)
    for guidance in (1.0, 7.5, (torch.linspace(1, 5, batch), 1)):
        make = Maker(2, shape, layouts, dtypes, special=False)
        cond, uncond = make(), make()
        results = []
        for target in (CPU, CUDA):
            scale = torch.empty(batch)
            partials = torch.empty(batch * 5 * chunks)
            native.rescale(shape, cond, uncond, guidance, 0.7, partials, scale, *target)
            results.append(bits(scale))
        assert torch.equal(*results)


# ---- the direct transposed convolution -----------------------------------------------------------

PLACES = ("contiguous", "channels last", "sliced", "offset")


def placed(shape, dtype, place, fill):
    """Memory full of one number, and a tensor in the middle of it."""
    order = [0, *range(2, len(shape)), 1] if place == "channels last" else [*range(len(shape))]
    sizes = [shape[dim] for dim in order]
    step, margin = (2 if place == "sliced" else 1), (3 if place == "offset" else 16)
    room = torch.full((math.prod(sizes) * step + 2 * margin,), fill, dtype=dtype)
    inner = room[margin : room.numel() - margin].view(*sizes[:-1], step * sizes[-1])[..., ::step]
    return room, inner.permute([order.index(dim) for dim in range(len(shape))])


def put(value, place):
    """The values of a tensor in some place, NaN around them; expanded: those of one channel."""
    if place == "expanded":
        return value[:, :1].expand(value.shape)
    return placed(value.shape, value.dtype, place, math.nan)[1].copy_(value)


def direct(native, case, place="contiguous"):
    """The kernel's result, of which nothing lies outside."""
    x, weight, given = case.input, case.weight, case.geometry
    absent = 3 - case.dims
    sizes = case.eager(FLOAT64).shape[2:]
    numbers = []
    for values, neutral in (
        (x.shape[2:], 1), (sizes, 1), (weight.shape[2:], 1), (given["stride"], 1),
        (given["padding"], 0), (given["dilation"], 1),
    ):  # fmt: skip
        numbers += [neutral] * absent + list(values)
    groups = given["groups"]
    numbers += [groups, weight.shape[0] // groups, weight.shape[1], 0]
    shape = (x.shape[0], weight.shape[1] * groups, *sizes)
    room, out = placed(shape, x.dtype, place, 77.0)
    vectors = [None if v is None else v.float() for v in (case.bias, case.scale, case.shift)]
    code = ACTIVATIONS.index(case.activation)
    native.conv_transpose_direct(x, weight, out, tuple(numbers), *vectors, code, 0.2, 1, 0)
    result = out.clone()
    out.fill_(77.0)
    assert (room == 77.0).all()
    return result


def check_direct(native, case, place="contiguous", again=True):
    """Within twice PyTorch's error, and of 16 bits within one rounding of what float32 gives."""
    result, exact, dtype = direct(native, case, place), case.eager(FLOAT64), case.input.dtype
    assert_close_to_oracle(result, case.eager(dtype), exact, rounding=case.rounding())
    if dtype is not FLOAT32:
        wide = Case(case.input.float(), case.weight.float(), *list(vars(case).values())[2:])
        unit, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
        allowed = 1.01 * unit * exact.abs() + 4 * wide.rounding() + unit * least
        assert ((result.double() - exact).abs() <= allowed).all()
    if again:
        assert_bitwise(direct(native, case, place), result)


def random_case(choose, seed):
    """Few channels a group, and every kind of geometry that PyTorch takes."""
    dims = choose.choice((1, 2, 2, 3))

    def sizes(low, high):
        return [choose.randint(low, high) for _ in range(dims)]

    while True:
        most = 7 - dims
        spatial = sizes(1, (20, 5, 3)[dims - 1])
        kernel, stride, dilation = sizes(1, most), sizes(1, most), sizes(1, 4)
        padding, extra = (
            sizes(0, 3),
            [choose.randrange(max(stride[d], dilation[d])) for d in range(dims)],
        )
        if choose.random() < 0.3:
            kernel, stride, padding, dilation = ([n] * dims for n in choose.choice(
                [(4, 2, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), (2, 3, 0, 1), (3, 2, 1, 4), (5, 4, 2, 6)]
            ))  # fmt: skip
            extra = [choose.randrange(max(stride[0], dilation[0])) for _ in range(dims)]
        numbers = zip(spatial, kernel, stride, padding, dilation, extra, strict=True)
        if all((n - 1) * s - 2 * p + d * (k - 1) + e >= 0 for n, k, s, p, d, e in numbers):
            break
    groups, inputs, outputs = choose.choice([
        (1, choose.randint(1, 40), choose.randint(1, 4)), (1, 16, choose.randint(1, 9)),
        (choose.randint(2, 36 // dims), 1, 1), (choose.randint(2, 9), 1, choose.randint(2, 9)),
        (choose.randint(2, 5), choose.randint(2, 8), choose.randint(1, 9)),
        (2, 8 * choose.randint(1, 3), choose.randint(1, 5)),
    ])  # fmt: skip
    dtype = choose.choice(DTYPES)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    channels = groups * outputs
    x = put(normal(choose.choice((0, 1, 2, 3)), groups * inputs, *spatial),
            choose.choice((*PLACES, "channels last", "expanded")))  # fmt: skip
    weight = put(normal(groups * inputs, outputs, *kernel) * inputs**-0.5, choose.choice(PLACES))
    vectors = [normal(channels) if choose.random() < 0.6 else None for _ in range(3)]
    geometry = {"stride": stride, "padding": padding, "output_padding": extra, "groups": groups,
                "dilation": dilation}  # fmt: skip
    return Case(x, weight, vectors[0], geometry, *vectors[1:], choose.choice(ACTIVATIONS))


@pytest.mark.parametrize("seed", range(8))
def test_direct_conv_transpose(native, seed):
    choose = random.Random(seed)
    for repeat in range(25):
        case = random_case(choose, 100 * seed + repeat)
        place = choose.choice(PLACES)
        if case.input.shape[0] == 0:
            assert direct(native, case, place).numel() == 0
        else:
            check_direct(native, case, place, again=repeat % 4 == 0)


def direct_case(batch, groups, inputs, outputs, sizes, kernel, stride, dtype, **more):
    """Channels are those of a group."""
    dims, generator = len(sizes), torch.Generator().manual_seed(5)
    x = torch.randn((batch, groups * inputs, *sizes), generator=generator)
    weight = torch.randn((groups * inputs, outputs, *kernel), generator=generator) * inputs**-0.5
    geometry = {"stride": stride, "padding": [0] * dims, "output_padding": [0] * dims,
                "groups": groups, "dilation": [1] * dims}  # fmt: skip
    vectors = [torch.randn(groups * outputs, generator=generator).to(dtype) for _ in range(3)]
    return Case(x.to(dtype), weight.to(dtype), vectors[0], geometry | more, *vectors[1:], "tanh")


LONG = {
    "sums of many channels, staged in parts": (2, 1, 208, 3, (3, 5), (4, 4), (2, 2)),
    "a stride beyond the threads": (1, 1, 6, 2, (5,), (2048,), (512,)),
    "a kernel beyond the shared memory": (1, 2, 1, 2, (3,), (13000,), (7,)),
    "many lanes, a large kernel": (1, 40, 1, 3, (2, 2, 2), (6, 5, 6), (2, 2, 2)),
}


@pytest.mark.parametrize("place", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LONG)
def test_direct_conv_transpose_with_large_weights(native, name, dtype, place):
    case = direct_case(*LONG[name], dtype)
    case.input = put(case.input, place)
    check_direct(native, case, place)


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
def test_direct_conv_transpose_of_many_samples(native, outputs, groups):
    """So many that a thread makes several, and one more; of several groups, of these as well."""
    samples = 4 if outputs == 1 else 2
    threads = (1 << 16) * (1 if groups == 1 else 2)
    case = direct_case(threads * samples // (4 * groups) + 1, groups, 2, outputs, (2,), (3,), (2,),
                       DTYPES[outputs % 3], padding=[1], output_padding=[1])  # fmt: skip
    case.input = put(case.input, PLACES[outputs % 2])
    check_direct(native, case, again=False)


def test_direct_conv_transpose_passes_nan_on(native):
    case = direct_case(1, 1, 3, 2, (2, 2), (4, 4), (2, 2), FLOAT32)
    case.input[0, 0, 0, 0] = math.nan
    for case.activation in ACTIVATIONS:
        assert direct(native, case).isnan().sum() == 2 * 4 * 4


# ---- the straight path, to which the CPU's tensors here are a GPU's ------------------------------


@pytest.fixture
def on_gpu(native, monkeypatch):
    """Tensors seen as on a GPU, whose kernels serve; what does not go straight is an error."""

    def enter():
        native.serve_gpu(True)
        monkeypatch.setattr(backends, "_native", native)
        monkeypatch.setattr(kernel, "launch", None)

    yield enter
    native.serve_gpu(False)


def test_a_gpu_is_not_served_before_it_is_known_to_run_the_kernels(native):
    x, row = torch.randn(2, 3), solvers.ddim(NoiseSchedule.linear(), 5).rows[1].packed
    arguments = ((x, x), None, None, row, 1.0, None, 0, (2,), True, 1)
    native.serve_gpu(False)
    assert native.quick_step(*arguments) is NotImplemented
    native.serve_gpu(True)
    assert_bitwise(native.quick_step(*arguments), backends._native.quick_step(*arguments))
    native.serve_gpu(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_straight_calls(on_gpu, dtype):
    make = Maker(1, (2, 4, 16, 16), ["contiguous", "permuted"], [dtype], special=False)
    x, e, plain = make(), make(), make().contiguous()

    def calls():
        out = torch.zeros(2, 4, 16, 16, dtype=dtype)
        yield fastgen.ddpm_step(x, e, 0.4, 0.6, seed=3, step=2)
        yield fastgen.ddpm_step(plain, e.contiguous(), 0.4, 0.6, noise=plain, out=out)
        yield fastgen.cfg_combine(x, e, 7.5)
        yield fastgen.add_noise(x, 0.3, seed=1, step=4)
        yield fastgen.reparameterize(x, e, seed=1, step=4)
        yield fastgen.randn(out.shape, seed=9, out=torch.empty(out.shape))

    expected = list(calls())
    on_gpu()
    for actual, wanted in zip(calls(), expected, strict=True):
        assert_bitwise(actual, wanted)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("key", [7, [7, 8]])
def test_a_loop_goes_straight(on_gpu, guided, key):
    plan = solvers.dpmpp_2m_sde(NoiseSchedule.linear().levels(6))
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    ends = []
    for enter in (lambda: None, on_gpu):
        enter()
        loop = Loop(plan, x, seed=key, guided=guided, guidance_scale=[2.0, 3.0] if guided else 1.0)
        loop._straight = True
        while not loop.done:
            loop.step(torch.tanh(loop.model_input))
        ends.append(loop.x)
    assert_bitwise(*ends)


@pytest.mark.parametrize("noise", ["torch", "fastgen"])
@pytest.mark.parametrize("name", [
    "DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler", "SASolverScheduler",
])  # fmt: skip
def test_a_scheduler_goes_straight(on_gpu, name, noise, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    fast = pytest.importorskip("fastgen.integrations.diffusers")
    ends, python = [], []
    for enter in (lambda: None, on_gpu):
        enter()
        made = fast.convert(getattr(diffusers, name)(), noise=noise)
        made.set_timesteps(6)
        made._times = made.timesteps.tolist()  # as of a device
        x = torch.linspace(-1, 1, 210).view(2, 3, 5, 7)
        stepped = type(made)._stepped
        monkeypatch.setattr(
            type(made), "_stepped",
            lambda *given, run=stepped, **more: python.append(1) or run(*given, **more),
        )  # fmt: skip
        python.clear()
        torch.manual_seed(0)
        for t in made.timesteps:
            seen = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
            x = made.step(torch.tanh(seen), t, x).prev_sample
        ends.append((x, torch.rand(1)))
        monkeypatch.setattr(type(made), "_stepped", stepped)
    assert_bitwise(*ends)
    # a first step, which begins a run; with torch's noise, those whose draws no row takes
    assert len(python) <= (1 if noise == "fastgen" else 3)
