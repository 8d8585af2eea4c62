"""What tokens at a distance say of each other: a table and an edge weight per offset, and edge scores from context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.potentials.statistics import check_blocks, log_unigram, pointwise_mutual_information
from codd_ppl.potentials.table import LARGEST_TABLE
from codd_ppl.typing import Float, Int

__all__ = ["EdgeScores", "OffsetPairs"]


class EdgeScores(nn.Module):
    """Predicted dependence of two sites, a bilinear form of their hidden states:

        score_ij = (A h_i) . (B h_j) / sqrt(rank),    i < j,    score_ji = score_ij

    B starts at zero, so that training starts from the scores that the text gave.

    Args:
        hidden_size: width of the denoiser's hidden states.
        rank: of the bilinear form.
        seed: of the start of A.
    """

    def __init__(self, hidden_size: int, rank: int = 16, seed: int = 0) -> None:
        super().__init__()
        start = torch.randn(rank, hidden_size, generator=torch.Generator().manual_seed(seed))
        self.left = nn.Parameter(start / hidden_size**0.5)
        self.right = nn.Parameter(torch.zeros(rank, hidden_size))

    def forward(self, hidden: Float[Tensor, "*batch sites hidden"]) -> Float[Tensor, "*batch sites sites"]:
        """Symmetric scores of all pairs, nats; zero on the diagonal."""
        hidden = hidden.to(self.left.dtype)
        scores = (hidden @ self.left.mT) @ (hidden @ self.right.mT).mT / len(self.left) ** 0.5
        upper = scores.triu(1)
        return upper + upper.mT


class OffsetPairs(nn.Module):
    """log K_d[x_i, x_{i+d}] and log beta_d for the offsets d = 1 .. max_offset.

    Both start at 0, which is no dependence; from a corpus the tables are the pointwise mutual information at that
    offset, and log beta_d = sharpness * I_d, the mutual information in nats.

    Args:
        vocab_size: values of a token.
        max_offset: largest distance at which tokens are coupled.
        hidden_size: width of the denoiser's hidden states, to add :class:`EdgeScores`; None: offsets alone.
        rank, seed: of the edge scores.

    Raises:
        ConfigError: max_offset < 1, or tables that are too large.
    """

    information: Tensor

    def __init__(
        self, vocab_size: int, max_offset: int, hidden_size: int | None = None, rank: int = 16, seed: int = 0
    ) -> None:
        super().__init__()
        if max_offset < 1:
            raise ConfigError(f"expected max_offset >= 1, found {max_offset}")
        if max_offset * vocab_size**2 > LARGEST_TABLE:
            raise ConfigError(
                f"{max_offset} tables of {vocab_size} x {vocab_size} entries are too many (at most {LARGEST_TABLE:,} "
                "entries); couple the tokens through latent variables instead: CouplingLayer with "
                "topologies.hidden_markov"
            )
        self.vocab_size, self.max_offset, self.hidden_size = vocab_size, max_offset, hidden_size
        self.tables = nn.Parameter(torch.zeros(max_offset, vocab_size, vocab_size))
        self.log_beta = nn.Parameter(torch.zeros(max_offset))
        self.scores = None if hidden_size is None else EdgeScores(hidden_size, rank, seed)
        self.register_buffer("information", torch.zeros(max_offset))

    def forward(
        self, sites: int, hidden: Float[Tensor, "*batch sites hidden"] | None = None
    ) -> Float[Tensor, "*#batch sites sites"]:
        """log beta of all pairs of sites, symmetric; -inf on the diagonal and beyond ``max_offset``.

        Raises:
            ShapeError: edge scores need hidden states, and none are given.
        """
        log_beta = self.by_offset(sites)
        if self.scores is None:
            return log_beta
        if hidden is None:
            raise ShapeError(
                "edge scores read the denoiser's hidden states; pass hidden=output.hidden, or build the coupling "
                "with hidden_size=None"
            )
        return log_beta + self.scores(hidden)

    def by_offset(self, sites: int) -> Float[Tensor, "sites sites"]:
        """log beta of all pairs without the edge scores."""
        place = torch.arange(sites, device=self.log_beta.device)
        offset = (place[:, None] - place).abs()
        near = (offset > 0) & (offset <= self.max_offset)
        log_beta = self.log_beta[(offset - 1).clamp(0, self.max_offset - 1)]
        return torch.where(near, log_beta, -torch.inf)

    def init_from_corpus(self, blocks: Int[Tensor, "blocks sites"]) -> Float[Tensor, " offsets"]:
        """Set the tables to the pointwise mutual information of tokens at each offset, pooled over the sites.

        Returns:
            Mutual information at each offset, nats; kept as ``information`` (see :meth:`sharpen`).

        Raises:
            ShapeError, TokenError: blocks that don't fit.
        """
        check_blocks(blocks, blocks.shape[-1], self.vocab_size)
        if blocks.shape[-1] <= self.max_offset:
            raise ShapeError(
                f"expected blocks longer than max_offset = {self.max_offset}, found {blocks.shape[-1]} sites"
            )
        unigram = log_unigram(blocks, self.vocab_size)
        independent = unigram[:, None] + unigram
        with torch.no_grad():
            for d in range(1, self.max_offset + 1):
                pairs = torch.stack([blocks[:, :-d].reshape(-1), blocks[:, d:].reshape(-1)], -1)
                table = pointwise_mutual_information([pairs], self.vocab_size, unigram)
                self.tables[d - 1].copy_(table)
                self.information[d - 1] = (((table + independent).exp()) * table).sum()
        return self.information

    def sharpen(self, sharpness: float) -> None:
        """Set log beta_d = sharpness * I_d: the larger, the more the trees keep to the strongest offsets."""
        with torch.no_grad():
            self.log_beta.copy_(sharpness * self.information)
