"""diffusers' guiders, their combination a kernel: its numbers, its states, its files."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen.testing import assert_bitwise

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
from fastgen.integrations import diffusers as fast  # noqa: E402

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
PERTURBED = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
ENERGY = {"seg_guidance_start": 0.0, "seg_guidance_stop": 1.0}
# name, options, the weights of (cond - other) in its order
CASES = [
    ("ClassifierFreeGuidance", {}, [6.5]),
    ("ClassifierFreeGuidance", {"guidance_scale": 0.0}, [-1.0]),
    ("ClassifierFreeGuidance", {"guidance_scale": 7.5, "use_original_formulation": True}, [7.5]),
    ("ClassifierFreeGuidance", {"guidance_scale": 1.0}, []),
    ("ClassifierFreeGuidance", {"enabled": False}, []),
    ("AutoGuidance", {"auto_guidance_layers": [1], "dropout": 0.1}, [6.5]),
    ("SkipLayerGuidance", {"skip_layer_guidance_layers": [1], **ALL}, [6.5, 2.8]),
    ("SkipLayerGuidance",
     {"skip_layer_guidance_layers": [1], **ALL, "use_original_formulation": True}, [7.5, 2.8]),
    ("SkipLayerGuidance", {"skip_layer_guidance_layers": [1], **ALL, "guidance_scale": 1.0},
     [None, 1.8]),
    ("SkipLayerGuidance",
     {"skip_layer_guidance_layers": [1], **ALL, "skip_layer_guidance_scale": 0.0}, [6.5, None]),
    ("PerturbedAttentionGuidance", {"perturbed_guidance_layers": [1], **PERTURBED}, [6.5, 2.8]),
    ("SmoothedEnergyGuidance", {"seg_guidance_layers": [1], **ENERGY}, [6.5, 2.8]),
    ("SmoothedEnergyGuidance", {"seg_guidance_layers": [1], **ENERGY, "guidance_scale": 1.0},
     [None, 1.8]),
]  # fmt: skip
if hasattr(diffusers, "LTX2Guidance"):
    CASES += [
        ("LTX2Guidance", {"guidance_scale": 3.0, "stg_scale": 0.5, "modality_scale": 1.5},
         [2.0, 0.5, 0.5]),
        ("LTX2Guidance", {"stg_scale": 0.7}, [None, 0.7, None]),
    ]  # fmt: skip


def predictions(guider, dtype=torch.float32):
    """As many as it combines, near to each other, as a network's are."""
    count = len(inspect.signature(guider.forward).parameters)
    source = torch.Generator().manual_seed(0)
    shared = torch.randn(3, 4, 9, 11, generator=source)
    return [(shared + 0.3 * torch.randn(shared.shape, generator=source)).to(dtype)
            for _ in range(count)]  # fmt: skip


def begun(guider, at=5):
    guider.set_state(step=at, num_inference_steps=10, timestep=torch.tensor(500))
    return guider


def pair(name, options, at=5):
    theirs = getattr(diffusers, name)(**options)
    ours = fast.convert(theirs)
    assert type(ours) is getattr(fast, name)
    return begun(theirs, at), begun(ours, at)


def exact(cond, others, weights):
    """(the formula in float64, the size of its terms)."""
    c = cond.double()
    value, size = c, c.abs()
    for other, weight in zip(others, weights, strict=False):
        if weight is not None:
            value = value + weight * (c - other.double())
            size = size + (abs(weight) + 1.0) * (c.abs() + other.double().abs())
    return value, size


def named(value):
    return ",".join(value) if isinstance(value, dict) else value if isinstance(value, str) else ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("name", "options", "weights"), CASES, ids=named)
def test_it_is_diffusers_combination(name, options, weights, rescale, dtype):
    theirs, ours = pair(name, {**options, "guidance_rescale": rescale})
    cond, *others = predictions(theirs, dtype)
    want, got = theirs.forward(cond, *others), ours.forward(cond, *others)
    assert type(got) is type(want)
    assert list(got) == list(want)
    assert got.pred_cond is cond
    assert got.pred_uncond is others[0]
    assert got[0] is got.pred
    assert got.pred.dtype == want.pred.dtype
    value, size = exact(cond, others, weights)
    dims = (1, 2, 3)
    if rescale:
        ratio = cond.double().std(dim=dims, keepdim=True) / value.std(dim=dims, keepdim=True)
        factor = rescale * ratio + 1 - rescale
        value, size = factor * value, factor * size
    # a few roundings of the terms and of the factor; the ends, of the sum and of its rescale
    half = torch.finfo(dtype).eps / 2
    bound = 8 * EPS * size + (2 if rescale else 1) * half * value.abs()
    assert ((got.pred - value).abs() <= bound).all()
    if dtype is not torch.float32:
        assert (got.pred - value).abs().max() <= (want.pred - value).abs().max()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(("name", "options", "weights"), CASES, ids=named)
