"""The noise contract, and what randn refuses."""

from __future__ import annotations

import math
import multiprocessing
import sys

import numpy as np
import pytest
import torch

import fastgen
from fastgen.reference import arithmetic
from fastgen.testing import assert_bitwise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_known_answers(counter, key, words):
    """The known answers published with Random123."""
    assert fastgen.philox4x32(counter, key) == words


def contract(shape, seed, sample_id, step, stream):
    """The contract written out in float64, one element at a time."""
    values = []
    for element in range(math.prod(shape)):
        block, lane = divmod(element, 4)
        counter = (block, step << 8 | stream, sample_id & 0xFFFFFFFF, sample_id >> 32)
        words = fastgen.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        radius_word, angle_word = words[2 * (lane // 2) : 2 * (lane // 2) + 2]
        u, turn = (
            float(np.float32(w) * np.float32(2**-32) + np.float32(2**-33))
            for w in (radius_word, angle_word)
        )
        radius = math.sqrt(-2.0 * math.log(u))
        angle = 2.0 * math.pi * turn
        values.append(radius * (math.sin(angle) if lane % 2 else math.cos(angle)))
    return torch.tensor(values, dtype=torch.float64).view(shape)


def test_normals_are_the_contracts(backend):
    seed, ids, step, stream = 2**63 + 12345, [5, 2**40 + 3], 77, 9
    z = fastgen.randn(
        (2, 3, 7), seed=seed, sample_ids=ids, step=step, stream=stream, backend=backend
    )
    expected = torch.stack([contract((3, 7), seed, i, step, stream) for i in ids])
    # log and the root, cos or sin, and their product: 2 ulp / 2 + 1/2, 2 and 1/2 ulp
    bound = 4 * torch.finfo(torch.float32).eps * expected.abs() + 1e-7
    assert ((z - expected).abs() <= bound).all()


def test_strides_of_the_output_do_not_matter(backend):
    expected = fastgen.randn((2, 5, 6, 7), seed=3, backend=backend)
    out = torch.empty(2, 5, 6, 7).to(memory_format=torch.channels_last)
    assert_bitwise(fastgen.randn(out.shape, seed=3, out=out, backend=backend), expected)
    holes = torch.empty(2, 5, 6, 14)[..., ::2]
    assert_bitwise(fastgen.randn(holes.shape, seed=3, out=holes, backend=backend), expected)


def test_noise_does_not_depend_on_batch_size():
    whole = fastgen.randn((6, 4, 33), seed=1)
    for batch in (1, 2, 5):
        assert_bitwise(fastgen.randn((batch, 4, 33), seed=1), whole[:batch])


def test_a_seed_per_sample_is_that_seed_alone():
    seeds = [0, 2**64 - 1, 17]
    each = fastgen.randn((3, 50), seed=seeds)
    as_tensor = fastgen.randn((3, 50), seed=torch.tensor([0, -1, 17]))
    assert_bitwise(as_tensor, each)
    for i, seed in enumerate(seeds):
        assert_bitwise(fastgen.randn((1, 50), seed=seed, sample_ids=[i])[0], each[i])


def test_every_part_of_the_key_changes_the_noise():
    base = {"seed": 1, "step": 0, "stream": 1, "sample_ids": [0]}
    plain = fastgen.randn((1, 64), **base)
    for change in ({"seed": 2}, {"seed": 1 + 2**32}, {"step": 1}, {"stream": 2},
                   {"sample_ids": [1]}, {"sample_ids": [2**32]}):  # fmt: skip
        assert not torch.isclose(fastgen.randn((1, 64), **base | change), plain).any()


def test_moments_of_a_million():
    z = fastgen.randn((1, 1 << 20), seed=11).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert z.abs().max() <= 6.764


def test_float64_is_the_float32_noise_widened():
    narrow = fastgen.randn((2, 9), seed=4)
    assert_bitwise(fastgen.randn((2, 9), seed=4, dtype=torch.float64), narrow.double())


def test_what_randn_writes_counts_as_a_change():
    out = torch.zeros(2, 8)
    version = out._version
    fastgen.randn((2, 8), seed=1, out=out)
    assert out._version > version


def test_the_last_block_of_the_largest_sample_is_numbered():
    zero = torch.zeros(1, dtype=torch.int64)
    words = arithmetic.philox4x32((zero + 2**32 - 1, zero + 1, zero, zero), (zero + 5, zero))
    assert tuple(int(w) for w in words) == fastgen.philox4x32((2**32 - 1, 1, 0, 0), (5, 0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
        ({"seed": 1.5}, TypeError, "seed: got float"),
        ({"seed": True}, TypeError, "seed: got bool"),
        ({"seed": [1, 2, 3]}, ValueError, "seed: got 3"),
        ({"seed": torch.tensor([1.0])}, TypeError, "torch.int64"),
        ({"seed": torch.Generator()}, TypeError, r"initial_seed\(\)"),
        ({"step": -1}, ValueError, "step: got -1"),
        ({"step": 2**24}, ValueError, "step: got 16777216"),
        ({"step": 0.5}, TypeError, "step: got float"),
        ({"stream": 256}, ValueError, "stream: got 256"),
        ({"sample_ids": [0]}, ValueError, "sample_ids: got 1"),
        ({"sample_ids": [0, -1]}, ValueError, "sample_ids: got -1"),
        ({"sample_ids": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "torch.int64"),
        ({"shape": ()}, ValueError, "shape"),
        ({"shape": (2, -1)}, ValueError, "shape: got -1"),
        ({"shape": (1, 2**34 + 1)}, ValueError, "2\\^34"),
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
        ({"backend": "cuda"}, ValueError, "backend: 'cuda' cannot serve step here"),
        ({"out": torch.empty(2, 7)}, ValueError, "out: got shape"),
        ({"out": torch.empty(2, 8), "dtype": torch.float16}, ValueError, "out: got torch.float32"),
        ({"out": torch.empty(2, 8, requires_grad=True)}, ValueError, "out: requires grad"),
        ({"out": torch.empty(2, 1).expand(2, 8)}, ValueError, "out: several of its elements"),
        ({"out": 3}, TypeError, "out: got int"),
    ],
)
def test_randn_names_what_is_wrong(options, error, message):
    options = {"shape": (2, 8), "seed": 1} | options
    shape = options.pop("shape")
    with pytest.raises(error, match=message):
        fastgen.randn(shape, **options)


def test_philox_names_what_is_wrong():
    with pytest.raises(ValueError, match="counter"):
        fastgen.philox4x32((0, 0, 0), (0, 0))
    with pytest.raises(ValueError, match="key: got -1"):
        fastgen.philox4x32((0, 0, 0, 0), (0, -1))


def _noise_in_child(queue):
    queue.put(fastgen.randn((8, 20000), seed=6).numpy())


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_a_child_after_fork_makes_the_same_noise():
    expected = fastgen.randn((8, 20000), seed=6)  # a parallel region in the parent comes first
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_noise_in_child, args=(queue,))
    child.start()
    made = torch.from_numpy(queue.get(timeout=60))
    child.join(timeout=60)
    assert child.exitcode == 0
    assert_bitwise(made, expected)
