"""A hash of a module's weights and settings, so that a changed teacher is noticed."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from codd_ppl.compiler import ContractionPlan
from codd_ppl.graphs import FactorGraph

__all__ = ["fingerprint"]


def fingerprint(module: nn.Module) -> str:
    """A hexadecimal hash of what a module computes with.

    Read are the state dict and, of the module and each of its parts, class and public attributes: numbers, strings,
    tensors, graphs, and lists, tuples, sets, dictionaries and dataclasses of them. Not read are mode, device and
    ``requires_grad``, names that begin with an underscore, and the inside of any other object (make an array a buffer).
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if k[0] != "_" and k != "training"}
        digest.update(
            f"{name}: {type(part).__module__}.{type(part).__qualname__}{_said(settings)}\n".encode()
        )
    digest.update(_said(dict(module.state_dict())).encode())
    return digest.hexdigest()[:32]


def _said(value: object) -> str:
    """A text that is the same for equal values; of an object that isn't plain data, its class."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | torch.dtype():
            return repr(value)
        case Tensor():
            whole = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(whole.numpy().data).hexdigest()}"
        case FactorGraph():
            return repr((*value.variables.values(), *value.factors.values()))
        case set() | frozenset():
            return _said(sorted(map(_said, value)))
        case list() | tuple():
            return f"[{', '.join(map(_said, value))}]"
        case dict():
            return f"{{{', '.join(sorted(f'{_said(k)}: {_said(v)}' for k, v in value.items()))}}}"
        case _ if is_dataclass(value) and not isinstance(
            value, type | ContractionPlan
        ):  # the graph makes the plan
            return _said({f.name: getattr(value, f.name) for f in fields(value)})
    return type(value).__qualname__
