"""diffusers' guiders by their own names, their combination a kernel.

Each is a subclass of diffusers' own: configuration, loading and saving, when a term is on, and what
is run for it are diffusers'. The combination is

    cond + sum weight (cond - other)

with the rescale of Lin et al. (2024), eq. 15 and 16. Predictions that differ in shape or dtype,
float64, and a rescale above 1 are left to diffusers' own ``forward``.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor

from ...cache import cached_constant
from ...ops.guidance import cfg_combine
from ...ops.step import step
from ...plan import Output, Row

_GUIDERS: dict[str, Any] = {}
_Terms = list[tuple[Tensor | None, float]]  # what is guided away from, and its weight


class _Guided:
    guidance_scale: float
    guidance_rescale: float
    use_original_formulation = True  # the first term's weight is its scale, less one where not

    def _guided(self, cond: Tensor, terms: _Terms) -> Tensor | None:
        """The prediction; None where it is left to diffusers."""
        if not terms:
            return cond
        rescale = max(self.guidance_rescale, 0.0)
        alike = all(
            isinstance(other, Tensor) and other.shape == cond.shape and other.dtype == cond.dtype
            for other, _ in terms
        )
        if rescale > 1.0 or not alike or cond.dtype is torch.float64:
            return None
        (other, weight), *further = terms
        scale = weight + 1.0 if self.use_original_formulation else weight
        if not further:
            return cfg_combine(cond, other, scale, rescale=rescale)  # type: ignore[arg-type]
        (known, _), *history = further
        guided = step(
            _added(tuple(weight for _, weight in further)), cond, cond, uncond=other,
            guidance_scale=scale, known=known, history=[tensor for tensor, _ in history],
        )  # fmt: skip
        assert isinstance(guided, Tensor)
        return cfg_combine(cond, guided, 0.0, rescale=rescale) if rescale else guided

    def __reduce__(self) -> Any:
        return _revived, (type(self).__name__,), vars(self)


@cached_constant
def _added(weights: tuple[float, ...]) -> Row:
    """e + sum weight (x - other) of the terms after the first, which is e's own."""
    of_others = dict(zip(("known", "h0"), (-weight for weight in weights), strict=False))
    return Row((Output({"e": 1.0, "x": sum(weights), **of_others}),))


def _revived(name: str) -> Any:
    return _GUIDERS[name].__new__(_GUIDERS[name])


def _register(cls: Any) -> Any:
    """The class under diffusers' name, with its signature."""
    base: Any = cls.__bases__[-1]
    theirs = base.forward

    @functools.wraps(theirs)
    def forward(self, pred_cond, pred_uncond=None, *others, **named):
        pred = self._guided(pred_cond, self._terms(pred_uncond, *others, **named))
        if pred is None:
            return theirs(self, pred_cond, pred_uncond, *others, **named)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    cls.forward = forward
    cls.__doc__ = f"diffusers' {base.__name__}, its combination a kernel."
    cls.__name__ = cls.__qualname__ = base.__name__
    cls.__module__ = base.__module__  # what a saved pipeline records
    _GUIDERS[cls.__name__] = cls
    return cls


@_register
class ClassifierFreeGuidance(_Guided, diffusers.ClassifierFreeGuidance):
    def _terms(self, uncond: Tensor | None) -> _Terms:
        return [(uncond, self.guidance_scale)] if self._is_cfg_enabled() else []


@_register
class AutoGuidance(_Guided, diffusers.AutoGuidance):
    def _terms(self, uncond: Tensor | None) -> _Terms:
        return [(uncond, self.guidance_scale)] if self._is_ag_enabled() else []


class _Skipping(_Guided):
    def _terms(self, uncond: Tensor | None, pred_cond_skip: Tensor | None = None) -> _Terms:
        guided: Any = self
        terms: _Terms = []
        if guided._is_cfg_enabled():
            terms.append((uncond, self.guidance_scale))
        if guided._is_slg_enabled():
            terms.append((pred_cond_skip, guided.skip_layer_guidance_scale))
        return terms


@_register
class SkipLayerGuidance(_Skipping, diffusers.SkipLayerGuidance):
    pass


@_register
class PerturbedAttentionGuidance(_Skipping, diffusers.PerturbedAttentionGuidance):
    pass


@_register
class SmoothedEnergyGuidance(_Guided, diffusers.SmoothedEnergyGuidance):
    def _terms(self, uncond: Tensor | None, pred_cond_seg: Tensor | None = None) -> _Terms:
        terms: _Terms = []
        if self._is_cfg_enabled():
            terms.append((uncond, self.guidance_scale))
        if self._is_seg_enabled():
            terms.append((pred_cond_seg, self.seg_guidance_scale))
        return terms


if hasattr(diffusers, "LTX2Guidance"):  # newer than 0.38

    @_register
    class LTX2Guidance(_Guided, diffusers.LTX2Guidance):
        def _terms(
            self, uncond: Tensor | None, pred_cond_stg: Tensor | None = None,
            pred_cond_modality: Tensor | None = None,
        ) -> _Terms:  # fmt: skip
            terms: _Terms = []
            if self.is_cfg_enabled():
                terms.append((uncond, self.guidance_scale - 1.0))
            if self.is_stg_enabled():
                terms.append((pred_cond_stg, self.stg_scale))
            if self.is_modality_enabled():
                terms.append((pred_cond_modality, self.modality_scale - 1.0))
            return terms


def convert(guider: BaseGuidance) -> Any:
    """A guider's counterpart here, with its configuration and state.

    Raises ValueError for one that has none, with the names of those that have.
    """
    name = type(guider).__name__
    if name not in _GUIDERS:
        raise ValueError(f"x: {name} has no counterpart here; these have: {', '.join(_GUIDERS)}")
    made = _revived(name)
    vars(made).update(vars(guider))
    return made
