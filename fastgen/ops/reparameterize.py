"""z = mean + exp(logvar / 2) eps: the reparameterization trick, with its KL term."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks
from ..reference import reparameterize as reference
from ..reference.arithmetic import CHUNK, per_sample_rows, sum_by_halves
from ..reference.noise import key_tensors, normal
from ..reference.step import per_sample
from . import kernel
from .dispatch import LIBRARY, is_batched, is_plain, wants_gradient
from .noise import REPARAMETERIZE

_NO_CLAMP = (-math.inf, math.inf)


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    seed: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int | None = None,
    return_kl: bool = False,
    clamp: tuple[float, float] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """z = mean + exp(logvar / 2) eps with eps made in the kernel: Kingma & Welling (2014), 2.4.

    mean, logvar: (B, ...), any strides: they may be the two halves of one packed tensor.
    seed, sample_ids, step: where eps comes from (stream 3 of the noise contract); ``step`` must be
        given with ``seed``, and differ from call to call in a training loop. Or noise: eps itself.
    return_kl: also the KL divergence of N(mean, exp(logvar)) from N(0, 1), summed over each sample,
        in nats: (B,), float32 but for float64 inputs, from the same pass (appendix B).
    clamp: (low, high) for logvar; its gradient is zero where it was clamped.
    out: where to write z, like mean; it may be an input. backend: as for ``ddpm_step``.

    Returns z with mean's shape and dtype, or (z, kl). The backward pass makes eps again from the
    seed, so nothing but mean and logvar is kept. Raises TypeError or ValueError for what does not
    fit, ValueError where neither or both of seed and noise are given.
    """
    if (
        backend is None and sample_ids is None and clamp is None
        and mean is not None and logvar is not None
        and (seed is None) != (noise is None) and (noise is not None or step is not None)
        and kernel.is_quick(seed, step, out)
        and not (return_kl and getattr(mean, "is_cuda", False))
    ):  # fmt: skip
        kl = None
        if return_kl and isinstance(mean, Tensor) and mean.ndim > 0:
            kl = torch.empty(mean.shape[0], dtype=torch.float32)
        z = backends._native.quick_reparameterize(
            mean, logvar, noise, out, kl, seed, step or 0, REPARAMETERIZE,
            torch.is_grad_enabled() and out is not None, torch.get_num_threads(),
        )  # fmt: skip
        if z is not NotImplemented:
            if out is not None:
                torch.autograd.graph.increment_version(out)
            elif wants_gradient(mean, logvar, noise):
                z, kl = _Recorded.apply(mean, logvar, noise, seed, None, step or 0, *_NO_CLAMP,
                                        z.device.type, (z, kl))  # fmt: skip
            return z if kl is None else (z, kl)
    checks.tensor("mean", mean)
    checks.like("logvar", logvar, "mean", mean)
    checks.size(mean.shape)
    batch, device = mean.shape[0], mean.device
    seed_words, ids, step_count = noise_source(seed, noise, sample_ids, step, mean)
    bounds = _NO_CLAMP if clamp is None else checks.interval("clamp", clamp)
    if out is not None:
        checks.out(out, mean.shape, mean.dtype, device, (mean, logvar, noise))
    name = kernel.choose(backend, mean, logvar, noise, op="reparameterize")
    if mean.ndim > kernel.MAX_KERNEL_DIMS and name != "reference":
        given = None if noise is None else per_sample_rows(noise)
        made = reparameterize(
            per_sample_rows(mean), per_sample_rows(logvar), noise=given, seed=seed,
            sample_ids=sample_ids, step=step, return_kl=return_kl, clamp=clamp, backend=name,
        )  # fmt: skip
        z, kl = made if isinstance(made, tuple) else (made, None)
        z = z.reshape(mean.shape)
        z = z if out is None else kernel.written(out, z)
        return z if kl is None else (z, kl)
    keys = (seed_words[0] if isinstance(seed_words, tuple) else None,
            ids if isinstance(ids, Tensor) else None)  # fmt: skip
    recording = out is None
    if name != "reference" and is_plain(mean, logvar, noise, out, *keys, recording=recording):
        z = backends.empty_like(mean) if out is None else out
        kl = _launch(name, mean, logvar, noise, z, return_kl, bounds, seed_words, ids, step_count)
        if out is not None:
            torch.autograd.graph.increment_version(out)
        elif wants_gradient(mean, logvar, noise):
            z, kl = _Recorded.apply(mean, logvar, noise, seed_words, ids, step_count, *bounds, name,
                                    (z, kl))  # fmt: skip
        return z if kl is None else (z, kl)
    seeds, id_tensor = key_tensors(seed_words, ids, batch, device)
    if name == "reference":
        if seeds is not None and id_tensor is not None:
            noise = normal(mean.shape, seeds, id_tensor, step_count, REPARAMETERIZE)
        assert noise is not None
        z = reference.reparameterize(mean, logvar, noise, bounds).to(mean.dtype)
        kl = reference.gaussian_kl(mean, logvar, bounds) if return_kl else None
    else:
        z, kl = torch.ops.fastgen.reparameterize(
            mean, logvar, noise, seeds, id_tensor, step_count, return_kl, *bounds, name
        )
    if out is not None:
        z = kernel.written(out, z)
    return (z, kl) if return_kl and kl is not None else z


def gaussian_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    clamp: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over each sample: (B,), float32 (float64
    for float64 inputs).

    mean, logvar: (B, ...). Kingma & Welling (2014), appendix B. The same bits as
    ``reparameterize(..., return_kl=True)``.
    """
    checks.tensor("mean", mean)
    checks.like("logvar", logvar, "mean", mean)
    bounds = _NO_CLAMP if clamp is None else checks.interval("clamp", clamp)
    name = kernel.choose(backend, mean, logvar, op="reparameterize")
    if mean.ndim > kernel.MAX_KERNEL_DIMS:
        mean, logvar = per_sample_rows(mean), per_sample_rows(logvar)
    if name == "reference":
        return reference.gaussian_kl(mean, logvar, bounds)
    if is_plain(mean, logvar):
        kl = _launch(name, mean, logvar, None, None, True, bounds, None, 0, 0)
        assert kl is not None
        return kl
    return torch.ops.fastgen.reparameterize(mean, logvar, None, None, None, 0, True, *bounds, name)[
        1
    ]


