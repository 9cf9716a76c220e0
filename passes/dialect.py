"""One vocabulary for every capture: Dynamo, symbolic_trace, torch.export, torch or aten.

:func:`read` turns an fx node into an :class:`Op`: a name of the vocabulary and its arguments by
name.  ``torch.add``, ``Tensor.add_``, ``operator.iadd`` and ``aten.add.Tensor`` are all ``add``; that
the node also writes to its input is said by :attr:`Op.mutates`.
"""

from __future__ import annotations

import functools
import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_SIGNATURES: dict[str, str] = {
    # products
    "matmul": "input other",
    "baddbmm": "bias input other * beta alpha",
    "einsum": "equation *operands",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale enable_gqa",
    # the softmax and what surrounds it
    "softmax": "input dim dtype",
    "safe_softmax": "input dim dtype",
    "log_softmax": "input dim dtype",
    "logsumexp": "input dim keepdim",
    "dropout": "input p training inplace",
    "native_dropout": "input p train",
    # arithmetic
    "add": "input other * alpha",
    "sub": "input other * alpha",
    "rsub": "input other * alpha",
    "mul": "input other",
    "div": "input other * rounding_mode",
    "floordiv": "input other",
    "mod": "input other",
    "neg": "input",
    "exp": "input",
    "log": "input",
    "tanh": "input",
    "sqrt": "input",
    "rsqrt": "input",
    "abs": "input",
    "sigmoid": "input",
    "floor": "input",
    "ceil": "input",
    "round": "input * decimals",
    "trunc": "input",
    "sign": "input",
    "log2": "input",
    "log10": "input",
    "log1p": "input",
    "exp2": "input",
    "expm1": "input",
    "square": "input",
    "erf": "input",
    "sin": "input",
    "cos": "input",
    "relu": "input inplace",
    "reciprocal": "input",
    "pow": "input exponent",
    "minimum": "input other",
    "maximum": "input other",
    "clamp": "input min max",
    "clamp_min": "input min",
    "clamp_max": "input max",
    "amax": "input dim keepdim",
    "max": "input dim keepdim",
    "min": "input dim keepdim",
    "sum": "input dim keepdim dtype",
    "any": "input dim keepdim",
    "all": "input dim keepdim",
    # conditions
    "le": "input other",
    "lt": "input other",
    "ge": "input other",
    "gt": "input other",
    "eq": "input other",
    "ne": "input other",
    "and": "input other",
    "or": "input other",
    "xor": "input other",
    "not": "input",
    "isnan": "input",
    "nan_to_num": "input nan posinf neginf",
    "where": "condition input other",
    "masked_fill": "input mask value",
    "tril": "input diagonal",
    "triu": "input diagonal",
    # casts
    "to": "input *spec",
    "to_copy": "input",
    "type_as": "input other",
    "float": "input",
    "double": "input",
    "half": "input",
    "bfloat16": "input",
    "bool": "input",
    "long": "input",
    "int": "input",
    # index only
    "view": "input *shape",
    "reshape": "input *shape",
    "reshape_as": "input other",
    "flatten": "input start_dim end_dim",
    "unflatten": "input dim sizes",
    "unsqueeze": "input dim",
    "squeeze": "input dim",
    "transpose": "input dim0 dim1",
    "permute": "input *dims",
    "movedim": "input source destination",
    "t": "input",
    "mT": "input",
    "T": "input",
    "expand": "input *sizes",
    "expand_as": "input other",
    "contiguous": "input",
    "clone": "input",
    "alias": "input",
    "detach": "input",
    "getitem": "input index",
    "index": "input indices",
    "gather": "input dim index",
    "take_along_dim": "input index dim",
    "index_select": "input dim index",
    "slice": "input dim start end step",
    "select": "input dim index",
    "narrow": "input dim start length",
    "repeat": "input *sizes",
    "repeat_interleave": "input repeats dim",
    "cat": "tensors dim",
    "chunk": "input chunks dim",
    "split": "input split_size dim",
    "unbind": "input dim",
    "pad": "input pad mode value",
    # tensors known by formula
    "arange": "start end step",
    "diff": "input n dim prepend append",
    "cumsum": "input dim dtype",
    "eye": "n m",
    "full": "size value",
    "zeros": "*size",
    "ones": "*size",
    "new_full": "input size value",
    "new_zeros": "input *size",
    "new_ones": "input *size",
    "full_like": "input value",
    "zeros_like": "input",
    "ones_like": "input",
    "tensor": "data",
    "scalar_tensor": "data",
}
"""Argument names by position; ``*name`` takes the rest, ``*`` alone starts the keyword-only ones."""

