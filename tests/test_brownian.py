"""Brownian motion from the counter: increments that add up, whatever the steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fastgen
from fastgen.ops.brownian import _increment
from fastgen.testing import assert_bitwise

SHAPE = (2, 5000)
TIMES = [0.0, 0.125, 0.3, 0.31, 0.5, 0.77, 1.0]


def motion(start, end, **options):
    return fastgen.brownian(SHAPE, start, end, **{"seed": 5, **options})


def test_increments_add_up():
    for a, b, c in itertools.combinations(TIMES, 3):
        # float32: 47 roundings of what is at most 4 at a time
        torch.testing.assert_close(motion(a, b) + motion(b, c), motion(a, c), rtol=0, atol=2e-5)
    assert_bitwise(motion(0.3, 0.77), -motion(0.77, 0.3))


def test_increments_are_brownian():
    parts = [motion(a, b).flatten().double().numpy() for a, b in itertools.pairwise(TIMES)]
    for (a, b), part in zip(itertools.pairwise(TIMES), parts, strict=True):
        assert abs(part.mean()) < 4 * math.sqrt((b - a) / part.size)
        assert abs(part.var() / (b - a) - 1.0) < 4 * math.sqrt(2.0 / part.size)
    correlation = np.corrcoef(np.stack(parts)) - np.eye(len(parts))
    assert np.abs(correlation).max() < 5 / math.sqrt(parts[0].size)


def test_the_tree_is_levys():
    """Its variance is the time's, exactly; and its normals are the noise contract's."""
    for start, end in ((0, 1), (5, 1 << 23), (123456, 3333333), (8388607, 8388608), (0, 1 << 22)):
        nodes = _increment(start, end)
        assert len(nodes) <= 47
        assert max(node for node, _ in nodes) < 1 << 24
        assert sum(f * f for _, f in nodes) == pytest.approx((end - start) / 2**23, rel=1e-12)
    quarter, half = _increment(0, 1 << 21), _increment(0, 1 << 22)
    assert [node for node, _ in quarter] == [0, 1, 2]
    z = [fastgen.randn(SHAPE, seed=5, stream=7, step=k).double() for k in range(3)]
    for nodes, end in ((quarter, 0.25), (half, 0.5)):
        wanted = sum(factor * z[node] for node, factor in nodes)
        torch.testing.assert_close(motion(0.0, end).double(), wanted, rtol=0, atol=1e-6)


def test_backends_and_batches_agree(backend):
    options = {"seed": [1, 2, 3], "sample_ids": [7, 7, 9]}
    whole = fastgen.brownian((3, 4, 9), 0.2, 0.23, backend=backend, **options)
    assert_bitwise(whole, fastgen.brownian((3, 4, 9), 0.2, 0.23, backend="reference", **options))
    alone = fastgen.brownian((1, 4, 9), 0.2, 0.23, seed=3, sample_ids=[9], backend=backend)
    assert_bitwise(alone, whole[2:])


def test_normalized_is_a_normal():
    z = motion(0.4, 0.41, normalized=True)
    assert abs(float(z.std()) - 1.0) < 0.03
    assert motion(0.4, 0.41, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: motion(-0.1, 0.5), ValueError, "start"),
    (lambda: motion(0.1, 1.5), ValueError, "end"),
    (lambda: motion(0.1, math.nan), ValueError, "end"),
    (lambda: motion("a", 0.5), TypeError, "start"),
    (lambda: motion(0.5, 0.5 + 1e-9, normalized=True), ValueError, "apart"),
    (lambda: fastgen.brownian((), 0.1, 0.5, seed=0), ValueError, "shape"),
    (lambda: fastgen.brownian(3, 0.1, 0.5, seed=0), TypeError, "shape"),
    (lambda: fastgen.brownian((2, 3), 0.1, 0.5, seed=None), TypeError, "seed"),
    (lambda: fastgen.brownian((2, 3), 0.1, 0.5, seed=-1), ValueError, "seed"),
])  # fmt: skip
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- runs ----------------------------------------------------------------------------------------

SOLVERS = {
    "euler_ancestral": fastgen.solvers.euler_ancestral, "dpmpp_sde": fastgen.solvers.dpmpp_sde,
    "dpmpp_2m_sde": fastgen.solvers.dpmpp_2m_sde, "er_sde": fastgen.solvers.er_sde,
    "seeds_2": fastgen.solvers.seeds_2, "seeds_3": fastgen.solvers.seeds_3,
    "score_sde_ve": fastgen.solvers.score_sde_ve,
}  # fmt: skip


def denoiser(x, sigma, cond):
    """Of normal data with deviation 0.5."""
    s = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
    return x * (0.25 / (0.25 + s))


def end(solver, steps, **options):
    levels = fastgen.denoiser_levels(fastgen.sigmas.karras(steps, 0.05, 5.0))
    return fastgen.sample(denoiser, solver(levels), (4, 500), seed=3, **options)


@pytest.mark.parametrize("name", SOLVERS)
def test_more_steps_follow_the_path_of_fewer(name):
    """Strong convergence: with one path the ends approach each other, at order 1/2 or better;
    without it they are as different as two samples are."""
    solver = SOLVERS[name]
    gaps = [float((end(solver, n, brownian=True) - end(solver, 2 * n, brownian=True)).std())
            for n in (16, 64, 256)]  # fmt: skip
    assert gaps[2] < 0.6 * gaps[1] < 0.36 * gaps[0]
    apart = float((end(solver, 256) - end(solver, 512)).std())
    assert gaps[2] < 0.1 * apart
    sample = end(solver, 256, brownian=True)
    assert abs(float(sample.std()) - 0.5) < 0.03


def test_a_path_is_a_samples_own_and_needs_its_seed():
    plan = fastgen.solvers.euler_ancestral(
        fastgen.denoiser_levels(fastgen.sigmas.karras(5, 0.05, 5.0))
    )
    whole = fastgen.sample(denoiser, plan, (3, 8), seed=3, brownian=True)
    alone = fastgen.sample(denoiser, plan, (1, 8), seed=3, sample_ids=[2], brownian=True)
    assert_bitwise(alone, whole[2:])
    with pytest.raises(ValueError, match="seed"):
        fastgen.Loop(plan, torch.ones(1, 8), brownian=True)
    bare = fastgen.Plan((fastgen.Row((fastgen.Output({"x": 1.0}, (1.0,)),)),))
    with pytest.raises(ValueError, match="level"):
        fastgen.Loop(bare, torch.ones(1, 8), seed=0, brownian=True)
    levels = fastgen.denoiser_levels(fastgen.sigmas.karras(5, 0.05, 5.0))
    for turning in (fastgen.solvers.repaint(levels, jump_length=2),
                    fastgen.solvers.score_sde_ve(levels, corrections=1)):  # fmt: skip
        with pytest.raises(ValueError, match="brownian"):
            fastgen.Loop(turning, torch.ones(1, 8), seed=0, brownian=True)
    still = fastgen.Row((fastgen.Output({"x": 1.0}, (1.0,)),), level=(1.0, 0.0))
    with pytest.raises(ValueError, match="brownian"):
        fastgen.Loop(fastgen.Plan((still,)), torch.ones(1, 8), seed=0, brownian=True)
