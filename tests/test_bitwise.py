"""The promise: the same bits from every backend, for any shape, strides and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fastgen
from fastgen import backends
from shared import HAS_TRITON, ISAS, assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.one_of(
    st.tuples(st.integers(0, 3), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
    st.sampled_from([(1, 16, 8), (2, 1024), (1, 1025), (2, 3, 5, 7, 2), (3,), (1, 2, 33, 65)]),
)
# Ordinary values, with what may go wrong mixed in.
SPECIAL = torch.tensor([0.0, -0.0, 1e-40, -1e-40, torch.inf, -torch.inf, torch.nan, 3e38, 65504.0])


def scattered(shape, dtype, layout: str, seed: int) -> torch.Tensor:
    """A tensor of ``shape`` with the strides that ``layout`` names."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if seed % 3 == 0 and values.numel() > 2:
        places = torch.randperm(values.numel(), generator=generator)[: len(SPECIAL)]
        values.view(-1)[places] = SPECIAL[: len(places)]
    values = values.to(dtype)
    if layout == "reversed":  # dims stored in the opposite order: channels-last and its like
        order = list(range(len(shape)))[::-1]
        stored = values.permute(order).contiguous()
        return stored.permute(order)
    if layout == "strided":
        wide = torch.full((*shape[:-1], 2 * shape[-1] + 1), torch.nan, dtype=dtype)
        view = wide[..., 1::2]
        view.copy_(values)
        return view
    if layout == "expanded" and len(shape) > 1:
        return values[:, :1].expand(shape)
    return values


_PHASES = (Phase.explicit, Phase.generate)  # a failure in the interpreter takes too long to shrink
LAYOUTS = st.sampled_from(["contiguous", "contiguous", "reversed", "strided", "expanded"])


def everywhere(call) -> None:
    """The same bits from the reference, the CPU kernels of every instruction set on one and two
    threads, and Triton."""
    expected = call("reference")
    native, threads = backends.native(), torch.get_num_threads()
    chosen = native.isa()
    try:
        for isa in ISAS:
            native.choose_isa(isa)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert_same_bits(call("cpu"), expected)
    finally:
        native.choose_isa(chosen)
        torch.set_num_threads(threads)
    assert_same_bits(call(None), expected)
    if HAS_TRITON:
        assert_same_bits(call("triton"), expected)


def draws(examples: int):
    return settings(
        max_examples=examples, phases=_PHASES, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip


@draws(25)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2**64 - 1), st.integers(0, 2**24 - 1),
       st.integers(0, 255))  # fmt: skip
def test_randn(shape, dtype, seed, step, stream):
    everywhere(
        lambda backend: fastgen.randn(
            shape, seed=seed, step=step, stream=stream, dtype=dtype, backend=backend
        )
    )


@draws(25)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(DTYPES), LAYOUTS, LAYOUTS,
       st.booleans(), st.booleans(), st.integers(0, 1000))  # fmt: skip
def test_reparameterize_and_its_divergence(shape, dtype, other, layout, second, kl, clamp, seed):
    mean = scattered(shape, dtype, layout, seed)
    logvar = scattered(shape, other, second, seed + 1)
    everywhere(
        lambda backend: fastgen.reparameterize(
            mean, logvar, seed=seed, step=seed, return_kl=kl,
            clamp=(-1.0, 0.5) if clamp else None, backend=backend,
        )
    )  # fmt: skip


@draws(20)
@given(SHAPES, st.sampled_from(DTYPES), st.sampled_from(DTYPES), LAYOUTS, LAYOUTS,
       st.sampled_from([1.0, 0.0, 7.5, -2.0]), st.booleans(), st.sampled_from([0.0, 0.7, 1.0]),
       st.integers(0, 1000))  # fmt: skip
