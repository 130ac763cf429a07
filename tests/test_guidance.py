"""cfg_combine, its rescale, and combine."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.testing import assert_bitwise

EPS = torch.finfo(torch.float32).eps


def test_it_is_the_papers_formula(backend):
    c, u = torch.randn(2, 3, 4, 50)
    g = torch.tensor([2.0, 7.5, 0.0])
    exact = u.double() + g.double().view(3, 1, 1) * (c.double() - u.double())
    scale = u.abs() + g.view(3, 1, 1) * (c.abs() + u.abs())
    for guidance in (g, g.tolist()):
        guided = fastgen.cfg_combine(c, u, guidance, backend=backend)
        assert ((guided - exact).abs() <= 2 * EPS * scale).all()


def test_a_scale_of_one_gives_cond_exactly(backend):
    c = torch.randn(3, 50)
    u = torch.full_like(c, torch.nan)
    assert_bitwise(fastgen.cfg_combine(c, u, 1.0, backend=backend), c)


def test_rescale_brings_back_the_deviation(backend):
    """Lin et al. (2024), eq. 15 and 16, with torch's unbiased deviation as diffusers has it."""
    c, u = torch.randn(2, 3, 4, 16, 17)
    exact_c, exact_u = c.double(), u.double()
    guided = exact_u + 7.5 * (exact_c - exact_u)
    dims = (1, 2, 3)
    ratio = exact_c.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    for phi in (0.7, 1.0):
        exact = phi * (guided * ratio) + (1 - phi) * guided
        got = fastgen.cfg_combine(c, u, 7.5, rescale=phi, backend=backend)
        assert (got - exact).abs().max() <= 8 * EPS * guided.abs().max()
    assert torch.allclose(got.std(dim=dims), c.std(dim=dims), rtol=16 * EPS)


def test_the_deviation_is_right_far_from_zero():
    c, u = 1e4 + torch.randn(2, 1, 5000)
    got = fastgen.cfg_combine(c, u, 3.0, rescale=1.0)
    exact_c, exact_u = c.double(), u.double()
    guided = exact_u + 3.0 * (exact_c - exact_u)
    exact = guided * (exact_c.std() / guided.std())
    # inputs carry 2^-11 of their spread; the sums must not lose more
    assert (got - exact).abs().max() <= 1e4 * 2**-10


def test_halves_of_one_batch_are_read_in_place(backend):
    both = torch.randn(6, 40)
    u, c = both.chunk(2)
    expected = fastgen.cfg_combine(c.clone(), u.clone(), 3.0, backend=backend)
    assert_bitwise(fastgen.cfg_combine(c, u, 3.0, backend=backend), expected)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_gradients(rescale):
    c, u = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    g = torch.tensor([2.0, 3.5], dtype=torch.float64, requires_grad=True)
    run = lambda c, u, g: fastgen.cfg_combine(c, u, g, rescale=rescale)  # noqa: E731
    assert torch.autograd.gradcheck(run, (c, u, g))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_gradients_of_the_kernels_are_the_references(rescale):
    tensors = [torch.randn(2, 50), torch.randn(2, 50), torch.tensor([2.0, 3.5])]

    def grads(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(
            fastgen.cfg_combine(*leaves, rescale=rescale).sin().sum(), leaves
        )

    for got, want in zip(grads(torch.float32), grads(torch.float64), strict=True):
        assert (got - want).abs().max() <= 200 * EPS * (1 + want.abs().max())


def test_the_registered_op_keeps_torchs_rules():
    c, u = (torch.randn(2, 30, requires_grad=True) for _ in range(2))
    torch.library.opcheck(
        torch.ops.fastgen.rescale.default, (c, u, torch.tensor([3.0]), 0.7, "cpu")
    )


def test_combine_sums_left_to_right(backend):
    tensors = list(torch.randn(10, 2, 33))
    weights = [0.5, -1.25, 2.0, 0.0, 1.0, 3.0, -0.125, 0.75, 1e-3, 4.0]
    expected = weights[0] * tensors[0]
    for weight, tensor in list(zip(weights, tensors, strict=True))[1:]:
        if weight:
            expected = expected + torch.tensor(weight) * tensor
    assert_bitwise(fastgen.combine(tensors, weights, backend=backend), expected)


def test_combine_leaves_a_tensor_of_weight_zero_unread(backend):
    x = torch.randn(2, 9)
    poison = torch.full_like(x, torch.nan)
    assert_bitwise(fastgen.combine([x, poison], [1.0, 0.0], backend=backend), x)


C = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((C, C[:1], 2.0), {}, ValueError, "uncond: got shape"),
        ((C, None, 2.0), {}, TypeError, "uncond: got NoneType"),
        ((C, C.to("meta"), 2.0), {}, ValueError, "uncond: is on meta"),
        ((C, C, float("nan")), {}, ValueError, "guidance_scale: got nan"),
        ((C, C, torch.zeros(3)), {}, ValueError, "guidance_scale: got shape"),
        ((C, C, None), {}, TypeError, "guidance_scale: got NoneType"),
        ((C, C, 2.0), {"rescale": 1.5}, ValueError, "rescale: got 1.5"),
        ((C, C, 2.0), {"rescale": "x"}, TypeError, "rescale: got str"),
        ((C, C, 2.0), {"out": C[:, :2]}, ValueError, "out: got shape"),
    ],
)
def test_cfg_combine_names_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastgen.cfg_combine(*arguments, **options)


@pytest.mark.parametrize(
    ("outputs", "weights", "error", "message"),
    [
        ([], [], ValueError, "outputs: got 0"),
        ([C] * 11, [1.0] * 11, ValueError, "outputs: got 11"),
        ([C, C], [1.0], ValueError, "weights: got 1"),
        ([C, C[:1]], [1.0, 1.0], ValueError, r"outputs\[1\]: got shape"),
        ([C, C], [1.0, float("inf")], ValueError, r"weights\[1\]: got inf"),
    ],
)
def test_combine_names_what_is_wrong(outputs, weights, error, message):
    with pytest.raises(error, match=message):
        fastgen.combine(outputs, weights)
