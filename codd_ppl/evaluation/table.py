"""A table of T-step likelihood bounds, and the figures that are read off it."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation.bootstrap import Interval, paired_bootstrap
from codd_ppl.typing import Float, Tensor

__all__ = ["EquivalentSteps", "NelboTable"]


@dataclass(frozen=True)
class EquivalentSteps:
    """Number of factorised steps with the same bound; ``relation`` says whether that is known or only bounded.

    ``=``: interpolated. ``>=``: better than the factorised model at its largest number of steps in the table,
    which is ``steps``. ``<=``: no better than at its smallest. ``low`` and ``high`` are bootstrap percentiles,
    clamped to the steps in the table.
    """

    steps: float
    relation: str
    low: float
    high: float

    def __str__(self) -> str:
        sign = "" if self.relation == "=" else f"{self.relation} "
        return f"{sign}{self.steps:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class NelboTable:
    """NELBO_T in bits per token, per model, number of steps T and block.

    Attributes:
        sites: tokens per block; T = sites stands for T -> infinity in ``gap_closed``.
        values: model name -> T -> (blocks,) float64, bits per token of each block. All entries of one T were
            computed with the same noise, so differences of models are paired.
        settings: how it was computed (schedule, seed, draws): JSON values.
    """

    sites: int
    values: Mapping[str, Mapping[int, Float[Tensor, " blocks"]]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order given."""
        return tuple(self.values)

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps T, ascending."""
        return tuple(sorted({T for rows in self.values.values() for T in rows}))

    def per_block(self, model: str, T: int) -> Float[Tensor, " blocks"]:
        """Bits per token of each block.

        Raises:
            ConfigError: no such model or T in the table.
        """
        if model not in self.values:
            raise ConfigError(
                f"model: expected one of {', '.join(self.models)}, found {model!r}; pass a name of the table"
            )
        if T not in self.values[model]:
            raise ConfigError(
                f"T: expected one of {sorted(self.values[model])}, found {T}; "
                f"compute the table with {T} among its steps"
            )
        return self.values[model][T]

    def mean(self, model: str, T: int) -> float:
        """NELBO_T, bits per token."""
        return float(self.per_block(model, T).mean())

    def standard_error(self, model: str, T: int) -> float:
        """Standard error of the mean over blocks; nan for a single block.

        It holds the spread between texts and the noise of masking. The steps are stratified over the blocks,
        which it does not credit, so it errs on the large side.
        """
        values = self.per_block(model, T)
        return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

    def difference(self, model: str, other: str, T: int) -> tuple[float, float]:
        """Paired mean of model - other at T, and its standard error: far smaller than those of the two means."""
        paired = self.per_block(model, T) - self.per_block(other, T)
        error = float(paired.std() / math.sqrt(len(paired))) if len(paired) > 1 else math.nan
        return float(paired.mean()), error

    def gap_closed(
        self, coupled: str, factorised: str, T: int, resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> Interval:
        """(F_T - C_T) / (F_T - F_L), L = sites: 0 no better than independent tokens, 1 as good as one at a time.

        The interval is a paired bootstrap over blocks: all three means are taken on the same resampled
        blocks. It is (-inf, inf), and the value nan, where the data don't show that F_T > F_L.

        Raises:
            ConfigError: T = sites (the ratio is 0/0), or T or sites not in the table.
        """
        if self.sites == T:
            raise ConfigError(
                f"T: expected less than the {self.sites} sites, where there is no gap; pass a smaller T"
            )
        rows = [(factorised, T), (coupled, T), (factorised, self.sites)]

        def ratio(means: Tensor) -> Tensor:
            gap = means[0] - means[2]
            return torch.where(gap > 0, (means[0] - means[1]) / gap, torch.nan)

        return self._interval(rows, ratio, resamples, level, seed)

    def relative_gain(
        self, coupled: str, factorised: str, T: int, resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> Interval:
        """(F_T - C_T) / F_T: the share of the factorised bound that the coupling saves, with a paired bootstrap."""

        def ratio(means: Tensor) -> Tensor:
            return (means[0] - means[1]) / means[0]

        return self._interval([(factorised, T), (coupled, T)], ratio, resamples, level, seed)

    def equivalent_steps(
        self, coupled: str, factorised: str, T: int, resamples: int = 2000, level: float = 0.95, seed: int = 0
    ) -> EquivalentSteps:
        """N at which the factorised model reaches the coupled bound: NELBO_N[factorised] = NELBO_T[coupled].

        Linear interpolation in log2 N between the steps of the table, up to the first that is as good as the
        coupled model. Outside of the table only a bound is known, and said.
        """
        grid = sorted(self.values.get(factorised, ()))
        if not grid:
            self.per_block(factorised, T)  # says what is missing
        rows = [(coupled, T), *((factorised, N) for N in grid)]
        logs = torch.tensor(grid, dtype=torch.float64).log2()

        def crossing(means: Tensor) -> Tensor:
            target, curve = means[0], means[1:]
            reached = curve <= target
            first = reached.long().argmax(0)
            right = first.clamp(min(1, len(grid) - 1))
            left = (right - 1).clamp_min(0)
            high, low = curve.gather(0, left[None])[0], curve.gather(0, right[None])[0]
            share = ((high - target) / (high - low).clamp_min(torch.finfo(high.dtype).tiny)).clamp(0, 1)
            inside = logs[left] + share * (logs[right] - logs[left])
            return torch.where(reached[0], logs[0], torch.where(reached.any(0), inside, logs[-1]))

        interval = self._interval(rows, crossing, resamples, level, seed)
        target, curve = self.mean(coupled, T), [self.mean(factorised, N) for N in grid]
        relation = "<=" if target > curve[0] else "=" if min(curve) <= target else ">="
        return EquivalentSteps(2**interval.value, relation, 2**interval.low, 2**interval.high)

    def _interval(
        self,
        rows: list[tuple[str, int]],
        statistic: Callable[[Tensor], Tensor],
        resamples: int,
        level: float,
        seed: int,
    ) -> Interval:
        values = torch.stack([self.per_block(model, T) for model, T in rows])
        return paired_bootstrap(values, statistic, resamples, level, seed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that JSON lacks are the strings "inf", "-inf" and "nan"."""
        values = {
            model: {
                str(T): [v if math.isfinite(v) else str(v) for v in row.tolist()] for T, row in rows.items()
            }
            for model, rows in self.values.items()
        }
        return {
            "sites": self.sites,
            "unit": "bits per token",
            "settings": dict(self.settings),
            "values": values,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "NelboTable":
        """The inverse of ``to_dict``, exact to the last bit.

        Raises:
            DataError: not such a dictionary.
        """
        try:
            values = {
                model: {
                    int(T): torch.tensor([float(v) for v in row], dtype=torch.float64)
                    for T, row in rows.items()
                }
                for model, rows in data["values"].items()
            }
            return cls(sites=int(data["sites"]), values=values, settings=dict(data["settings"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"table: expected the dictionary that NelboTable.to_dict writes, but {type(error).__name__}: {error}; "
                "compute the table again with nelbo_table and save it"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, through a temporary file in the same folder: there is never half a table."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict(), allow_nan=False), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NelboTable":
        """Read what ``save`` wrote.

        Raises:
            DataError: missing file, or not such a table.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: expected a table written by NelboTable.save, but {type(error).__name__}: {error}; "
                "compute it with nelbo_table and save it"
            ) from error
        return cls.from_dict(data)

    def render(self, factorised: str | None = None) -> Table:
        """A rich table: NELBO_T with standard error, and gap_closed below, if told which model is factorised."""
        table = Table(title=f"NELBO_T, bits per token ({self.sites} sites; ± standard error)")
        table.add_column("model")
        for T in self.steps:
            table.add_column(f"T = {T}", justify="right")
        for model in self.models:
            has = self.values[model].keys()
            means = {T: f"{self.mean(model, T):.3f} ± {self.standard_error(model, T):.3f}" for T in has}
            table.add_row(model, *(means.get(T, "") for T in self.steps))
        if factorised is None:
            return table
        for model in self.models:
            if model == factorised:
                continue
            both = self.values[model].keys() & self.values[factorised].keys() - {self.sites}
            cells = [str(self.gap_closed(model, factorised, T)) if T in both else "" for T in self.steps]
            table.add_row(f"{model}: gap closed", *cells)
        return table

    def __rich__(self) -> Table:
        return self.render()
