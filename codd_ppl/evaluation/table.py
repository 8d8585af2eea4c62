"""A table of T-step likelihood bounds, and the figures that are read off it."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.evaluation.bootstrap import Interval, paired_bootstrap
from codd_ppl.evaluation.comparison import EquivalentSteps, equivalent_steps, in_the_same_time
from codd_ppl.evaluation.files import write_whole
from codd_ppl.typing import Float, Tensor

__all__ = ["NelboTable"]


@dataclass(frozen=True)
class NelboTable:
    """NELBO_T in bits per token, per model, number of steps T and block.

    Attributes:
        sites: tokens per block; T = sites stands for T -> infinity in ``gap_closed``.
        values: model name -> T -> (blocks,) float64, bits per token of each block. All entries of one T were
            computed with the same noise, so differences of models are paired.
        settings: how it was computed (schedule, seed, draws): JSON values.
        seconds_per_sample: model name -> T -> wall clock of sampling, where it was measured (`time_sampling`).
    """

    sites: int
    values: Mapping[str, Mapping[int, Float[Tensor, " blocks"]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds_per_sample: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

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
            ConfigError: T >= sites (where the ratio is 0/0 or noise), or T or sites not in the table.
        """
        if self.sites <= T:
            raise ConfigError(
                f"T: expected less than the {self.sites} sites, where there is no gap, found {T}; pass a smaller T"
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
        curve = torch.stack([self.per_block(factorised, N) for N in grid])
        return equivalent_steps(self.per_block(coupled, T), curve, grid, resamples, level, seed)

    def with_seconds(self, seconds: Mapping[str, Mapping[int, float]], **settings: Any) -> "NelboTable":
        """The same table with seconds per sample beside it, from `time_sampling`; ``settings`` are noted.

        Raises:
            ConfigError: seconds of a model that isn't in the table.
        """
        unknown = sorted(seconds.keys() - self.values.keys())
        if unknown:
            raise ConfigError(
                f"seconds: expected models of the table ({', '.join(self.models)}), found {', '.join(unknown)}; "
                "time the models that the table was made of"
            )
        return replace(self, seconds_per_sample=dict(seconds), settings={**self.settings, **settings})

    def seconds(self, model: str, T: int) -> float:
        """Wall clock of one sample, seconds; nan where it wasn't measured."""
        return self.seconds_per_sample.get(model, {}).get(T, math.nan)

    def in_the_same_time(self, coupled: str, factorised: str, T: int) -> tuple[float, float]:
        """Steps that the factorised model makes while the coupled one makes T, and its bound there, bits per token.

        Both are interpolated and clamped to the steps in the table; (nan, nan) where the times weren't measured.
        """
        bounds = {N: self.mean(factorised, N) for N in self.values.get(factorised, ())}
        return in_the_same_time(self.seconds_per_sample.get(factorised, {}), bounds, self.seconds(coupled, T))

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
            "seconds_per_sample": {
                model: {str(T): s for T, s in rows.items()} for model, rows in self.seconds_per_sample.items()
            },
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
            seconds = {
                model: {int(T): float(s) for T, s in rows.items()}
                for model, rows in data.get("seconds_per_sample", {}).items()
            }
            return cls(int(data["sites"]), values, dict(data["settings"]), seconds)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"table: expected the dictionary that NelboTable.to_dict writes, but {type(error).__name__}: {error}; "
                "compute the table again with nelbo_table and save it"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, through a temporary file in the same folder: there is never half a table."""
        write_whole(path, json.dumps(self.to_dict(), allow_nan=False))

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

    def render(
        self, factorised: str | None = None, equivalent: Sequence[int] = (4,), resamples: int = 2000
    ) -> RenderableType:
        """For ``rich.print``: see `codd_ppl.evaluation.rendering.render_table`."""
        from codd_ppl.evaluation.rendering import render_table  # which imports this module

        return render_table(self, factorised, equivalent, resamples)

    def __rich__(self) -> RenderableType:
        return self.render()
