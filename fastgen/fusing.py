"""``fuse``: the transposed convolutions of a network that exists, with what stands behind them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from .nn import FUSED, PASSED, _Fused
from .ops import conv_transpose as ops

logger = logging.getLogger("fastgen")

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu", nn.GELU: "gelu",
}  # fmt: skip
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.leaky_relu: "leaky_relu", torch.tanh: "tanh", torch.tanh_: "tanh", F.tanh: "tanh",
    "tanh": "tanh", "tanh_": "tanh", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid", "sigmoid_": "sigmoid", F.silu: "silu", F.gelu: "gelu",
}  # fmt: skip


class Layer(NamedTuple):
    """What ``fuse`` did to a transposed convolution; why: the reason for what it left."""

    name: str
    norm: str | None
    activation: str | None
    why: str


class _Match(NamedTuple):
    conv: str
    norm: str | None = None
    activation: str | None = None
    slope: float = 0.2
    act_module: str | None = None  # to be replaced
    act_node: str | None = None  # to be cut out of the graph
    why: str = ""
    next: str | None = None  # the transposed convolution that alone reads the result


def fuse(
    module: nn.Module,
    *,
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> nn.Module:
    """A network with the same outputs whose transposed convolutions are fastgen's, each with the
    normalisation and the activation behind it in its one kernel.

    Found in Sequentials and in any ``forward`` that torch.fx can trace. Batch normalisation (and
    instance normalisation with running statistics) is folded while it is in evaluation mode; in
    training mode it runs by the batch's own statistics, and all gradients are exact. Parameters,
    buffers and ``state_dict`` keep their names, and what is changed in them is noticed; a weight
    normalisation of the old kind (a hook) is removed, one of ``parametrizations`` stays. What else
    there is in the network is left alone.

    inplace: change ``module`` itself, instead of a copy. dtype: of parameters and buffers, and of
        the input to come; those of folded normalisations stay as they are. memory_format: of the
        transposed convolutions' results and of the weights of the other convolutions:
        torch.channels_last, or torch.contiguous_format. None: as it comes, but with channels last
        between transposed convolutions that follow each other, and contiguous behind them.

    What torch.fx cannot trace must call its blocks whole, not a layer of one by itself.

    Returns a module of the same class; where an activation is a function in ``forward``, that is
    written anew, of a subclass, which torch.save cannot save but by its ``state_dict``.
    ``explain`` says what was fused, and what not.
    Raises TypeError for what is no module, ValueError for another dtype than float32, bfloat16,
    float16, float64 and for an unknown memory format.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.Module")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype: got {dtype}, expected a floating dtype")
    ops.is_last(memory_format, None)
    made = module if inplace else _copied(module)
    layers: list[Layer] = []
    places = Counter(id(child) for m in made.modules() for child in m._modules.values())
    probe = _copied(made)  # tracing runs forward, which may leave marks
    for path, graph, differs in list(_traceable(probe)):
        _rewrite(made, path, graph, differs, places, layers)
    if memory_format is not None:
        _lay_out(made, memory_format)
    if dtype is not None:
        _convert(made, dtype)
    made.__dict__["_fastgen_layers"] = layers
    logger.info("fuse: %s", "; ".join(map(_told, layers)) or "no transposed convolution was found")
    return made


def _copied(module: nn.Module) -> nn.Module:
    for child in module.modules():
        for hook in child._forward_pre_hooks.values():
            weight = vars(child).get(getattr(hook, "name", ""))
            if isinstance(weight, torch.Tensor):  # which the hook makes anew; it cannot be copied
                vars(child)[hook.name] = weight.detach()  # type: ignore[attr-defined]
    return copy.deepcopy(module)


def explain(module: nn.Module) -> str:
    """What ``fuse`` made of a network, a line for each transposed convolution.

    Raises ValueError for a network that it did not make.
    """
    layers = getattr(module, "_fastgen_layers", None)
    if layers is None:
        raise ValueError("module: fastgen.fuse did not return it; explain what fuse returned")
    return "\n".join(map(_told, layers)) or "no transposed convolution was found"


