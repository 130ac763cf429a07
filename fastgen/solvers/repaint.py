"""RePaint, for images of which a part is known: Lugmayr et al. (2022)."""

from __future__ import annotations

from .. import checks
from ..levels import NoiseLevels
from ..plan import Plan
from ..schedules import NoiseSchedule
from .euler import _lift, _numbers, down_and_up
from .rows import Clip, Rows, combined, first_order, levels_of


def visited(steps: int, jump_length: int, resamplings: int) -> list[int]:
    """The levels where the network is called, 0 the noisiest: Lugmayr et al. (2022), appendix B."""
    left = dict.fromkeys(range(0, steps - jump_length, jump_length), resamplings - 1)
    places, t = [], steps - 1  # t: how many levels are below
    while t >= 0:
        if left.get(t, 0) > 0:
            left[t] -= 1
            t += jump_length
        places.append(steps - 1 - t)
        t -= 1
    return places


def repaint(
    levels: NoiseLevels | NoiseSchedule,
    steps: int | None = None,
    *,
    jump_length: int = 10,
    resamplings: int = 10,
    eta: float = 1.0,
    prediction: str = "epsilon",
    clip: Clip = None,
    spacing: str = "trailing",
) -> Plan:
    """RePaint's jumps: Lugmayr et al. (2022), algorithm 1; for ``sample`` with known and mask,
    which puts what is known into the sample behind every step.

    At every jump_length-th level from the last up, the run goes back up by jump_length levels, the
    forward process drawn in one step, and down again, resamplings times in all (10, 10: the paper's
    j and r). eta: of the steps down, those of ``euler_ancestral``: 1 is DDPM. A step to a level
    where the run turns holds the way up, so that what is known is put in at its upper end: the same
    distribution, since the way up adds noise to each pixel by itself. First order; about
    steps x resamplings calls; the rest as for ``euler``.
    """
    levels = levels_of(levels, steps, prediction, spacing)
    jump_length = checks.integer("jump_length", jump_length, 1)
    resamplings = checks.integer("resamplings", resamplings, 1)
    (eta,) = _numbers(eta=eta)
    rows = Rows(levels, clip)
    places = visited(len(levels), jump_length, resamplings)
    for place, following in zip(places, [*places[1:], None], strict=True):
        at, end = levels.pairs[place]
        to = None if following is None else levels.points[following]
        down, up = down_and_up(at, end, eta)
        factor, deviation = (1.0, 0.0) if to is None else _lift(end, to, 1.0)
        noise = ((factor * up) ** 2 + deviation**2) ** 0.5
        rows.add(at, to, combined((factor, first_order(at, down))), (noise,))
    return rows.plan("repaint")
