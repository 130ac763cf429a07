"""diffusers' pipelines before and after ``convert``, with small random networks."""

from __future__ import annotations

import functools
import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed, which pipelines need")
from fastgen.integrations import diffusers as fast  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # diffusers', of NumPy's
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers', of its configurations
]
STEPS = 6
LATENT = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
NETWORKS = {
    "pixels": lambda: diffusers.UNet2DModel(
        sample_size=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **LATENT,
    ),
    "latents": lambda channels=4: diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=channels, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **LATENT,
    ),
    "vae": lambda: diffusers.AutoencoderKL(
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=1.0, shift_factor=0.0, **LATENT,
    ),
    "dit": lambda: diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, norm_num_groups=4,
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
        pooled_projection_dim=16, pos_embed_max_size=16,
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ),
}  # fmt: skip


@functools.cache
def network(name, *arguments):
    torch.manual_seed(0)
    return NETWORKS[name](*arguments).eval()


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stable_diffusion(kind, scheduler, channels=4):
    return getattr(diffusers, kind)(
        vae=network("vae"), text_encoder=None, tokenizer=None, scheduler=scheduler,
        unet=network("latents", channels), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def flow(kind, **modules):
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
             "tokenizer_3")[: 6 if kind == "StableDiffusion3Pipeline" else 4]  # fmt: skip
    return getattr(diffusers, kind)(vae=network("vae"), **dict.fromkeys(names), **modules)


def prompts(batch):
    """Of every image its own, and of none."""
    return {"prompt_embeds": normal(2, 5, 16)[:batch],
            "negative_prompt_embeds": normal(2, 5, 16, seed=2)[:batch]}  # fmt: skip


def pooled(batch):
    return {"pooled_prompt_embeds": normal(2, 16, seed=3)[:batch]}


def picture(batch):
    return {"image": normal(2, 3, 16, 16, seed=4).sigmoid()[:batch], "strength": 0.8}


def mask(batch):
    return {"mask_image": (normal(2, 1, 16, 16, seed=5) > 0).float()[:batch]}


SIZE = {"height": 16, "width": 16}
# A pipeline's scheduler to it, and the size of a batch to the arguments of its call.
PIPELINES = {
    "DDPMPipeline": (
        lambda made: diffusers.DDPMPipeline(network("pixels"), made),
        lambda batch: {"batch_size": batch},
    ),
    "DDIMPipeline": (
        lambda made: diffusers.DDIMPipeline(network("pixels"), made),
        lambda batch: {"batch_size": batch, "eta": 0.7},
    ),
    "ConsistencyModelPipeline": (
        lambda made: diffusers.ConsistencyModelPipeline(network("pixels"), made),
        lambda batch: {"batch_size": batch},
    ),
    "DiTPipeline": (
        lambda made: diffusers.DiTPipeline(network("dit"), network("vae"), made),
        lambda batch: {"class_labels": [1, 2][:batch], "guidance_scale": 3.0},
    ),
    "StableDiffusionPipeline": (
        lambda made: stable_diffusion("StableDiffusionPipeline", made),
        lambda batch: prompts(batch) | SIZE | {"eta": 0.7},
    ),
    "StableDiffusionImg2ImgPipeline": (
        lambda made: stable_diffusion("StableDiffusionImg2ImgPipeline", made),
        lambda batch: prompts(batch) | picture(batch),
    ),
    "StableDiffusionInpaintPipeline": (
        lambda made: stable_diffusion("StableDiffusionInpaintPipeline", made, 9),
        lambda batch: prompts(batch) | picture(batch) | mask(batch) | SIZE,
    ),
    "StableDiffusion3Pipeline": (
        lambda made: flow("StableDiffusion3Pipeline", transformer=network("sd3"), scheduler=made),
        lambda batch: prompts(batch) | pooled(batch) | SIZE
        | {"negative_pooled_prompt_embeds": normal(2, 16, seed=6)[:batch]},
    ),
    "FluxPipeline": (
        lambda made: flow("FluxPipeline", transformer=network("flux"), scheduler=made),
        lambda batch: {"prompt_embeds": prompts(batch)["prompt_embeds"]} | pooled(batch) | SIZE,
    ),
}  # fmt: skip
LDM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
       "steps_offset": 1}  # fmt: skip
