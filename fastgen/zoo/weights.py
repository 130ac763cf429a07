"""Weight files: safetensors, with the model's card and a digest of the tensors as metadata.

Matrices and kernels are stored as float16; vectors and counts, which are small, as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor, nn

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save
except ImportError:
    raise ImportError(
        "fastgen.zoo: needs safetensors (pip install fastgen-samplers[cli])"
    ) from None


def write(path: Path, model: nn.Module, card: str) -> None:
    """Store the model's parameters and buffers, and its card, at path."""
    state = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    path.write_bytes(save(state, {"card": card, "sha256": _digest(state)}))


def read(path: Path, model: nn.Module) -> None:
    """Fill the model from path. ValueError if the file is damaged or is not this model's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            state = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name, _ in expected.items() ^ found.items())
    if wrong:
        raise ValueError(
            f"{path} holds other tensors than {type(model).__name__}: "
            f"missing, unknown or of another shape: {', '.join(dict.fromkeys(wrong))}"
        )
    if metadata.get("sha256") != _digest(state):
        raise ValueError(f"{path} is damaged: its tensors do not have the digest stored with them")
    model.load_state_dict(state)


def card(path: Path) -> str:
    """The card stored at path."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {})["card"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged or holds no card: {error}") from error


def _digest(state: dict[str, Tensor]) -> str:
    """sha256 over the bytes of the tensors, by name."""
    sha256 = hashlib.sha256()
    for _, tensor in sorted(state.items()):
        sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()
