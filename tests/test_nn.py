"""fastgen.nn: torch's modules by every argument, with an activation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastgen
from fastgen.reference.conv_transpose import ACTIVATIONS
from fastgen.testing import assert_bitwise

SIZES = {1: (9,), 2: (5, 4), 3: (3, 2, 4)}


@pytest.mark.parametrize("options", [
    {}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 2, "bias": False},
    {"dilation": 2, "stride": 3}, {"dtype": torch.float64}, {"dtype": torch.bfloat16},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_torchs_arguments_and_state(dims, options):
    ours = getattr(fastgen.nn, f"ConvTranspose{dims}d")(4, 6, 3, activation="relu", **options)
    theirs = getattr(nn, f"ConvTranspose{dims}d")(4, 6, 3, **options)
    assert isinstance(ours, type(theirs))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, *SIZES[dims]).to(options.get("dtype", torch.float32))
    y = theirs(x).relu()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if y.dtype is torch.bfloat16 else {}
    torch.testing.assert_close(ours(x), y, **tolerance)
    torch.testing.assert_close(ours(x[0]), y[0], **tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    layer = fastgen.nn.ConvTranspose2d(4, 3, 4, 2, 1, activation=activation, negative_slope=0.3)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    plain = nn.ConvTranspose2d.forward(layer, x)
    torch.testing.assert_close(layer(x), ACTIVATIONS[activation](plain, 0.3))
    torch.autograd.gradcheck(layer.double(), x.double(), fast_mode=True)
    assert (activation is None) == ("activation" not in repr(layer))


def test_output_size():
    ours = fastgen.nn.ConvTranspose2d(4, 3, 3, stride=3, padding=1)
    theirs = nn.ConvTranspose2d(4, 3, 3, stride=3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 6)
    for size in ((13, 18), [15, 16], (2, 3, 14, 17)):
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    with pytest.raises(ValueError, match="output size"):
        ours(x, output_size=(20, 20))


def test_the_results_format():
    for chosen, last in ((None, False), (torch.channels_last, True)):
        layer = fastgen.nn.ConvTranspose2d(4, 3, 4, 2, 1, memory_format=chosen)
        y = layer(torch.randn(2, 4, 5, 5))
        assert y.is_contiguous(memory_format=torch.channels_last) == last
    layer.memory_format = torch.contiguous_format
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()
    long = fastgen.nn.ConvTranspose1d(4, 3, 4, 2, 1, memory_format=torch.channels_last)
    assert long(torch.randn(2, 4, 9)).transpose(1, 2).is_contiguous()


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_conversion_by_swapping(swapping):
    layer, x = fastgen.nn.ConvTranspose2d(4, 3, 4, 2, 1, activation="relu"), torch.randn(2, 4, 5, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        weight = layer.to(dtype).weight
        layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()})
        assert layer.weight is weight
        fresh = torch.nn.Parameter(weight.detach().clone())
        with torch.no_grad():
            y = layer(x.to(dtype))
            assert y.dtype is dtype
            expected = fastgen.conv_transpose2d(x.to(dtype), fresh, layer.bias, 2, 1,
                                                activation="relu")  # fmt: skip
        assert_bitwise(y, expected)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="activation: got 'swish'"):
        fastgen.nn.ConvTranspose2d(4, 3, 4, activation="swish")
    with pytest.raises(TypeError, match="negative_slope"):
        fastgen.nn.ConvTranspose2d(4, 3, 4, negative_slope="much")
    with pytest.raises(ValueError, match="memory_format"):
        fastgen.nn.ConvTranspose2d(4, 3, 4, memory_format=torch.preserve_format)
    with pytest.raises(ValueError, match="memory_format: given beside out"):
        fastgen.conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2),
                                 out=torch.ones(1, 1, 3, 3),
                                 memory_format=torch.channels_last)  # fmt: skip


def test_on_a_gpu_weights_have_their_output_channels_side_by_side(monkeypatch):
    monkeypatch.setattr(fastgen.nn, "_is_on_gpu", lambda weight: weight.dtype is torch.bfloat16)
    layer = fastgen.nn.ConvTranspose1d(6, 4, 5, groups=2)
    parameter, before = layer.weight, layer.weight.detach().clone()
    assert layer.weight.is_contiguous()
    layer.to(torch.bfloat16)
    assert layer.weight is parameter
    assert layer.weight.stride() == (10, 1, 2)
    assert torch.equal(layer.weight, before.bfloat16())
    assert torch.equal(layer.state_dict()["weight"], before.bfloat16())
    made = fastgen.nn.ConvTranspose2d(4, 3, (2, 5), dtype=torch.bfloat16)
    assert made.weight.stride(1) == 1
    network = nn.Sequential(nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh()).to(torch.bfloat16)
    assert network[0].weight.stride(1) == 16
    fused = fastgen.fuse(network)
    assert fused[0].weight.stride(1) == 1
    assert torch.equal(fused[0].weight, network[0].weight)
    normed = fastgen.nn.ConvTranspose1d(4, 4, 3)
    torch.nn.utils.parametrizations.weight_norm(normed)
    normed.to(torch.bfloat16)  # whose weight is no parameter
    assert normed(torch.ones(1, 4, 5, dtype=torch.bfloat16)).shape == (1, 4, 7)
    fused = fastgen.fuse(nn.Sequential(normed).eval())
    with torch.no_grad():
        assert fused[0]._own_weight().stride(1) == 1
        assert torch.equal(fused[0]._own_weight(), normed.weight)