def _told(layer: Layer) -> str:
    parts = [p for p in (layer.norm, layer.activation) if p]
    done = f"with {' and '.join(parts)}" if parts else "alone"
    return f"{layer.name or 'the module'}: {done}" + (f" ({layer.why})" if layer.why else "")


# ---- what is found -------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Through modules of the user's own, whose parts it sees."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, nn.Sequential | nn.ModuleList):
            return False
        return super().is_leaf_module(module, name) or parametrize.is_parametrized(module)


@contextlib.contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = training
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _traced(module: nn.Module) -> tuple[fx.Graph, str] | None:
    """(its graph, "" or where it is another one: in training, without gradients, or with the
    defaults of ``forward``), or None."""
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    ways: dict[str, tuple[bool, bool, dict | None]] = {
        "": (False, True, None),
        "in training": (True, True, None),
        "without gradients": (False, False, None),
    }
    if defaults:
        ways[f"with the defaults of {', '.join(defaults)}"] = False, True, defaults
    graphs, told = [], []
    for training, grad, given in ways.values():
        with _in_mode(module, training), torch.set_grad_enabled(grad):
            try:
                graphs.append(_Tracer().trace(module, given))
            except Exception as error:
                logger.info("fuse: torch.fx cannot trace %s: %s", type(module).__name__, error)
                return None
        inner = [n for n in graphs[-1].nodes if n.op not in ("placeholder", "output")]
        told.append([(n.op, n.target, str(n.args), str(n.kwargs)) for n in inner])
    differs = [way for way, other in zip(ways, told, strict=True) if other != told[0]]
    if any(n.op == "get_attr" and "_constant" in str(n.target) for n in graphs[0].nodes):
        differs.append("at every call, by tensors that it makes")
    return graphs[0], differs[0] if differs else ""


def _convs(module: nn.Module) -> list[str]:
    return [n for n, m in module.named_modules() if isinstance(m, nn.modules.conv._ConvTransposeNd)]


def _traceable(module: nn.Module, path: str = "") -> Iterator[tuple[str, fx.Graph | None, str]]:
    """(path, graph, where that is another one) of the largest modules that torch.fx can trace;
    graph None: of a transposed convolution that what it cannot trace calls."""
    if not _convs(module):
        return
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        yield path, None, ""
        return
    traced = None if isinstance(module, nn.ModuleList | nn.ModuleDict) else _traced(module)
    if traced is not None:
        yield path, *traced
        return
    for name, child in module.named_children():
        yield from _traceable(child, _joined(path, name))


