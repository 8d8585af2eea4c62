"""A record of an evaluation: all that a card needs to say, in a small JSON file, without the values per block."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation.files import write_whole
from codd_ppl.evaluation.likelihood import Model
from codd_ppl.evaluation.metrics import word_perplexity
from codd_ppl.evaluation.table import NelboTable

__all__ = ["FORMAT", "Row", "evaluation_record", "load_record", "save_record"]

FORMAT = "codd_ppl evaluation 1"
EQUIVALENT = 4
"""Number of coupled steps that is compared with factorised steps of the same bound, and of the same time."""


@dataclass(frozen=True)
class Row:
    """A model of the table, and what the record says of it.

    Attributes:
        model: network and coupling, as `nelbo_table` takes them.
        role: "factorised": what others are compared with; "coupled"; "control": of the coupling.
        against: name of the factorised row of the same network; None for that row itself.
        parts: what it is made of: JSON values.
    """

    model: Model
    role: Literal["factorised", "coupled", "control"]
    against: str | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)


def evaluation_record(
    table: NelboTable,
    rows: Mapping[str, Row],
    *,
    command: str,
    device: str,
    versions: Mapping[str, str],
    text: Mapping[str, Any],
    vocab: int,
    tokens_per_word: float | None = None,
    network_seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What is known of an evaluation, as JSON values; what JSON lacks becomes the string "inf", "-inf" or "nan".

    For every model and T: bits per token and standard error, seconds per sample if they were measured, perplexity per
    word if ``tokens_per_word`` is given. Beside the factorised row of its network: the paired difference (mean and
    standard error, negative is better) and the gap closed with its 95 % interval ([value, low, high]). For every model:
    the relative change of the bound at T = sites, and the median over T of the ratio of seconds ("step_time"). For all
    but controls also the relative gain at every T, the factorised steps that 4 steps equal, and those of the same time.

    Args:
        table: the bounds.
        rows: every model of the table, in its order.
        command: as it was typed.
        device: see `codd_ppl.evaluation.machine.describe_device`.
        versions: of codd_ppl and torch.
        text: what was read: files, blocks, tokens.
        vocab: number of tokens in the vocabulary.
        tokens_per_word: of the text, for perplexities per word.
        network_seconds: of one call of the network per sequence, for factorised rows (`time_network`). Where sampling
            was timed, too, coupled rows get "coupling_time": what they add to a step, as a share of that.

    Raises:
        ConfigError: rows that aren't the models of the table, or compared with a model that isn't there.
    """
    others = {row.against for row in rows.values() if row.against is not None}
    if set(rows) != set(table.models) or not others <= set(rows):
        raise ConfigError(
            f"rows: expected the models of the table ({', '.join(table.models)}), compared with one of them, found "
            f"{', '.join(rows)}, compared with {', '.join(sorted(others)) or 'none'}; make the table of these rows"
        )
    return {
        "format": FORMAT,
        "command": command,
        "date": date.today().isoformat(),
        "device": device,
        "versions": dict(versions),
        "text": dict(text),
        "sites": table.sites,
        "vocab": vocab,
        "settings": dict(table.settings),
        "models": {
            name: _model(table, name, row, tokens_per_word, network_seconds or {})
            for name, row in rows.items()
        },
    }


