"""Edges of the ops: what must not crash, be dropped silently, or be read from foreign memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import fastgen
from fastgen import Output, Plan, Row, backends, cli
from fastgen.testing import assert_bitwise

X, C = torch.randn(2, 2, 3)


@pytest.mark.parametrize("index", [-1, 3, 10**12])
def test_a_row_index_beyond_the_table_is_refused_under_modes_as_well(index):
    table = fastgen.solvers.ddim(fastgen.NoiseSchedule.cosine(100), 3).table()
    with torch.device("cpu"), pytest.raises(ValueError, match="row_index: got"):
        fastgen.step(table, X, X, row_index=torch.tensor(index))


def test_the_steps_of_a_table_do_not_wrap():
    table = fastgen.solvers.ddpm(fastgen.NoiseSchedule.cosine(100), 3).table()
    with pytest.raises(ValueError, match="step: got 16777216"):
        fastgen.step(table, X, X, row_index=torch.tensor(1), seed=0, step=2**24 - 1)


@pytest.mark.parametrize("rank", [9, 65, 1700])
def test_any_rank_is_served(rank):
    shape = (2, *[1] * (rank - 2), 3)
    assert_bitwise(fastgen.randn(shape, seed=0).view(2, 3), fastgen.randn((2, 3), seed=0))


@pytest.mark.parametrize("shape", [(0, *[1] * 8), (0, 2, *[1] * 7), (2, 0, *[1] * 7)])
def test_nothing_has_any_rank(shape):
    x = torch.zeros(shape)
    assert fastgen.ddim_step(x, x, 0.5, 0.6).shape == shape
    assert fastgen.cfg_combine(x, x, 2.0, rescale=0.5).shape == shape
    z, kl = fastgen.reparameterize(x, x, noise=x, return_kl=True)
    assert z.shape == shape
    assert torch.equal(kl, torch.zeros(shape[0]))
    assert torch.equal(fastgen.gaussian_kl(x, x), kl)


def test_layouts_beyond_the_kernels_dims_are_flattened():
    scattered = torch.randn((4,) * 10)[(slice(0, 4, 2),) * 10]
    dense = scattered.contiguous()
    assert_bitwise(fastgen.combine([scattered], [0.5]), fastgen.combine([dense], [0.5]))
    out = torch.empty_like(dense)
    assert_bitwise(fastgen.combine([scattered], [0.5], out=out), 0.5 * dense)
    for kind in (scattered, dense):
        z, kl = fastgen.reparameterize(kind, kind, seed=1, step=0, return_kl=True)
        assert z.shape == dense.shape
        assert kl.shape == (2,)
    assert fastgen.cfg_combine(scattered, dense, 2.0, rescale=0.5).shape == dense.shape


@pytest.mark.parametrize(
    "call",
    [
        lambda: fastgen.randn((1, 2), seed=None),
        lambda: fastgen.ddim_step(None, C, 0.5, 0.6),
        lambda: fastgen.ddim_step(X, None, 0.5, 0.6),
        lambda: fastgen.ddim_step(X, None, 0.5, 0.6, uncond=C, guidance_scale=2.0),
        lambda: fastgen.ddpm_step(None, C, 0.5, 0.6, seed=0, step=0),
        lambda: fastgen.add_noise(None, 0.5, noise=C),
        lambda: fastgen.combine([C, None, X], [1.0, 1.0, 1.0]),
        lambda: fastgen.reparameterize(X, None, seed=0, step=0),
        lambda: fastgen.Loop(5, X),
    ],
)
def test_none_is_never_taken_for_nothing(call):
    with pytest.raises(TypeError, match="got"):
        call()


def test_forward_mode_and_transforms_take_the_reference():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        tangent = forward_ad.unpack_dual(fastgen.combine([dual], [2.0])).tangent
        assert torch.equal(tangent, torch.full_like(X, 2.0))
        with pytest.raises(ValueError, match="'cpu' cannot serve step under forward-mode"):
            fastgen.combine([dual], [2.0], backend="cpu")
    step = lambda x: fastgen.ddim_step(x, C[:1], 0.5, 0.6)  # noqa: E731
    rows = torch.func.vmap(lambda x: step(x[None])[0])(X)
    assert_bitwise(rows, torch.cat([step(X[:1]), step(X[1:])]))
    gradient = torch.func.grad(lambda x: fastgen.ddim_step(x, C, 0.5, 0.6).sum())(X)
    assert gradient.shape == X.shape


def test_an_output_with_the_negative_bit_is_written_right():
    out = torch.zeros(2, 3, dtype=torch.complex64).conj().imag
    assert out.is_neg()
    fastgen.combine([torch.ones(2, 3)], [2.0], out=out)
    assert torch.equal(out, torch.full((2, 3), 2.0))


def test_scales_that_share_memory_with_the_output_are_refused():
    memory = torch.rand(4002)
    c, u = torch.randn(2, 4000)
    with pytest.raises(ValueError, match="out: overlaps an input partly"):
        fastgen.cfg_combine(c, u, memory[10:11], out=memory[:4000])


def test_a_step_does_not_write_over_the_numbers_it_reads():
    scales = torch.rand(6)
    x, c, u = torch.randn(3, 5)
    with pytest.raises(ValueError, match="out: overlaps an input partly"):
        fastgen.ddim_step(x, c, 0.5, 0.6, uncond=u, guidance_scale=scales[:5], out=scales[1:])
    memory = torch.zeros(288)
    memory[:216] = fastgen.stack_rows([Row((Output({"x": 1.0}),))] * 3).flatten()
    rows, out = memory[:216].view(3, 72), memory[72:].view(3, 72)
    with pytest.raises(ValueError, match="out: overlaps an input partly"):
        fastgen.step(rows, torch.randn(3, 72), out=out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_guidance_tensor_may_have_any_floating_dtype(dtype):
    scales = torch.tensor([2.0, 3.5], dtype=dtype)
    expected = fastgen.cfg_combine(X, C, [2.0, 3.5])
    assert_bitwise(fastgen.cfg_combine(X, C, scales), expected)
    assert_bitwise(fastgen.cfg_combine(X, C, scales, rescale=0.5),
                     fastgen.cfg_combine(X, C, [2.0, 3.5], rescale=0.5))  # fmt: skip


def test_an_output_that_overlaps_itself_is_refused():
    out = torch.zeros(6).as_strided((2, 4), (2, 1))
    with pytest.raises(ValueError, match="out: several of its elements share memory"):
        fastgen.combine([torch.ones(2, 4)], [1.0], out=out)


def test_a_loop_refuses_what_it_cannot_feed():
    with pytest.raises(ValueError, match="plan: a row reads 'known'"):
        fastgen.Loop(Plan((Row((Output({"x": 1.0, "known": 1.0}),)),)), X)
    loop = fastgen.Loop(Plan((Row((Output({"x": 1.0, "e": 1.0}),)),)), X, guidance_scale=2.0)
    with pytest.raises(ValueError, match="uncond: got None"):
        loop.step(C)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (Output({"x": 1.0}, (1.0,)), "seed, noise: the row draws"),
        (Output({"known": 1.0}), "known: the row reads it"),
        (Output({"e": 1.0}), "output: the row reads it"),
        (Output({"h1": 1.0}), r"history\[1\]: the row reads it"),
    ],
)
def test_rows_in_a_tensor_are_held_to_what_they_read(output, message):
    with pytest.raises(ValueError, match=message):
        fastgen.step(fastgen.stack_rows([Row((output,))]), X)


def test_a_list_of_levels_is_as_exact_as_a_number():
    zero, noise = torch.zeros(2, 1), torch.ones(2, 1)
    one = fastgen.add_noise(zero, 0.999999, noise=noise)
    assert_bitwise(fastgen.add_noise(zero, [0.999999] * 2, noise=noise), one)
    with pytest.raises(ValueError, match=r"alpha_bar: got 2\.0"):
        fastgen.add_noise(zero, [2.0, 0.5], noise=noise)


def test_a_traced_call_is_not_frozen():
    traced = torch.jit.trace(
        lambda a, b: fastgen.ddim_step(a, b, 0.5, 0.6), (X, C), check_trace=False
    )
    assert_bitwise(traced(X + 1, C), fastgen.ddim_step(X + 1, C, 0.5, 0.6))


def test_compiled_calls_with_numbers_as_arguments():
    compiled = torch.compile(
        lambda a, b, g, s: (
            fastgen.cfg_combine(a, b, g),
            fastgen.randn((2, 3), seed=s),
            fastgen.add_noise(a, 0.3, seed=s, step=1),
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    for g, s in ((2.0, 1), (3.0, 2), (4.5, 3)):
        expected = (
            fastgen.cfg_combine(X, C, g),
            fastgen.randn((2, 3), seed=s),
            fastgen.add_noise(X, 0.3, seed=s, step=1),
        )
        assert_bitwise(compiled(X, C, g, s), expected)


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "triton is not installed"), ((3, 5), "triton 3.5 is older than 3.6")],
)
def test_a_triton_that_cannot_keep_the_bits_is_refused(monkeypatch, version, reason):
    monkeypatch.setattr(backends, "triton_version", lambda: version)
    assert reason in backends.refusal("step", "triton", "cuda", torch.float32)


def test_an_empty_batch_has_gradients():
    c = torch.zeros(0, 4, requires_grad=True)
    fastgen.cfg_combine(c, torch.zeros(0, 4), 2.0, rescale=0.5).sum().backward()
    assert c.grad is not None


def test_a_kernel_of_size_zero_is_refused():
    with pytest.raises(ValueError, match="weight: got shape"):
        fastgen.conv_transpose2d(torch.randn(1, 2, 4, 4), torch.randn(2, 3, 0, 3))


@pytest.mark.parametrize("text", ["0-99999999999", "5-3", "0-", "²", ""])
def test_odd_labels_are_refused(text):
    with pytest.raises(ValueError, match="--labels"):
        cli.labels_of(text)


# ---- tensors without memory of their own, transforms of gradients --------------------------------


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_mkldnn])
def test_layouts_that_are_not_dense_are_refused_by_name(make):
    with pytest.raises(TypeError, match="x: got a torch"):
        fastgen.ddim_step(make(X), C, 0.5, 0.6)


class Wrapper(torch.Tensor):
    """Has no memory: a kernel that wrote to it would crash."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise RuntimeError(f"dispatched {function}")


