"""Solvers of reverse-time SDEs, one call a row: Song et al. (2021), and ER-SDE-Solvers (Cui, Zhang,
Bao & Liao 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable

from .. import checks
from ..levels import NoiseLevels, Point
from ..plan import Plan
from ..schedules import NoiseSchedule
from .dpm import DATA, SAMPLE, differences
from .euler import _numbers
from .multistep import integral, past
from .rows import Clip, Rows, Weights, combined, first_order, levels_of


def score(at: Point) -> dict[str, float]:
    """The gradient of the log-density: -(x - alpha x_0) / sigma^2."""
    return {"x": -1.0 / at.sigma**2, "denoised": at.alpha / at.sigma**2}


def score_sde_ve(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    corrections: int = 0,
    snr: float = 0.16,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """The predictor-corrector sampler of a score-based model: Song et al. (2021), algorithms 2 and
    4. The predictor is reverse diffusion, eq. 46 (variance exploding; on other paths eq. 47), whose
    forward step between two levels is x_t = f x_s + g z:

        x_s = (2 - f) x_t + g^2 score + g z,  f = alpha_t / alpha_s,
        g^2 = sigma_t^2 - (f sigma_s)^2

    and a correction, at the level where the predictor then begins, a step of Langevin dynamics:

        x = x + eps score + sqrt(2 eps) z,  eps = 2 (snr sigma)^2

    This is not algorithm 4's own eps, which has ||z|| / ||score||, norms of what was drawn and
    predicted in the batch, for sigma: what that quotient comes to where nearly all of x is noise.
    Here the step is known beforehand and no sample depends on the others (as in the annealed
    dynamics of Song & Ermon 2019, algorithm 1). Where the data's spread is not small beside sigma,
    the score is smaller than 1 / sigma and algorithm 4's steps are longer.

    corrections: how many of them a level, a call each. snr: of those. s_noise scales all noise. A
    last step to sigma = 0 draws none. First order; the rest as for ``euler``.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    corrections = checks.integer("corrections", corrections, 0)
    snr, s_noise = _numbers(snr=snr, s_noise=s_noise)
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        size = 2.0 * (snr * at.sigma) ** 2
        for _ in range(corrections):
            corrected = combined((1.0, SAMPLE), (size, score(at)))
            rows.add(at, at, corrected, (s_noise * math.sqrt(2.0 * size),))
        f = at.alpha / end.alpha
        variance = at.sigma**2 - (f * end.sigma) ** 2
        weights = combined((2.0 - f, SAMPLE), (variance, score(at)))
        deviation = math.sqrt(variance) if end.sigma > 0.0 else 0.0
        if at.alpha == 0.0:  # all of x is noise, of which none is kept
            weights, deviation = {"denoised": end.alpha}, end.sigma
        rows.add(at, levels.next(i), weights, (s_noise * deviation,))
    return rows.plan("score_sde_ve")


