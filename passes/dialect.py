"""One vocabulary for every capture: Dynamo, symbolic_trace, torch.export, torch or aten.

:func:`read` turns an fx node into an :class:`Op`: a name of the vocabulary and its arguments by
name.  ``torch.add``, ``Tensor.add_``, ``operator.iadd`` and ``aten.add.Tensor`` are all ``add``; that
the node also writes to its input is said by :attr:`Op.mutates`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_SIGNATURES: dict[str, str] = {
    # products
    "matmul": "input other",
    "bmm": "input other",
    "baddbmm": "bias input other * beta alpha",
    "einsum": "equation *operands",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale enable_gqa",
    # the softmax and what surrounds it
    "softmax": "input dim dtype",
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
    "reciprocal": "input",
    "pow": "input exponent",
    "minimum": "input other",
    "maximum": "input other",
    "clamp": "input min max",
    "amax": "input dim keepdim",
    "max": "input dim keepdim",
    "sum": "input dim keepdim dtype",
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
    "flatten": "input start_dim end_dim",
    "unflatten": "input dim sizes",
    "unsqueeze": "input dim",
    "squeeze": "input dim",
    "transpose": "input dim0 dim1",
    "permute": "input *dims",
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
    "clamp_min": "clamp_min",
    "special_softmax": "softmax",
    "_softmax": "softmax",
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
    "view_as": "reshape_as",
    "movedim": "movedim",
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
    "feature_dropout": "feature_dropout",
    "where_self": "where",
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
    "memory_format": "memory_format",
}

ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "floordiv", "mod", "minimum", "maximum", "pow"}
COMPARISON = {"le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!="}
CASTS = {"to", "to_copy", "type_as", "float", "double", "half", "bfloat16", "bool", "long", "int"}
VIEWS = {
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "t", "mT", "T",
    "expand", "expand_as", "alias", "detach", "slice", "select", "narrow", "chunk", "split", "unbind",
}  # fmt: skip
"""Index-only operations whose result may share memory with the input."""

_MUTATING_FUNCTIONS = {"setitem", "copy", "fill", "zero", "index_copy", "scatter", "index_put", "scatter_add"}


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
    if name == "arange":
        return _arange(node)
    signature = _SIGNATURES.get(name)
    if signature is None:
        return None
    args = _bind(signature, node)
    if args is None:
        return None
    if name in ("dropout", "native_dropout") and isinstance(node.target, torch._ops.OpOverload):
        args["training"] = args.get("training", True)
    if args.get("inplace") is True:
        mutates = True
    if args.get("out") is not None:
        return None
    return Op(name, args, mutates)


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory ``node`` writes to."""
    if node.op == "call_module":
        module = _module(node)
        return [a for a in node.args[:1] if isinstance(a, fx.Node)] if getattr(module, "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        written = []
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                written += [value] if isinstance(value, fx.Node) else []
        return written
    _, mutates = _name(node)
    written = [a for a in node.args[:1] if isinstance(a, fx.Node)] if mutates else []
    out = node.kwargs.get("out")
    if node.kwargs.get("inplace") is True or (_name(node)[0] == "dropout" and len(node.args) > 3 and node.args[3]):
        written += [a for a in node.args[:1] if isinstance(a, fx.Node)]
    return written + ([out] if isinstance(out, fx.Node) else [])


def _name(node: fx.Node) -> tuple[str, bool]:
    """The vocabulary's name of the target, and whether the spelling is an in-place one."""
    target = node.target
    if isinstance(target, str):
        raw = target
    elif isinstance(target, torch._ops.OpOverload):
        raw = target._schema.name.rpartition("::")[2]
        if raw == "where" or raw == "pow" or target.namespace not in ("aten", "prims"):
            raw = raw if target.namespace in ("aten", "prims") else str(target)
    else:
        raw = getattr(target, "__name__", str(target))
    if target is operator.not_:
        return "", False
    if raw in _IN_PLACE_OPERATORS and getattr(target, "__module__", "") == "_operator":
        return _IN_PLACE_OPERATORS[raw], True
    raw = raw.strip("_") if raw.startswith("__") and raw.endswith("__") else raw
    if raw in _SYNONYMS:
        return _SYNONYMS[raw], False
    if raw.endswith("_") and not raw.endswith("__"):
        base = raw[:-1]
        return _SYNONYMS.get(base, base), True
    return _SYNONYMS.get(raw, raw), raw in ("setitem",)


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
        # aten spells some keyword-only arguments of torch positionally; alpha and beta are the ones met.
        return None
    known = {name.lstrip("*") for name in names}
    for key, value in node.kwargs.items():
        key = key if key in known else _KEYWORD_SYNONYMS.get(key, key)
        if key == "sizes" and "shape" in known:
            key = "shape"
        if key == "sizes" and "size" in known:
            key = "size"
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
