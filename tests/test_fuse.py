"""fuse: the same outputs, in every mode, and what is changed behind its back is seen."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fastgen
from fastgen.bench.generators import GENERATORS, Pix2Pix, cyclegan, dcgan, made
from fastgen.ops import conv_transpose_cpu
from fastgen.testing import assert_bitwise, assert_close_to_oracle

SMALL = {
    "DCGAN": lambda: GENERATORS["DCGAN"][0](8),
    "pix2pix": lambda: Pix2Pix(8, 5),
    "CycleGAN": lambda: cyclegan(8, 1),
    "VAE decoder": lambda: GENERATORS["VAE decoder"][0](4),
    "HiFi-GAN": lambda: GENERATORS["HiFi-GAN"][0](4),
    "3D-GAN": lambda: GENERATORS["3D-GAN"][0](4),
}


def inputs(name, batch=2):
    shape = {"pix2pix": (3, 64, 64), "CycleGAN": (3, 32, 32), "HiFi-GAN": (80, 9)}.get(
        name, GENERATORS[name][1]
    )
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("name", SMALL)
def test_generators_give_the_same_images(name, last):
    net, x = made(SMALL[name]()), inputs(name)
    fused = fastgen.fuse(net, memory_format=torch.channels_last if last else None)
    assert list(fused.state_dict()) == list(net.state_dict())
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
        y = fused(x)
        assert_close_to_oracle(y, net(x), exact, times=4.0, rounding=1e-6)
        if not last:
            assert y.is_contiguous()
        alone = fused(x[1:])
    torch.testing.assert_close(alone, y[1:], rtol=1e-4, atol=1e-5)


def test_an_image_of_dcgan_has_its_bits_in_any_batch():
    fused, z = fastgen.fuse(made(dcgan(16))), inputs("DCGAN", 5)
    with torch.no_grad():
        whole = fused(z)
        for i in range(5):
            assert_bitwise(fused(z[i : i + 1]), whole[i : i + 1])


def test_what_was_done_is_told():
    lines = fastgen.explain(fastgen.fuse(made(dcgan(4)))).splitlines()
    assert lines == [f"{i}: with BatchNorm2d and relu" for i in (0, 3, 6, 9)] + ["12: with tanh"]
    told = fastgen.explain(fastgen.fuse(made(cyclegan(4, 1))))
    assert "InstanceNorm2d has statistics of the sample" in told
    with pytest.raises(ValueError, match="fuse did not return it"):
        fastgen.explain(dcgan(4))


class Functional(nn.Module):
    """Activations that are functions, methods, or shared."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.ConvTranspose2d(6, 5, 4, 2, 1), nn.BatchNorm2d(5)
        self.b, self.c = nn.ConvTranspose2d(5, 4, 3, 2, 1, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = F.leaky_relu(self.n(self.a(x)), 0.3)
        x = self.relu(self.b(self.relu(x)))
        return self.c(x).tanh()


def test_activations_in_a_forward_are_found():
    net, x = made(Functional()), torch.randn(2, 6, 5, 5)
    fused = fastgen.fuse(net)
    assert isinstance(fused, Functional)
    assert list(fused.state_dict()) == list(net.state_dict())
    assert fastgen.explain(fused).splitlines() == [
        "a: with BatchNorm2d and leaky_relu", "b: with relu", "c: with tanh",
    ]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-6)