def score_sde_vp(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    s_noise: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """Euler-Maruyama on the reverse of the variance-preserving SDE: Song et al. (2021), eq. 6, 11.

        x_s = x_t + (x_t / 2 + score) B + sqrt(B) z,  B = int_s^t beta = 2 log(alpha_s / alpha_t)

    where the authors' code has beta(t) (t - s), its value where the step begins, for the integral:
    the same to first order. A last step to sigma = 0 draws no noise. s_noise scales the noise.
    First order; the rest as for ``euler``.

    Raises ValueError for levels that preserve no variance, or begin without signal, where B is
    infinite.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    (s_noise,) = _numbers(s_noise=s_noise)
    if any(abs(p.alpha**2 + p.sigma**2 - 1.0) > 1e-9 for p in (*levels.points, levels.end)):
        raise ValueError("levels: expected alpha^2 + sigma^2 = 1; score_sde_ve takes any")
    if levels.points[0].alpha == 0.0:
        raise ValueError("levels: begin without signal, where the integral of beta is infinite")
    rows = Rows(levels, clip)
    for i, (at, end) in enumerate(levels.pairs):
        beta = 2.0 * math.log(end.alpha / at.alpha)
        deviation = math.sqrt(beta) if end.sigma > 0.0 else 0.0
        weights = combined((1.0 + 0.5 * beta, SAMPLE), (beta, score(at)))
        rows.add(at, levels.next(i), weights, (s_noise * deviation,))
    return rows.plan("score_sde_vp")


# ---- ER-SDE-Solvers ------------------------------------------------------------------------------


def er_sde_scale(s: float) -> float:
    """phi(s) = s (e^(s^0.3) + 10), the authors' choice: Cui et al. (2023), appendix A.8, SDE 5."""
    return s * (math.exp(s**0.3) + 10.0)


def er_sde(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    order: int = 3,
    noise_scale: Callable[[float], float] = er_sde_scale,
    s_noise: float = 1.0,
    published: bool = False,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """ER-SDE-Solvers of an extended reverse-time SDE: Cui et al. (2023), algorithms 1 to 3; in
    y = x / alpha over s = sigma / alpha the variance-exploding and the variance-preserving form are
    one:

        y_t = r y_s + (1 - r) x_0 + sqrt(t^2 - (r s)^2) z,  r = phi(t) / phi(s)

    with phi(t) int_t^s phi' / phi^2 du of the further Taylor terms of x_0.

    order: 1 to 3, of the deterministic part, by the last estimates. noise_scale: phi, a function of
    s > 0 that grows at least as fast as s; s itself gives the probability flow, s^2 the SDE of Song
    et al. (2021). s_noise scales the noise. published: in the third order with the last backward
    difference alone for the slope, as the authors have it, which makes it a second one. A last step
    to sigma = 0 is of first order. The rest as for ``euler``.

    Raises ValueError for a noise_scale that is not above zero, or grows less.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    order = checks.integer("order", order, 1, 4)
    (s_noise,) = _numbers(s_noise=s_noise)
    if not callable(noise_scale):
        raise TypeError(f"noise_scale: got {type(noise_scale).__name__}, expected a function of s")
    rows, count = Rows(levels, clip), len(levels)
    begin = 1 if levels.points[0].alpha == 0.0 else 0  # where s is finite
    for i, (at, end) in enumerate(levels.pairs):
        keep = {i % 2: DATA} if order > 1 and i + 1 < count else {}
        weights: Weights = first_order(at, end)
        deviation = 0.0
        if at.alpha == 0.0:  # the limit of s: none of the noise is kept, or, in the flow, all
            far = 1e4 * max(end.ratio, 1.0)
            if end.sigma > 0.0 and _kept(noise_scale, far, end.ratio)[1] > 0.0:
                weights, deviation = {"denoised": end.alpha}, end.sigma
        elif end.sigma > 0.0:
            share, variance = _kept(noise_scale, at.ratio, end.ratio)
            terms: list[tuple[float, Weights]] = [
                (end.alpha / at.alpha * share, SAMPLE), (end.alpha * (1.0 - share), DATA)
            ]  # fmt: skip
            known = min(order, i + 1 - begin)
            if known > 1:
                slope, curve = _derivatives(levels, i, known, published)
                of_slope, of_curve = _integrals(noise_scale, at.ratio, end.ratio)
                terms += [(end.alpha * of_slope, slope), (end.alpha * of_curve, curve)]
            weights, deviation = combined(*terms), end.alpha * math.sqrt(variance)
        rows.add(at, levels.next(i), weights, (s_noise * deviation,), keep)
    return rows.plan("er_sde")


def _kept(phi: Callable[[float], float], s: float, t: float) -> tuple[float, float]:
    """(r, t^2 - (r s)^2)."""
    high, low = (checks.number("noise_scale", phi(level)) for level in (s, t))
    if not (high > 0.0 and low > 0.0):
        raise ValueError(f"noise_scale: got {high} of {s} and {low} of {t}, expected more than 0")
    share = low / high
    variance = t * t - (share * s) ** 2
    if variance < -1e-9 * t * t:
        raise ValueError(f"noise_scale: grows less than s between {t} and {s}")
    return share, variance if variance > 1e-12 * t * t else 0.0  # else a rounding


def _integrals(phi: Callable[[float], float], s: float, t: float) -> tuple[float, float]:
    """Of u - s and (u - s)^2 / 2, the integrals with phi(t) phi' / phi^2 from t to s, by parts, in
    units of the step t - s and its square."""
    h = t - s

    def over_phi(of: Callable[[float], float]) -> float:
        """phi(t) int_t^s of(u) / phi(u) du, in log u."""
        return phi(t) * integral(
            math.log(t), math.log(s), lambda v: math.exp(v) * of(math.exp(v)) / phi(math.exp(v))
        )

    first = h + over_phi(lambda u: 1.0)
    second = 0.5 * h * h + over_phi(lambda u: u - s)
    return first / h, second / (h * h)


def _derivatives(
    levels: NoiseLevels, i: int, known: int, published: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """First and second derivatives of x_0 in s, in units of the step."""
    s = [levels.points[i - k].ratio for k in range(known)]
    h = levels.pairs[i][1].ratio - s[0]
    before: Weights = {past(i, 1, 2): 1.0}
    earlier: Weights | None = {past(i, 2, 2): 1.0} if known > 2 else None
    r0 = (s[0] - s[1]) / h
    slope, curve = differences(DATA, before, earlier, r0, (s[1] - s[2]) / h if earlier else 1.0)
    return (combined((1.0 / r0, DATA), (-1.0 / r0, before)) if published else slope), curve