def test_cfg_combine(shape, dtype, other, layout, second, g, each, rescale, seed):
    cond = scattered(shape, dtype, layout, seed)
    uncond = scattered(shape, other, second, seed + 1)
    scale = [g + i for i in range(shape[0])] if each else g
    everywhere(
        lambda backend: fastgen.cfg_combine(cond, uncond, scale, rescale=rescale, backend=backend)
    )


@draws(15)
@given(SHAPES, st.lists(st.sampled_from([0.0, 1.0, -0.3, 2.5]), min_size=1, max_size=10), LAYOUTS,
       st.integers(0, 1000))  # fmt: skip
def test_combine(shape, weights, layout, seed):
    outputs = [
        scattered(shape, DTYPES[i % 3], layout if i % 2 else "contiguous", seed + i)
        for i in range(len(weights))
    ]
    everywhere(lambda backend: fastgen.combine(outputs, weights, backend=backend))


@draws(20)
@given(SHAPES, st.sampled_from(DTYPES), LAYOUTS, st.booleans(), st.booleans(), st.booleans(),
       st.integers(0, 1000))  # fmt: skip
def test_add_noise(shape, dtype, layout, each, with_noise, with_velocity, seed):
    x0 = scattered(shape, dtype, layout, seed)
    level = torch.linspace(0, 1, shape[0], dtype=torch.float64) if each else 0.37
    everywhere(
        lambda backend: fastgen.add_noise(
            x0, level, seed=seed, step=3, return_noise=with_noise, return_velocity=with_velocity,
            backend=backend,
        )
    )  # fmt: skip


STEP_OPTIONS = {
    "shape": SHAPES,
    "dtype": st.sampled_from(DTYPES),
    "other": st.sampled_from(DTYPES),
    "layout": LAYOUTS,
    "second": LAYOUTS,
    "guided": st.booleans(),
    "prediction": st.sampled_from(["epsilon", "sample", "v"]),
    "clip": st.sampled_from([None, 1.0, (-0.5, 2.0)]),
    "levels": st.sampled_from([(0.5, 0.7), (1e-3, 2e-3), (0.9, 1.0), (0.6, 0.6)]),
    "seed": st.integers(0, 1000),
}


@draws(30)
@given(**STEP_OPTIONS, variance=st.sampled_from(["fixed_small", "fixed_large", "learned"]),
       given_noise=st.booleans())  # fmt: skip
def test_ddpm_step(shape, dtype, other, layout, second, guided, prediction, clip, levels, seed,
                   variance, given_noise):  # fmt: skip
    x, e = scattered(shape, dtype, layout, seed), scattered(shape, other, second, seed + 1)
    u = scattered(shape, other, layout, seed + 2) if guided else None
    if variance == "learned":
        variance = scattered(shape, other, second, seed + 3)
    source = {"seed": seed, "step": 5}
    if given_noise:
        source = {"noise": scattered(shape, other, layout, seed + 4)}
    everywhere(
        lambda backend: fastgen.ddpm_step(
            x, e, *levels, uncond=u, guidance_scale=1.0 if u is None else 3.0,
            prediction=prediction, clip=clip,
            variance=variance, backend=backend, **source,
        )
    )  # fmt: skip


@draws(30)
@given(**STEP_OPTIONS, eta=st.sampled_from([0.0, 0.5, 1.0]), clipped=st.booleans())
def test_ddim_step(shape, dtype, other, layout, second, guided, prediction, clip, levels, seed,
                   eta, clipped):  # fmt: skip
    x, e = scattered(shape, dtype, layout, seed), scattered(shape, other, second, seed + 1)
    u = scattered(shape, other, layout, seed + 2) if guided else None
    eta = eta if levels[0] < levels[1] else 0.0
    everywhere(
        lambda backend: fastgen.ddim_step(
            x, e, *levels, uncond=u, guidance_scale=1.0 if u is None else 3.0,
            prediction=prediction, clip=clip, eta=eta,
            use_clipped_model_output=clipped, seed=seed, step=2, backend=backend,
        )
    )  # fmt: skip