class Branching(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.conv, self.norm = way, nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.BatchNorm2d(4)
        self.inner = nn.Sequential(nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        if self.way == "data" and x.sum() > 0:
            return self.inner(x)
        y = self.conv(x)
        if self.way == "training" and self.training:
            return y.relu()
        if self.way == "twice":
            return self.norm(self.conv(y))
        return self.norm(y) + (y if self.way == "read twice" else 0.0)


@pytest.mark.parametrize(("way", "why"), [
    ("data", "torch.fx cannot trace what calls it"), ("training", "another one in training"),
    ("twice", "called more than once"), ("read twice", "read more than once"),
])  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_what_is_not_sure_is_left(way, why, training):
    net, x = made(Branching(way)).train(training), torch.randn(3, 4, 5, 5)
    fused = fastgen.fuse(net)
    assert why in fastgen.explain(fused)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-5)


def conv():
    return nn.ConvTranspose2d(4, 4, 4, 2, 1)


class By(nn.Module):
    """A forward given from outside."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.way = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x, skip=None):
        return self.way(self, x, skip)


def untraceable(net, x, skip):
    return net.b(net.a(x) if x.sum() > -1e9 else x)


def shared(kind):
    norm, act, one = nn.BatchNorm2d(4), nn.LeakyReLU(0.3), conv()
    return {
        "norm": By(untraceable, a=nn.Sequential(conv(), norm), b=nn.Sequential(conv(), norm)),
        "conv": By(untraceable, a=nn.Sequential(one, norm), b=nn.Sequential(one)),
        "activation": By(lambda n, x, s: n.main(x), spare=act, main=nn.Sequential(conv(), act)),
        "default": By(lambda n, x, s: n.n(n.c(x) * 2 if s is None else n.c(x)), c=conv(), n=norm),
        "gradients": By(lambda n, x, s: n.n(n.c(x) * (1 + torch.is_grad_enabled())), c=conv(),
                        n=norm),
        "constant": By(lambda n, x, s: n.n(n.c(x)).relu() + torch.ones(1), c=conv(), n=norm),
        "view": By(lambda n, x, s: n.d(n.c(x)).view(len(x), -1), c=conv(), d=conv()),
        "unused": By(lambda n, x, s: n.n(n.c(x)).tanh(), c=conv(), n=norm, extra=conv()),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["norm", "conv", "activation", "default", "gradients", "constant",
                                  "view", "unused"])  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_taken_for_what_it_is_not(kind, inplace):
    net, x = made(shared(kind)), torch.randn(3, 4, 5, 5)
    given = copy.deepcopy(net)
    fused = fastgen.fuse(given, inplace=inplace)
    assert isinstance(fused, By)
    assert (fused is given) == inplace
    assert list(fused.state_dict()) == list(net.state_dict())
    assert fused.way is net.way
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-5)


def test_patches_and_hooks_stay():
    net, x = made(dcgan(4)), inputs("DCGAN")
    net[0].forward = lambda z: nn.ConvTranspose2d.forward(net[0], z) * 0.5
    seen = []
    net[5] = nn.ReLU()
    net[5].register_full_backward_hook(lambda *_: seen.append("backward"))
    net.register_forward_hook(lambda m, given, y: y * 3)
    fused = fastgen.fuse(net, inplace=True)
    assert "0: alone (it has hooks)" in fastgen.explain(fused)
    x.requires_grad_()
    fused(x).sum().backward()
    assert seen == ["backward"]
    assert fused(x).abs().max() > 1.0


def test_statistics_in_other_places():
    net, z = made(dcgan(8)), inputs("DCGAN")
    fused = fastgen.fuse(net)
    with torch.no_grad():
        for i in range(20):
            for both in (net, fused):
                both[1].running_mean = None
                both[1].running_mean = torch.full((64,), float(i))
            torch.testing.assert_close(fused(z), net(z), rtol=1e-5, atol=1e-5)
        for both in (net, fused):
            both[1].eps = 0.5
        torch.testing.assert_close(fused(z), net(z), rtol=1e-5, atol=1e-5)
        for both in (net, fused):
            both[4].running_mean = both[4].running_var = None
        torch.testing.assert_close(fused(z), net(z), rtol=1e-5, atol=1e-5)


def test_an_unbatched_signal_is_normalised_as_torch_does():
    net = made(nn.Sequential(nn.ConvTranspose1d(4, 4, 1), nn.BatchNorm1d(4)))
    for shape in ((4, 4), (2, 4, 7)):
        x = torch.randn(shape)
        torch.testing.assert_close(fastgen.fuse(net)(x), net(x))


def test_function_transforms():
    net, z = made(dcgan(2)), inputs("DCGAN")
    fused = fastgen.fuse(net)
    state = {k: torch.stack([v, v * 1.1]) for k, v in net.named_parameters()}
    ends = [
        torch.func.vmap(lambda p, both=both: torch.func.functional_call(both, p, (z,)))(state)
        for both in (net, fused)
    ]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["DCGAN", "VAE decoder", "3D-GAN"])
def test_training_goes_on_as_before(name):
    net, x = made(SMALL[name]()).train(), inputs(name, 3)
    fused = fastgen.fuse(net)
    for both in (net, fused):
        optimizer = torch.optim.SGD(both.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            both(x).square().mean().backward()
            optimizer.step()
    for (key, a), b in zip(net.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    net.eval(), fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-3, atol=1e-4)


def test_a_gradient_penalty_has_its_second_derivatives():
    net = made(dcgan(2)).double()
    fused, z = fastgen.fuse(net), torch.randn(2, 100, 1, 1, dtype=torch.float64)
    found = []
    for both in (net, fused):
        x = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(both(x).sum(), x, create_graph=True)
        (slope.square().sum() - 1.0).square().backward()
        found.append([x.grad, both[0].weight.grad, both[4].weight.grad, both[12].weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_changes_are_seen():
    net, z = made(dcgan(8)), inputs("DCGAN")
    fused = fastgen.fuse(net)

    def both(change):
        for module in (net, fused):
            with torch.no_grad():
                change(module)
        with torch.no_grad():
            torch.testing.assert_close(fused(z), net(z), rtol=1e-5, atol=1e-5)

    both(lambda m: None)
    both(lambda m: m[1].running_mean.add_(1.0))
    both(lambda m: m[1].running_var.data.mul_(2.0))
    both(lambda m: m[4].weight.mul_(0.5))
    both(lambda m: m[3].weight.data.mul_(0.5))
    both(lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight.flip(0))))
    other = made(dcgan(8), seed=5).state_dict()
    both(lambda m: m.load_state_dict(other))


@pytest.mark.parametrize("way", ["copied", "saved", "scripted by export", "compiled"])
def test_it_is_copied_saved_exported_and_compiled(way):
    fused, z = fastgen.fuse(made(dcgan(4))), inputs("DCGAN")
    with torch.no_grad():
        expected = fused(z)
        if way == "copied":
            other = copy.deepcopy(fused)
            fused[1].running_mean.add_(1.0)  # of the first alone
        elif way == "saved":
            file = io.BytesIO()
            torch.save(fused, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        elif way == "compiled":
            torch._dynamo.reset()
            other = torch.compile(fused, fullgraph=True, backend="aot_eager")
        else:
            other = torch.export.export(fused, (z,)).module()
        torch.testing.assert_close(other(z), expected, rtol=1e-5, atol=1e-6)
    assert fastgen.explain(fastgen.fuse(fused)).count("fused before") == 5


def normed(way):
    conv = nn.ConvTranspose1d(12, 8, 16, 8, 4)
    if way == "weight_norm of hooks":
        return nn.utils.weight_norm(conv)
    if way == "spectral_norm of hooks":
        return nn.utils.spectral_norm(conv)
    return getattr(parametrizations, way)(conv)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "weight_norm of hooks",
                                 "spectral_norm of hooks"])  # fmt: skip
def test_normalised_weights(way):
    net = nn.Sequential(normed(way), nn.LeakyReLU(0.1)).eval()
    x = torch.randn(2, 12, 7)
    net(x)
    fused = fastgen.fuse(net)
    before = len(conv_transpose_cpu._packed)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-6)
    assert len(conv_transpose_cpu._packed) == before + 1  # not packed anew at every call
    if "hooks" in way:
        assert "norm removed" in fastgen.explain(fused)
        return
    for both in (net, fused):
        with torch.no_grad():
            list(both.parameters())[-1].mul_(1.5)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-6)
    net.train(), fused.train()
    fused(x).sum().backward()
    torch.nn.utils.parametrize.remove_parametrizations(copy.deepcopy(fused)[0], "weight")
    assert all(p.grad is not None for p in fused.parameters())


def test_dtype_leaves_the_statistics_as_they_are():
    net, z = made(dcgan(8)), inputs("DCGAN")
    fused = fastgen.fuse(net, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert fused[0].weight.dtype is torch.bfloat16
    assert fused[1].running_var.dtype is torch.float32
    with torch.no_grad():
        y, exact = fused(z.bfloat16()), net(z)
        theirs = copy.deepcopy(net).bfloat16()(z.bfloat16())
    assert y.dtype is torch.bfloat16
    assert (y - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()


def test_inplace_and_what_does_not_fit():
    net = made(dcgan(4))
    assert fastgen.fuse(net) is not net
    assert fastgen.fuse(net, inplace=True) is net
    nothing = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert fastgen.explain(fastgen.fuse(nothing)) == "no transposed convolution was found"
    with pytest.raises(TypeError, match="module: got int"):
        fastgen.fuse(3)
    with pytest.raises(ValueError, match="dtype: got"):
        fastgen.fuse(net, dtype=torch.int32)
    with pytest.raises(ValueError, match="memory_format: got"):
        fastgen.fuse(net, memory_format=torch.preserve_format)
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"weight: got torch.float32, expected.*float64"):
            net(torch.zeros(1, 100, 1, 1, dtype=torch.float64))
        with pytest.raises(ValueError, match="input: got 99 channels"):
            net(torch.zeros(1, 99, 1, 1))
        with pytest.raises(ValueError, match="weight: is on cpu"):
            net(torch.zeros(1, 100, 1, 1, device="meta"))