def test_gradients_are_diffusers(name, options, weights, rescale):
    theirs, ours = pair(name, {**options, "guidance_rescale": rescale})
    tensors = predictions(theirs)
    weight = tensors[0].double().cos()

    def gradients(guider, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        loss = (guider.forward(*leaves).pred.sin() * weight).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    for got, want in zip(gradients(ours, torch.float32), gradients(theirs, torch.float64),
                         strict=True):  # fmt: skip
        if want is None or not want.any():
            assert got is None or not got.any()
        else:  # the sine's argument has its roundings, and so has its slope
            assert (got - want).abs().max() <= 200 * EPS * (1 + want.abs().max())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ClassifierFreeGuidance", {"start": 0.2, "stop": 0.7}),
        ("SkipLayerGuidance", {"skip_layer_guidance_layers": [1], "start": 0.3}),
        ("SmoothedEnergyGuidance", {"seg_guidance_layers": [1], "stop": 0.5}),
    ],
)
def test_it_is_on_when_diffusers_is(name, options):
    theirs, ours = pair(name, options)
    tensors = predictions(theirs)
    counts = set()
    for at in range(10):
        want, got = (begun(guider, at).forward(*tensors).pred for guider in (theirs, ours))
        assert ours.num_conditions == theirs.num_conditions
        counts.add(ours.num_conditions)
        assert (got - want).abs().max() <= 32 * EPS * want.abs().max()
    assert len(counts) > 1
    ours.disable()
    assert ours.forward(*tensors).pred is tensors[0]


def test_a_guider_that_is_off_gives_the_prediction_itself():
    theirs, ours = pair("ClassifierFreeGuidance", {"enabled": False, "guidance_rescale": 0.5})
    cond = torch.zeros(2, 4, 8, 8)
    assert theirs.forward(cond).pred.isnan().all()
    assert ours.forward(cond).pred is cond


def test_it_is_one_kernel_of_both_halves():
    both = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    cond, uncond = both.chunk(2)
    guider = fast.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.5)
    expected = fastgen.cfg_combine(cond, uncond, 3.0, rescale=0.5)
    assert_bitwise(guider.forward(cond, uncond).pred, expected)


def test_what_does_not_fit_is_left_to_diffusers():
    theirs, ours = pair("ClassifierFreeGuidance", {"guidance_scale": 4.0, "guidance_rescale": 0.5})
    c, u = predictions(theirs)
    for cond, uncond in ((c, u[:1]), (c.half(), u), (c.double(), u.double())):
        assert_bitwise(ours.forward(cond, uncond).pred, theirs.forward(cond, uncond).pred)
    with pytest.raises(TypeError):
        ours.forward(c)
    theirs, ours = pair("ClassifierFreeGuidance", {"guidance_rescale": 1.5})
    assert_bitwise(ours.forward(c, u).pred, theirs.forward(c, u).pred)


@pytest.mark.parametrize(("name", "options"), [case[:2] for case in CASES], ids=named)
def test_it_is_configured_copied_and_saved_as_diffusers(name, options, tmp_path):
    theirs, ours = pair(name, options)
    assert isinstance(ours, type(theirs))
    assert inspect.signature(type(ours).forward) == inspect.signature(type(theirs).forward)
    assert ours.config == theirs.config
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["_class_name"] == name
    assert type(type(theirs).from_pretrained(tmp_path)) is type(theirs)
    tensors = predictions(theirs)
    expected = ours.forward(*tensors).pred
    others = [fast.convert(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for other in [*others, begun(ours.new()), begun(type(ours).from_pretrained(tmp_path))]:
        assert type(other) is type(ours)
        assert_bitwise(other.forward(*tensors).pred, expected)


def test_compiled_it_has_the_same_bits():
    guider = fast.ClassifierFreeGuidance(guidance_scale=3.0, guidance_rescale=0.5)
    cond, uncond = predictions(guider)

    def run(cond, uncond):
        return guider.forward(cond, uncond)["pred"]  # as diffusers' output is read in a graph

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(cond, uncond), run(cond, uncond))


def test_every_guider_is_here_or_named_as_left_out():
    """Those that a new version of diffusers adds are to be added or named."""
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
    there = {name for name in vars(diffusers.guiders) if name.endswith("Guidance")}
    left = there - set(fast.guiders._GUIDERS) - {"BaseGuidance"}
    assert left
    assert not [name for name in left if f"`{name}`" not in page]
    assert not [name for name in fast.guiders._GUIDERS if f"`{name}`" not in page]


def test_a_guider_without_counterpart_is_named():
    with pytest.raises(ValueError, match="ClassifierFreeZeroStarGuidance has no counterpart"):
        fast.convert(diffusers.ClassifierFreeZeroStarGuidance())
