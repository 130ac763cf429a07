"""reparameterize and its divergence: formula, gradients, what is kept, what is refused."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.testing import assert_bitwise

EPS = torch.finfo(torch.float32).eps


def test_it_is_the_papers_formula(backend):
    mean, logvar, noise = torch.randn(3, 4, 5, 33)
    z = fastgen.reparameterize(mean, logvar, noise=noise, backend=backend)
    exact = mean.double() + (0.5 * logvar.double()).exp() * noise.double()
    # exp within 2 ulp of an argument that is exact, a product and a sum
    bound = EPS * (3 * ((0.5 * logvar).exp() * noise.abs()) + exact.abs())
    assert ((z - exact).abs() <= bound).all()


def test_the_divergence_is_the_papers(backend):
    mean, logvar = torch.randn(2, 3, 4, 700)
    m, v = mean.double(), logvar.double()
    exact = 0.5 * (m**2 + v.exp() - 1 - v).flatten(1).sum(1)
    kl = fastgen.gaussian_kl(mean, logvar, backend=backend)
    # each term of a few roundings of values up to |m|^2 + e^v + |v| + 1, a tree of 12 levels
    size = 0.5 * (m**2 + v.exp() + v.abs() + 1).flatten(1).sum(1)
    assert ((kl - exact).abs() <= 16 * EPS * size).all()
    _, fused = fastgen.reparameterize(mean, logvar, seed=1, step=0, return_kl=True, backend=backend)
    assert_bitwise(fused, kl)


def test_the_divergence_agrees_with_its_monte_carlo_estimate():
    mean, logvar = 0.5 * torch.randn(2, 4, 1000)
    exact = fastgen.gaussian_kl(mean, logvar)
    draws = 400
    estimate = fastgen.gaussian_kl_monte_carlo(mean, logvar, seed=3, draws=draws)
    # a draw's variance is at most sum (sigma^2 - 1)^2 / 2 + mean^2 sigma^2
    variance = ((logvar.exp() - 1) ** 2 / 2 + mean**2 * logvar.exp()).sum(1)
    assert ((estimate - exact).abs() <= 5 * (variance / draws).sqrt()).all()


def test_halves_of_a_packed_tensor_are_read_in_place(backend):
    packed = torch.randn(3, 8, 5, 6)
    mean, logvar = packed.chunk(2, dim=1)
    packed_z = fastgen.reparameterize(mean, logvar, seed=1, step=2, backend=backend)
    z = fastgen.reparameterize(mean.clone(), logvar.clone(), seed=1, step=2, backend=backend)
    assert_bitwise(packed_z, z)


@pytest.mark.parametrize("clamp", [None, (-0.5, 0.4)])
@pytest.mark.parametrize("kl", [False, True])
def test_gradients(clamp, kl):
    mean, logvar, noise = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
                           for _ in range(3))  # fmt: skip

    def run(mean, logvar, noise):
        return fastgen.reparameterize(mean, logvar, noise=noise, clamp=clamp, return_kl=kl)

    assert torch.autograd.gradcheck(run, (mean, logvar, noise))
    assert torch.autograd.gradgradcheck(run, (mean, logvar, noise))


@pytest.mark.parametrize("clamp", [None, (-0.5, 0.4)])
def test_nan_passes_into_the_gradients(clamp, backend):
    mean = torch.tensor([[torch.nan, 1.0, 2.0]]).requires_grad_()
    logvar = torch.tensor([[0.1, torch.nan, 0.3]]).requires_grad_()
    z, kl = fastgen.reparameterize(mean, logvar, seed=0, step=0, return_kl=True, clamp=clamp,
                                   backend=backend)  # fmt: skip
    of_mean, of_logvar = torch.autograd.grad(z.sum() + kl.sum(), (mean, logvar))
    assert of_mean.isnan().tolist() == [[True, False, False]]
    assert of_logvar.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("clamp", [None, (-0.5, 0.4)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_kernels_are_the_references(clamp, given, dtype, backend):
    tensors = [torch.randn(3, 7, 11).to(dtype) for _ in range(3)]

    def grads(backend, kind):
        mean, logvar, noise = (t.to(kind).requires_grad_() for t in tensors)
        source = {"noise": noise} if given else {"seed": 4, "step": 1}
        z, kl = fastgen.reparameterize(mean, logvar, return_kl=True, clamp=clamp, backend=backend,
                                       **source)  # fmt: skip
        leaves = (mean, logvar, noise) if given else (mean, logvar)
        return torch.autograd.grad((z * z.detach()).sum() + (kl * kl.detach()).sum(), leaves)

    for got, want in zip(grads(backend, dtype), grads("reference", torch.float64), strict=True):
        eps = torch.finfo(dtype).eps
        assert (got - want).abs().max() <= 8 * max(eps, 8 * EPS) * want.abs().max()


def test_second_gradients_through_the_kernels():
    mean, logvar = torch.randn(2, 2, 9, requires_grad=True).unbind(0)

    def penalty(mean, logvar):
        z, kl = fastgen.reparameterize(mean, logvar, seed=2, step=0, return_kl=True)
        first = torch.autograd.grad(z.square().sum() + kl.sum(), (mean, logvar), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (mean, logvar))

    exact = penalty(*(t.detach().double().requires_grad_() for t in (mean, logvar)))
    for got, want in zip(penalty(mean, logvar), exact, strict=True):
        assert (got - want).abs().max() <= 100 * EPS * want.abs().max()


def test_nothing_but_the_inputs_is_kept_for_the_backward():
    mean, logvar = (torch.randn(2, 64, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastgen.reparameterize(mean, logvar, seed=1, step=0)
    large = {t.data_ptr() for t in kept if t.numel() == mean.numel()}
    assert large == {mean.data_ptr(), logvar.data_ptr()}


def test_the_registered_op_keeps_torchs_rules():
    mean, logvar = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    arguments = (mean, logvar, None, torch.tensor([3]), torch.arange(2), 1, True, -1.0, 1.0, "cpu")
    torch.library.opcheck(torch.ops.fastgen.reparameterize.default, arguments)


def test_compiled_it_has_the_same_bits_and_gradients():
    mean, logvar = (torch.randn(2, 300, requires_grad=True) for _ in range(2))

    def run(mean, logvar):
        z, kl = fastgen.reparameterize(mean, logvar, seed=3, step=2, return_kl=True)
        return z, kl

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(mean, logvar), run(mean, logvar))
    for a, b in zip(*(torch.autograd.grad(sum(o.sum() for o in f(mean, logvar)), (mean, logvar))
                      for f in (compiled, run)), strict=True):  # fmt: skip
        assert_bitwise(a, b)


def test_out_may_be_mean_itself(backend):
    mean, logvar = torch.randn(2, 3, 1100)
    expected = fastgen.reparameterize(mean, logvar, seed=1, step=1, return_kl=True, backend=backend)
    z, kl = fastgen.reparameterize(mean, logvar, seed=1, step=1, return_kl=True, out=mean,
                                   backend=backend)  # fmt: skip
    assert z is mean
    assert_bitwise((z, kl), expected)


def test_an_empty_batch_and_an_empty_sample():
    z, kl = fastgen.reparameterize(
        torch.zeros(0, 5), torch.zeros(0, 5), seed=1, step=0, return_kl=True
    )
    assert z.shape == (0, 5)
    assert kl.shape == (0,)
    z, kl = fastgen.reparameterize(
        torch.zeros(3, 0), torch.zeros(3, 0), seed=1, step=0, return_kl=True
    )
    assert kl.tolist() == [0, 0, 0]


M = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "seed, noise: got neither"),
        ({"seed": 1, "noise": M, "step": 0}, ValueError, "seed, noise: got both"),
        ({"seed": 1}, ValueError, "step: must be given"),
        ({"logvar": M[:, :3], "seed": 1, "step": 0}, ValueError, "logvar: got shape"),
        ({"logvar": M.int(), "seed": 1, "step": 0}, TypeError, "logvar: got torch.int32"),
        ({"logvar": M.to("meta"), "seed": 1, "step": 0}, ValueError, "logvar: is on meta"),
        ({"noise": M[0]}, ValueError, "noise: got shape"),
        ({"clamp": (1.0, 0.0), "seed": 1, "step": 0}, ValueError, "clamp: got"),
        ({"clamp": "x", "seed": 1, "step": 0}, TypeError, "clamp: got 'x'"),
        ({"backend": "cuda", "seed": 1, "step": 0}, ValueError, "cannot serve reparameterize"),
        ({"out": M[:1], "seed": 1, "step": 0}, ValueError, "out: got shape"),
    ],
)
def test_it_names_what_is_wrong(options, error, message):
    options = {"logvar": M} | options
    with pytest.raises(error, match=message):
        fastgen.reparameterize(M, **options)
