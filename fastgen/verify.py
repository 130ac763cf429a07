"""Every op on every backend of this machine against the eager reference, and that against the
papers' formulas in float64, on random shapes, strides and dtypes: what ``fastgen verify`` runs.
Needs hypothesis."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from torch import Tensor

from . import backends, verify_formulas
from .testing import DTYPES, bits, error_ratio, laid_out, sample_tensor, ulps
from .verify_cases import OPS, name_of

TIMES = 2.0  # the error allowed, over PyTorch's own
# Of the largest value, between the reference in float64 and the paper's formula: float32's rounding
# of coefficients (2^-24) and of the polynomials for normals and exponentials (2 ulp), where the
# terms of a sum are up to 40 times its value (epsilon prediction at alpha_bar = 1e-3).
FORMULA = 40 * 8 * 2.0**-24


@dataclass(frozen=True)
class Measure:
    """bitwise: all bits equal the eager reference's. ulps: the greatest distance from it, in the
    last place of each number, or of the largest one where bits are not promised. ratio: the error
    against float64 over PyTorch's own."""

    bitwise: bool
    ulps: int
    ratio: float


class Breach(AssertionError):
    """A promise that a backend does not keep, with the case that shows it."""

    def __init__(
        self, op: str, backend: str, case: Mapping[str, Any], what: str, found: Any = None
    ) -> None:
        self.op, self.backend, self.case, self.what = op, backend, dict(case), what
        self.found: Measure | None = found
        super().__init__(f"{op} on {backend}: {what}\n{self.line}")

    @property
    def line(self) -> str:
        """Python that shows it again."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.case.items())
        call = f"check({self.op!r}, {self.backend!r}, {options})"
        interpreter = self.backend == "triton" and backends.triton_interpreted()
        before = "import os; os.environ['TRITON_INTERPRET'] = '1'; " if interpreter else ""
        return f"{before}from fastgen.verify import check; {call}"


def check(op: str, backend: str, **case: Any) -> Measure:
    """Runs one case on a backend and on the eager reference. Raises ``Breach`` where the op fails,
    the bits differ, the reference is not the paper's formula, or for conv_transpose the error is
    more than twice PyTorch's own."""
    entry = OPS[op]
    device = device_of(backend)
    special = entry.exact and case["seed"] % 3 == 0

    def make(shape, dtype, layout, seed, *, to=None, precise=False) -> Tensor:
        value = sample_tensor(shape, getattr(torch, dtype), seed=seed, special=special)
        value = value.double() if precise else value
        return laid_out(value.to(to or device), layout)

    on_host = functools.partial(make, to=torch.device("cpu"))
    try:
        actual = _tensors(entry.run(make, backend, **case))
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Breach(op, backend, case, what) from error
    eager = "reference" if entry.exact else "eager"
    expected = _tensors(entry.run(on_host, eager, **case))
    exact = _tensors(entry.run(functools.partial(on_host, precise=True), eager, **case))
    if not special:  # where infinities meet, formulas differ in the order of operations
        _hold_to_formula(op, backend, case, functools.partial(on_host, precise=True), exact)
    measures = [
        _measure(a, e, o, entry.exact) for a, e, o in zip(actual, expected, exact, strict=True)
    ]
    found = Measure(
        all(m.bitwise for m in measures),
        max(m.ulps for m in measures),
        max(m.ratio for m in measures),
    )
    if entry.exact and not found.bitwise:
        distance = f"by up to {found.ulps} ulps" if found.ulps else "in the sign of zeros"
        raise Breach(op, backend, case, f"bits differ, {distance}", found)
    if not entry.exact and found.ratio > TIMES:
        raise Breach(
            op, backend, case, f"the error is {found.ratio:.3g} times PyTorch's own", found
        )
    return found


