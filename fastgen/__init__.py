"""fastgen: native-accelerated samplers for generative models."""

import importlib
from importlib.metadata import PackageNotFoundError, version

from . import sigmas, solvers
from .backends import info
from .levels import NoiseLevels, denoiser_levels, edm_levels, flow_levels
from .loop import Loop
from .ops.brownian import brownian
from .ops.conv_transpose import conv_transpose1d, conv_transpose2d, conv_transpose3d
from .ops.forward import add_noise
from .ops.guidance import cfg_combine, combine
from .ops.noise import philox4x32, randn
from .ops.reparameterize import gaussian_kl, gaussian_kl_monte_carlo, reparameterize
from .ops.step import ddim_step, ddpm_step, step
from .plan import Output, Plan, Row, Threshold, stack_rows
from .sampling import sample
from .schedules import NoiseSchedule

try:
    __version__ = version("fastgen-samplers")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0"

__all__ = [
    "Loop",
    "NoiseLevels",
    "NoiseSchedule",
    "Output",
    "Plan",
    "Row",
    "Threshold",
    "add_noise",
    "brownian",
    "cfg_combine",
    "combine",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "ddim_step",
    "ddpm_step",
    "denoiser_levels",
    "edm_levels",
    "explain",
    "flow_levels",
    "fuse",
    "gaussian_kl",
    "gaussian_kl_monte_carlo",
    "info",
    "nn",
    "philox4x32",
    "randn",
    "reparameterize",
    "sample",
    "sigmas",
    "solvers",
    "stack_rows",
    "step",
    "testing",
    "zoo",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str):
    if name in ("nn", "testing", "zoo"):  # not needed for sampling
        return importlib.import_module(f"fastgen.{name}")
    if name in ("explain", "fuse"):
        return getattr(importlib.import_module("fastgen.fusing"), name)
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