def _model(
    table: NelboTable,
    name: str,
    row: Row,
    tokens_per_word: float | None,
    network_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Parts and figures of one model."""
    found: dict[str, Any] = {"role": row.role, **row.parts}
    if name in network_seconds:
        found["network_seconds"] = _numbers(network_seconds[name])[0]
    steps = sorted(table.values[name])
    nelbo = {str(T): _cell(table, name, T, row, tokens_per_word) for T in steps}
    base = row.against
    if base is not None:
        shared = [T for T in steps if T in table.values[base]]
        found["against"] = base
        if table.sites in shared:
            gain = table.relative_gain(name, base, table.sites)
            found["change_at_sites"] = _numbers(-gain.value, -gain.high, -gain.low)
        if EQUIVALENT in shared and row.role != "control":
            equal = table.equivalent_steps(name, base, EQUIVALENT)
            steps_and_ends = _numbers(equal.steps, equal.low, equal.high)
            found["equivalent_steps"] = {
                "T": EQUIVALENT,
                "relation": equal.relation,
                "steps": steps_and_ends,
            }
            count, bits = table.in_the_same_time(name, base, EQUIVALENT)
            if not math.isnan(count):
                same = _numbers(count, bits, digits=5)
                found["in_the_same_time"] = {"T": EQUIVALENT, "steps": same[0], "bits_per_token": same[1]}
        ratios = [table.seconds(name, T) / table.seconds(base, T) for T in shared]
        measured = [ratio for ratio in ratios if math.isfinite(ratio)]
        if measured:
            found["step_time"] = _numbers(median(measured))[0]
        few = [T for T in shared if table.sites >= 8 * T]  # where hardly a step has nothing to reveal
        added = [(table.seconds(name, T) - table.seconds(base, T)) / T for T in few]
        added = [seconds for seconds in added if math.isfinite(seconds)]
        if base in network_seconds and added:
            found["coupling_time"] = _numbers(median(added) / network_seconds[base])[0]
    return {**found, "nelbo": nelbo}


def _cell(table: NelboTable, name: str, T: int, row: Row, tokens_per_word: float | None) -> dict[str, Any]:
    """Figures of one model at one T."""
    base = row.against
    cell: dict[str, Any] = {
        "bits_per_token": _numbers(table.mean(name, T), digits=5)[0],
        "standard_error": _numbers(table.standard_error(name, T))[0],
    }
    if not math.isnan(table.seconds(name, T)):
        cell["seconds_per_sample"] = _numbers(table.seconds(name, T))[0]
    if tokens_per_word is not None:
        cell["word_perplexity"] = _numbers(word_perplexity(table.mean(name, T), tokens_per_word), digits=5)[0]
    if base is None or T not in table.values[base]:
        return cell
    cell["difference"] = _numbers(*table.difference(name, base, T))
    if row.role != "control":
        gain = table.relative_gain(name, base, T)
        cell["relative_gain"] = _numbers(gain.value, gain.low, gain.high)
    if table.sites > T and table.sites in table.values[base]:
        gap = table.gap_closed(name, base, T)
        cell["gap_closed"] = _numbers(gap.value, gap.low, gap.high)
    return cell


def _numbers(*values: float, digits: int = 4) -> list[float | str]:
    """Rounded; what JSON lacks becomes a string, which ``float`` reads."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else str(value) for value in values]


def save_record(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write as JSON that a person can read: a line for each model and T. There is never half a file."""
    return write_whole(path, _layout(record, 0) + "\n")


def _layout(value: Any, depth: int) -> str:
    if not isinstance(value, Mapping) or not any(isinstance(v, Mapping) for v in value.values()):
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    pad = " " * (depth + 1)
    lines = [
        f"{pad}{json.dumps(str(k), ensure_ascii=False)}: {_layout(v, depth + 1)}" for k, v in value.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def load_record(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read what ``save_record`` wrote; None if it is JSON of another kind (results of something else).

    Raises:
        DataError: no such file, no JSON, or a record that lacks something.
    """
    remedy = "write it again with `codd evaluate .. --output`"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected JSON results, but {type(error).__name__}: {error}; {remedy}"
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return None
    try:
        for key in ("command", "date", "device", "versions", "text", "settings", "vocab"):
            data[key]
        if not data["models"] or not isinstance(data["sites"], int):
            raise ValueError("no models, or sites that are no number")
        for row in data["models"].values():
            for T, cell in row["nelbo"].items():
                int(T), float(cell["bits_per_token"]), float(cell["standard_error"])
            if row["role"] not in ("factorised", "coupled", "control"):
                raise ValueError(f"role {row['role']!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: expected a record as save_record writes it, but {type(error).__name__}: {error}; {remedy}"
        ) from error
    return data
