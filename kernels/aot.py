"""Ahead-of-time compilation of every Triton kernel, on machines without a GPU.

To be run in a process where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import conv_transpose, guidance, reparameterize, step, tile


def source(kernel, arguments: dict) -> ASTSource:
    """`arguments`: a type for what a call would pass ("*bf16:16" for a tensor whose address is a
    multiple of 16, "i32", "fp32", ...), tuples of them, None, and values of constexprs."""
    constexprs, attributes = {}, {}

    def describe(value, path):
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i)) for i, item in enumerate(value))
        if not isinstance(value, str):
            constexprs[path] = value
            return "constexpr"
        kind, _, divisor = value.partition(":")
        if divisor:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        return kind

    names = kernel.arg_names
    signature = {name: describe(arguments[name], (i,)) for i, name in enumerate(names)}
    return ASTSource(kernel, signature, constexprs, attributes)


def compile_all(capability: int) -> Iterator[tuple[str, str, bytes, int]]:
    """(name, PTX, cubin, bytes of shared memory) of representative cases of each kernel.

    capability: 80, 90 or 100, as in sm_80.
    """
    target = GPUTarget("cuda", capability, 32)
    for module in (step, reparameterize, guidance, conv_transpose):
        for name, kernel, arguments in module.specializations():
            compiled = triton.compile(
                source(kernel, arguments), target=target, options=options_of(module, arguments)
            )
            yield name, compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared


def options_of(module, arguments: dict) -> dict:
    """The compiler's options: the module's, and those that a call would pass."""
    own = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return {**getattr(module, "OPTIONS", tile.OPTIONS), **own}
