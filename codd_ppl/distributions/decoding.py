"""Draws of a coupled law that are sharpened, or ranked: what decoding asks beyond exact samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codd_ppl.compiler import ContractionPlan
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.inference import k_best
from codd_ppl.inference.hidden_path import HiddenPath
from codd_ppl.inference.leaves import Leaves
from codd_ppl.inference.sharpened import sample_sharpened
from codd_ppl.inference.site_by_site import Turns, draw_along_path, draw_one_by_one
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["Decoding"]

LAST_TURN = 1 << 31
"""Turns beyond would overflow when they are put in order with the sites."""


class Decoding:
    """The part of :class:`codd_ppl.CoupledCategorical` that decodes."""

    plan: ContractionPlan
    sites: tuple[str, ...]
    tokens: Int[Tensor, "*batch sites"]
    known: Bool[Tensor, "*batch sites"]
    _evidence: Float[Tensor, "*batch sites vocab"]
    _potentials: LogPotentials

    if TYPE_CHECKING:  # what the whole law has

        @property
        def log_potentials(self) -> LogPotentials:
            """With the evidence of the tokens."""

        @property
        def log_partition(self) -> Tensor:
            """Given the known tokens."""

        @property
        def marginals(self) -> Tensor:
            """Of single sites."""

        @property
        def _leaves(self) -> Leaves | None: ...

        @property
        def _path(self) -> HiddenPath | None: ...

        def _require_feasible(self) -> None: ...

        def condition(self, value: Tensor, sites: Tensor | None = None) -> Decoding:
            """Given tokens at some sites."""

    def sample_sharpened(
        self, temperature: float, generator: torch.Generator | None = None
    ) -> Int[Tensor, "*batch sites"]:
        """Latents z from their law, then the masked tokens jointly from p(x | z)^(1 / temperature), normalised.

        Temperature 1 is an exact joint draw; without latents it is p(x)^(1 / temperature) itself.

        Raises:
            ConfigError: a temperature not above 0.
            InfeasibleError: the known tokens are impossible.
        """
        if not 0 < temperature < torch.inf:
            raise ConfigError(
                f"temperature: expected a number above 0, found {temperature!r}; for 0 see mode"
            )
        with torch.no_grad():
            found = None if self._path is None else self._path.sample_sharpened(temperature, generator)
        if found is not None:
            return found.view(self.tokens.shape)
        self._require_feasible()
        if self._leaves is not None:
            return self._leaves.sample_sharpened(temperature, generator)
        drawn = sample_sharpened(self.plan, self.log_potentials, temperature, generator)
        return torch.stack([drawn[name] for name in self.sites], -1)

    def sample_in_turns(
        self,
        turns: Turns,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "*batch sites"]:
        """Masked sites one after the other, each from p(x_i | known, drawn so far)^(1 / temperature), normalised.

        Temperature 1 is an exact joint draw of the sites with a turn, the others summed out.

        Args:
            turns: sites with turn 0 come first, in reading order, then those with turn 1, against it, then turn 2, in
                reading order, and so on. Sites with a negative turn, and known ones, aren't drawn. Or a callable that
                reads the turns off the marginals, (*batch, sites, vocab) at masked sites -> (*batch, sites) integers.
            temperature: of every site.
            generator: torch's global one by default.

        Returns:
            The known and drawn tokens, 0 elsewhere.

        Raises:
            ConfigError: a temperature not above 0.
            ShapeError: turns that don't fit.
            InfeasibleError: the known tokens are impossible.
        """
        if not 0 < temperature < torch.inf:
            raise ConfigError(
                f"temperature: expected a number above 0, found {temperature!r}; for 0 see mode"
            )
        if isinstance(turns, Tensor):
            turns = self._checked(turns)
        else:
            asked = turns

            def turns(marginals: Tensor) -> Tensor:
                return self._checked(asked(marginals))

        shape, device = self.known.shape, self._evidence.device
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        if "marginals" in self.__dict__ and not isinstance(turns, Tensor):
            turns = turns(self.marginals)
        with torch.no_grad():
            ready = self._path is not None and self._path.free_marginals is not None
            leaves = None if ready else self._leaves
            if ready or leaves is not None:
                tokens = (self._evidence, self.tokens, self.known)
                found = draw_along_path(
                    self.plan, self._potentials, *tokens, leaves, turns, uniform, temperature, self._path
                )
                if found is not None:
                    return found
            self._require_feasible()
            return draw_one_by_one(self, turns, uniform, temperature)

    def _checked(self, turns: Tensor) -> Tensor:
        """Turns as int64, in which a turn times the number of sites has room."""
        shape = self.known.shape
        fits = isinstance(turns, Tensor) and turns.shape == shape
        if not fits or turns.is_floating_point() or turns.is_complex() or turns.dtype == torch.bool:
            found = f"{turns.dtype} {tuple(turns.shape)}" if isinstance(turns, Tensor) else repr(turns)
            raise ShapeError(
                f"turns: expected integers of shape {tuple(shape)}, 0 for what is drawn first and negative for what is "
                f"not drawn, found {found}"
            )
        if turns.numel() and int(turns.max()) > LAST_TURN:
            raise ShapeError(
                f"turns: expected at most {LAST_TURN}, found {int(turns.max())}; number them from 0 on"
            )
        return turns.long()

    def k_best(self, k: int) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k sites"]]:
        """Log-probabilities (descending) and tokens of the k most probable assignments of tokens and latents.

        The same tokens come several times where latents differ. Where fewer than k assignments are possible the rest
        has log-probability -inf and tokens -1.

        Raises:
            ConfigError: k < 1.
        """
        scores, values = k_best(self.plan, self.log_potentials, k)
        return scores - self.log_partition[..., None], torch.stack([values[name] for name in self.sites], -1)