DDIM = ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, **LDM})
PNDM = ("PNDMScheduler", {"skip_prk_steps": True, **LDM})
DPM = ("DPMSolverMultistepScheduler", LDM)
SDE = ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **LDM})
ANCESTRAL = ("EulerAncestralDiscreteScheduler", LDM)
FLOW = ("FlowMatchEulerDiscreteScheduler", {})
CASES = [
    ("DDPMPipeline", "DDPMScheduler", {}),
    ("DDPMPipeline", "DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("DDIMPipeline", "DDIMScheduler", {}),
    ("DDIMPipeline", "DDPMScheduler", {}),
    ("ConsistencyModelPipeline", "CMStochasticIterativeScheduler", {}),
    ("DiTPipeline", *DDIM),
    ("DiTPipeline", *DPM),
    ("StableDiffusionPipeline", *DDIM),
    ("StableDiffusionPipeline", *PNDM),
    ("StableDiffusionPipeline", *DPM),
    ("StableDiffusionPipeline", *SDE),
    ("StableDiffusionPipeline", *ANCESTRAL),
    ("StableDiffusionPipeline", "EulerDiscreteScheduler", {"use_karras_sigmas": True, **LDM}),
    ("StableDiffusionPipeline", "HeunDiscreteScheduler", LDM),
    ("StableDiffusionPipeline", "UniPCMultistepScheduler", LDM),
    ("StableDiffusionPipeline", "LCMScheduler", LDM),
    ("StableDiffusionPipeline", "TCDScheduler", LDM),
    ("StableDiffusionPipeline", "DEISMultistepScheduler", LDM),
    ("StableDiffusionPipeline", "SASolverScheduler", LDM),
    ("StableDiffusionPipeline", "DPMSolverSinglestepScheduler", {}),
    ("StableDiffusionPipeline", "KDPM2AncestralDiscreteScheduler", LDM),
    ("StableDiffusionImg2ImgPipeline", *DDIM),
    ("StableDiffusionImg2ImgPipeline", *PNDM),
    ("StableDiffusionImg2ImgPipeline", *DPM),
    ("StableDiffusionImg2ImgPipeline", *ANCESTRAL),
    ("StableDiffusionInpaintPipeline", *DDIM),
    ("StableDiffusionInpaintPipeline", *DPM),
    ("StableDiffusionInpaintPipeline", *ANCESTRAL),
    ("StableDiffusion3Pipeline", *FLOW),
    ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("StableDiffusion3Pipeline", "FlowMatchHeunDiscreteScheduler", {}),
    ("StableDiffusion3Pipeline", "FlowMatchLCMScheduler", {}),
    ("FluxPipeline", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
]
DRAWING = [  # noise in their steps
    CASES[0],
    CASES[2],
    ("StableDiffusionPipeline", *DDIM),
    ("StableDiffusionPipeline", *SDE),
    ("StableDiffusionImg2ImgPipeline", *ANCESTRAL),
    ("StableDiffusionInpaintPipeline", *ANCESTRAL),
]
CLOSE = 1e-4  # of values up to 1, as float32's own errors along a run go
APART = 50 * CLOSE


def build(kind, scheduler, config):
    """A pipeline with diffusers' own scheduler, made from its whole configuration."""
    pipe = PIPELINES[kind][0](getattr(diffusers, scheduler)(**config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, seeds=(7, 8), steps=STEPS):
    """(B, height, width, 3) in [0, 1], of a generator each."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    torch.manual_seed(0)  # of steps that a pipeline gives no generator
    arguments = PIPELINES[type(pipe).__name__][1](len(seeds))
    made = pipe(num_inference_steps=steps, generator=generators, output_type="np", **arguments)
    return torch.as_tensor(made.images)


def difference(a, b):
    return float((a - b).abs().max())


def is_picture(image):
    """No constant, and most of it within the bounds that it is clipped to."""
    within = (image > 0) & (image < 1)
    return float(image.std()) > 0.1 and float(within.float().mean()) > 0.5


def named(value):
    if not isinstance(value, dict):
        return value
    return ",".join(f"{key}={value[key]}" for key in value if key not in LDM)


@pytest.mark.parametrize(("kind", "scheduler", "config"), CASES, ids=named)
def test_a_seed_gives_the_pipelines_image(kind, scheduler, config):
    pipe = build(kind, scheduler, config)
    theirs = type(pipe.scheduler)
    expected, wrong = images(pipe), images(pipe, steps=STEPS - 1)
    assert is_picture(expected)
    assert fast.convert(pipe) is pipe
    assert type(pipe.scheduler) is getattr(fast, theirs.__name__)
    assert difference(images(pipe), expected) <= CLOSE
    assert difference(wrong, expected) > APART


@pytest.mark.parametrize(("kind", "scheduler", "config"), CASES, ids=named)
def test_an_image_does_not_depend_on_its_neighbours(kind, scheduler, config):
    """But for the rounding of networks, which the size of a batch changes."""
    pipe = fast.convert(build(kind, scheduler, config), noise="fastgen")
    both, other, alone = (images(pipe, seeds) for seeds in ((7, 8), (7, 9), (7,)))
    assert is_picture(both)
    for image in (other[0], alone[0]):
        assert difference(image, both[0]) <= CLOSE
    assert difference(other[1], both[1]) > APART


@pytest.mark.parametrize(("kind", "scheduler", "config"), DRAWING, ids=named)
def test_the_noise_of_the_kernel_is_another(kind, scheduler, config):
    pipe = build(kind, scheduler, config)
    theirs = images(pipe)
    ours = images(fast.convert(pipe, noise="fastgen"))
    assert is_picture(ours)
    assert difference(ours, theirs) > APART


@pytest.mark.parametrize(
    ("kind", "scheduler", "config"),
    [
        ("DDIMPipeline", "DDIMScheduler", {}),
        ("StableDiffusionPipeline", *DPM),
        ("StableDiffusion3Pipeline", *FLOW),
    ],
    ids=named,
)
def test_a_saved_pipeline_is_diffusers(kind, scheduler, config, tmp_path):
    pipe = fast.convert(build(kind, scheduler, config))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == kind
    assert index["scheduler"] == ["diffusers", scheduler]
    absent = [name for name, module in pipe.components.items() if module is None]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is getattr(diffusers, scheduler)
    assert difference(images(loaded), images(pipe)) <= CLOSE


def test_ddims_pipeline_makes_its_scheduler_anew():
    given = fast.convert(diffusers.DDIMScheduler())
    made = diffusers.DDIMPipeline(network("pixels"), given)
    assert type(made.scheduler) is diffusers.DDIMScheduler
    assert type(fast.convert(made).scheduler) is fast.DDIMScheduler
    assert diffusers.DDPMPipeline(network("pixels"), given).scheduler is given


def test_the_guider_of_a_modular_pipeline(tmp_path):
    from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

    def latents(scheduler, guider):
        pipe = StableDiffusion3DenoiseStep().init_pipeline()
        pipe.update_components(transformer=network("sd3"), scheduler=scheduler, guider=guider)
        scheduler.set_timesteps(STEPS)
        given = prompts(2) | pooled(2) | {"latents": normal(2, 4, 8, 8)}
        given["negative_pooled_prompt_embeds"] = normal(2, 16, seed=6)
        return pipe, pipe(timesteps=scheduler.timesteps, num_inference_steps=STEPS,
                          output="latents", **given)  # fmt: skip

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    guider = diffusers.ClassifierFreeGuidance(4.0, guidance_rescale=0.5, start=0.2)
    _, expected = latents(scheduler, guider)
    _, wrong = latents(scheduler, guider.new(guidance_rescale=0.4))
    pipe, actual = latents(fast.convert(scheduler), fast.convert(guider))
    assert type(pipe.guider) is fast.ClassifierFreeGuidance
    assert difference(actual, expected) <= CLOSE * float(expected.abs().max())
    assert difference(wrong, expected) > APART
    pipe.save_pretrained(str(tmp_path))
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert index["scheduler"][:2] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert type(pipe.guider).__module__.startswith("diffusers.")  # which is where it is looked for