def test_an_output_without_memory_is_left_to_the_dispatcher():
    out = torch.Tensor._make_wrapper_subclass(Wrapper, (1, 3, 5, 5))
    with pytest.raises(RuntimeError, match=r"dispatched aten.copy_"):
        fastgen.conv_transpose2d(torch.randn(1, 2, 4, 4), torch.randn(2, 3, 2, 2), out=out)
    out = torch.empty(3, 2, device="meta").t()
    assert fastgen.ddim_step(X.to("meta"), C.to("meta"), 0.5, 0.6, out=out) is out
    assert fastgen.randn((2, 3), seed=0, device="meta").shape == (2, 3)


def test_gradients_may_be_vectorised_and_differentiated_forward():
    mean, logvar = X.clone().requires_grad_(), C.clone().requires_grad_()
    outputs = fastgen.reparameterize(mean, logvar, seed=0, step=0, return_kl=True)
    directions = torch.randn(4, 2, 3), torch.randn(4, 2)
    batched = torch.autograd.grad(
        outputs, (mean, logvar), directions, is_grads_batched=True, retain_graph=True
    )
    for i in range(4):
        one = torch.autograd.grad(
            outputs, (mean, logvar), [d[i] for d in directions], retain_graph=True
        )
        torch.testing.assert_close([b[i] for b in batched], list(one))
    eps = fastgen.randn(X.shape, seed=0, step=0, stream=3)
    tangents = torch.func.jvp(
        lambda v: fastgen.reparameterize(X, v, seed=0, step=0), (C,), (torch.ones_like(C),)
    )
    torch.testing.assert_close(tangents[1], 0.5 * torch.exp(C / 2) * eps)
    hessian = torch.func.hessian(lambda v: fastgen.reparameterize(X, v, seed=0, step=0).sum())(C)
    diagonal = torch.diagonal(hessian.reshape(6, 6)).view_as(C)
    torch.testing.assert_close(diagonal, 0.25 * torch.exp(C / 2) * eps)