def gaussian_kl_monte_carlo(mean: Tensor, logvar: Tensor, *, seed: int, draws: int = 64) -> Tensor:
    """The same divergence estimated from samples: the mean over ``draws`` of log q(z) - log p(z).

    Kingma & Welling (2014), eq. 6. (B,), unbiased; for checking ``gaussian_kl``.
    """
    draws = checks.integer("draws", draws, 1)
    checks.tensor("mean", mean)
    checks.like("logvar", logvar, "mean", mean)
    total = torch.zeros(mean.shape[0], device=mean.device)
    for step in range(draws):
        z = reparameterize(mean.float(), logvar.float(), seed=seed, step=step)
        assert isinstance(z, Tensor)
        distance = (z - mean) ** 2 * torch.exp(-logvar.float())
        total = total + 0.5 * sum_by_halves(per_sample_rows(z**2 - distance - logvar))
    return total / draws


def noise_source(seed, noise, sample_ids, step, like: Tensor):
    """(seed, sample ids, step) as the kernels take them; checks that one source is given."""
    if (seed is None) == (noise is None):
        raise ValueError(
            f"seed, noise: got {'neither' if seed is None else 'both'}, expected one of them"
        )
    if noise is not None:
        checks.like("noise", noise, "the input", like)
        return None, 0, 0
    batch, device = like.shape[0], like.device
    step = checks.step(step)
    return checks.seed(seed, batch, device), checks.sample_ids(sample_ids, batch, device), step


