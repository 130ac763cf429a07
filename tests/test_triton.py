"""The Triton kernels in the interpreter against the native CPU kernels, bit for bit."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys

import pytest
import torch

from fastgen import _native
from fastgen.bench.static_checks import inexact
from fastgen.testing import assert_bitwise
from shared import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("no Triton, or one too old", allow_module_level=True)
from fastgen.kernels import reparameterize, step, tile
from fastgen.kernels.guidance import rescale

pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the interpreter; on a GPU see test_step and its siblings"
    ),
]

FLOAT32, BFLOAT16, FLOAT16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Maker:
    """Random tensors of one shape, in a layout each."""

    def __init__(self, shape, layout="contiguous", seed=0):
        self.shape, self.layout = shape, layout
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, dtype=FLOAT32, scale=1.0):
        shape = self.shape
        values = (torch.randn(shape, generator=self.random) * scale).to(dtype)
        match self.layout:
            case "contiguous":
                return values
            case "permuted":
                order = torch.randperm(len(shape), generator=self.random).tolist()
                return values.permute(order).contiguous().permute(*torch.tensor(order).argsort())
            case "channels_last":
                return values.movedim(1, -1).contiguous().movedim(-1, 1)
            case "sliced":
                room = values.new_zeros([2 * n + 1 for n in shape])
                view = room[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
            case "half":  # of the channels, as a network's mean and log-variance come
                room = values.new_zeros((shape[0], 2 * shape[1], *shape[2:]))
                view = room[:, shape[1] :]
            case "expanded":
                return values[:, :1].expand(shape)
        return view.copy_(values)

    def out(self, dtype=FLOAT32):
        if self.layout == "expanded":
            return torch.full(self.shape, float("nan"), dtype=dtype)
        return self(dtype).fill_(float("nan"))


def packed_row(
    weights, noise=(), denoise=(0.0, 0.0), clip=(float("-inf"), float("inf")), logvar=(0.0, 0.0)
) -> bytes:
    """weights: of x, e, u, denoised, known, history... for each output; noise: the same."""
    words = [*denoise, *clip, *logvar, 0.0, 0.0]
    for j in range(4):
        given = list(weights[j]) if j < len(weights) else []
        words += given + [0.0] * (12 - len(given))
    for j in range(4):
        given = list(noise[j]) if j < len(noise) else []
        words += given + [0.0] * (4 - len(given))
    return struct.pack("72f", *words)


def both_steps(make_out, shape, *, x=None, cond=None, uncond=None, known=None, logvar=None,
               history=(), given_noise=(), row=b"", rows=None, row_pointer=None, guidance=1.0,
               output_scale=None, seed=None, sample_ids=0, noise_step=0, streams=()):  # fmt: skip
    results = []
    for run, tail in ((step.step, ()), (_native.step, (1, None))):
        out = make_out()
        run(tuple(shape), x, cond, uncond, known, logvar, history, given_noise, out, row, rows,
            row_pointer, guidance, output_scale, seed, sample_ids, noise_step, streams,
            *tail)  # fmt: skip
        results.append(out)
    for ours, native in zip(*results, strict=True):
        if ours is not None:
            assert_bitwise(ours, native)


SHAPES = [(1, 1), (2, 3, 5, 7), (3, 1024), (2, 3, 700)]
LAYOUTS = ["contiguous", "permuted", "channels_last", "sliced", "half", "expanded"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_randn(shape, dtype):
    make = Maker(shape)
    both_steps(lambda: (make.out(dtype),), shape, row=packed_row([[]], [[1.0]]),
               seed=2**64 - 5, sample_ids=2**40 + 3, noise_step=77, streams=(1,))  # fmt: skip


def test_seeds_ids_and_step_may_come_from_memory():
    make = Maker((3, 50))
    seeds = torch.tensor([5, -7, 2**62])
    ids = torch.tensor([2**33, 0, -1])
    common = {"row": packed_row([[]], [[2.0, 0.0, 0.5]]), "noise_step": 9, "streams": (2, 8, 200)}
    for stride in (0, 1):
        both_steps(lambda: (make.out(),), make.shape, seed=(seeds, stride), sample_ids=ids,
                   row_pointer=torch.tensor([123456]), **common)  # fmt: skip


# Every input and noise in every output, some weights zero.
EVERY = packed_row(
    [
        [0.9, -0.3, 0.2, 0.7, 1e-3, 0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7],
        [0.0, 1.5, 0.0, -0.5],
        [1.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0],
        [],
    ],
    [[0.5, 0.0, -0.25, 0.125], [0.0, 1.0], [], [0.0, 0.0, 3.0]],
    denoise=(1.05, -0.33),
    clip=(-0.9, 1.1),
    logvar=(0.7, -0.1),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_term(layout):
    make = Maker((2, 3, 5, 11), layout)
    dtypes = (FLOAT32, BFLOAT16, FLOAT16, FLOAT32)
    both_steps(
        lambda: tuple(make.out(dtype) for dtype in dtypes),
        make.shape, x=make(), cond=make(BFLOAT16), uncond=make(FLOAT16), known=make(BFLOAT16),
        logvar=make(scale=20.0), history=tuple(make(dtypes[i % 3]) for i in range(7)),
        given_noise=(None, None, make(BFLOAT16)), row=EVERY, seed=11, streams=(2, 8, 9, 10),
        guidance=7.5, output_scale=torch.tensor([0.5, 1.25]),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_rows_of_a_table_and_guidance_for_each_sample(layout):
    make = Maker((3, 4, 130), layout)
    plain = packed_row([[1.0, 0.5]], [[0.3]])
    table = torch.frombuffer(bytearray(plain + EVERY + plain + EVERY), dtype=FLOAT32).view(4, 72)
    operands = {"x": make(BFLOAT16), "cond": make(), "uncond": make(), "known": make(),
                "logvar": make(), "history": tuple(make() for _ in range(7)), "seed": 3,
                "streams": (2, 8, 9, 10), "rows": table}  # fmt: skip
    for row, pointer, guidance in [
        (1, None, (torch.tensor([1.0, 2.0, 0.0]), 1)),
        (0, torch.tensor(3), (torch.tensor([1.0]), 0)),
        (1, torch.tensor([1]), 1.0),
    ]:
        both_steps(lambda: (make.out(BFLOAT16), None, make.out()), make.shape, row=row,
                   row_pointer=pointer, guidance=guidance, **operands)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_noise_joins_samples_into_one(layout):
    make = Maker((3, 6, 10, 20), layout)
    both_steps(lambda: (make.out(), make.out(BFLOAT16)), make.shape, x=make(),
                   cond=make(BFLOAT16), uncond=make(BFLOAT16), guidance=3.0,
                   row=packed_row([[0.1, 0.0, 0.0, 0.9], [0.0, 1.0]],
                                  denoise=(1.5, -0.7)))  # fmt: skip


def test_a_zero_weight_is_neither_read_nor_multiplied():
    make = Maker((2, 33))
    poison = torch.full(make.shape, float("nan"))
    poison[0] = float("inf")
    both_steps(lambda: (make.out(),), make.shape, x=poison, cond=make(), uncond=poison,
               known=poison, logvar=poison, history=(poison,), given_noise=(poison,),
               row=packed_row([[0.0, 2.0]]), guidance=1.0)  # fmt: skip
    out = make.out()
    step.step(make.shape, poison, None, None, None, None, (), (), (out,), packed_row([[]]), None,
              None, 1.0, None, None, 0, 0, ())  # fmt: skip
    assert (out.view(torch.int32) == -(2**31)).all()  # -0.0, the neutral element


def test_nan_infinity_and_denormals_pass():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, 3e38, -0.0])
    x, cond = torch.meshgrid(values, values, indexing="ij")
    make = Maker(x.shape)
    for clip in [(-1.0, 1.0), (-float("inf"), float("inf"))]:
        both_steps(lambda: (make.out(), make.out(BFLOAT16), make.out(FLOAT16)), x.shape,
                   x=x.contiguous(), cond=cond.contiguous(), logvar=cond.contiguous(),
                   given_noise=(x.contiguous(),), row=packed_row(
                       [[1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0]], [[0.0], [1.0]],
                       denoise=(0.5, 2.0), clip=clip, logvar=(1.0, 0.0)))  # fmt: skip


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_every_value_of_a_short_type_passes_unchanged(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None]
    out = torch.empty_like(every)
    step.step(every.shape, every, None, None, None, None, (), (), (out,), packed_row([[1.0]]),
              None, None, 1.0, None, None, 0, 0, ())  # fmt: skip
    assert_bitwise(out, every)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_rounding_to_a_short_type_is_to_nearest_even(dtype):
    random = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, (1, 8192), generator=random).to(torch.int32)
    words[:, ::2] &= ~0xFFF  # ties
    x = words.view(FLOAT32)
    both_steps(lambda: (torch.empty(x.shape, dtype=dtype),), x.shape, x=x,
               row=packed_row([[1.0]]))  # fmt: skip


def test_in_place():
    make = Maker((2, 5, 300))
    x, cond, history = make(), make(BFLOAT16), make()
    results = []
    for run, tail in ((step.step, ()), (_native.step, (1, None))):
        out = (x.clone(), history.clone())
        run(make.shape, out[0], cond, None, None, None, (out[1],), (), out,
            packed_row([[0.5, 0.1, 0.0, 0.0, 0.0, 2.0], [1.0]], [[1.0]]), None, None, 1.0, None,
            4, 0, 1, (2,), *tail)  # fmt: skip
        results.append(out)
    for ours, native in zip(*results, strict=True):
        assert_bitwise(ours, native)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (0,)])
def test_nothing_to_do(shape):
    both_steps(lambda: (torch.empty(shape),), shape, x=torch.empty(shape), seed=1,
               row=packed_row([[1.0]], [[1.0]]), streams=(2,))  # fmt: skip


def both(function, name, *arguments, outputs):
    """Runs Triton's and the native function, each with `outputs` of its own, made by name."""
    results = []
    for module, tail in ((function, ()), (getattr(_native, name), (1, None))):
        made = {key: make() for key, make in outputs.items()}
        module(*(made[a] if isinstance(a, str) else a for a in arguments), *tail)
        results.append(made)
    for key, ours in results[0].items():
        if not key.startswith("partials"):
            assert_bitwise(ours, results[1][key])


