"""The records of one folder: the same evaluation, once or for several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from codd_ppl.errors import DataError
from codd_ppl.evaluation.record import load_record

__all__ = ["Seeds", "read_seeds", "results_files"]

SAME = ("sites", "vocab", "text")
"""What all records of a folder must agree in, beside their models and numbers of steps."""


@dataclass(frozen=True)
class Seeds:
    """Records of the same models on the same text; every figure is a list, one for each record."""

    records: Sequence[dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """The record that stands for all where they agree."""
        return self.records[0]

    @property
    def steps(self) -> list[int]:
        """All numbers of steps, ascending."""
        return sorted({int(T) for row in self.first["models"].values() for T in row["nelbo"]})

    def models(self, *roles: str) -> dict[str, dict[str, Any]]:
        """Name -> what the first record says of it, for models of these roles, in their order."""
        return {name: row for name, row in self.first["models"].items() if row["role"] in roles}

    def rows(self, model: str) -> list[dict[str, Any]]:
        """What each record says of a model."""
        return [record["models"][model] for record in self.records]

    def cells(self, model: str, T: int, figure: str) -> list[Any]:
        """A figure of a model at T in every record; empty if it isn't in all."""
        cells = [row["nelbo"].get(str(T), {}) for row in self.rows(model)]
        return [cell[figure] for cell in cells] if all(figure in cell for cell in cells) else []

    def bits(self, model: str, T: int) -> tuple[float, float] | None:
        """Bits per token, and their standard error, or their standard deviation over the records."""
        values = [float(value) for value in self.cells(model, T, "bits_per_token")]
        if not values:
            return None
        if len(values) > 1:
            return mean(values), stdev(values)
        return values[0], float(self.cells(model, T, "standard_error")[0])


def results_files(folder: Path) -> list[Path]:
    """``results*.json`` of a folder, ``results.json`` first."""
    found = [path for path in folder.glob("results*.json") if path.is_file()]
    return sorted(found, key=lambda path: (path.name != "results.json", path.name))


def read_seeds(folder: Path) -> Seeds | None:
    """All records of a folder; None if its results are of another kind.

    Raises:
        DataError: no results, damaged ones, or records that differ in text, sites, vocabulary, models or steps.
    """
    paths = results_files(folder)
    if not paths:
        raise DataError(
            f"{folder}: expected results.json, found none; write it with "
            f"`codd evaluate MODEL TEXT --output {folder}/results.json`"
        )
    found = {path.name: record for path in paths if (record := load_record(path)) is not None}
    if not found:
        return None
    (name, first), *others = found.items()
    for other, record in others:
        for what, one, two in (
            *((key, first[key], record[key]) for key in SAME),
            ("models and steps", _grid(first), _grid(record)),
        ):
            if one != two:
                raise DataError(
                    f"{folder}: expected the same {what} in all results*.json, as they are one evaluation for several "
                    f"seeds, found {one} in {name} and {two} in {other}; evaluate again, or move one to another folder"
                )
    return Seeds(list(found.values()))


def _grid(record: dict[str, Any]) -> dict[str, list[str]]:
    return {name: list(row["nelbo"]) for name, row in record["models"].items()}