def any_row(index: int) -> fastgen.Row:
    """Rows that together use every input, several outputs and several normals."""
    names = fastgen.plan.INPUTS
    outputs = []
    for j in range(1 + index % 4):
        weights = {n: 0.1 * (k - j + index % 7) for k, n in enumerate(names) if (k + j + index) % 3}
        noise = tuple(0.3 * m - 0.2 * j for m in range((index + j) % 5))
        outputs.append(fastgen.Output(weights, noise, target="x" if j == 0 else j))
    return fastgen.Row(
        tuple(outputs),
        denoised=(1.1, -0.4 * (index % 3)),
        clip=(-0.7, 0.9) if index % 2 else None,
        logvar=(0.5, -0.25),
    )


@draws(25)
@given(SHAPES, st.integers(0, 40), LAYOUTS, LAYOUTS, st.booleans(), st.booleans(), st.booleans(),
       st.integers(0, 1000))  # fmt: skip
def test_step(shape, index, layout, second, each, learned, table, seed):
    layouts = [layout, second, "contiguous"]
    tensors = [
        scattered(shape, DTYPES[(seed + i) % 3], layouts[i % 3], seed + i) for i in range(12)
    ]
    x, e, u, known, logvar, *history = tensors
    rows = [any_row(index + (i if each else 0) * 4) for i in range(max(1, shape[0]))]
    count = len(rows[0].outputs)
    row = fastgen.stack_rows(rows) if each or table else rows[0]
    if isinstance(row, torch.Tensor):
        row = row[: shape[0]] if each else row[:1]
    if isinstance(row, torch.Tensor) and row.shape[0] == 0:
        row = fastgen.stack_rows(rows[:1])
    everywhere(
        lambda backend: fastgen.step(
            row, x, e, uncond=u, known=known, history=history[:7],
            logvar=logvar if learned else None, guidance_scale=2.0, seed=seed, step=7,
            outputs=count, dtypes=[x.dtype, *DTYPES[: count - 1]],
            backend=backend,
        )
    )  # fmt: skip


@pytest.mark.parametrize("op", ["randn", "add_noise", "reparameterize", "ddpm_step"])
def test_a_sample_is_the_same_alone_in_any_batch_and_at_any_slot(op):
    x, y = torch.randn(2, 5, 3, 17, 9)
    ids = [40, 7, 123456789012, 3, 11]

    def run(slots):
        one, two = x[slots], y[slots]
        chosen = [ids[i] for i in slots]
        if op == "randn":
            return fastgen.randn(one.shape, seed=9, sample_ids=chosen)
        if op == "add_noise":
            return fastgen.add_noise(one, 0.3, seed=9, step=1, sample_ids=chosen)
        if op == "ddpm_step":
            return fastgen.ddpm_step(one, two, 0.3, 0.4, seed=9, step=1, sample_ids=chosen)
        z, kl = fastgen.reparameterize(one, two, seed=9, step=1, sample_ids=chosen, return_kl=True)
        return torch.cat([z.flatten(1), kl[:, None]], dim=1)

    whole = run([0, 1, 2, 3, 4])
    for slots in ([3], [4, 2], [1, 3, 0, 2]):
        assert_same_bits(run(slots), whole[slots])


def test_reductions_of_a_sample_do_not_depend_on_its_batch():
    x, y = torch.randn(2, 6, 5000)
    whole = fastgen.cfg_combine(x, y, 4.0, rescale=0.7)
    for i in range(6):
        assert_same_bits(
            fastgen.cfg_combine(x[i : i + 1], y[i : i + 1], 4.0, rescale=0.7)[0], whole[i]
        )


def test_flushing_denormals_changes_nothing():
    x = torch.full((1, 64), 1e-40)
    expected = fastgen.combine([x], [1.0])
    torch.set_flush_denormal(True)
    try:
        flushed = fastgen.combine([x], [1.0])
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(flushed, expected)
    assert_same_bits(expected, x)