def _hold_to_formula(op: str, backend: str, case, make, exact: list[Tensor]) -> None:
    """Raises ``Breach`` where the reference in float64 is not the paper's formula, but for its
    coefficients, which are rounded to float32."""
    formula = getattr(verify_formulas, op, None)
    if formula is None:
        return
    for value, wanted in zip(exact, _tensors(formula(make, **case)), strict=True):
        known = wanted.isfinite()  # where the formula says something
        scale = wanted[known].abs().amax() if known.any() else 0.0
        allowed = FORMULA + torch.finfo(value.dtype).eps  # drawn in a lower dtype: rounded to it
        if not bool(((value - wanted).abs() <= allowed * scale)[known].all()):
            raise Breach(op, backend, case, "the reference is not the paper's formula")


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _measure(actual: Tensor, expected: Tensor, exact: Tensor, promised: bool) -> Measure:
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return Measure(False, 1 << 62, float("inf"))
    actual = actual.cpu()
    same, distance = bool((bits(actual) == bits(expected)).all()), 0
    if not same and promised:
        distance = ulps(actual, expected)
    elif not same:
        unit = torch.finfo(actual.dtype).eps * exact.abs().max()
        distance = int((actual.double() - expected.double()).abs().max() / unit + 0.5)
    return Measure(same, distance, error_ratio(actual, expected, exact))


def device_of(backend: str) -> torch.device:
    """Where a backend is checked: on the GPU if it serves there, else on the CPU."""
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


# ---- all of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Of one op, backend and dtype. line: of the smallest case that breaches, or empty."""

    op: str
    backend: str
    dtype: str
    cases: int
    bitwise: bool
    ulps: int
    ratio: float
    what: str = ""
    line: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)


def served(op: str) -> list[str]:
    """The backends that can run an op here, but for the reference."""
    kernel = {"reparameterize": "reparameterize", "gaussian_kl": "reparameterize",
              "conv_transpose": "conv_transpose"}.get(op, "step")  # fmt: skip
    names = [name for name in backends.OPS[kernel] if name != "reference"]
    return [n for n in names
            if not backends.refusal(kernel, n, device_of(n).type, torch.float32)]  # fmt: skip


def verify(
    ops: Sequence[str] = (),
    only: Sequence[str] = (),
    *,
    cases: int = 50,
    seed: int = 0,
) -> Iterator[Verdict]:
    """A verdict for each op, backend and dtype, from ``cases`` random cases each.

    ops, only: names of ops and of backends; all that serve by default. A case that breaches is made
    as small as it can be. Raises ValueError for an unknown name, or a backend that serves nowhere.
    """
    for name in ops:
        if name not in OPS:
            raise ValueError(f"op: got {name!r}, expected one of {', '.join(OPS)}")
    for name in only:
        if name not in backends.BACKENDS[:-1]:
            known = ", ".join(backends.BACKENDS[:-1])
            raise ValueError(f"backend: got {name!r}, expected one of {known}")
    pairs = [(op, backend) for op in dict.fromkeys(ops or OPS) for backend in served(op)
             if not only or backend in only]  # fmt: skip
    idle = set(only) - {backend for _, backend in pairs}
    if idle or not pairs:
        who = ", ".join(sorted(idle)) or "nothing"
        raise ValueError(f"backend: {who} serves none of these ops here; `fastgen info` says why")
    for op, backend in pairs:
        for dtype in DTYPES:
            yield _verdict(op, backend, dtype, cases, seed)


def _verdict(op: str, backend: str, dtype: torch.dtype, cases: int, seed: int) -> Verdict:
    measures: list[Measure] = []

    @seeded(seed)
    @settings(
        max_examples=cases, phases=(Phase.generate, Phase.shrink), deadline=None, database=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        verbosity=Verbosity.quiet, print_blob=False,
    )  # fmt: skip
    @given(OPS[op].cases([dtype]))
    def run(case: dict[str, Any]) -> None:
        measures.append(check(op, backend, **case))

    what = line = ""
    try:
        run()
    except Breach as breach:
        what, line = breach.what, breach.line
        measures += [breach.found] if breach.found else []
    return Verdict(
        op, backend, name_of(dtype), len(measures),
        all(m.bitwise for m in measures) and not what,
        max((m.ulps for m in measures), default=0), max((m.ratio for m in measures), default=0.0),
        what, line,
    )  # fmt: skip
