"""The one place that chooses a backend for an op, and can say why.

``reference``: eager PyTorch, any device. ``cpu``: C++. ``cuda``: CUDA C++. ``triton``: Triton, on
CUDA and ROCm devices (on the CPU in Triton's interpreter, for checking).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from .cache import cached_constant

_transforms = torch._C._functorch.peek_interpreter_stack
# (a function, what it returns where nothing stands between a call and its kernel)
_MODES: tuple[tuple[Callable[[], object], object], ...] = (
    (torch._C._len_torch_dispatch_stack, 0),
    (torch._C._len_torch_function_stack, 0),
    (_transforms, None),
    (functools.partial(getattr, forward_ad, "_current_level"), -1),
    (torch._C._is_tracing, False),
)


_gpu_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _meet(native, gpu_stream: Callable[[int], int] | None = _gpu_stream) -> None:
    """Tell the compiled module of the parts of PyTorch that it uses."""
    native.set_torch(
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.Tensor, torch.nn.Parameter),
        torch.empty_like,
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        _MODES,
        torch.get_num_threads,
        gpu_stream,
    )


try:
    from . import _native
except ImportError as error:  # a broken or missing build must not hide the reference
    _native = None  # type: ignore[assignment]
    _native_error = str(error)
else:
    _native_error = ""
    _meet(_native)

BACKENDS = ("cuda", "triton", "cpu", "reference")  # best first
OPS = {  # op: what has a kernel for it
    "step": BACKENDS,
    "reparameterize": BACKENDS,
    "rescale": BACKENDS,
    "conv_transpose": ("triton", "cuda", "cpu", "reference"),
}
MIN_TRITON = (3, 6)  # 3.4 and 3.5 flush denormals in square roots, 3.3 does not compile the kernels
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, just allocated, on large pages where it is large and the system has them."""
    if _native is not None:
        _native.use_huge_pages(tensor)
    return tensor


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``torch.empty_like``, on huge pages where it is large."""
    return on_huge_pages(torch.empty_like(tensor, dtype=dtype))


def native():
    """The compiled module; ImportError, with the reason, where it is missing."""
    if _native is None:
        raise ImportError(f"fastgen's compiled module could not be loaded: {_native_error}")
    return _native


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the installed Triton, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def refusal(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Why ``backend`` cannot serve, or an empty string where it can."""
    if backend not in OPS[op]:
        return f"{op} has no {backend} kernel"
    if backend == "reference":
        return ""
    if dtype not in KERNEL_DTYPES:
        return f"{dtype} is served by the reference alone"
    if backend in ("cpu", "cuda"):
        if device_type != backend:
            return f"the tensors are on {device_type}"
        if _native is None:
            return f"the compiled module could not be loaded: {_native_error}"
    if backend == "cuda":
        if not _native.cuda_architectures:
            return "built without CUDA (nvcc was not found, or not asked for)"
        if torch.version.cuda is None:
            return "this torch has no CUDA"
        if torch.cuda.is_available() and (reason := _native.cuda_refusal()):
            return f"the compiled kernels do not run on this device: {reason}"
    if backend == "triton":
        version = triton_version()
        if version is None:
            return "triton is not installed"
        if version < MIN_TRITON:
            return f"triton {version[0]}.{version[1]} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
        if triton_interpreted() != (device_type == "cpu"):
            return (
                "on the CPU it runs in Triton's interpreter alone (TRITON_INTERPRET=1)"
                if device_type == "cpu"
                else "TRITON_INTERPRET is set"
            )
        if device_type not in ("cpu", "cuda"):
            return f"the tensors are on {device_type}"
    return ""


