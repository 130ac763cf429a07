"""step, ddpm_step and ddim_step: the papers' formulas, gradients, graphs, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import fastgen
from fastgen import Output, Row
from fastgen.testing import assert_bitwise

EPS = torch.finfo(torch.float32).eps


def predicted(prediction, x, e, a):
    """(x_0, epsilon) from what the network says."""
    signal, sigma = math.sqrt(a), math.sqrt(1 - a)
    if prediction == "epsilon":
        return (x - sigma * e) / signal, e
    if prediction == "sample":
        return e, (x - signal * e) / sigma
    return signal * x - sigma * e, sigma * x + signal * e


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_step_is_the_papers(prediction, clip, eta, backend):
    """Song et al. (2021), eq. 12 and 16, in float64."""
    a, s = 0.4, 0.55
    x, e, z = torch.randn(3, 2, 3, 40)
    x0, epsilon = predicted(prediction, x.double(), e.double(), a)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    sigma = eta * math.sqrt((1 - s) / (1 - a) * (1 - a / s))
    expected = math.sqrt(s) * x0 + math.sqrt(1 - s - sigma**2) * epsilon + sigma * z.double()
    actual = fastgen.ddim_step(x, e, a, s, prediction=prediction, clip=clip, eta=eta,
                               noise=z, backend=backend)  # fmt: skip
    # at most eight roundings of terms no larger than twice those of the inputs
    scale = 2 * (x.abs() + e.abs() + z.abs()).double()
    assert ((actual - expected).abs() <= 8 * EPS * scale).all()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("clip", [None, (-0.5, 0.9)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_ddpm_step_is_the_papers(prediction, clip, variance, backend):
    """Ho et al. (2020), eq. 6 and 7, in float64."""
    a, s = 0.4, 0.55
    x, e, z, learned = torch.randn(4, 2, 3, 40)
    x0, _ = predicted(prediction, x.double(), e.double(), a)
    if clip is not None:
        x0 = x0.clamp(*clip)
    beta = 1 - a / s
    mean = math.sqrt(s) * beta / (1 - a) * x0 + math.sqrt(a / s) * (1 - s) / (1 - a) * x.double()
    deviation = {
        "fixed_small": torch.tensor((1 - s) / (1 - a) * beta).sqrt(),
        "fixed_large": torch.tensor(beta).sqrt(),
        "learned": (0.5 * learned.double()).exp(),
    }[variance]
    expected = mean + deviation * z.double()
    actual = fastgen.ddpm_step(
        x, e, a, s, prediction=prediction, clip=clip, noise=z, backend=backend,
        variance=learned if variance == "learned" else variance,
    )  # fmt: skip
    scale = 2 * (x.abs() + e.abs() + deviation * z.abs()).double()
    assert ((actual - expected).abs() <= 8 * EPS * scale).all()


def test_no_noise_is_drawn_at_the_last_step():
    x, e = torch.randn(2, 2, 9)
    for variance in ("fixed_small", "fixed_large", torch.zeros(2, 9)):
        last = fastgen.ddpm_step(x, e, 0.9, 1.0, variance=variance)
        seeded = fastgen.ddpm_step(x, e, 0.9, 1.0, variance=variance, seed=1, step=1)
        assert_bitwise(seeded, last)
    assert_bitwise(fastgen.ddim_step(x, e, 0.9, 1.0, eta=1.0), last)


def test_guidance_of_one_is_the_conditional_output_exactly():
    x, c = torch.randn(2, 2, 9)
    u = torch.full_like(c, torch.nan)
    guided = fastgen.ddim_step(x, c, 0.4, 0.5, uncond=u, guidance_scale=1.0)
    assert_bitwise(guided, fastgen.ddim_step(x, c, 0.4, 0.5))


def test_guidance_is_fused_without_a_rounding_in_between(backend):
    x, c, u = torch.randn(3, 2, 64).bfloat16()
    step = fastgen.ddim_step(x, c, 0.4, 0.5, uncond=u, guidance_scale=3.0, backend=backend)
    e = fastgen.cfg_combine(c.float(), u.float(), 3.0)
    assert_bitwise(step, fastgen.ddim_step(x.float(), e, 0.4, 0.5).bfloat16())


def test_a_weight_of_zero_leaves_its_term_unread(backend):
    x = torch.ones(1, 8)
    poison = torch.full((1, 8), torch.nan)
    row = Row((Output({"x": 2.0, "e": 0.0, "known": 0.0, "h0": 0.0}, noise=(0.0,)),))
    y = fastgen.step(row, x, poison, known=poison, history=[poison], seed=1, backend=backend)
    assert_bitwise(y, 2 * x)


def test_nan_passes_through_the_clip(backend):
    x, e = torch.tensor([[0.0, torch.nan, 5.0]]), torch.zeros(1, 3)
    y = fastgen.ddim_step(x, e, 0.5, 1.0, clip=1.0, backend=backend)
    assert y.isnan().tolist() == [[False, True, False]]
    assert y[0, 2] == 1.0


def test_the_result_has_xs_dtype_and_memory_format():
    x = torch.randn(2, 4, 5, 6).half().to(memory_format=torch.channels_last)
    y = fastgen.ddim_step(x, torch.randn(2, 4, 5, 6), 0.4, 0.5)
    assert y.dtype == torch.float16
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("operand", ["x", "e", "u"])
def test_out_may_be_an_input(operand, backend):
    x, e, u = torch.randn(3, 3, 1500)
    options = {"uncond": u, "guidance_scale": 2.0, "clip": 1.0, "backend": backend}
    expected = fastgen.ddim_step(x, e, 0.4, 0.5, **options)
    out = {"x": x, "e": e, "u": u}[operand]
    returned = fastgen.ddim_step(x, e, 0.4, 0.5, out=out, **options)
    assert returned is out
    assert_bitwise(out, expected)


def test_large_outputs_past_the_caches_have_the_same_bits():
    x, e = torch.randn(2, 9, 1 << 20)
    whole = fastgen.ddim_step(x, e, 0.4, 0.5)
    for i in range(0, 9, 4):
        assert_bitwise(fastgen.ddim_step(x[i : i + 1], e[i : i + 1], 0.4, 0.5)[0], whole[i])


def test_a_table_on_the_device_gives_the_bits_of_its_rows(backend):
    plan = fastgen.solvers.ddpm(fastgen.NoiseSchedule.linear(), 5, clip=1.0)
    table = plan.table()
    x, e = torch.randn(2, 2, 30)
    for i, row in enumerate(plan.rows):
        index = torch.tensor(i)
        by_table = fastgen.step(table, x, e, row_index=index, seed=3, backend=backend)
        by_value = fastgen.step(row, x, e, seed=3, step=i, backend=backend)
        assert_bitwise(by_table, by_value)


def smooth(shape, count):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def test_gradients_to_every_operand():
    x, e, u, known, h = smooth((2, 3), 5)
    row = Row(
        (
            Output({"x": 0.5, "e": -0.3, "u": 0.2, "denoised": 0.7, "known": 0.1, "h0": 0.4}),
            Output({"denoised": 1.0, "x": 0.3}, target=0),
        ),
        denoised=(0.9, -0.4),
        clip=(-0.6, 0.6),
    )

    def run(x, e, u, known, h):
        return fastgen.step(row, x, e, uncond=u, known=known, history=[h], guidance_scale=2.5)

    assert torch.autograd.gradcheck(run, (x, e, u, known, h))
    assert torch.autograd.gradgradcheck(run, (x, e, u, known, h))


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("guided", [1.0, 2.5, [2.0, 1.0]])
@pytest.mark.parametrize("table", [False, True])
def test_gradients_of_the_kernels_are_the_references(clip, drawn, guided, table, backend):
    """Of first and second order, of a row on the host and of one in a tensor."""
    row = Row(
        (
            Output({"x": 0.5, "e": -0.3, "u": 0.2, "denoised": 0.7}, (0.3,)),
            Output({"denoised": 1.0, "h1": 0.3}, target=0),
        ),
        denoised=(0.9, -0.4),
        clip=clip,
    )
    tensors = [torch.randn(2, 3, 5) for _ in range(6 - drawn)]
    scales = [torch.rand(2) + 0.5] + ([torch.tensor(guided)] if isinstance(guided, list) else [])

    def grads(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (*tensors, *scales)]
        x, e, u, h, logvar = leaves[:5]
        source = {"seed": 3, "step": 1} if drawn else {"noise": leaves[5]}
        y, d = fastgen.step(
            fastgen.stack_rows([row]) if table else row, x, e, uncond=u, history=[None, h],
            logvar=logvar, output_scale=leaves[6 - drawn], outputs=2,
            guidance_scale=leaves[-1] if isinstance(guided, list) else guided, backend=backend,
            **source,
        )  # fmt: skip
        first = torch.autograd.grad((y.sin() + d.cos()).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        return [*first, *second]

    exact = grads(torch.float64, "reference")
    for got, want in zip(grads(torch.float32, backend), exact, strict=True):
        # sums of at most 15 elements, each of a dozen roundings; twice that of second order
        assert (got - want).abs().max() <= 400 * EPS * (1 + want.abs().max())


def test_a_gradient_keeps_its_operands_dtype_and_is_zero_without_a_weight(backend):
    x = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(2, 3, requires_grad=True)
    y = fastgen.step(Row((Output({"x": 0.5}),)), x, e, backend=backend)
    of_x, of_e = torch.autograd.grad(y.sum(), (x, e))
    assert torch.equal(of_x, torch.full((2, 3), 0.5, dtype=torch.bfloat16))
    assert torch.equal(of_e, torch.zeros(2, 3))


def test_gradients_reach_the_rows():
    table = fastgen.solvers.ddpm(fastgen.NoiseSchedule.linear(), 4).table().requires_grad_()
    x, e = torch.randn(2, 2, 9)
    y = fastgen.step(table, x, e, row_index=torch.tensor(1), seed=3)
    (grad,) = torch.autograd.grad(y.sum(), table)
    assert torch.equal(grad[[0, 2, 3]], torch.zeros(3, 72))
    torch.testing.assert_close(grad[1, 8], x.sum())  # the weight of x in y_0
    torch.testing.assert_close(grad[1, 9], e.sum())


def test_a_weight_of_zero_has_a_gradient(backend):
    row = Row((Output({"x": 1.0}),))
    rows = fastgen.stack_rows([row]).requires_grad_()
    x, e = torch.ones(2, 3), torch.full((2, 3), 5.0)
    y = fastgen.step(rows, x, e, history=(None, x), backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), rows)
    assert grad[0, 8:20].tolist() == [6.0, 30.0, 0, 0, 0, 0, 6.0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad", "grad of vmap"])
def test_transforms_see_what_a_choice_hides(transform):
    """The derivative by a weight of zero, and by a guidance of one."""
    x, e, u = torch.randn(3, 2, 3)
    rows = fastgen.stack_rows([Row((Output({"x": 1.0}),))])

    def by_weight(w):
        index = torch.arange(72) == 9
        return fastgen.step(torch.where(index, w, rows), x, e).sum()

    def by_guidance(g):
        row = Row((Output({"e": 1.0}),))
        return fastgen.step(row, x, e, uncond=u, guidance_scale=g).sum()

    for function, at, expected in ((by_weight, 0.0, e.sum()), (by_guidance, 1.0, (e - u).sum())):
        point = torch.full((1,), at)
        if transform == "grad":
            found = torch.func.grad(function)(point)
        elif transform == "jvp":
            found = torch.func.jvp(function, (point,), (torch.ones(1),))[1]
        elif transform == "vmap of grad":
            found = torch.func.vmap(torch.func.grad(function))(point.expand(4, 1))[3]
        else:
            batched = torch.func.vmap(function)
            found = torch.func.grad(lambda p: batched(p).sum())(point.expand(4, 1))[3]  # noqa: B023
        torch.testing.assert_close(found.sum(), expected)


def test_mixed_second_derivatives_at_a_weight_of_zero_and_a_guidance_of_one(backend):
    x, e, u = (t.requires_grad_() for t in torch.randn(3, 2, 3))
    rows = fastgen.stack_rows([Row((Output({"e": 1.0}),), denoised=(0.0, 1.0), clip=9.0)])
    rows, g = rows.requires_grad_(), torch.ones(1, requires_grad=True)
    y = fastgen.step(rows, x, e, uncond=u, guidance_scale=g, backend=backend)
    by_rows, by_g = torch.autograd.grad(y.square().sum() / 2, (rows, g), create_graph=True)
    # y = w_x x + u + g (c - u): d/dw_x is sum x y, and d/dg sum (c - u) y
    (of_x,) = torch.autograd.grad(by_rows[0, 8], x, retain_graph=True)
    torch.testing.assert_close(of_x, e.detach())
    of_c, of_u = torch.autograd.grad(by_g.sum(), (e, u))
    torch.testing.assert_close(of_c, (2 * e - u).detach())
    torch.testing.assert_close(of_u, -e.detach())


def test_an_unread_weight_of_noise_has_a_gradient(backend):
    rows = fastgen.stack_rows([Row((Output({"x": 1.0}),))]).requires_grad_()
    x = torch.ones(2, 3)
    y = fastgen.step(rows, x, seed=3, step=2, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), rows)
    for m, stream in enumerate((2, 8, 9, 10)):
        z = fastgen.randn((2, 3), seed=3, step=2, stream=stream)
        torch.testing.assert_close(grad[0, 56 + m], z.sum())


def test_a_log_variance_that_scales_nothing_has_a_gradient_of_zero(backend):
    x, logvar = torch.randn(2, 2, 3)
    logvar.requires_grad_()
    rows = fastgen.stack_rows([Row((Output({"x": 1.0}),))])
    for row in (Row((Output({"x": 1.0}),)), rows):
        y = fastgen.step(row, x.clone().requires_grad_(), logvar=logvar, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), logvar, allow_unused=True)
        assert grad is None or not grad.any()


def test_history_may_have_empty_slots(backend):
    row = Row((Output({"x": 1.0, "h1": 0.5}),))
    x, h = torch.randn(2, 2, 3)
    expected = x + 0.5 * h
    assert_bitwise(fastgen.step(row, x, history=(None, h), backend=backend), expected)
    x, h = x.requires_grad_(), h.requires_grad_()
    y = fastgen.step(row, x, history=(None, h), backend=backend)
    of_x, of_h = torch.autograd.grad(y.sum(), (x, h))
    assert torch.equal(of_x, torch.ones(2, 3))
    assert torch.equal(of_h, torch.full((2, 3), 0.5))


def test_the_registered_op_keeps_torchs_rules():
    plan = fastgen.solvers.ddpm(fastgen.NoiseSchedule.linear(), 3, clip=1.0)
    x, e, u = (torch.randn(2, 5, requires_grad=True) for _ in range(3))
    arguments = (
        x, e, u, None, None, [], 0, [], plan.table(), torch.tensor(1), torch.ones(1), None,
        torch.tensor([4]), torch.arange(2), 0, [2, 8, 9, 10], [0], [2, 5],
        torch.device("cpu"), "cpu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastgen.step.default, arguments)


def test_transforms_and_modes_are_served():
    x, e = torch.randn(2, 4, 3, 7)
    expected = fastgen.ddim_step(x, e, 0.4, 0.5)

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        assert_bitwise(fastgen.ddim_step(x, e, 0.4, 0.5), expected)
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag  # a view with the negative bit
    assert negative.is_neg()
    assert_bitwise(fastgen.ddim_step(negative, e, 0.4, 0.5), expected)
    parameter = torch.nn.Parameter(x)
    assert fastgen.ddim_step(parameter, e, 0.4, 0.5).requires_grad
    with torch.no_grad():
        assert_bitwise(fastgen.ddim_step(parameter, e, 0.4, 0.5), expected)


def test_compiled_steps_have_the_same_bits():
    x, e, u = torch.randn(3, 2, 300)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, e, u):
        y = fastgen.ddim_step(x, e, 0.4, 0.5, uncond=u, guidance_scale=3.0, clip=1.0)
        return fastgen.ddpm_step(y, e, 0.5, 0.6, seed=3, step=2)

    y = fastgen.ddim_step(x, e, 0.4, 0.5, uncond=u, guidance_scale=3.0, clip=1.0)
    assert_bitwise(run(x, e, u), fastgen.ddpm_step(y, e, 0.5, 0.6, seed=3, step=2))


X = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x: got torch.int32"),
        ({"x": [1.0]}, TypeError, "x: got list"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: got a 0-d tensor"),
        ({"output": torch.zeros(2, 5)}, ValueError, r"model_output: got shape \(2, 5\)"),
        ({"output": X.to("meta")}, ValueError, "model_output: is on meta"),
        ({"uncond": torch.zeros(1, 6)}, ValueError, "uncond: got shape"),
        ({"alpha_bar": -0.1}, ValueError, "alpha_bar: got -0.1"),
        ({"alpha_bar": 1.1}, ValueError, "alpha_bar: got 1.1"),
        ({"alpha_bar": math.nan}, ValueError, "alpha_bar: got nan"),
        ({"alpha_bar": torch.tensor(0.5)}, TypeError, "alpha_bar: got Tensor"),
        ({"alpha_bar": "0.5"}, TypeError, "alpha_bar: got str"),
        ({"alpha_bar": 0.0}, ValueError, "alpha_bar: got 0, where epsilon"),
        ({"alpha_bar_prev": math.inf}, ValueError, "alpha_bar_prev: got inf"),
        ({"guidance_scale": math.nan}, ValueError, "guidance_scale: got nan"),
        ({"guidance_scale": "big"}, TypeError, "guidance_scale: got str"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, ValueError, "guidance_scale: got shape"),
        ({"prediction": "x0"}, ValueError, "prediction: got 'x0'"),
        ({"clip": (1.0, -1.0)}, ValueError, "clip: got"),
        ({"clip": "1"}, TypeError, "clip: got '1'"),
        ({"backend": "rocm"}, ValueError, "backend: got 'rocm'"),
        ({"backend": "cuda"}, ValueError, "backend: 'cuda' cannot serve"),
        ({"out": torch.zeros(2, 5)}, ValueError, "out: got shape"),
        ({"out": X.double()}, ValueError, "out: got torch.float64"),
        ({"out": torch.zeros(2, 6, requires_grad=True)}, ValueError, "out: requires grad"),
    ],
)
@pytest.mark.parametrize("op", ["ddpm", "ddim"])
def test_steps_name_what_is_wrong(op, change, error, message):
    options = {"x": X, "output": X, "alpha_bar": 0.4, "alpha_bar_prev": 0.5} | change
    if op == "ddpm":
        options |= {"seed": 0, "step": 0}
    function = {"ddpm": fastgen.ddpm_step, "ddim": fastgen.ddim_step}[op]
    positional = [options.pop(n) for n in ("x", "output", "alpha_bar", "alpha_bar_prev")]
    with pytest.raises(error, match=message):
        function(*positional, **options)


def test_zero_signal_is_refused_for_epsilon_alone():
    for prediction in ("sample", "v"):
        assert fastgen.ddim_step(X, X, 0.0, 0.5, prediction=prediction).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "seed, noise: this step draws noise"),
        ({"seed": 1}, ValueError, "step: must be given with seed"),
        ({"seed": 1, "step": 1, "noise": X}, ValueError, "got both"),
        ({"seed": -3, "step": 1}, ValueError, "seed: got -3"),
        ({"seed": 1, "step": -1}, ValueError, "step: got -1"),
        ({"seed": 1, "step": 1.5}, TypeError, "step: got float"),
        ({"noise": X[:1]}, ValueError, "noise: got shape"),
        ({"seed": 1, "step": 1, "variance": "huge"}, ValueError, "variance: got 'huge'"),
        ({"seed": 1, "step": 1, "variance": X[:, :2]}, ValueError, "variance: got shape"),
    ],
)
def test_ddpm_names_what_is_wrong(options, error, message):
    with pytest.raises(error, match=message):
        fastgen.ddpm_step(X, X, 0.4, 0.5, **options)


def test_ddpm_never_goes_back_to_more_noise():
    with pytest.raises(ValueError, match=r"alpha_bar_prev: got 0\.3"):
        fastgen.ddpm_step(X, X, 0.4, 0.3, seed=0, step=0)
    assert fastgen.ddim_step(X, X, 0.4, 0.3).isfinite().all()  # inversion


def test_ddim_refuses_more_noise_than_fits():
    for eta in (-0.5, 5.0):
        with pytest.raises(ValueError, match="eta: got"):
            fastgen.ddim_step(X, X, 0.4, 0.5, eta=eta, seed=0, step=0)


def test_an_output_that_overlaps_an_input_partly_is_refused():
    memory = torch.zeros(40)
    x = memory[:20].view(2, 10)
    with pytest.raises(ValueError, match="out: overlaps an input partly"):
        fastgen.ddim_step(x, torch.zeros(2, 10), 0.4, 0.5, out=memory[4:24].view(2, 10))
    halves = torch.randn(2, 12)
    left, right = halves[:, :6], halves[:, 6:]  # interleaved in memory, sharing none of it
    expected = fastgen.ddim_step(left.clone(), left.clone(), 0.4, 0.5)
    assert_bitwise(fastgen.ddim_step(left, left, 0.4, 0.5, out=right), expected)


def test_outputs_that_overlap_each_other_are_refused():
    row = Row((Output({"x": 1.0}), Output({"x": 2.0}, target=0)))
    memory = torch.zeros(3, 6)
    with pytest.raises(ValueError, match=r"out\[1\]: overlaps another output"):
        fastgen.step(row, X, out=[memory[:2], memory[1:]])


def test_nothing_is_written_on_failure():
    out = torch.full((2, 6), 7.0)
    with pytest.raises(ValueError, match="guidance_scale"):
        fastgen.ddim_step(X, X, 0.4, 0.5, uncond=X, guidance_scale=math.inf, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": None}, "output: the row reads it"),
        ({"history": []}, "history: the row reads slot 0"),
        ({"known": None}, "known: the row reads it"),
        ({"seed": None}, "seed, noise: the row draws 1 normals"),
        ({"row_index": torch.tensor(0)}, "row_index: goes with a table"),
        ({"out": [X.clone(), X.clone()]}, "out: got 2 tensors"),
        ({"output_scale": torch.ones(3)}, "output_scale: got shape"),
        ({"output_scale": 2.0}, "output_scale: got 2.0"),
        ({"row": torch.zeros(4, 72), "row_index": torch.tensor(4)}, "row_index: got 4"),
        ({"dtypes": [torch.float32] * 2}, "dtypes: got 2"),
        ({"dtypes": [torch.int32]}, r"dtypes\[0\]: got torch.int32"),
        ({"dtypes": torch.float32}, "dtypes: got dtype"),
        ({"dtypes": [torch.float64], "backend": "cpu"}, "backend: 'cpu' cannot serve"),
        ({"outputs": 2}, "outputs: got 2"),
        ({"step": None}, "step: must be given with seed"),
        ({"step": "1"}, "step: got str"),
        ({"history": None}, "history: got NoneType"),
        ({"noise": 2.0, "seed": None}, "noise: got float"),
        ({"out": 3}, "out: got int"),
        (
            {"guidance_scale": torch.tensor([1, 2]), "uncond": X},
            "guidance_scale: got a torch.int64",
        ),
        ({"history": [X] * 8}, "history: got 8"),
        ({"noise": [X] * 5}, "noise: got 5"),
        ({"row": torch.zeros(3, 72)}, "row: got shape"),
        ({"row": torch.zeros(2, 71)}, "row: got shape"),
        ({"row": torch.zeros(72).double()}, "row: got torch.float64"),
        ({"row": torch.zeros(4, 72), "row_index": torch.tensor([0.0])}, "row_index"),
    ],
)
def test_step_names_what_is_wrong(options, message):
    row = Row((Output({"x": 1.0, "e": 1.0, "known": 1.0, "h0": 1.0}, (1.0,)),))
    given = {"row": row, "output": X, "known": X, "history": [X], "seed": 0, "step": 1}
    given |= options
    row, output = given.pop("row"), given.pop("output")
    with pytest.raises((ValueError, TypeError), match=message):
        fastgen.step(row, X, output, **given)


@pytest.mark.slow
def test_more_than_two_to_the_thirty_one_elements():
    """8.6 GB of output from expanded inputs."""
    x = torch.randn(1, 1).expand(2, (1 << 30) + 5)
    y = fastgen.combine([x, x], [0.5, 2.0])
    assert (y[:, -1] == y[0, 0]).all()
    assert torch.equal(y[1, -9:], y[0, :9])


@pytest.mark.parametrize("bad", ["x", 1.5, -1, 2**24, True])
def test_a_bad_step_is_refused_where_nothing_is_drawn(bad):
    x, row = torch.ones(1, 3), Row((Output({"x": 0.5}),))
    for seed in (None, 1):
        if seed is None and bad != "x":
            continue
        with pytest.raises((TypeError, ValueError), match="step"):
            fastgen.step(row, x, x, seed=seed, step=bad)
