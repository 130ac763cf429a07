"""The latents of diffusers' autoencoders: drawn in one pass over the moments."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.autoencoders import vae
from torch import Tensor

from ... import checks
from ...ops.reparameterize import gaussian_kl, reparameterize
from .base import NOISES, _seeds, randn_tensor

_CLAMP = (-30.0, 20.0)  # diffusers', of the log-variance


class DiagonalGaussianDistribution(vae.DiagonalGaussianDistribution):
    """diffusers' posterior of the same name, with ``sample`` and ``kl`` a kernel each.

    parameters: (B, 2 C, ...), the mean and then the log-variance; both are read in place.
    deterministic: a deviation of zero.
    noise: "torch" draws as diffusers does, so that a seed gives the latents that it gave before;
        "fastgen" makes the noise in the kernel (stream 3 of the noise contract), from seeds that
        are drawn from the generators: with a list of them a latent does not depend on its batch.

    ``logvar`` (clamped to [-30, 20]), ``std`` and ``var`` are made where they are asked for.
    """

    def __init__(
        self, parameters: Tensor, deterministic: bool = False, *, noise: str = "torch"
    ) -> None:
        self._noise = checks.one_of("noise", noise, NOISES)
        self.parameters = parameters
        self.mean, self._logvar = parameters.chunk(2, dim=1)
        self.deterministic = deterministic

    @classmethod
    def of(cls, posterior: Any, *, noise: str = "torch") -> DiagonalGaussianDistribution:
        """diffusers' own posterior, as ``vae.encode(x).latent_dist`` is, as one of these."""
        return cls(posterior.parameters, posterior.deterministic, noise=noise)

    @functools.cached_property
    def logvar(self) -> Tensor:
        return self._logvar.clamp(*_CLAMP)

    @functools.cached_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else (0.5 * self.logvar).exp()

    @functools.cached_property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(self, generator: Any = None, *, return_kl: bool = False) -> Any:
        """z = mean + exp(logvar / 2) eps, (B, C, ...) in the moments' dtype, rounded once.

        generator: one, a list of one for each sample, or torch's own.
        return_kl: also the divergence from N(0, 1) from the same pass, in nats, summed over each
            sample: (B,), float32 (float64 for float64 moments).
        """
        if self.deterministic:
            if self._noise == "torch":
                self._source(generator)  # the generator is left as diffusers leaves it
            return (self.mean.clone(), self.kl()) if return_kl else self.mean.clone()
        return reparameterize(self.mean, self._logvar, clamp=_CLAMP, return_kl=return_kl,
                              **self._source(generator))  # fmt: skip

    def _source(self, generator: Any) -> dict[str, Any]:
        """Where eps comes from, as ``reparameterize`` takes it."""
        mean = self.mean
        if self._noise == "torch":
            return {"noise": randn_tensor(mean.shape, generator=generator, device=mean.device,
                                          dtype=mean.dtype)}  # fmt: skip
        seed, ids = _seeds(generator, mean)
        return {"seed": seed[0] if isinstance(seed, tuple) else seed, "step": 0,
                "sample_ids": ids if isinstance(ids, Tensor) else None}  # fmt: skip

    def kl(self, other: Any = None) -> Tensor:
        """As diffusers', in nats; of images from N(0, 1) it is summed in float32, and rounded to
        the moments' dtype."""
        if self.deterministic or other is not None or self.mean.ndim != 4:
            return super().kl(other)
        return gaussian_kl(self.mean, self._logvar, clamp=_CLAMP).to(self.mean.dtype)


def convert(autoencoder: Any, *, noise: str | None = None) -> Any:
    """An autoencoder of the same modules, parameters and configuration, which are shared, whose
    ``encode`` gives such posteriors; what ``encode`` gives in another form is left as it is. A
    pipeline saved with one records diffusers' class.

    Raises ValueError for a noise that is neither "torch" nor "fastgen".
    """
    theirs = getattr(autoencoder, "_theirs", type(autoencoder))
    noise = getattr(autoencoder, "_noise", "torch") if noise is None else noise
    made = _revived(theirs)
    vars(made).update(vars(autoencoder), _noise=checks.one_of("noise", noise, NOISES))
    return made


def _revived(theirs: Any) -> Any:
    return _class_of(theirs).__new__(_class_of(theirs))


@functools.cache
def _class_of(theirs: Any) -> Any:
    """diffusers' class with an ``encode`` whose posteriors are drawn here, under its name."""

    @functools.wraps(theirs.encode)
    def encode(self, *args, **kwargs):
        output = theirs.encode(self, *args, **kwargs)
        if isinstance(output, tuple):
            return tuple(_drawn(part, self._noise) for part in output)
        if hasattr(output, "latent_dist"):
            output.latent_dist = _drawn(output.latent_dist, self._noise)
        return output

    def __reduce__(self):
        return _revived, (theirs,), vars(self)

    names = ("__module__", "__qualname__", "__doc__")
    return type(theirs.__name__, (theirs,), {name: getattr(theirs, name) for name in names} | {
        "_theirs": theirs, "_noise": "torch", "encode": encode, "__reduce__": __reduce__,
    })  # fmt: skip


def _drawn(given: Any, noise: str) -> Any:
    if type(given) is not vae.DiagonalGaussianDistribution:
        return given
    return DiagonalGaussianDistribution.of(given, noise=noise)