def test_compiled_calls_take_new_levels_and_steps():
    levels = fastgen.NoiseSchedule.linear().pairs(4)
    step = torch.compile(
        lambda x, c, a, b, i: fastgen.ddpm_step(x, c, a, b, seed=0, step=i), backend="aot_eager"
    )
    for i, (_, a, b) in enumerate(levels):
        assert_bitwise(step(X, C, a, b, i), fastgen.ddpm_step(X, C, a, b, seed=0, step=i))
    clipped = torch.compile(lambda x, c: fastgen.ddim_step(x, x, 0.1, 0.2, clip=c),
                            backend="aot_eager")  # fmt: skip
    for bound in (1, 2, 3, 3.5):
        assert_bitwise(clipped(X, bound), fastgen.ddim_step(X, X, 0.1, 0.2, clip=bound))
    train = torch.compile(
        lambda m, v, i: (
            fastgen.reparameterize(m, v, seed=0, step=i),
            fastgen.add_noise(m, 0.3, seed=1, step=i),
        ),
        backend="aot_eager",
        fullgraph=True,
    )
    for i in range(12):  # beyond the recompile limit: the step is no constant of the graph
        expected = (
            fastgen.reparameterize(X, C, seed=0, step=i),
            fastgen.add_noise(X, 0.3, seed=1, step=i),
        )
        assert_bitwise(train(X, C, i), expected)