@cached_constant
def _choose(op: str, backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    if backend is not None:
        if backend not in BACKENDS:
            known = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"backend: got {backend!r}, expected one of {known} or None")
        reason = refusal(op, backend, device_type, dtype)
        if reason:
            raise ValueError(f"backend: {backend!r} cannot serve {op} here: {reason}")
        return backend
    reasons: list[str] = []
    for candidate in OPS[op]:
        if candidate == "triton" and device_type == "cpu":
            continue  # the interpreter is for checking, never a default
        reason = refusal(op, candidate, device_type, dtype)
        if not reason:
            if candidate == "cuda":
                _native.serve_gpu(True)  # what is ordinary goes straight to it from now on
            falls_back = candidate == "reference" and device_type not in ("cpu", "meta")
            if falls_back and dtype in KERNEL_DTYPES:
                warnings.warn(
                    f"fastgen: {op} on {device_type} falls back to the eager reference: "
                    + "; ".join(reasons),
                    stacklevel=5,
                )
            return candidate
        reasons.append(f"{candidate}: {reason}")
    raise AssertionError("the reference serves everything")


def choose(op: str, backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend for an op: the one asked for, or the best that serves this device and dtype.

    Raises ValueError for an unknown backend, or for a named one that cannot serve (with why).
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: got {type(backend).__name__}, expected a str or None")
    name = _choose(op, backend, device.type, dtype)
    if name != "reference" and not torch.compiler.is_compiling() and is_transformed():
        if backend is not None:
            raise ValueError(
                f"backend: {backend!r} cannot serve {op} under forward-mode differentiation, a "
                "torch.func transform or torch.jit.trace; 'reference' can"
            )
        return "reference"
    return name


def _is_eager() -> bool:
    return all(state() == off for state, off in _MODES)


#: Whether no mode, transform or trace stands between a call and its kernel.
is_eager: Callable[[], bool] = _is_eager if _native is None else _native.is_eager


def is_transformed() -> bool:
    """Inside torch.func's transforms, forward-mode AD or torch.jit.trace, which miss a kernel."""
    return forward_ad._current_level >= 0 or _transforms() is not None or torch._C._is_tracing()


def table(device_types: tuple[str, ...] = ("cpu", "cuda")) -> list[tuple[str, str, str, str]]:
    """Rows of (op, device, backend, "default" | "yes" | why not), for float32."""
    rows: list[tuple[str, str, str, str]] = []
    for op in OPS:
        for device_type in device_types:
            if device_type == "cuda" and not torch.cuda.is_available():
                rows.extend((op, "cuda", name, "no CUDA device") for name in OPS[op])
                continue
            default = _choose(op, None, device_type, torch.float32)
            for name in OPS[op]:
                reason = refusal(op, name, device_type, torch.float32)
                rows.append(
                    (op, device_type, name, reason or ("default" if name == default else "yes"))
                )
    return rows


def info() -> str:
    """What runs where and why, as text: versions, instruction set, every op x backend."""
    lines = [f"torch {torch.__version__}"]
    if _native is None:
        lines.append(f"compiled module: not loaded ({_native_error})")
    else:
        sets = ", ".join(_native.available_isas())
        lines.append(f"cpu kernels: {_native.isa()} (available: {sets})")
        lines.append(f"threads: {torch.get_num_threads()}, from {_native.parallel_runtime()}")
        built = (
            _native.cuda_architectures.replace("-real", "")
            or "not built (nvcc was not found, or not asked for)"
        )
        lines.append(f"cuda kernels: {built}")
    version = triton_version()
    lines.append(f"triton: {'.'.join(map(str, version)) if version else 'not installed'}")
    lines += ["", f"{'op':16} {'on':5} {'backend':10} serves float32"]
    lines += [f"{op:16} {device:5} {name:10} {state}" for op, device, name, state in table()]
    if _native is not None:
        lines += [
            "",
            "conv_transpose on the cpu: products of packed weights; or PyTorch's operator, and one",
            "pass behind it, where that was measured to be faster: channels last with groups, or",
            "with kernels that are no multiple of their stride",
            "(fastgen.ops.conv_transpose_cpu.is_packed).",
            "conv_transpose on a gpu, by default: triton, cuda or PyTorch's operator, whichever",
            "was the fastest when a layer first met a size (see fastgen.ops.conv_transpose_gpu).",
        ]
    return "\n".join(lines)
