"""What a value is, as a text or a hash: a changed teacher, or another start of a fit, is noticed."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from codd_ppl.compiler import ContractionPlan
from codd_ppl.graphs import FactorGraph

__all__ = ["fingerprint", "value_text"]


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
            f"{name}: {type(part).__module__}.{type(part).__qualname__}{value_text(settings)}\n".encode()
        )
    digest.update(value_text(dict(module.state_dict())).encode())
    return digest.hexdigest()[:32]


def value_text(value: object) -> str:
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
            return value_text(sorted(map(value_text, value)))
        case list() | tuple():
            return f"[{', '.join(map(value_text, value))}]"
        case dict():
            return f"{{{', '.join(sorted(f'{value_text(k)}: {value_text(v)}' for k, v in value.items()))}}}"
        case _ if is_dataclass(value) and not isinstance(
            value, type | ContractionPlan
        ):  # the graph makes the plan
            return value_text({f.name: getattr(value, f.name) for f in fields(value)})
    return type(value).__qualname__
