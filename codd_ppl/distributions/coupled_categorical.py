"""The joint distribution of the tokens of partly known sequences, with a factor graph between them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import log, prod
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from codd_ppl.compiler import ContractionPlan
from codd_ppl.distributions.decoding import Decoding
from codd_ppl.distributions.token_checks import check_tokens, chosen_tokens
from codd_ppl.errors import ConfigError, InfeasibleError, IntractableError, ShapeError, TokenError
from codd_ppl.inference import entropy, log_partition, marginals, mode, sample
from codd_ppl.inference.feasibility import require_feasible
from codd_ppl.inference.hidden_path import HiddenPath
from codd_ppl.inference.leaves import Leaves, absorb
from codd_ppl.inference.projection import broadcasts
from codd_ppl.inference.sampling import categorical
from codd_ppl.inference.semirings import safe_logsumexp
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.transforms import transforming
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["CoupledCategorical"]


class CoupledCategorical(Decoding, TorchDistribution):
    """Tokens drawn jointly:

        p(x) = 1/Z  sum_z  prod_i exp(log_evidence_i[x_i])  prod_f psi_f(x_f, z_f)

    exact to normalise, condition, marginalise and sample whenever the graph compiles (arXiv:2603.00045, section 3).

    Args:
        plan: the compiled factor graph; its token variables are the sites, in reading order.
        log_potentials: factor or tie name -> (*batch, *cardinalities); batch shapes broadcast to that of the evidence.
        log_evidence: (*batch, sites, vocab) unary log-potentials of the tokens; -inf means impossible.
        tokens: (*batch, sites) values of the known sites (elsewhere ignored); None: nothing is known.
        known: (*batch, sites) bool.
        normalized: the evidence of every masked site sums to one already; without factors its entries are then the
            log-probabilities, bit for bit.
        log_weights: (*batch, sites, vocab), log w of the projection that the evidence comes from, if one does; kept for
            a later projection to start from, and read by no query.
        path: this law's messages, where they are at hand already.

    Raises:
        ShapeError: evidence or potentials don't fit the graph, or only one of ``tokens`` and ``known`` is given.
        TokenError: a known token outside the vocabulary.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    ENUMERABLE: ClassVar[int] = 4096
    """Number of sequences up to which the whole support is listed."""

    def __init__(
        self,
        plan: ContractionPlan,
        log_potentials: LogPotentials,
        log_evidence: Float[Tensor, "*batch sites vocab"],
        tokens: Int[Tensor, "*#batch sites"] | None = None,
        known: Bool[Tensor, "*#batch sites"] | None = None,
        normalized: bool = False,
        validate_args: bool | None = None,
        log_weights: Float[Tensor, "*batch sites vocab"] | None = None,
        path: HiddenPath | None = None,
    ) -> None:
        self.plan = plan
        self.sites, self.vocab_size = plan.tokens, _vocab_size(plan)
        expected = (len(self.sites), self.vocab_size)
        if tuple(log_evidence.shape[-2:]) != expected:
            raise ShapeError(
                f"expected log_evidence of shape (*batch, {expected[0]}, {expected[1]}) for a graph of "
                f"{expected[0]} tokens, found {tuple(log_evidence.shape)}"
            )
        batch_shape = log_evidence.shape[:-2]
        if (tokens is None) != (known is None):
            raise ShapeError("expected tokens and known together; pass known=tokens != mask_token_id")
        if tokens is None or known is None:
            known = torch.zeros(1, dtype=torch.bool, device=log_evidence.device)
            tokens = torch.zeros(1, dtype=torch.int64, device=log_evidence.device)
        expected = (*batch_shape, len(self.sites))
        if known.dtype != torch.bool or not broadcasts(known.shape, expected):
            raise ShapeError(f"expected known as bool {expected}, found {known.dtype} {tuple(known.shape)}")
        if tokens.is_floating_point() or not broadcasts(tokens.shape, expected):
            raise ShapeError(
                f"expected tokens as int64 {expected}, found {tokens.dtype} {tuple(tokens.shape)}"
            )
        self.known: Tensor = known.expand(expected)
        self.tokens: Tensor = torch.where(self.known, tokens, 0).long()
        if path is None:  # which was made of tokens that were checked
            check_tokens(self.tokens, self.vocab_size)
        self._potentials = dict(log_potentials)
        self._coupled = bool(plan.factors)
        self._normalized = normalized
        self.log_weights = log_weights
        self._given_path = path
        self._check_batch(tuple(batch_shape))
        self._evidence = log_evidence
        super().__init__(batch_shape, torch.Size((len(self.sites),)), validate_args=validate_args)

    # -- what it is --------------------------------------------------------------------------------

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Sequences of token ids from 0 to vocab - 1."""
        return constraints.independent(constraints.integer_interval(0, self.vocab_size - 1), 1)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are at most :attr:`ENUMERABLE` sequences, known sites included."""
        return len(self.sites) * log(self.vocab_size) <= log(self.ENUMERABLE) + 1e-9

    def enumerate_support(self, expand: bool = True) -> Int[Tensor, "sequences *batch sites"]:
        """All vocab ** sites sequences (those that contradict known tokens have log_prob -inf).

        Raises:
            IntractableError: more than :attr:`ENUMERABLE` sequences.
        """
        if not self.has_enumerate_support:
            raise IntractableError(
                f"{self.vocab_size} ** {len(self.sites)} sequences are too many to list (at most {self.ENUMERABLE}); "
                "use sample() and log_prob(), which are exact at any size"
            )
        count = self.vocab_size ** len(self.sites)
        place = self.vocab_size ** torch.arange(len(self.sites) - 1, -1, -1, device=self._evidence.device)
        values = torch.arange(count, device=place.device)[:, None] // place % self.vocab_size
        values = values.reshape(count, *[1] * len(self.batch_shape), len(self.sites))
        return values.expand(count, *self.batch_shape, len(self.sites)) if expand else values

    @property
    def log_potentials(self) -> dict[str | tuple[str, ...], Tensor]:
        """All log-potentials for ``codd_ppl.inference``: the factors', and the tokens' evidence under one key."""
        result: dict[str | tuple[str, ...], Tensor] = dict(self._potentials)
        result[self.sites] = self.log_evidence
        return result

    @cached_property
    def log_evidence(self) -> Float[Tensor, "*batch sites vocab"]:
        """Unary log-potentials of the tokens, -inf at known sites for every value but the known one."""
        return self._clamp(self._evidence, self.tokens, self.known)

    @cached_property
    def _leaves(self) -> Leaves | None:
        """The tokens taken out of the graph, where they hang on latents."""
        return absorb(self.plan, self._potentials, self.sites, self._evidence, self.tokens, self.known)

    @cached_property
    def _path(self) -> HiddenPath | None:
        """Its messages, where it is a hidden Markov model of a small vocabulary."""
        if self._given_path is not None or not self._coupled:
            return self._given_path
        return HiddenPath.of(self.plan, self._potentials, self.sites, self._evidence, self.tokens, self.known)

    # -- probabilities -----------------------------------------------------------------------------

    @cached_property
    def log_partition(self) -> Float[Tensor, "*batch"]:
        """log Z of the masked sites given the known ones, nats."""
        if not self._coupled and not transforming():
            total = safe_logsumexp(self.log_evidence, -1).sum(-1)
            if bool((total < torch.inf).all()):  # else the query says what is wrong
                return total
        if self._leaves is not None:
            return self._leaves.log_partition
        return log_partition(self.plan, self.log_potentials)

    def log_prob(
        self, value: Int[Tensor, "*#shape sites"], sites: Bool[Tensor, "*#shape sites"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """Exact log-probability of all sites, or of a set of them with the rest summed out (DESIGN section 3):

            log p(x_S | x_K) = log Z(K and S clamped) - log Z(K clamped)

        Args:
            value: (*sample, *batch, sites) tokens; read only where ``sites``.
            sites: bool, the set S, for each sequence its own; None: all sites. Known sites contribute 0 where they
                agree with what is known; else the result is -inf.

        Returns:
            (*sample, *batch) nats.

        Raises:
            ShapeError: shapes that don't broadcast, or a dtype that isn't integer.
            TokenError: ids outside the vocabulary.
            InfeasibleError: what is known is impossible, so that nothing can be conditioned on it.
        """
        value, chosen = chosen_tokens(value, sites, self.known.shape, self.vocab_size)
        self._require_feasible()
        clash = (self.known & chosen & (value != self.tokens)).any(-1)
        free = chosen & ~self.known
        if not self._coupled:  # independent sites: nothing but the categoricals' own normaliser
            logs = self.log_evidence if self._normalized else self.log_evidence.log_softmax(-1)
            logs = logs.expand(*value.shape, self.vocab_size).gather(-1, value[..., None])[..., 0]
            total = torch.where(free, logs, 0.0).sum(-1)
        elif self._leaves is not None:
            total = self._leaves.log_clamped(value, free) - self.log_partition
        else:
            evidence = self._clamp(self.log_evidence, value, free)
            clamped = log_partition(self.plan, {**self._potentials, self.sites: evidence})
            total = clamped - self.log_partition
        return torch.where(clash, -torch.inf, total)

    @cached_property
    def marginals(self) -> Float[Tensor, "*batch sites vocab"]:
        """Probability of each token at each site, given the known ones (one-hot there)."""
        if not self._coupled and not transforming():
            self._require_feasible()
            return self.log_evidence.softmax(-1)
        if self._path is not None and self._path.marginals is not None:
            return self._path.marginals.reshape(*self.batch_shape, len(self.sites), self.vocab_size)
        if self._leaves is not None:
            try:
                return self._leaves.marginals
            except InfeasibleError:
                self._require_feasible()  # names the tokens
                raise
        return marginals(self.plan, self.log_potentials)[self.sites]

    def entropy(
        self, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch"]:
        """Entropy of the masked tokens given the known ones, nats.

        Exact without latent variables (a sum over the tree), and by listing the support when it is small.

        Args:
            num_samples: estimate it as the mean of -log p over this many exact draws instead (unbiased; not
                differentiable through the draws).
            generator: for the draws.

        Raises:
            ConfigError: ``num_samples`` below 1.
            IntractableError: there are latents, the support is large and ``num_samples`` isn't given: the entropy of
                a mixture has no exact polynomial algorithm.
        """
        if num_samples is not None:
            if num_samples < 1:
                raise ConfigError(f"expected num_samples >= 1, found {num_samples}")
            draws = self.sample((num_samples,), generator=generator)
            return -self.log_prob(draws).mean(0)
        if not any(v.latent for v in self.plan.variables):
            return entropy(self.plan, self.log_potentials)
        if self.has_enumerate_support:
            logs = self.log_prob(self.enumerate_support())
            return -torch.where(logs == -torch.inf, 0.0, logs.exp() * logs).sum(0)
        raise IntractableError(
            "the entropy of tokens with latent variables summed out is intractable at this size; ask for an unbiased "
            "estimate with entropy(num_samples=100)"
        )

    # -- draws ---------------------------------------------------------------------------------------

    def sample(
        self, sample_shape: Sequence[int] = torch.Size(), generator: torch.Generator | None = None
    ) -> Int[Tensor, "*shape sites"]:
        """Exact joint draws, (*sample_shape, *batch, sites); known tokens are filled in.

        Raises:
            InfeasibleError: the known tokens are impossible.
        """
        if not self._coupled:
            self._require_feasible()
            with torch.no_grad():
                values = categorical(self.log_evidence, generator, prod(sample_shape))
            return values.movedim(-1, 0).reshape(*sample_shape, *self.batch_shape, len(self.sites))
        found = None if self._path is None else self._path.sample(tuple(sample_shape), generator)
        if found is not None:
            return found.view(*sample_shape, *self.batch_shape, len(self.sites))
        if self._leaves is not None:
            try:
                return self._leaves.sample(tuple(sample_shape), generator)
            except InfeasibleError:
                self._require_feasible()  # names the tokens
                raise
        drawn = sample(self.plan, self.log_potentials, tuple(sample_shape), generator)
        return torch.stack([drawn[name] for name in self.sites], -1)

    @property
    def mode(self) -> Int[Tensor, "*batch sites"]:
        """Tokens of a most probable assignment of tokens **and latents** (max-product; Viterbi on a chain).

        Without latents it is the most probable sequence; with latents that one is NP-hard to find in general.
        """
        found = None if self._path is None else self._path.mode
        if found is not None:
            return found.view(self.tokens.shape)
        best = mode(self.plan, self.log_potentials)
        return torch.stack([best[name] for name in self.sites], -1)

    # -- other distributions from it -------------------------------------------------------------------

    def condition(
        self, value: Int[Tensor, "*#batch sites"], sites: Bool[Tensor, "*#batch sites"] | None = None
    ) -> CoupledCategorical:
        """The same law given the tokens at ``sites`` (bool; None: all); nothing is projected anew.

        Its log-partition is that of both together: condition(x, S).log_partition - log_partition = log p(x_S).

        Raises:
            TokenError: ids outside the vocabulary, or another token at a site that is known already.
        """
        value, chosen = chosen_tokens(value, sites, self.known.shape, self.vocab_size)
        if value.shape[:-1] != self.batch_shape:
            raise ShapeError(
                f"expected one sequence for each of the batch, {(*self.batch_shape, *self.event_shape)}, found "
                f"{tuple(value.shape)}; expand() the distribution first"
            )
        clash = (self.known & chosen & (value != self.tokens)).nonzero()
        if len(clash):
            *where, site = clash[0].tolist()
            raise TokenError(
                f"site {self.sites[site]!r} of batch element {tuple(where)} is known as token "
                f"{int(self.tokens[tuple(clash[0])])}, found {int(value[tuple(clash[0])])}; condition on masked sites"
            )
        tokens = torch.where(chosen, value, self.tokens)
        return self._like(self.batch_shape, self._evidence, tokens, self.known | chosen, self.log_weights)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CoupledCategorical:
        """The same law for a larger batch; nothing is copied."""
        shape = torch.Size(batch_shape)
        evidence = self._evidence.expand(*shape, *self._evidence.shape[-2:])
        known = self.known.expand(*shape, len(self.sites))
        weights = None if self.log_weights is None else self.log_weights.expand(evidence.shape)
        return self._like(shape, evidence, self.tokens.expand(*shape, len(self.sites)), known, weights)

    def _like(
        self, batch_shape: torch.Size, evidence: Tensor, tokens: Tensor, known: Tensor, weights: Tensor | None
    ) -> CoupledCategorical:
        settings = (self._normalized, self._validate_args, weights)
        return CoupledCategorical(self.plan, self._potentials, evidence, tokens, known, *settings)

    # -- checks --------------------------------------------------------------------------------------

    @staticmethod
    def _clamp(evidence: Tensor, tokens: Tensor, sites: Tensor) -> Tensor:
        """Evidence with every value but the given token made impossible at the given sites."""
        values = torch.arange(evidence.shape[-1], device=evidence.device)
        return torch.where(sites[..., None] & (values != tokens[..., None]), -torch.inf, evidence)

    def _require_feasible(self) -> None:
        """Raise where the log-partition is -inf: there every ratio of partition functions would be NaN."""
        if not self._feasible:
            require_feasible(Tables(self.plan, self.log_potentials), self.log_partition.reshape(-1))

    @cached_property
    def _feasible(self) -> bool:
        return not bool((self.log_partition == -torch.inf).any())

    def _check_batch(self, batch_shape: tuple[int, ...]) -> None:
        for key, table in self._potentials.items():
            factors = self.plan.ties.get(str(key), (str(key),))
            if factors[0] not in self.plan.factor:
                continue  # evidence of a variable; an unknown key is refused by the first query
            found = tuple(table.shape[: max(0, table.dim() - self.plan.factor[factors[0]].order)])
            if not broadcasts(found, batch_shape):
                raise ShapeError(
                    f"log_potentials[{key!r}]: expected a batch shape that broadcasts to {batch_shape}, that of the "
                    f"evidence, found {found}; expand the evidence (or the logits) first"
                )

    def __repr__(self) -> str:
        count = prod(self.batch_shape) * len(self.sites)
        return (
            f"CoupledCategorical(batch_shape={tuple(self.batch_shape)}, sites={len(self.sites)}, "
            f"vocab_size={self.vocab_size}, known={int(self.known.sum())} of {count})"
        )


@lru_cache(maxsize=256)
def _vocab_size(plan: ContractionPlan) -> int:
    """The number of values of a plan's tokens."""
    sizes = {plan.variable[name].cardinality for name in plan.tokens}
    if len(sizes) != 1:
        raise ShapeError(f"all tokens need the same cardinality, found {sorted(sizes)}")
    return sizes.pop()