def test_a_compiled_add_noise_has_a_gradient():
    x = X.clone().requires_grad_()
    noise = torch.compile(lambda x: fastgen.add_noise(x, 0.5, seed=0, step=0).sum(),
                          backend="aot_eager", fullgraph=True)  # fmt: skip
    (gradient,) = torch.autograd.grad(noise(x), x)
    torch.testing.assert_close(gradient, torch.full_like(X, 0.5**0.5))


def test_guidance_without_uncond_is_refused():
    for call in (
        lambda g: fastgen.ddim_step(X, C, 0.5, 0.6, guidance_scale=g),
        lambda g: fastgen.step(Row((Output({"x": 1.0, "e": 1.0}),)), X, C, guidance_scale=g),
    ):
        for g in (3.0, torch.tensor([1.0, 2.0])):
            with pytest.raises(ValueError, match=r"guidance_scale: got .* without uncond"):
                call(g)
        call(1.0)


def test_a_check_does_not_depend_on_earlier_calls():
    fastgen.ddim_step(X, C, 0.5, 0.6, clip=1.0)
    with pytest.raises(TypeError, match="clip: got True"):
        fastgen.ddim_step(X, C, 0.5, 0.6, clip=True)
    image, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 3, 2, 2)
    for _ in range(2):
        fastgen.conv_transpose2d(image, weight, stride=1)
        with pytest.raises(TypeError, match="groups: got bool"):
            fastgen.conv_transpose2d(image, weight, groups=True)
        with pytest.raises(TypeError, match="stride: got bool"):
            fastgen.conv_transpose2d(image, weight, stride=(True, 1))
        fastgen.conv_transpose2d(image, weight, stride=(1, 1))
    stride = torch.tensor(2)
    fastgen.conv_transpose2d(image, weight, stride=stride)
    stride.fill_(3)
    assert fastgen.conv_transpose2d(image, weight, stride=stride).shape == (1, 3, 11, 11)
    for slope, zero in ((0.0, -0.0), (-0.0, 0.0)):
        y = fastgen.conv_transpose1d(-torch.ones(1, 1, 1), torch.ones(1, 1, 1),
                                     activation="leaky_relu", negative_slope=slope)  # fmt: skip
        assert_bitwise(y, torch.full((1, 1, 1), zero))


@pytest.mark.parametrize("stride", [1 << 31, 1 << 40])
def test_a_stride_beyond_pytorchs_is_refused(stride):
    with pytest.raises(ValueError, match="stride: got"):
        fastgen.conv_transpose1d(torch.ones(1, 1, 1), torch.ones(1, 1, 1), stride=stride)


def test_a_backend_is_named_by_a_string():
    with pytest.raises(TypeError, match="backend: got list"):
        fastgen.ddim_step(X, C, 0.5, 0.6, backend=[])


def test_the_divergence_of_the_straight_path_is_that_of_the_others():
    mean, logvar = torch.randn(2, 3, 5, 700)
    z, kl = fastgen.reparameterize(mean, logvar, seed=4, step=2, return_kl=True)
    assert_bitwise(kl, fastgen.gaussian_kl(mean, logvar, backend="reference"))
    assert_bitwise(z, fastgen.reparameterize(mean, logvar, seed=4, step=2, backend="reference"))
    assert fastgen.reparameterize(mean[:0], logvar[:0], seed=4, step=2, return_kl=True)[
        1
    ].shape == (0,)


def test_large_new_outputs_have_the_bits_of_small_ones():
    x, c = torch.randn(2, 4, 3, 512, 513)  # beyond the size of huge pages, at odd offsets
    whole = fastgen.ddpm_step(x, c, 0.5, 0.6, seed=0, step=1)
    assert_bitwise(whole[:1], fastgen.ddpm_step(x[:1], c[:1], 0.5, 0.6, seed=0, step=1))


def test_rows_do_not_depend_on_whether_denormals_are_flushed():
    def rows():
        return [
            Row((Output({"x": 1.2345e-39, "e": 0.5}, noise=(1e-40,)),), clip=(-0.0, 1e-41)),
            Row((Output({"x": 0.0, "e": 0.5}),), clip=(0.0, 0.0)),
        ]

    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        flushed = rows()
    finally:
        torch.set_flush_denormal(False)
    packed = {row.packed for row in rows() + flushed}
    assert len(packed) == 1
    assert all(row.noises == 0 and row.reads == {"e"} for row in rows() + flushed)