def _joined(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _matches(module: nn.Module, graph: fx.Graph, places: Counter[int]) -> list[_Match]:
    calls = Counter(n.target for n in graph.nodes if n.op == "call_module")
    found = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        conv = module.get_submodule(name)
        if not isinstance(conv, nn.modules.conv._ConvTransposeNd):
            continue
        if calls[name] > 1 or places[id(conv)] > 1:
            found.append(_Match(name, why="it is called more than once"))
            continue
        if _is_patched(conv) or getattr(conv, "activation", None):
            why = "it has hooks" if _is_patched(conv) else "it has its activation"
            found.append(_Match(name, why=why))
            continue
        last, norm = node, None
        behind, why = _only_user(last)
        if behind is not None and behind.op == "call_module":
            candidate = module.get_submodule(str(behind.target))
            refusal = _norm_refusal(candidate, max(calls[behind.target], places[id(candidate)]))
            if refusal == "":
                norm, last = str(behind.target), behind
                behind, why = _only_user(last)
            elif refusal is not None:
                found.append(_Match(name, why=refusal))
                continue
        activation, slope = _activation(module, behind) if behind is not None else (None, 0.2)
        if activation is None or behind is None:
            if behind is not None and behind.op == "call_module" and not why:
                kind = type(module.get_submodule(str(behind.target))).__name__
                why = f"{kind} behind it is not fused" if _conv_of(module, behind) is None else ""
            match = _Match(name, norm, why=why)
        else:
            target = str(behind.target)
            own = behind.op == "call_module" and calls[behind.target] == 1
            own = own and places[id(module.get_submodule(target))] == 1
            where = {"act_module": target} if own else {"act_node": behind.name}
            match, last = _Match(name, norm, activation, slope, **where), behind
        user, _ = _only_user(last)
        found.append(match._replace(next=_conv_of(module, user)))
    return found


def _conv_of(module: nn.Module, node: fx.Node | None) -> str | None:
    if node is None or node.op != "call_module":
        return None
    conv = module.get_submodule(str(node.target))
    is_conv = isinstance(conv, nn.modules.conv._ConvTransposeNd) and conv.groups == 1
    return str(node.target) if is_conv else None


def _is_patched(module: nn.Module) -> bool:
    """Whether it does more than its class says."""
    hooks = module._forward_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def _only_user(node: fx.Node) -> tuple[fx.Node | None, str]:
    """What alone reads a node's result first, and why none does."""
    users = list(node.users)
    if len(users) != 1:
        return None, "its result is read more than once"
    user = users[0]
    if not user.args or user.args[0] is not node or list(user.all_input_nodes) != [node]:
        return None, ""
    return user, ""


def _norm_refusal(norm: nn.Module, calls: int) -> str | None:
    """Why a module behind cannot be folded, "" where it can, None where it is no normalisation."""
    kind = type(norm).__name__
    if isinstance(norm, nn.GroupNorm | nn.LayerNorm | nn.LocalResponseNorm):
        return f"{kind} has statistics of the sample"
    if not isinstance(norm, nn.modules.batchnorm._NormBase):
        return None
    if type(norm) not in PASSED:
        return f"{kind} is none that can be folded"
    if norm.running_mean is None or norm.running_var is None:
        return f"{kind} has statistics of the sample"
    if _is_patched(norm) or norm._forward_pre_hooks:
        return f"{kind} has hooks"
    if calls > 1:
        return f"{kind} is called more than once"
    return ""


def _activation(module: nn.Module, node: fx.Node) -> tuple[str | None, float]:
    if node.op == "call_module":
        act: Any = module.get_submodule(str(node.target))
        name = _MODULES.get(type(act))
        if name is None or _is_patched(act) or act._forward_pre_hooks:
            return None, 0.2
        if name == "gelu" and act.approximate != "none":
            return None, 0.2
        return name, float(act.negative_slope) if name == "leaky_relu" else 0.2
    if node.op not in ("call_function", "call_method"):
        return None, 0.2
    name = _FUNCTIONS.get(node.target)
    if name is None:
        return None, 0.2
    slope: Any = 0.2
    if name == "leaky_relu":
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        if not isinstance(slope, float | int):
            return None, 0.2
    if name == "gelu" and (len(node.args) > 1 or node.kwargs.get("approximate", "none") != "none"):
        return None, 0.2
    return name, float(slope)


# ---- what is made of it --------------------------------------------------------------------------


def _rewrite(
    root: nn.Module,
    path: str,
    graph: fx.Graph | None,
    differs: str,
    places: Counter[int],
    layers: list[Layer],
) -> None:
    """Fuses the transposed convolutions of the module at ``path``."""
    owner = root.get_submodule(path)
    if graph is None:
        why = "torch.fx cannot trace what calls it"
        layers.append(_fused_conv(owner, path, _Match(path, why=why)))
        return
    cut = []
    seen = set()
    matches = _matches(owner, graph, places)
    for match in matches:
        if match.conv in seen:
            continue
        seen.add(match.conv)
        if differs:
            match = _Match(match.conv, why=f"forward is another one {differs}")
        conv = owner.get_submodule(match.conv)
        norm = None if match.norm is None else owner.get_submodule(match.norm)
        layer = _fused_conv(conv, _joined(path, match.conv), match, norm)
        layers.append(layer)
        if layer.norm is not None and norm is not None:
            norm.__class__ = PASSED[type(norm)]
        if layer.activation is not None and match.act_module is not None:
            owner.set_submodule(match.act_module, nn.Identity())
        if layer.activation is not None and match.act_node is not None:
            cut.append(match.act_node)
    if not differs:
        _lay_out_chains(owner, matches)
    for name in _convs(owner):  # those that the graph does not reach
        if name not in seen:
            unreached = _Match(name, why="forward does not call it")
            layers.append(_fused_conv(owner.get_submodule(name), _joined(path, name), unreached))
    if not cut:
        return
    for node in list(graph.nodes):
        if node.name in cut:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    forward = type(fx.GraphModule(owner, graph)).forward
    cls = type(owner)
    owner.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _lay_out_chains(owner: nn.Module, matches: list[_Match]) -> None:
    """Between transposed convolutions that follow each other results have their channels last,
    which is faster; the end of a chain is contiguous."""
    behind = {match.next for match in matches if match.next is not None}
    for match in matches:
        conv: Any = owner.get_submodule(match.conv)
        if isinstance(conv, _Fused) and match.next is not None:
            conv.memory_format = torch.channels_last
        elif isinstance(conv, _Fused) and match.conv in behind:
            conv.memory_format = torch.contiguous_format


def _fused_conv(conv: nn.Module, name: str, match: _Match, norm: nn.Module | None = None) -> Layer:
    told = Layer(name, None if norm is None else type(norm).__name__, match.activation, match.why)
    cls = type(conv)
    if isinstance(conv, _Fused):
        norm_class = None if conv._norm is None else conv._norm_class.__name__
        return told._replace(norm=norm_class, activation=conv.activation, why="fused before")
    plain = cls.__mro__[1] if parametrize.is_parametrized(conv) else cls
    if plain not in FUSED:
        return told._replace(norm=None, activation=None, why=f"{cls.__name__} is left as it is")
    for hook in list(conv._forward_pre_hooks.values()):
        removed = _REMOVERS.get(type(hook).__name__)
        if removed is not None:
            what, remove = removed
            remove(conv)
            told = told._replace(why="; ".join(filter(None, (told.why, f"{what} removed"))))
    if plain is cls:
        conv.__class__ = FUSED[cls]
    else:  # what torch made of the class, of another base
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        conv.__class__ = type(cls.__name__, (FUSED[plain],), own)
    cast(_Fused, conv)._lay_out_weight()
    if norm is not None:
        conv.__dict__["_norm"], conv.__dict__["_norm_class"] = norm, type(norm)
    if match.activation is not None:
        conv.__dict__["activation"] = match.activation
        conv.__dict__["negative_slope"] = match.slope
    return told


_REMOVERS: dict[str, tuple[str, Any]] = {
    "WeightNorm": ("weight norm", nn.utils.remove_weight_norm),
    "SpectralNorm": ("spectral norm", nn.utils.remove_spectral_norm),
}


def _lay_out(module: nn.Module, memory_format: torch.memory_format) -> None:
    last = memory_format is not torch.contiguous_format
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for child in module.modules():
        if isinstance(child, _Fused):
            child.memory_format = memory_format
        if isinstance(child, nn.modules.conv._ConvNd) and child.weight.ndim in formats:
            own = formats[child.weight.ndim] if last else memory_format
            child.to(memory_format=own)  # type: ignore[call-overload]


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    for child in module.modules():
        if type(child) in PASSED.values() and dtype is not torch.float64:
            continue
        tensors: list[dict[str, Any]] = [child._parameters, child._buffers]
        for held in tensors:
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.data.to(dtype)
                else:
                    held[name] = tensor.to(dtype)
