"""A cache for what is made from plain numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def cached_constant(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with its answers kept by the types and values of its arguments; to
    ``torch.compile`` they are constants. Arguments without a hash reach it as they are, for its own
    checks to name."""
    cached = functools.lru_cache(4096, typed=True)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return cached(*args, **kwargs)  # type: ignore[arg-type]
        except TypeError:
            return function(*args, **kwargs)

    # what torch.compiler.assume_constant_result does, but for importing all of torch._dynamo first
    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return call
