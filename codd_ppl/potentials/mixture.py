"""Mixtures of latent priors, whose weights may depend on the denoiser's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from codd_ppl.errors import ConfigError, PotentialsError, ShapeError
from codd_ppl.graphs import FactorGraph
from codd_ppl.inference.kept import MEMORY, keepable
from codd_ppl.potentials.baum_welch import baum_welch
from codd_ppl.potentials.heads import Head, spread
from codd_ppl.potentials.latent import LatentPotentials
from codd_ppl.potentials.mixture_start import MixtureStart, joined, kinds, part_graph
from codd_ppl.potentials.starts import Start
from codd_ppl.potentials.table import table_shapes
from codd_ppl.potentials.trace import Trace
from codd_ppl.typing import Float, Int

__all__ = ["MixturePotentials"]


class MixturePotentials(nn.Module):
    """K latent priors over the same tokens (hidden Markov models, latent trees, mixtures of products):

        p(x; h) = sum_k pi_k(h) p_k(x),    log pi = log_softmax(a + f(mean over sites of h)),

    as one prior over a graph whose latents have K blocks of states (:mod:`codd_ppl.potentials.mixture_start`), so that
    every coupling and query takes it. f is a network whose output starts at 0: constant weights. Other states of a
    latent than those of its own block are impossible (-inf), whatever is trained.

    Args:
        graph: one tree of latents over tokens, such as ``topologies.hidden_markov(sites, vocab, components * states)``.
        components: K; it divides the number of states of every latent.
        hidden_size: of the denoiser, for weights that depend on it; None: constant weights.
        width: of the network's hidden layer.
        mask_ratio: whether it reads the share of masked sites, too.
        seed: of the random start.

    Attributes:
        needs_ratio: whether :meth:`forward` must be given ``ratio``.

    Raises:
        GraphError: another kind of graph, or states that can't be shared equally.
        ConfigError: ``mask_ratio`` without ``hidden_size``, or a size below 1.
    """

    def __init__(
        self,
        graph: FactorGraph,
        components: int,
        hidden_size: int | None = None,
        width: int = 128,
        mask_ratio: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (hidden_size is not None and hidden_size < 1) or width < 1 or (mask_ratio and hidden_size is None):
            raise ConfigError(
                "expected hidden_size >= 1 (None: constant weights, without mask_ratio) and width >= 1, found "
                f"hidden_size={hidden_size}, width={width}, mask_ratio={mask_ratio}"
            )
        self.part = part_graph(graph, components)
        self.graph, self.components = graph, components
        self.hidden_size, self.width, self.mask_ratio = hidden_size, width, mask_ratio
        self._kinds = kinds(graph)
        self._keys = {name: f"table{i}" for i, name in enumerate(self._kinds)}
        generator, shapes = torch.Generator().manual_seed(seed), table_shapes(self.part)
        self.tables = nn.ParameterDict(
            {
                key: nn.Parameter(0.5 * torch.randn(components, *shapes[name], generator=generator))
                for name, key in self._keys.items()
            }
        )
        self.weights = nn.Parameter(torch.zeros(components))
        self.norm: nn.LayerNorm | None = None
        self.gate: Head | None = None
        if hidden_size is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.norm, self.gate = (
                    nn.LayerNorm(hidden_size),
                    Head(hidden_size, width, components, mask_ratio),
                )

    @property
    def needs_ratio(self) -> bool:
        """Whether the share of masked sites is read."""
        return self.mask_ratio

    def log_weights(
        self,
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        ratio: Float[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*weights components"]:
        """log pi; without batch dimensions if the weights are constant.

        Raises:
            ShapeError: no hidden states, or of another size; no ratio where one is read.
        """
        if self.gate is None or self.norm is None:
            return self.weights.log_softmax(-1)
        sites = len(self.graph.tokens)
        if hidden is None or hidden.shape[-2:] != (sites, self.hidden_size):
            raise ShapeError(
                f"weights that depend on the context read hidden states (*batch, {sites}, {self.hidden_size}), found "
                f"{None if hidden is None else tuple(hidden.shape)}; pass hidden=output.hidden to the coupling"
            )
        hidden = hidden.to(self.weights.dtype)
        ratio = spread(ratio, hidden) if self.mask_ratio else None
        mean = self.norm(hidden).mean(-2, keepdim=True)
        return (self.weights + self.gate(mean, ratio)[..., 0, :]).log_softmax(-1)

    def forward(
        self,
        hidden: Float[Tensor, "*batch sites hidden"] | None = None,
        ratio: Float[Tensor, "*batch"] | None = None,
    ) -> dict[str, Float[Tensor, "..."]]:
        """Factor or tie name -> log-probabilities; that of the root has the batch's dimensions if the weights have.

        Args:
            hidden: of the denoiser, read with ``hidden_size``.
            ratio: share of masked sites, read with ``mask_ratio``.

        Raises:
            ShapeError: as :meth:`log_weights`.
        """
        weights = self.log_weights(hidden, ratio)
        return {name: self._table(name, weights) for name in self._kinds}

    def _table(self, name: str, weights: Tensor) -> Tensor:
        kind, table = self._kinds[name], self.tables[self._keys[name]]
        if kind == "root" or not keepable(table):
            return joined(kind, table.log_softmax(-1), weights)
        auto = torch.is_autocast_enabled(table.device.type)
        return MEMORY.get(
            table, ("joined", auto), lambda t: joined(kind, t.log_softmax(-1), t.new_zeros(len(t)))
        )

    def evidence(self) -> None:
        """None: the tables are a complete prior."""
        return None

    def start_from(
        self, priors: Sequence[LatentPotentials], weights: Float[Tensor, "components"] | None = None
    ) -> None:
        """Take over the tables of priors that exist already, one for each component.

        Args:
            priors: over graphs like :attr:`part`, the graph of one component.
            weights: their probabilities; None: all the same.

        Raises:
            PotentialsError: another number of them, or of weights, or other tables.
        """
        shapes = table_shapes(self.part)
        found = [{name: tuple(table.shape) for name, table in prior().items()} for prior in priors]
        weights = self.weights.new_ones(self.components) if weights is None else weights
        if (
            found != [shapes] * self.components
            or weights.shape != (self.components,)
            or not bool((weights > 0).all())
        ):
            raise PotentialsError(
                f"expected {self.components} priors with tables of the shapes {shapes} and as many weights above 0, "
                f"found {found} and {weights.tolist()}"
            )
        with torch.no_grad():
            self.weights.copy_(weights.log())
            for name, key in self._keys.items():
                self.tables[key].copy_(torch.stack([prior()[name] for prior in priors]))

    def init_from_corpus(
        self,
        blocks: Int[Tensor, "blocks sites"],
        *,
        progress: bool = True,
        seed: int = 0,
        start: Start | None = None,
        **settings: Any,
    ) -> Trace:
        """Fit all components and their weights together by Baum-Welch, which leaves the zeros between blocks; the
        network stays as it is.

        Args:
            blocks: (n, sites) int64.
            progress: show a progress bar.
            seed: of the start and the order of the blocks.
            start: of tables with blocks; :class:`MixtureStart` by default.
            settings: passed to :func:`codd_ppl.potentials.baum_welch`.

        Returns:
            The trace of the log-likelihood, nats per token.

        Raises:
            ShapeError, TokenError: blocks that don't fit the graph.
        """
        start = MixtureStart(self.components) if start is None else start
        tables, trace = baum_welch(
            self.graph, blocks, progress=progress, seed=seed, start=start, keep_zeros=True, **settings
        )
        with torch.no_grad():
            for name, key in self._keys.items():
                rows = tables[name].unflatten(0, (self.components, -1))
                if self._kinds[name] == "root":
                    self.weights.copy_(rows.logsumexp(-1))
                elif self._kinds[name] == "latent":
                    rows = rows.unflatten(-1, (self.components, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
                self.tables[key].copy_(rows)
        if trace.interrupted:
            raise KeyboardInterrupt
        return trace
