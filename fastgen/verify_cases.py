"""The random cases of ``fastgen verify``: how each op is run, and where its arguments come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import fastgen

from .plan import INPUTS, Output, Row, stack_rows
from .reference.conv_transpose import ACTIVATIONS
from .testing import DTYPES, layouts, shapes

Make = Callable[..., Tensor]  # (shape, dtype, layout, seed) -> a tensor where the op is to run


@dataclass(frozen=True)
class Op:
    """How an op is run on a case, and where cases are drawn from.

    run: (make, backend, **case) to the results. options: a strategy for each name of a case but
    ``dtype`` and ``seed``, which every case has. exact: whether the bits are promised; if not,
    the error is at most twice that of ``run`` with backend "eager", PyTorch's own operators.
    """

    run: Callable[..., Any]
    options: Mapping[str, st.SearchStrategy]
    exact: bool = True

    def cases(self, dtypes: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[dict[str, Any]]:
        names = [name_of(dtype) for dtype in dtypes]
        return st.fixed_dictionaries(
            {"dtype": st.sampled_from(names), **self.options, "seed": st.integers(0, 1000)}
        )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _randn(make, backend, *, dtype, shape, seed, step, stream):
    device = make((1,), dtype, "contiguous", 0).device
    return fastgen.randn(shape, seed=2**64 - 1 - seed, step=step, stream=stream, device=device,
                         dtype=getattr(torch, dtype), backend=backend)  # fmt: skip


def _reparameterize(make, backend, *, dtype, other, shape, layout, second, clamp, kl, seed):
    mean, logvar = make(shape, dtype, layout, seed), make(shape, other, second, seed + 1)
    return fastgen.reparameterize(mean, logvar, seed=seed, step=seed, return_kl=kl, clamp=clamp,
                                  backend=backend)  # fmt: skip


def _gaussian_kl(make, backend, *, dtype, other, shape, layout, second, seed):
    mean, logvar = make(shape, dtype, layout, seed), make(shape, other, second, seed + 1)
    return fastgen.gaussian_kl(mean, logvar, backend=backend)


def _cfg_combine(make, backend, *, dtype, other, shape, layout, second, guidance, each, rescale,
                 seed):  # fmt: skip
    cond, uncond = make(shape, dtype, layout, seed), make(shape, other, second, seed + 1)
    scale = [guidance + i for i in range(shape[0])] if each else guidance
    return fastgen.cfg_combine(cond, uncond, scale, rescale=rescale, backend=backend)


def _combine(make, backend, *, dtype, other, shape, layout, weights, seed):
    kinds = [dtype, other]
    terms = [make(shape, kinds[i % 2], layout if i % 2 else "contiguous", seed + i)
             for i in range(len(weights))]  # fmt: skip
    return fastgen.combine(terms, weights, backend=backend)


def _add_noise(make, backend, *, dtype, shape, layout, each, noise, velocity, seed):
    x0 = make(shape, dtype, layout, seed)
    level = torch.linspace(0, 1, shape[0], dtype=torch.float64, device=x0.device) if each else 0.37
    return fastgen.add_noise(x0, level, seed=seed, step=3, return_noise=noise,
                             return_velocity=velocity, backend=backend)  # fmt: skip


def _step_operands(make, dtype, other, shape, layout, second, guided, seed):
    x, e = make(shape, dtype, layout, seed), make(shape, other, second, seed + 1)
    u = make(shape, other, layout, seed + 2) if guided else None
    return x, e, {"uncond": u, "guidance_scale": 3.0 if guided else 1.0}


def _ddpm_step(make, backend, *, dtype, other, shape, layout, second, guided, prediction, clip,
               levels, variance, given_noise, seed):  # fmt: skip
    x, e, guidance = _step_operands(make, dtype, other, shape, layout, second, guided, seed)
    a_t, a_s = levels
    if variance == "learned":
        variance = make(shape, other, second, seed + 3)
    source = {"noise": make(shape, other, layout, seed + 4)} if given_noise else {
        "seed": seed, "step": 5}  # fmt: skip
    return fastgen.ddpm_step(x, e, a_t, a_s, **guidance, prediction=prediction, clip=clip,
                             variance=variance, backend=backend, **source)  # fmt: skip


def _ddim_step(make, backend, *, dtype, other, shape, layout, second, guided, prediction, clip,
               levels, eta, clipped, seed):  # fmt: skip
    x, e, guidance = _step_operands(make, dtype, other, shape, layout, second, guided, seed)
    a_t, a_s = levels
    eta = eta if a_t < a_s else 0.0
    return fastgen.ddim_step(x, e, a_t, a_s, **guidance, prediction=prediction, clip=clip, eta=eta,
                             use_clipped_model_output=clipped, seed=seed, step=2,
                             backend=backend)  # fmt: skip


def any_row(index: int) -> Row:
    """Rows that together use every input, several outputs and several normals."""
    outputs = []
    for j in range(1 + index % 4):
        weights = {n: 0.1 * (k - j + index % 7) for k, n in enumerate(INPUTS)
                   if (k + j + index) % 3}  # fmt: skip
        noise = tuple(0.3 * m - 0.2 * j for m in range((index + j) % 5))
        outputs.append(Output(weights, noise, target="x" if j == 0 else j))
    return Row(
        tuple(outputs),
        denoised=(1.1, -0.4 * (index % 3)),
        clip=(-0.7, 0.9) if index % 2 else None,
        logvar=(0.5, -0.25),
    )


def _step(make, backend, *, dtype, other, shape, layout, second, index, rows, learned, seed):
    kinds, placed = [dtype, other], [layout, second, "contiguous"]
    tensors = [make(shape, kinds[i % 2], placed[i % 3], seed + i) for i in range(12)]
    x, e, u, known, logvar, *history = tensors
    several = [any_row(index + 4 * i) for i in range(max(1, shape[0]))]
    row: Row | Tensor = several[0]
    if rows != "row":
        row = stack_rows(several if rows == "one per sample" and shape[0] else several[:1])
        row = row.to(x.device)
    count = len(several[0].outputs)
    return fastgen.step(
        row, x, e, uncond=u, known=known, history=history, logvar=logvar if learned else None,
        guidance_scale=2.0, seed=seed, step=7, outputs=count,
        dtypes=[x.dtype, *[torch.promote_types(x.dtype, torch.float32)] * (count - 1)],
        backend=backend,
    )  # fmt: skip


def _conv_transpose(make, backend, *, dtype, sizes, channels, batch, geometry, epilogue, layout,
                    activation, seed):  # fmt: skip
    dims, groups = len(sizes), geometry["groups"]
    inputs, outputs = channels[0] * groups, channels[1] * groups
    kernel = geometry["kernel"][:dims]
    options = {k: v[:dims] if isinstance(v, tuple) else v
               for k, v in geometry.items() if k != "kernel"}  # fmt: skip
    x = make((batch, inputs, *sizes), dtype, layout, seed)
    weight = make((inputs, channels[1], *kernel), dtype, "contiguous", seed + 1)
    bias, scale, shift = (make((outputs,), dtype, "contiguous", seed + 2 + i) if there else None
                          for i, there in enumerate(epilogue))  # fmt: skip
    if backend != "eager":
        function = getattr(fastgen, f"conv_transpose{dims}d")
        return function(x, weight, bias, **options, scale=scale, shift=shift,
                        activation=activation, backend=backend)  # fmt: skip
    y = getattr(F, f"conv_transpose{dims}d")(x, weight, bias, **options)
    over = (-1, *[1] * dims)
    y = y if scale is None else y * scale.view(over)
    y = y if shift is None else y + shift.view(over)
    return ACTIVATIONS[activation](y, 0.2)


@st.composite
def _geometries(draw):
    def sizes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(3))

    kernel, stride, padding, dilation = sizes(1, 5), sizes(1, 4), sizes(0, 2), sizes(1, 3)
    extra = tuple(draw(st.integers(0, max(s, d) - 1))
                  for s, d in zip(stride, dilation, strict=True))  # fmt: skip
    # every size of one and more gives an output
    assume(all(d * (k - 1) + o + 1 > 2 * p
               for k, p, d, o in zip(kernel, padding, dilation, extra, strict=True)))  # fmt: skip
    return {"kernel": kernel, "stride": stride, "padding": padding, "output_padding": extra,
            "dilation": dilation, "groups": draw(st.sampled_from([1, 1, 2, 3]))}  # fmt: skip


_FLAG = st.booleans()
_NAMES = st.sampled_from([name_of(dtype) for dtype in DTYPES])
_SHAPE = {"shape": shapes()}
_ONE = {**_SHAPE, "layout": layouts()}
_TWO = {**_ONE, "other": _NAMES, "second": layouts()}
_STEP = {
    **_TWO,
    "guided": _FLAG,
    "prediction": st.sampled_from(["epsilon", "sample", "v"]),
    "clip": st.sampled_from([None, 1.0, (-0.5, 2.0)]),
    "levels": st.sampled_from([(0.5, 0.7), (1e-3, 2e-3), (0.9, 1.0), (0.6, 0.6)]),
}
OPS: dict[str, Op] = {
    "randn": Op(
        _randn, {**_SHAPE, "step": st.integers(0, 2**24 - 1), "stream": st.integers(0, 255)}
    ),
    "reparameterize": Op(
        _reparameterize, {**_TWO, "clamp": st.sampled_from([None, (-1.0, 0.5)]), "kl": _FLAG}
    ),
    "gaussian_kl": Op(_gaussian_kl, _TWO),
    "cfg_combine": Op(
        _cfg_combine,
        {
            **_TWO,
            "guidance": st.sampled_from([1.0, 0.0, 7.5, -2.0]),
            "each": _FLAG,
            "rescale": st.sampled_from([0.0, 0.7, 1.0]),
        },
    ),
    "combine": Op(
        _combine,
        {
            **_ONE,
            "other": _NAMES,
            "weights": st.lists(
                st.sampled_from([1.0, 0.0, -0.3, 2.5]), min_size=1, max_size=10
            ),
        },
    ),
    "add_noise": Op(_add_noise, {**_ONE, "each": _FLAG, "noise": _FLAG, "velocity": _FLAG}),
    "ddpm_step": Op(
        _ddpm_step,
        {
            **_STEP,
            "variance": st.sampled_from(["fixed_small", "fixed_large", "learned"]),
            "given_noise": _FLAG,
        },
    ),
    "ddim_step": Op(_ddim_step, {**_STEP, "eta": st.sampled_from([0.0, 0.5, 1.0]),
                                 "clipped": _FLAG}),
    "step": Op(
        _step,
        {
            **_TWO,
            "index": st.integers(0, 40),
            "rows": st.sampled_from(["row", "table", "one per sample"]),
            "learned": _FLAG,
        },
    ),
    "conv_transpose": Op(
        _conv_transpose,
        {
            "sizes": st.integers(1, 3).flatmap(lambda n: st.tuples(*[st.integers(1, 6)] * n)),
            "channels": st.tuples(st.integers(1, 9), st.integers(1, 20)),
            "batch": st.integers(0, 3),
            "geometry": _geometries(),
            "epilogue": st.tuples(_FLAG, _FLAG, _FLAG),
            "layout": layouts(),
            "activation": st.sampled_from(list(ACTIVATIONS)),
        },
        exact=False,
    ),
}  # fmt: skip