_SYNONYMS = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "mm": "matmul",
    "bmm": "matmul",
    "special_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_safe_softmax": "safe_softmax",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "and_": "and",
    "or_": "or",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "bitwise_not": "not",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "logical_xor": "xor",
    "invert": "not",
    "inv": "not",
    "_to_copy": "to_copy",
    "type": "to",
    "_unsafe_view": "reshape",
    "_unsafe_index": "index",
    "numpy_T": "T",
    "view_as": "reshape_as",
    "moveaxis": "movedim",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "concat": "cat",
    "concatenate": "cat",
    "broadcast_to": "expand",
    "constant_pad_nd": "pad",
    "adjoint": "mT",
    "lift_fresh_copy": "alias",
    "lift_fresh": "alias",
    "split_with_sizes": "split",
}

_IN_PLACE_OPERATORS = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "ifloordiv": "floordiv",
    "imod": "mod",
    "iand": "and",
    "ior": "or",
    "ixor": "xor",
}

_KEYWORD_SYNONYMS = {
    "self": "input",
    "tensor": "input",
    "axis": "dim",
    "mat2": "other",
    "batch1": "input",
    "batch2": "other",
    "size": "sizes",
    "fill_value": "value",
    "train": "training",
    "split_sizes": "split_size",
    "split_size_or_sections": "split_size",
}

_WITHOUT_MEANING = {
    "dtype", "device", "layout", "requires_grad", "pin_memory", "memory_format", "non_blocking", "copy",
    "inplace", "half_to_float", "_stacklevel",
}  # fmt: skip
"""Keywords that say nothing which the example value of the result does not say, or that others read."""

PRODUCTS = {"matmul", "baddbmm", "einsum"}
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "floordiv", "mod", "minimum", "maximum", "pow"}
COMPARISON = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}
CASTS = {"to", "to_copy", "type_as", "float", "double", "half", "bfloat16", "bool", "long", "int"}
VIEWS = {
    "view", "reshape", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute",
    "movedim", "t", "mT", "T", "expand", "expand_as", "alias", "detach", "slice", "select", "narrow", "chunk",
    "split", "unbind",
}  # fmt: skip
"""Index-only operations whose result may share memory with the input."""


@dataclass(frozen=True)
class Op:
    """What a node computes: ``name``, its ``args`` by name, and whether it writes to its input."""

    name: str
    args: dict[str, Any]
    mutates: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        value = self.args.get(name, default)
        return default if value is None else value

    @property
    def input(self) -> Any:
        return self.args["input"]


def read(node: fx.Node) -> Op | None:
    """The operation of ``node``, or ``None`` where it is outside the vocabulary."""
    if node.op == "call_module":
        return _read_module(node)
    if node.op not in ("call_function", "call_method"):
        return None
    name, mutates = _name(node)
    if name == "getattr" and len(node.args) == 2 and node.args[1] in ("T", "mT"):
        return Op(str(node.args[1]), {"input": node.args[0]})
    if name == "getattr" and len(node.args) == 2 and node.args[1] == "values":
        # The named tuple of max, sort and the like.
        return Op("getitem", {"input": node.args[0], "index": 0})
    if name == "arange":
        return _arange(node)
    if name == "embedding":
        return _embedding(node)
    if name == "einsum" and (permuted := _permutation(node)) is not None:
        return permuted
    signature = _SIGNATURES.get(name)
    if signature is None:
        return None
    args = _bind(signature, node)
    if args is None:
        return None
    if args.get("out") is not None:
        return None
    if name == "view" and ("dtype" in args or any(isinstance(a, torch.dtype) for a in args["shape"])):
        # Reads the bits as another type.
        return None
    return Op(name, args, mutates or args.get("inplace") is True)


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory ``node`` writes to."""
    first = [a for a in node.args[:1] if isinstance(a, fx.Node)]
    if node.op == "call_module":
        return first if getattr(_module(node), "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        written = []
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                written += _tensors(value)
        return written
    outs = _tensors(node.kwargs.get("out"))
    if _name(node)[1] or _inplace_argument(node):
        return _tensors(node.args[0] if node.args else None) + outs
    return outs


def _tensors(x: Any) -> list[fx.Node]:
    """The nodes of an argument that is one tensor or a list of them."""
    return [n for n in (x if isinstance(x, (list, tuple)) else (x,)) if isinstance(n, fx.Node)]


def _inplace_argument(node: fx.Node) -> bool:
    """Whether ``inplace=True`` is said, by name or, as in ``F.relu(x, True)``, by position."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _inplace_position(node.target) if callable(node.target) else None
    return position is not None and len(node.args) > position and node.args[position] is not False


