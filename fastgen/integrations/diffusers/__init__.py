"""diffusers' schedulers by their own names, a kernel a step.

    from fastgen.integrations import diffusers as fast
    pipe.scheduler = fast.convert(pipe.scheduler)             # or fast.convert(pipe)
    pipe.scheduler = fast.DDIMScheduler.from_config(pipe.scheduler.config)

Each class is a subclass of diffusers' own: configuration, timesteps, sigmas, ``add_noise``, loading
and saving are diffusers', and a pipeline saved with one records diffusers' class. The arithmetic of
``step`` alone is replaced, by one row of a plan: float64 on the host from diffusers' float32
levels, then one kernel. What a row cannot hold (timesteps off the grid, per-token timesteps) is
left to diffusers' own ``step``.

noise: "torch" (the default) draws as diffusers does, from the generator or the global one, so that
a seed gives the image that it gave before; "fastgen" makes the noise in the kernel, a function of
(seed, sample, step, element): the seeds are drawn from the generators at a run's first step, and
with a list of generators an image's noise does not depend on its batch.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils import is_torchsde_available

from . import guiders
from .base import _CLASSES, diffusers, logger
from .by_sigma import (
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from .by_timestep import (
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    ScoreSdeVeScheduler,
)
from .ddpm import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    RePaintScheduler,
    UnCLIPScheduler,
)
from .dpm import (
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
)
from .few_step import (
    CMStochasticIterativeScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from .guiders import (
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from .multistep import (
    DEISMultistepScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from .video import CogVideoXDDIMScheduler, CogVideoXDPMScheduler


def convert(x: Any, *, noise: str | None = None, compat: str | None = None) -> Any:
    """A scheduler's or a guider's counterpart here with its configuration; or a pipeline, whose
    scheduler is swapped, itself; or an autoencoder of the same modules whose ``encode`` gives this
    package's ``DiagonalGaussianDistribution``. noise, compat (of schedulers alone): as for
    ``from_config``; what is converted again keeps them. What was done to a scheduler is logged
    ("fastgen", INFO).

    Raises ValueError for a scheduler or guider that has none, with the names of those that have,
    and for an option that is not of what is given; TypeError for what is none of these.
    """
    if isinstance(x, torch.nn.Module) and hasattr(x, "encode"):
        from . import autoencoders

        _refuse("an autoencoder", compat=compat)
        return autoencoders.convert(x, noise=noise)
    if isinstance(x, diffusers.BaseGuidance):
        _refuse("a guider", noise=noise, compat=compat)
        return guiders.convert(x)
    if not isinstance(x, diffusers.SchedulerMixin):
        if not hasattr(x, "scheduler"):
            raise TypeError(
                f"x: got {type(x).__name__}, expected a scheduler, a pipeline, an autoencoder "
                "or a guider"
            )
        x.scheduler = convert(x.scheduler, noise=noise, compat=compat)
        return x
    name = type(x).__name__
    if name not in _CLASSES:
        names = ", ".join(sorted(known.removesuffix("Scheduler") for known in _CLASSES))
        raise ValueError(f"x: {name} has no counterpart here; these schedulers have: {names}")
    noise = getattr(x, "_noise", "torch") if noise is None else noise
    compat = getattr(x, "_compat", "") if compat is None else compat
    made = _CLASSES[name].from_config(x.config, noise=noise, compat=compat)
    logger.info("%s: step is fastgen's, with noise from %s", name, noise)
    return made


def _refuse(what: str, **options: str | None) -> None:
    for name, given in options.items():
        if given is not None:
            raise ValueError(f"{name}: got {given!r}, which {what} does not take")


__all__ = [
    "AutoGuidance",
    "CMStochasticIterativeScheduler",
    "ClassifierFreeGuidance",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "PerturbedAttentionGuidance",
    "RePaintScheduler",
    "SASolverScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "SkipLayerGuidance",
    "SmoothedEnergyGuidance",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
    "convert",
]

if is_torchsde_available():
    from .sde import CosineDPMSolverMultistepScheduler, DPMSolverSDEScheduler

    __all__ += ["CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"]

if hasattr(guiders, "LTX2Guidance"):
    from .guiders import LTX2Guidance

    __all__ += ["LTX2Guidance"]


def __getattr__(name: str) -> Any:
    """What asks for a module of diffusers that takes long to import."""
    if name != "DiagonalGaussianDistribution":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .autoencoders import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution
