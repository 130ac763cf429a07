"""Three tiny trained models of 16x16 handwritten digits, to try samplers and kernels on.

digits-diffusion    model(x, t, cond) -> v; label 10 is unconditional
digits-vae          encode(x) -> mean, logvar; decode(z) -> x
digits-dcgan        model(z) -> x

`examples/train_digits_*.py` made the weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastgen.zoo import networks

__all__ = ["card", "load", "names"]

_NETWORKS: dict[str, type[nn.Module]] = {
    "digits-diffusion": networks.UNet,
    "digits-vae": networks.VAE,
    "digits-dcgan": networks.Generator,
}
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The models that `load` knows."""
    return list(_NETWORKS)


def load(name: str, device: torch.device | str | None = None) -> nn.Module:
    """The trained model in eval mode, float32, without gradients to its parameters.

    ValueError: the name is unknown, or its weight file is damaged or another model's.
    """
    from fastgen.zoo import weights  # needs safetensors, which the names do not

    path = _path(name)
    model = _NETWORKS[name]()
    weights.read(path, model)
    return model.to(device).eval().requires_grad_(False)


def card(name: str) -> str:
    """One line on a model: what it is, its data, size, training and measured quality."""
    from fastgen.zoo import weights

    return weights.card(_path(name))


def _path(name: str) -> Path:
    """Where the weights of a known model lie."""
    if name not in _NETWORKS:
        raise ValueError(f"name: no model is called {name!r}; known are {', '.join(names())}")
    return _FOLDER / f"{name}.safetensors"