@functools.lru_cache(maxsize=1024)
def _inplace_position(target: Any) -> int | None:
    try:
        parameters = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def _name(node: fx.Node) -> tuple[str, bool]:
    """The vocabulary's name of the target, and whether the spelling is an in-place one."""
    target = node.target
    if isinstance(target, str):
        raw = target
    elif isinstance(target, torch._ops.OpOverload):
        if target.namespace not in ("aten", "prims"):
            return str(target), target._schema.is_mutable
        raw = target._schema.name.rpartition("::")[2]
    elif target is operator.not_ or not _is_torch(target):
        return "", False
    else:
        raw = getattr(target, "__name__", str(target))
    if raw in _IN_PLACE_OPERATORS and getattr(target, "__module__", "") == "_operator":
        return _IN_PLACE_OPERATORS[raw], True
    if raw in ("setitem", "__setitem__"):
        return "setitem", True
    raw = raw.strip("_") if raw.startswith("__") and raw.endswith("__") else raw
    if raw in _SYNONYMS:
        return _SYNONYMS[raw], False
    if raw.endswith("_") and not raw.endswith("__"):
        return _SYNONYMS.get(raw[:-1], raw[:-1]), True
    return raw, False


def _is_torch(target: Any) -> bool:
    """Whether a function is PyTorch's or Python's own: others may have the same names."""
    module = getattr(target, "__module__", None)
    if module is None:
        return True
    if module.startswith("torch._ops."):
        return module in ("torch._ops.aten", "torch._ops.prims")
    own = module == "torch" or module.startswith("torch.")
    return (own and not module.startswith("torch.masked")) or module in ("_operator", "builtins")


def _bind(signature: str, node: fx.Node) -> dict[str, Any] | None:
    names = signature.split()
    bound: dict[str, Any] = {}
    position = 0
    args = list(node.args)
    for name in names:
        if name == "*":
            break
        if name.startswith("*"):
            rest = args[position:]
            if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
                rest = list(rest[0])
            if rest:
                bound[name[1:]] = list(rest)
            position = len(args)
        elif position < len(args):
            bound[name] = args[position]
            position += 1
    if position < len(args):
        # More positional arguments than the vocabulary knows: they may change the meaning.
        return None
    known = {name.lstrip("*") for name in names}
    for key, value in node.kwargs.items():
        key = key if key in known else _KEYWORD_SYNONYMS.get(key, key)
        key = next((k for k in ("shape", "size") if key == "sizes" and k in known), key)
        if key not in known and key not in _WITHOUT_MEANING and value is not None:
            return None
        bound[key] = value
    return bound


def _arange(node: fx.Node) -> Op | None:
    args = [*node.args]
    start, end, step = 0, node.kwargs.get("end"), node.kwargs.get("step", 1)
    if "start" in node.kwargs:
        start = node.kwargs["start"]  # type: ignore[assignment]
    if len(args) == 1:
        end = args[0]
    elif len(args) >= 2:
        start, end = args[0], args[1]  # type: ignore[assignment]
        step = args[2] if len(args) > 2 else step
    return Op("arange", {"start": start, "end": end, "step": step, "dtype": node.kwargs.get("dtype")})


def _embedding(node: fx.Node) -> Op | None:
    """``weight[input]``; not where a row gets no gradient, or is changed."""
    names = ["input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"]
    no_row: Any = None
    if isinstance(node.target, torch._ops.OpOverload):
        names, no_row = ["weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"], -1
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    special = ("max_norm", "scale_grad_by_freq", "sparse")
    if given.get("padding_idx", no_row) != no_row or any(given.get(name) for name in special):
        return None
    return Op("embedding", {"input": given.get("input", given.get("indices")), "weight": given["weight"]})


def _permutation(node: fx.Node) -> Op | None:
    """``einsum("ijbn->bnij", x)``, which is a view."""
    args = _bind(_SIGNATURES["einsum"], node)
    if args is None or not isinstance(args.get("equation"), str) or len(args.get("operands", ())) != 1:
        return None
    term, arrow, out = args["equation"].replace(" ", "").partition("->")
    if not arrow or not term.isalpha() or sorted(term) != sorted(out) or len(set(term)) != len(term):
        return None
    return Op("permute", {"input": args["operands"][0], "dims": [term.index(letter) for letter in out]})


def _module(node: fx.Node) -> torch.nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def _read_module(node: fx.Node) -> Op | None:
    module = _module(node)
    if isinstance(module, torch.nn.Softmax):
        return Op("softmax", {"input": node.args[0], "dim": module.dim})
    if isinstance(module, torch.nn.Dropout):
        args = {"input": node.args[0], "p": module.p, "training": module.training}
        return Op("dropout", args, module.inplace)
    if isinstance(module, torch.nn.Identity):
        return Op("alias", {"input": node.args[0]})
    return None