def _launch(name, mean, logvar, noise, z, return_kl, clamp, seed, ids, step) -> Tensor | None:
    kl = partials = None
    shape = tuple(mean.shape)
    if return_kl:
        kl = torch.empty(shape[0], dtype=torch.float32, device=mean.device)
        chunks = -(-math.prod(shape[1:]) // CHUNK)
        if chunks == 0:
            kl.zero_()
        partials = torch.empty(shape[0] * chunks, dtype=torch.float32, device=mean.device)
    kernel.call(name, "reparameterize", "reparameterize", mean.device, shape, mean, logvar, noise,
                z, kl, partials, clamp, seed, ids, step, REPARAMETERIZE)  # fmt: skip
    return kl


LIBRARY.define(
    "reparameterize(Tensor mean, Tensor logvar, Tensor? noise, Tensor? seeds, Tensor? sample_ids, "
    "SymInt step, bool return_kl, float low, float high, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "reparameterize_backward(Tensor mean, Tensor logvar, Tensor? noise, Tensor? seeds, "
    "Tensor? sample_ids, SymInt step, Tensor? grad_z, Tensor? grad_kl, bool wants_mean, "
    "bool wants_noise, "
    "float low, float high, str backend) -> (Tensor, Tensor, Tensor)"
)


def _draws(seeds, noise) -> bool:
    return seeds is not None or noise is not None


def _kernel(mean, logvar, noise, seeds, sample_ids, step, return_kl, low, high, backend):
    z = backends.empty_like(mean) if _draws(seeds, noise) else mean.new_empty(0)
    seed = None if seeds is None else (seeds.contiguous(), int(seeds.numel() > 1))
    ids = 0 if sample_ids is None else sample_ids.contiguous()
    kl = _launch(backend, mean, logvar, noise, z if _draws(seeds, noise) else None, return_kl,
                 (low, high), seed, ids, step)  # fmt: skip
    return z, mean.new_empty(0, dtype=torch.float32) if kl is None else kl


def _fake(mean, logvar, noise, seeds, sample_ids, step, return_kl, low, high, backend):
    z = torch.empty_like(mean) if _draws(seeds, noise) else mean.new_empty(0)
    return z, mean.new_empty(mean.shape[0] if return_kl else 0, dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    mean, logvar, noise, seeds, sample_ids, *ctx.rest = inputs
    ctx.save_for_backward(mean, logvar, noise, seeds, sample_ids)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_z, grad_kl):
    mean, logvar, noise, seeds, sample_ids = ctx.saved_tensors
    step, return_kl, low, high, backend = ctx.rest
    grads = _gradients(mean, logvar, noise, seeds, sample_ids, step, grad_z,
                       grad_kl if return_kl else None, low, high, backend)  # fmt: skip
    return *grads, None, None, None, None, None, None, None


class _Recorded(torch.autograd.Function):
    """Gives results their gradient: the registered op's twin for eager calls, without its cost,
    since the key stays on the host."""

    @staticmethod
    def forward(ctx, mean, logvar, noise, seed, ids, step, low, high, backend, results):
        tensors = [seed[0] if isinstance(seed, tuple) else None,
                   ids if isinstance(ids, Tensor) else None]  # fmt: skip
        ctx.save_for_backward(mean, logvar, noise, *tensors)
        ctx.set_materialize_grads(False)
        ctx.rest = (seed if isinstance(seed, int) else None, step, low, high, backend)
        return results

    @staticmethod
    def backward(ctx, grad_z, grad_kl):
        mean, logvar, noise, seeds, ids = ctx.saved_tensors
        seed, step, low, high, backend = ctx.rest
        grads = _gradients(mean, logvar, noise, seeds if seed is None else seed, ids, step,
                           grad_z, grad_kl, low, high, backend)  # fmt: skip
        return *grads, None, None, None, None, None, None, None


def _gradients(mean, logvar, noise, seeds, ids, step, grad_z, grad_kl, low, high, backend):
    """(mean's, logvar's, noise's); ``seeds``: int64 tensor, or an int where eager."""
    if seeds is None and noise is None:
        grad_z = None
    if grad_z is None and grad_kl is None:
        return None, None, None
    again = torch.is_grad_enabled() or is_batched(grad_z, grad_kl)  # double, vectorised backward
    if again and not torch.compiler.is_compiling():
        if isinstance(seeds, int):
            ids = 0 if ids is None else ids
            seeds, ids = key_tensors(seeds, ids, mean.shape[0], mean.device)
        return _backward_formula(mean, logvar, noise, seeds, ids, step, grad_z, grad_kl, low, high)
    wants_noise = noise is not None and noise.requires_grad and grad_z is not None
    passes = grad_kl is None and grad_z.dtype == mean.dtype  # d z / d mean = 1
    function = _backward_kernel if isinstance(seeds, int) else (
        torch.ops.fastgen.reparameterize_backward
    )  # fmt: skip
    grad_mean, grad_logvar, grad_noise = function(
        mean, logvar, noise, seeds, ids, step, grad_z, grad_kl, not passes, wants_noise, low, high,
        backend)  # fmt: skip
    return grad_z if passes else grad_mean, grad_logvar, grad_noise if wants_noise else None


def _backward_formula(mean, logvar, noise, seeds, sample_ids, step, grad_z, grad_kl, low, high):
    """The backward kernel's formula in eager torch, itself differentiable."""
    m, clamped = mean.float(), logvar.float()
    bounded, sigma = reference.deviation(clamped, (low, high))
    changed = (bounded < clamped) | (bounded > clamped)
    grad_mean = grad_logvar = torch.zeros_like(m)
    grad_noise = None
    if grad_z is not None:
        eps = (
            normal(mean.shape, seeds, sample_ids, step, REPARAMETERIZE)
            if noise is None
            else noise.float()
        )
        grad = grad_z.float()
        grad_mean, grad_logvar, grad_noise = grad, 0.5 * (grad * (sigma * eps)), grad * sigma
    if grad_kl is not None:
        weight = per_sample(grad_kl, m)
        grad_mean = grad_mean + weight * m
        grad_logvar = grad_logvar + 0.5 * weight * (sigma * sigma - 1.0)
    return (
        grad_mean.to(mean.dtype),
        torch.where(changed, 0.0, grad_logvar).to(logvar.dtype),
        None if noise is None or grad_noise is None else grad_noise.to(noise.dtype),
    )


def _backward_kernel(mean, logvar, noise, seeds, sample_ids, step, grad_z, grad_kl, wants_mean,
                     wants_noise, low, high, backend):  # fmt: skip
    grad_mean, grad_logvar, grad_noise = _backward_fake(
        mean, logvar, noise, seeds, sample_ids, step, grad_z, grad_kl, wants_mean, wants_noise, low,
        high, backend)  # fmt: skip
    seed = seeds
    if isinstance(seeds, Tensor):
        seed = (seeds.contiguous(), int(seeds.numel() > 1))
    kernel.call(
        backend, "reparameterize", "reparameterize_backward", mean.device, tuple(mean.shape),
        mean, logvar, noise, grad_z, None if grad_kl is None else grad_kl.float().contiguous(),
        grad_mean if wants_mean else None, grad_logvar, grad_noise if wants_noise else None,
        (low, high), seed, 0 if sample_ids is None else sample_ids.contiguous(), step,
        REPARAMETERIZE,
    )  # fmt: skip
    return grad_mean, grad_logvar, grad_noise


def _backward_fake(mean, logvar, noise, seeds, sample_ids, step, grad_z, grad_kl, wants_mean,
                   wants_noise, low, high, backend):  # fmt: skip
    grad_mean = backends.empty_like(mean) if wants_mean else mean.new_empty(0)
    grad_noise = backends.empty_like(noise) if wants_noise else mean.new_empty(0)
    return grad_mean, backends.empty_like(logvar), grad_noise


LIBRARY.impl("reparameterize", _kernel, "CompositeExplicitAutograd")
LIBRARY.impl("reparameterize_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastgen::reparameterize", _fake, lib=LIBRARY)
torch.library.register_fake("fastgen::reparameterize_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "fastgen::reparameterize", _backward, setup_context=_setup, lib=LIBRARY
)
