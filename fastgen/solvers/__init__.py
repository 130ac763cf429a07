"""Solvers: from noise levels to a ``Plan``. Pure functions, float64, on the host."""

from .consistency import consistency, lcm, tcd
from .ddim import ddim
from .ddpm import ddpm
from .dpm import (
    dpm_multistep,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    dpmpp_multistep,
    res_multistep,
)
from .euler import dpm2, euler, euler_ancestral, gradient_estimation, heun
from .multistep import deis, ipndm, lms, pndm
from .repaint import repaint
from .sa import sa_solver
from .sde import er_sde, score_sde_ve, score_sde_vp
from .singlestep import (
    dpm_singlestep,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    res_singlestep,
    seeds_2,
    seeds_3,
)
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
    "er_sde",
    "euler",
    "euler_ancestral",
    "gradient_estimation",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "pndm",
    "repaint",
    "res_multistep",
    "res_singlestep",
    "sa_solver",
    "score_sde_ve",
    "score_sde_vp",
    "seeds_2",
    "seeds_3",
    "tcd",
    "unipc",
]
