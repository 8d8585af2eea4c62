"""The coupling layer: logits of a denoiser in, a joint distribution of the masked tokens out."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from codd_ppl.compiler import compile
from codd_ppl.coupling_files import PretrainedCoupling
from codd_ppl.distributions import CoupledCategorical
from codd_ppl.errors import ConfigError, GraphError, LogitsError, ShapeError, TokenError
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.properties import directed_parents
from codd_ppl.inference.first_weights import first_weights
from codd_ppl.inference.hidden_path import HiddenPath
from codd_ppl.inference.hidden_projection import project_path, project_path_pooled
from codd_ppl.inference.projection import project
from codd_ppl.inference.tables import Tables
from codd_ppl.inference.transforms import transforming
from codd_ppl.potentials import LatentPotentials, LogarithmicPool, Potentials, TablePotentials
from codd_ppl.typing import Bool, Float, Int, LogPotentials

__all__ = ["CouplingLayer"]


class CouplingLayer(PretrainedCoupling, nn.Module):
    """Couples the tokens that a denoiser predicts, along a factor graph.

    ``combine="projected"`` (default): among all joint laws whose single-site marginals are the network's, the one
    closest in KL to the prior given the known tokens,

        p(x_M | xt) = 1/Z prod_{i in M} w_i(x_i) p_w(x_M, x_K),    marginal_i = softmax(l_i),

    with w from iterative proportional fitting, one site at a time (DESIGN section 3; Csiszar 1975).

    ``combine="product"``: the paper's form (arXiv:2603.00045),

        p(x_M | xt) = 1/Z sum_z prod_{i in M} softmax(l_i)[x_i] prod_f psi_f(x_f, z_f).

    Without factors both are the product of categoricals.

    Args:
        graph: tokens ``x0 .. x{L-1}`` in reading order, with latents and factors; loops are fine while the
            treewidth is small.
        vocab_size: cardinality of every token.
        hidden_size: width of the denoiser's hidden states, if the potentials read them.
        combine: "projected" or "product".
        potentials: a module that holds the log-potentials (see ``codd_ppl.potentials.Potentials``). None: conditional
            tables (:class:`LatentPotentials`) where latents hang together as a directed forest, else free tables.
        sweeps: of the projection; one or two are enough in practice. On partly masked text of characters
            (tests/benchmarks/sweeps.md) marginals are off by 0.06 to 0.11 in total variation after one, 0.03 to 0.06
            after two, and the held-out likelihood is best there, not at the fixed point.
        tolerance: end the sweeps when no log-weight changed by more than this in one; 0: never. There 0.1 takes 11 to
            14 sweeps, marginals then off by 0.001, and 0.01 takes 20 to 30: give ``sweeps`` of that order with it.
        candidates: fit only so many of the likeliest tokens of each site, and the others together (see
            :func:`codd_ppl.inference.projection.project`); None: all.
        seed: of the potentials' random start.
        pool: target marginals of the projection where the prior knows more than the network (many masks, a weak
            network); None: the network's alone. :func:`codd_ppl.training.fit_pool` fits it.

    Raises:
        GraphError: no tokens, or tokens of another cardinality than ``vocab_size``.
        TreewidthError: the graph has loops whose cliques are too large; the message names one.
        ConfigError: an unknown ``combine``, ``sweeps`` < 1, a table that is too large.
    """

    def __init__(
        self,
        graph: FactorGraph,
        vocab_size: int,
        hidden_size: int | None = None,
        combine: Literal["projected", "product"] = "projected",
        potentials: Potentials | None = None,
        sweeps: int = 1,
        seed: int = 0,
        pool: LogarithmicPool | None = None,
        tolerance: float = 0.0,
        candidates: int | None = None,
    ) -> None:
        super().__init__()
        if combine not in ("projected", "product"):
            raise ConfigError(f'expected combine to be "projected" or "product", found {combine!r}')
        if sweeps < 1:
            raise ConfigError(f"expected sweeps >= 1, found {sweeps}")
        if not tolerance >= 0 or (candidates is not None and candidates < 1):
            raise ConfigError(
                f"expected tolerance >= 0 and candidates >= 1 (or None), found {tolerance} and {candidates}"
            )
        if pool is not None and combine != "projected":
            raise ConfigError('a pool changes what is projected onto: expected combine="projected" with it')
        if not isinstance(graph, FactorGraph):
            raise GraphError(
                f"expected a FactorGraph, found {type(graph).__name__}; build one or take one from topologies"
            )
        tokens = [graph.variables[name] for name in graph.tokens]
        if not tokens:
            raise GraphError("the graph has no tokens; add variables with latent=False, x0 .. x{L-1}")
        for variable in tokens:
            if variable.cardinality != vocab_size:
                raise GraphError(
                    f"token {variable.name!r} has cardinality {variable.cardinality}, not vocab_size = {vocab_size}"
                )
        self.plan = compile(graph)
        self.graph = graph
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.combine = combine
        self.sweeps = sweeps
        self.tolerance, self.candidates = tolerance, candidates
        self._names = graph.tokens
        self.sites = len(tokens)
        if potentials is None:
            latent = any(v.latent for v in graph) and directed_parents(graph) is not None
            potentials = LatentPotentials(graph, seed) if latent else TablePotentials(graph, seed)
        self.potentials = potentials
        self.pool = pool

    def init_from_corpus(
        self, blocks: Int[Tensor, "blocks sites"], progress: bool = True, seed: int = 0, **settings: Any
    ) -> Any:
        """Start the potentials from text alone: counts for tables, Baum-Welch for latents. No network is run.

        Args:
            blocks: (n, sites) int64 clean text.
            progress: show a progress bar.
            seed: of the start and the order of the blocks.
            settings: of the potentials' own start, such as ``pseudo_count`` of tables, or what
                :func:`codd_ppl.potentials.baum_welch` takes (``epochs=3``, ...).

        Returns:
            What the potentials report: mutual information by table, or the likelihood trace.

        Raises:
            ShapeError, TokenError: blocks that don't fit the graph and vocabulary.
        """
        return cast(Potentials, self.potentials).init_from_corpus(
            blocks, progress=progress, seed=seed, **settings
        )

    def forward(
        self,
        logits: Float[Tensor, "*batch sites vocab"],
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        tokens: Int[Tensor, "*batch sites"] | None = None,
        known: Bool[Tensor, "*batch sites"] | None = None,
        start: CoupledCategorical | None = None,
    ) -> CoupledCategorical:
        """The joint law of the masked tokens given the known ones.

        Args:
            logits: of the denoiser; -inf rules a token out.
            hidden: of the denoiser, for potentials that read it.
            tokens: xt; read only where ``known``.
            known: which tokens are known; None: none is.
            start: a law that this coupling made of the same sequences with fewer tokens known; the projection starts
                from its weights instead of w = 1. The fixed point is the same and fewer sweeps come near it, but with
                few of them the result depends on ``start``, and no longer on logits and known tokens alone. It is a
                constant to the gradient.

        Raises:
            ConfigError: a ``start`` without weights, or nothing to project (see :attr:`warm_starts`).
            ShapeError: shapes or dtypes that don't fit the graph; tokens without known.
            LogitsError: NaN or +inf, or a masked site where every token is ruled out.
            TokenError: a known token outside the vocabulary.
        """
        self._check(logits, hidden, tokens, known)
        begin = None if start is None else self._first_weights(start)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if known is None or tokens is None:
            known = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
            tokens = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        tokens = tokens.long()
        # A known site's own logits don't matter, whatever they are: its evidence is 0 at the token, -inf elsewhere.
        if transforming() or (torch.is_grad_enabled() and logits.requires_grad):
            log_q = torch.where(
                known[..., None], 0.0, torch.where(known[..., None], 0.0, logits).log_softmax(-1)
            )
        else:  # without a pass over the vocabulary of all sites
            log_q = logits.log_softmax(-1)
            if self.pool is None or not self.warm_starts:  # else the pool says 0 there
                log_q[known] = 0.0
        potentials = self.log_potentials(hidden, known)
        if not self.warm_starts:
            plain = not self.plan.factors
            return CoupledCategorical(self.plan, potentials, log_q, tokens, known, normalized=plain)
        return self._projected(potentials, log_q, tokens, known, begin)

    def log_potentials(
        self,
        hidden: Float[Tensor, "*batch sites hidden"] | None,
        known: Bool[Tensor, "*batch sites"],
    ) -> LogPotentials:
        """What the potentials say of these inputs; those with ``needs_ratio`` read the share of masked sites, too."""
        if getattr(self.potentials, "needs_ratio", False):
            return cast(Any, self.potentials)(hidden, ratio=(~known).float().mean(-1))
        return cast(LogPotentials, self.potentials(hidden))

    @property
    def warm_starts(self) -> bool:
        """Whether there is a projection that could start from another law's weights."""
        return self.combine == "projected" and bool(self.plan.factors)

    def _first_weights(self, start: CoupledCategorical) -> Tensor:
        if not self.warm_starts:
            raise ConfigError(
                f"start: a coupling with combine={self.combine!r} and {len(self.plan.factors)} factors projects "
                'nothing; leave it out, or use combine="projected" on a graph with factors'
            )
        if not isinstance(start, CoupledCategorical) or start.log_weights is None:
            raise ConfigError(
                'start: expected a law that a coupling with combine="projected" made, which knows its weights, found '
                f"{type(start).__name__} without; leave it out to start from w = 1"
            )
        return start.log_weights.detach()

    def _projected(
        self, potentials: LogPotentials, log_q: Tensor, tokens: Tensor, known: Tensor, begin: Tensor | None
    ) -> CoupledCategorical:
        """The law whose evidence of the tokens, log w plus the prior's own, makes its marginals the network's."""
        start = cast(Potentials, self.potentials).evidence()
        prior = None if start is None else start.to(log_q).expand_as(log_q)
        path = HiddenPath.of(self.plan, potentials, self._names, prior, tokens, known)
        fitted = None
        if path is not None and self.pool is not None and begin is None and self.sweeps == 1:
            fitted = project_path_pooled(path, log_q, self.pool.knots, self.pool.weights)
        if fitted is None and self.pool is not None:
            log_q = self.pool(
                log_q, *self._prior_marginals(potentials, tokens, known, log_q.dtype, path), ~known
            )
        if fitted is None and path is not None:
            first = None if begin is None else first_weights(begin, log_q, ~known)
            fitted = project_path(path, log_q, self.sweeps, self.tolerance, first)
        if fitted is not None and fitted.log_weights is not None:
            weights = fitted.log_weights.reshape(log_q.shape)
        else:
            everything = potentials if prior is None else {**potentials, self._names: prior}
            settings = (self.sweeps, self.tolerance, tokens, self.candidates, begin, False)
            weights = project(self.plan, everything, self._names, log_q, ~known, *settings)
        evidence = weights if prior is None else torch.where(known[..., None], 0.0, prior + weights)
        return CoupledCategorical(
            self.plan, potentials, evidence, tokens, known, log_weights=weights, path=fitted
        )

    def prior_marginals(
        self,
        potentials: LogPotentials,
        tokens: Int[Tensor, "*batch sites"],
        known: Bool[Tensor, "*batch sites"],
        dtype: torch.dtype,
    ) -> tuple[Float[Tensor, "*batch sites vocab"], Float[Tensor, "*#batch sites vocab"]]:
        """Log-marginals of the prior given the known tokens, and with nothing known.

        Args:
            potentials: what ``self.potentials`` gave.
            tokens, known: as in :meth:`forward`.
            dtype: of the evidence.

        Raises:
            InfeasibleError: the prior rules the known tokens out.
        """
        return self._prior_marginals(potentials, tokens, known, dtype, None)

    def _prior_marginals(
        self,
        potentials: LogPotentials,
        tokens: Tensor,
        known: Tensor,
        dtype: torch.dtype,
        path: HiddenPath | None,
    ) -> tuple[Tensor, Tensor]:
        start = cast(Potentials, self.potentials).evidence()
        if path is not None and start is None:
            given, none = path.log_marginals, path.unconditional().log_marginals
            if given is not None and none is not None:
                shape = (*known.shape, self.vocab_size)
                return given.reshape(shape), none[0] if len(none) == 1 else none.reshape(shape)
        flat = (
            torch.zeros(self.vocab_size, dtype=dtype, device=known.device)
            if start is None
            else start.to(dtype)
        )

        def law(tokens: Tensor, known: Tensor) -> Tensor:
            evidence = flat.expand(*known.shape, self.vocab_size)
            return CoupledCategorical(self.plan, potentials, evidence, tokens, known).marginals.log()

        if Tables(self.plan, potentials).batch_shape:
            return law(tokens, known), law(tokens, torch.zeros_like(known))
        # One more row, with nothing known, in the same query.
        rows, seen = tokens.reshape(-1, self.sites), known.reshape(-1, self.sites)
        rows, seen = (
            torch.cat((rows, rows.new_zeros(1, self.sites))),
            torch.cat((seen, seen.new_zeros(1, self.sites))),
        )
        both = law(rows, seen)
        return both[:-1].reshape(*known.shape, self.vocab_size), both[-1]

    def _check(
        self, logits: Tensor, hidden: Tensor | None, tokens: Tensor | None, known: Tensor | None
    ) -> None:
        expected = (self.sites, self.vocab_size)
        if not logits.is_floating_point() or tuple(logits.shape[-2:]) != expected:
            raise ShapeError(
                f"expected floating logits of shape (*batch, {expected[0]}, {expected[1]}), the sites and vocabulary "
                f"of the coupling's graph, found {logits.dtype} {tuple(logits.shape)}"
            )
        shape = tuple(logits.shape[:-1])
        if tokens is not None and known is None:
            raise ShapeError("tokens are given without known; pass known=xt != mask_token_id")
        if known is not None and tokens is None:
            raise ShapeError("known is given without tokens; pass tokens=xt, which is read where known")
        if known is not None and (known.dtype != torch.bool or tuple(known.shape) != shape):
            raise ShapeError(f"expected known as bool {shape}, found {known.dtype} {tuple(known.shape)}")
        if tokens is not None and (
            tokens.is_floating_point() or tokens.dtype == torch.bool or tuple(tokens.shape) != shape
        ):
            raise ShapeError(f"expected tokens as int64 {shape}, found {tokens.dtype} {tuple(tokens.shape)}")
        if (
            hidden is not None
            and self.hidden_size is not None
            and tuple(hidden.shape) != (*shape, self.hidden_size)
        ):
            raise ShapeError(
                f"expected hidden of shape {(*shape, self.hidden_size)}, found {tuple(hidden.shape)}"
            )
        top = logits.detach().amax(-1)  # NaN and +inf show here
        fine = top.abs() < torch.inf
        if tokens is not None and known is not None:
            value = tokens.long()  # narrow types may not hold the vocabulary's size
            fine = fine > (known & (value.clamp(0, self.vocab_size - 1) != value))
        if not bool(fine.all()):  # as a rule the only look at values
            self._look(top, tokens, known)

    def _look(self, top: Tensor, tokens: Tensor | None, known: Tensor | None) -> None:
        """Which of the largest logits or of the known tokens is to blame, if one is."""
        ruled_out = top == -torch.inf
        bad = ~(top < torch.inf) | (ruled_out if known is None else ruled_out & ~known)
        if bool(bad.any()):
            *where, site = bad.nonzero()[0].tolist()
            value = float(top[(*where, site)])
            found = "every token ruled out (-inf)" if value == -torch.inf else f"{value}"
            raise LogitsError(
                f"expected finite logits (or -inf for some tokens), found {found} at site {site} of batch element "
                f"{tuple(where)}; look for an overflow in the denoiser (try float32 or a lower learning rate)"
            )
        if tokens is not None and known is not None:
            wrong = known & ((tokens < 0) | (tokens >= self.vocab_size))
            if bool(wrong.any()):
                *where, site = wrong.nonzero()[0].tolist()
                raise TokenError(
                    f"expected known tokens from 0 to {self.vocab_size - 1}, found {int(tokens[(*where, site)])} at "
                    f"site {site} of batch element {tuple(where)}; is the mask token marked as known?"
                )

    def extra_repr(self) -> str:
        """Sites, vocabulary and how logits and prior are combined."""
        return f"sites={self.sites}, vocab_size={self.vocab_size}, combine={self.combine!r}, sweeps={self.sweeps}"
