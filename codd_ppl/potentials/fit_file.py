"""Where a run of expectation maximisation stands, on disk: killed in the middle, it goes on to the same result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.fingerprint import value_text
from codd_ppl.folders import whole_file
from codd_ppl.potentials.fit import Fit, Problem
from codd_ppl.potentials.running_counts import RunningCounts
from codd_ppl.potentials.starts import Start
from codd_ppl.potentials.trace import Trace

__all__ = ["FitFile", "fit_key"]

FORMAT = "codd_ppl fit 1"


def fit_key(problem: Problem, start: Start, **settings: Any) -> str:
    """A hash of the text and of all that the course of a fit depends on, hexadecimal.

    Of a start that isn't a dataclass, the class alone.
    """
    digest = hashlib.sha256(
        repr((*problem.graph.variables.values(), *problem.graph.factors.values())).encode()
    )
    for blocks in (problem.blocks, problem.valid_blocks):
        if blocks is not None:
            digest.update(f"{blocks.dtype} {tuple(blocks.shape)}".encode())
            digest.update(blocks.contiguous().view(torch.uint8).numpy().data)
    names = ("batch_size", "step_power", "smoothing", "tolerance", "dtype", "keep_zeros")
    digest.update(repr([(name, getattr(problem, name)) for name in names]).encode())
    digest.update(value_text([type(start).__qualname__, start, settings]).encode())
    return digest.hexdigest()[:32]


class FitFile:
    """The file of one fit, written whole.

    Args:
        path: a .safetensors file; folders are made.
        key: of the fit, from :func:`fit_key`.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        self.path, self.key = Path(path), key

    def save(self, fit: Fit) -> None:
        """Write where a fit stands between two updates."""
        tensors = {
            f"{i}.{part}": value.contiguous()
            for i, counts in enumerate(fit.counts.values())
            for part, value in counts.state().items()
        }
        tensors |= {"generator": fit.generator.get_state(), "order": fit.order}
        notes = {
            "format": FORMAT,
            "key": self.key,
            "tables": json.dumps(list(fit.counts)),
            "trace": json.dumps(asdict(fit.trace)),
        }
        with whole_file(self.path) as draft:
            save_file(tensors, draft, metadata=notes)

    def load(self, problem: Problem, began: float) -> Fit | None:
        """The fit as it was saved; None if there is no file.

        Args:
            problem: of the fit.
            began: when this run began, by ``time.perf_counter``; the seconds of the trace go on from the saved ones.

        Raises:
            DataError: something else is there.
            ConfigError: it is of another text or other settings.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                notes: Mapping[str, str] = file.metadata() or {}
                if notes.get("format") != FORMAT:
                    raise ValueError(f"format {notes.get('format')!r}")
                if notes["key"] != self.key:
                    raise ConfigError(
                        f"{self.path}: expected a fit of this text with these settings, found another one; give "
                        "another path, or remove the file to begin anew"
                    )
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                names, trace = json.loads(notes["tables"]), json.loads(notes["trace"])
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise DataError(
                f"{self.path}: expected where a fit stood, but {type(error).__name__}: {error}; remove the file to "
                "begin anew"
            ) from error
        counts = {}
        for i, name in enumerate(names):
            own = f"{i}."
            state = {
                k.removeprefix(own): v.to(problem.device) for k, v in tensors.items() if k.startswith(own)
            }
            counts[name] = RunningCounts.of_state(state)
        trace["held_out"] = [tuple(pair) for pair in trace["held_out"]]
        return Fit.resumed(problem, counts, Trace(**trace), tensors["generator"], tensors["order"], began)