def chunks_of(shape):
    return -(-torch.Size(shape[1:]).numel() // 1024)


NO_CLAMP = (-float("inf"), float("inf"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((2, 3, 5, 7), (FLOAT32, BFLOAT16, FLOAT16)),
        ((2, 4, 12, 30), (BFLOAT16, BFLOAT16, BFLOAT16)),
        ((1, 4, 16, 48), (FLOAT32, FLOAT32, FLOAT32)),
    ],
)
def test_reparameterize(shape, dtypes, layout):
    make = Maker(shape, layout)
    mean, logvar = make(dtypes[0]), make(dtypes[1], scale=3.0)
    clamp = (-2.0, 3.0) if layout == "half" else NO_CLAMP
    for noise, seed in [(None, 2**63 + 1), (make(dtypes[2]), None)]:
        both(reparameterize.reparameterize, "reparameterize", shape, mean, logvar, noise, "out",
             "kl", "partials", clamp, seed, 5, 1, 3, outputs={
                 "out": lambda: make.out(dtypes[2]),
                 "kl": lambda: torch.full(shape[:1], float("nan")),
                 "partials": lambda: torch.empty(shape[0], chunks_of(shape))})  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_reparameterize(layout):
    shape = (2, 3, 5, 70)
    make = Maker(shape, layout)
    mean, logvar, grad = make(BFLOAT16), make(scale=3.0), make(FLOAT16)
    grad_kl = torch.tensor([0.7, -1.3])
    outputs = {"mean": lambda: make.out(BFLOAT16), "logvar": make.out, "noise": make.out}
    for grad_out, of_kl, noise, wanted in [
        (grad, grad_kl, None, ("mean", "logvar", None)),
        (grad, None, make(), ("mean", "logvar", "noise")),
        (None, grad_kl, None, ("mean", "logvar", None)),
        (grad, grad_kl, make(), (None, "logvar", "noise")),
    ]:
        both(reparameterize.reparameterize_backward, "reparameterize_backward", shape, mean,
             logvar, noise, grad_out, of_kl, *wanted, (-4.0, 2.5),
             None if noise is not None else 99, 0, 2, 3,
             outputs={k: v for k, v in outputs.items() if k in wanted})  # fmt: skip


def halves(values):
    """The reduction tree in eager torch: chunks of 1024, each summed by halves."""
    while len(values) > 1:
        values = torch.nn.functional.pad(values, (0, -len(values) % 1024)).view(-1, 1024)
        while values.shape[1] > 1:
            values = values[:, : values.shape[1] // 2] + values[:, values.shape[1] // 2 :]
        values = values[:, 0]
    return values


def test_a_tree_of_two_levels():
    chunks = 3 * 1024 + 7
    partials = torch.randn(2, chunks, generator=torch.Generator().manual_seed(0))
    kl = torch.empty(2)
    reparameterize.divergence_kernel[(2,)](partials.clone(), chunks, kl)
    assert_bitwise(kl, torch.cat([0.5 * halves(row) for row in partials]))


@pytest.mark.parametrize("shape", [(2, 4, 17, 33), (2, 3, 4)])
@pytest.mark.parametrize(
    ("layout", "dtype", "guidance"),
    [
        ("contiguous", FLOAT32, 7.3),
        ("half", BFLOAT16, (torch.tensor([1.0, 3.0]), 1)),
        ("permuted", FLOAT16, (torch.tensor([2.0]), 0)),
        ("expanded", FLOAT32, 1.0),
    ],
)
def test_rescale(shape, layout, dtype, guidance):
    make = Maker(shape, layout)
    both(rescale, "rescale", shape, make(dtype), make(), guidance, 0.7, "partials", "scale",
         outputs={"partials": lambda: torch.empty(2, 5, chunks_of(shape)),
                  "scale": lambda: torch.empty(2)})  # fmt: skip


def test_layouts_are_described_by_the_fewest_dims():
    def layout(*tensors, **how):
        return tile.coalesce(tensors[0].shape, tuple(t.stride() for t in tensors), **how)

    x = torch.empty(2, 4, 16, 16)
    last = x.to(memory_format=torch.channels_last)
    free = {"ordered": False, "per_sample": False}
    assert layout(x) == (2, 1024, (), ((),), 8)
    assert layout(x, **free) == (1, 2048, (), ((),), 8)
    assert layout(last, last, **free) == (1, 2048, (), ((), ()), 8)
    assert layout(last) == (2, 1024, (4, 256), ((1024, 1, 4),), 1)
    assert layout(x[:, 2:], x[:, :2]) == (2, 512, (512,), ((1024, 1), (1024, 1)), 8)
    assert layout(x[..., 4:]) == (2, 768, (64, 12), ((1024, 16, 1),), 4)
    assert layout(x[:1].expand(3, 4, 16, 16)) == (3, 1024, (1024,), ((0, 1),), 8)
    assert layout(torch.empty(())) == (1, 1, (), ((),), 1)
    with pytest.raises(ValueError, match="8"):
        layout(torch.empty([3] * 10)[(slice(0, 2),) * 10])


COMPILE = """
import sys
from fastgen.kernels import aot
for capability in map(int, sys.argv[1:]):
    for name, ptx, cubin, _ in aot.compile_all(capability):
        assert cubin
        print(f"# sm_{capability} {name}\\n{ptx}")
"""


def test_kernels_compiled_ahead_of_time_hold_exact_instructions_alone():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    workers = [
        subprocess.Popen([sys.executable, "-c", COMPILE, *capabilities], env=environment,
                         stdout=subprocess.PIPE, text=True)
        for capabilities in (["90"], ["80", "100"])
    ]  # fmt: skip
    kernels = {}
    for worker in workers:
        for listing in worker.communicate()[0].split("# sm_")[1:]:
            title, ptx = listing.split("\n", 1)
            kernels[title] = ptx
        assert worker.returncode == 0
    assert len(kernels) == 3 * len({title.split(" ", 1)[1] for title in kernels}) > 0
    for title, ptx in kernels.items():
        assert ".local" not in ptx, title
        if "conv_transpose" in title or "channel_epilogue" in title:  # no promise of bits
            on_units = "reduces" not in title and " fp32 " not in title
            assert ("mma" in ptx) == (on_units and "conv_transpose" in title), title
            assert ".approx" not in ptx, title
            continue
        assert not inexact(ptx), title
        if "ddpm" in title or "reparameterize" in title:
            for access in ("ld", "st"):
                wide = rf"\b{access}\.global\S*\.v(4\.b32|2\.b64)"
                assert re.search(wide, ptx), f"{title}: {access}"