def test_an_inference_tensor_is_written_under_inference_mode_alone():
    with torch.inference_mode():
        out = torch.zeros(2, 3)
        fastgen.ddim_step(X, C, 0.5, 0.6, out=out)
    assert_bitwise(out, fastgen.ddim_step(X, C, 0.5, 0.6))
    for call in (
        lambda: fastgen.ddim_step(X, C, 0.5, 0.6, out=out),
        lambda: fastgen.reparameterize(X, C, seed=0, step=0, out=out),
        lambda: fastgen.randn((2, 3), seed=0, out=out),
        lambda: fastgen.conv_transpose1d(X[None], torch.ones(2, 2, 1), out=out[None]),
    ):
        with pytest.raises(ValueError, match="out: an inference tensor"):
            call()


def test_seeds_without_memory_are_left_to_the_dispatcher():
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(2, dtype=torch.int64))
        assert isinstance(fastgen.randn((2, 3), seed=fake), FakeTensor)
        assert isinstance(fastgen.randn((2, 3), seed=0, sample_ids=fake), FakeTensor)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        fastgen.randn((2, 3), seed=fake)


def test_numbers_in_tensors_with_the_negative_bit_are_read_right():
    x, two = torch.ones(2, 3), torch._neg_view(torch.tensor([-2]))
    table = fastgen.stack_rows([Row((Output({"x": float(k)}),)) for k in (1, 2, 3)])
    assert torch.equal(fastgen.step(table, x, row_index=two), torch.full((2, 3), 3.0))
    for call in (
        lambda seed: fastgen.randn((2, 3), seed=seed),
        lambda seed: fastgen.reparameterize(x, x, seed=seed, step=0),
        lambda seed: fastgen.reparameterize(x, x, seed=1, sample_ids=seed.expand(2), step=0),
    ):
        assert_bitwise(call(two), call(torch.tensor([2])))


def test_the_key_of_a_reparameterization_may_be_fake():
    with FakeTensorMode() as mode:
        x, fake = torch.ones(2, 3), mode.from_tensor(torch.ones(2, dtype=torch.int64))
        assert isinstance(fastgen.reparameterize(x, x, seed=fake, step=0), FakeTensor)
    x = torch.ones(2, 3)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        fastgen.reparameterize(x, x, seed=fake, step=0)
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        fastgen.reparameterize(x, x, seed=0, sample_ids=fake, step=0)


def test_a_dim_of_one_may_have_any_stride():
    x = torch.ones(1, 4).as_strided((1, 4), (9, 1))
    assert fastgen.combine([x], [2.0], out=x.as_strided((1, 4), (4, 1))) is not None
    assert torch.equal(x, torch.full((1, 4), 2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastgen.ddim_step(X, C, 0.5, 0.6, clip="12"), "clip: got '12'"),
        (lambda: fastgen.ddim_step(X, C, 0.5, 0.6, clip=True), "clip: got True"),
        (lambda: fastgen.ddim_step(X, C, 0.5, 0.6, clip=-1.0), "clip: got -1.0"),
        (lambda: fastgen.ddim_step(X, C, 0.5, 10**400), "alpha_bar_prev: got 1000"),
        (lambda: fastgen.ddim_step(X, C, torch.tensor(0.5), 0.6), r"a float \(its .item\(\)\)"),
        (lambda: fastgen.philox4x32(0, 0), "counter: got int"),
        (lambda: fastgen.randn((2, 3), seed=0, sample_ids=7), r"sample_ids: got int.*as in \[7\]"),
        (lambda: fastgen.ddim_step(X, C, 0.5, 0.6, prediction=["v"]), r"prediction: got \['v'\]"),
        (lambda: fastgen.ddim_step(X, C, np.array(0.5), 0.6), "alpha_bar: got ndarray"),
        (lambda: fastgen.ddpm_step(X, C, 0.5, 0.6, variance=np.ones(3)), "variance: got array"),
        (lambda: fastgen.randn({2, 3}, seed=0), "shape: got set"),
        (lambda: fastgen.combine(None, None), "outputs: got NoneType"),
        (lambda: fastgen.combine([X], None), "weights: got NoneType"),
    ],
)
def test_odd_arguments_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_bounds_beyond_float32_are_no_bounds(backend):
    expected = fastgen.reparameterize(X, C, seed=0, step=0)
    wide = {"clamp": (-1e300, 1e300), "backend": backend}
    assert_bitwise(fastgen.reparameterize(X, C, seed=0, step=0, **wide), expected)
    assert Row((Output({"x": 1.0}),), clip=3.4028235e38).floats[3] == np.float32(3.4028235e38)
    clipped = fastgen.ddim_step(X, C, 0.5, 0.6, clip=1e300, backend=backend)
    assert clipped.isfinite().all()
