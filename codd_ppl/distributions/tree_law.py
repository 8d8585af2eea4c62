"""What the laws over dynamic trees have in common: the network's marginals, pairs of them coupled by offset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from codd_ppl.distributions.token_checks import chosen_tokens
from codd_ppl.errors import ShapeError
from codd_ppl.inference.pair_projection import PairLaws, project_pairs
from codd_ppl.typing import Bool, Float, Int

__all__ = ["OffsetCouplings", "TreeLaw"]


@dataclass(frozen=True, eq=False)
class OffsetCouplings:
    """How any two sites may depend: with weight beta_ij by their table, with weight 1 not at all.

    The pair's law is the mixture p_ij = (beta_ij p^K_ij + q_i q_j) / (beta_ij + 1), where p^K_ij is the table of their
    offset projected onto q_i and q_j (:func:`project_pairs`), and the weight of the edge ij is beta_ij + 1. Sites
    further apart than the tables reach have beta_ij = 0; every tree over the sites is thus possible.

    Args:
        tables: (offsets, vocab, vocab) log-dependence, entry [x_i, x_{i + d}] in table d - 1.
        log_beta: symmetric; -inf beyond the reach of the tables.
        iterations: of each projection; its marginals are exact after any number.
    """

    tables: Float[Tensor, "offsets vocab vocab"]
    log_beta: Float[Tensor, "*batch sites sites"]
    iterations: int = 10

    def expand(self, batch_shape: Sequence[int]) -> OffsetCouplings:
        """The same for a larger batch; nothing is copied."""
        log_beta = self.log_beta.expand(*batch_shape, *self.log_beta.shape[-2:])
        return OffsetCouplings(self.tables, log_beta, self.iterations)

    @property
    def log_weights(self) -> Float[Tensor, "*batch sites sites"]:
        """log (beta_ij + 1), float64."""
        return log1p_exp(self.log_beta.double())

    def project(
        self, log_q: Float[Tensor, "batch sites vocab"], row: Tensor, left: Tensor, right: Tensor
    ) -> PairLaws:
        """Laws of the pairs (left < right) of the given batch rows."""
        return project_pairs(
            self.tables, right - left - 1, log_q[row, left], log_q[row, right], self.iterations
        )


def log1p_exp(log: Tensor) -> Tensor:
    """log(1 + exp(log)), for -inf too."""
    return softplus(log, threshold=60.0)


class TreeLaw(TorchDistribution):
    """Tokens whose single-site marginals are the network's, coupled along trees; the law itself is a subclass's.

    Args:
        log_q: (*batch, sites, vocab) normalised log-marginals; one-hot at known sites.
        couplings: of every pair of sites.
        tokens, known: (*batch, sites) what is known.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        log_q: Float[Tensor, "*batch sites vocab"],
        couplings: OffsetCouplings,
        tokens: Int[Tensor, "*batch sites"],
        known: Bool[Tensor, "*batch sites"],
        validate_args: bool | None = None,
    ) -> None:
        batch = log_q.shape[:-2]
        self.sites, self.vocab_size = log_q.shape[-2:]
        if tuple(couplings.tables.shape[1:]) != (self.vocab_size, self.vocab_size):
            raise ShapeError(
                f"expected pair tables (offsets, {self.vocab_size}, {self.vocab_size}), found "
                f"{tuple(couplings.tables.shape)}"
            )
        if tuple(known.shape) != (*batch, self.sites) or tuple(tokens.shape) != tuple(known.shape):
            raise ShapeError(
                f"expected tokens and known of shape {(*batch, self.sites)}, found {tuple(tokens.shape)} and "
                f"{tuple(known.shape)}"
            )
        self.log_q, self.tokens, self.known = log_q, tokens, known
        self.couplings = couplings.expand(batch)
        super().__init__(batch, torch.Size((self.sites,)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Sequences of token ids from 0 to vocab - 1."""
        return constraints.independent(constraints.integer_interval(0, self.vocab_size - 1), 1)

    @property
    def marginals(self) -> Float[Tensor, "*batch sites vocab"]:
        """The network's own, one-hot at known sites."""
        return self.log_q.exp()

    def log_prob(
        self, value: Int[Tensor, "*#shape sites"], sites: Bool[Tensor, "*#shape sites"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """log p(x_S | xt) in nats, S the masked ones of ``sites`` (None: all); -inf against what is known.

        Raises:
            ShapeError: shapes that don't broadcast, or a dtype that isn't integer.
            TokenError: ids outside the vocabulary.
        """
        value, chosen, common = self._value(value, sites)
        clash = (self.known & chosen & (value != self.tokens)).any(-1)
        free = chosen & ~self.known
        logs = self.log_q.expand(*value.shape, self.vocab_size).gather(-1, value[..., None])[..., 0]
        alone = torch.where(free, logs, 0.0).sum(-1)
        gain = self._gain(value, (common & ~self.known) if common is not None else free)
        return torch.where(clash | (alone == -torch.inf), -torch.inf, alone + gain.to(alone.dtype))

    @abstractmethod
    def _gain(self, value: Tensor, free: Tensor) -> Tensor:
        """log p(x_S) - sum_S log q_i(x_i); ``free`` is S, with the leading dimensions of ``value`` or of the batch."""

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> TreeLaw:
        """The same law for a larger batch; nothing is copied."""
        shape = torch.Size(batch_shape)
        known = self.known.expand(*shape, self.sites)
        log_q = self.log_q.expand(*shape, self.sites, self.vocab_size)
        return type(self)(log_q, self.couplings.expand(shape), self.tokens.expand(known.shape), known)

    def _value(self, value: Tensor, sites: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value and chosen sites in full shape; the set of each batch element where all draws share it."""
        own = (*self.batch_shape, self.sites)
        narrow = torch.ones(1, dtype=torch.bool, device=value.device) if sites is None else sites
        value, chosen = chosen_tokens(value, sites, torch.Size(own), self.vocab_size)
        shared = narrow.dim() <= len(own) and value.shape[value.dim() - len(own) :] == own
        common = narrow.expand(own) if shared else None
        return value, chosen, common
