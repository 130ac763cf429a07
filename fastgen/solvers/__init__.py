"""Solvers: from noise levels to a ``Plan``. Pure functions, float64, on the host."""

from .consistency import consistency, lcm, tcd
from .ddim import ddim
from .ddpm import ddpm
from .dpm import (
    dpm_multistep,
    dpm_singlestep,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_multistep,
    dpmpp_sde,
)
from .euler import dpm2, euler, euler_ancestral, gradient_estimation, heun
from .multistep import deis, ipndm, lms, pndm
from .sa import sa_solver
from .unipc import unipc

__all__ = [
    "consistency",
    "ddim",
    "ddpm",
    "deis",
    "dpm2",
    "dpm_multistep",
    "dpm_singlestep",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_multistep",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "gradient_estimation",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "pndm",
    "sa_solver",
    "tcd",
    "unipc",
]
