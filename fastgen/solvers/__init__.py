"""Solvers: from a noise schedule to a ``Plan``. Pure functions, float64, on the host."""

from .ddim import ddim
from .ddpm import ddpm
from .dpm import dpmpp_2m

__all__ = ["ddim", "ddpm", "dpmpp_2m"]
