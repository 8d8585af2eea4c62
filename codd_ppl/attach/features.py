"""What a frozen network says of noised blocks, cached on disk, so that a coupling is trained without running it again.

For each site the log-probabilities of the likeliest tokens, the logarithm of what is left for all others, and the
hidden state, reduced to its principal components; in half precision, in shards that are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from codd_ppl.attach.token_store import Rows
from codd_ppl.denoisers.context import InContext
from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of, evaluation_mode
from codd_ppl.diffusion import noise
from codd_ppl.diffusion.schedules import LinearSchedule
from codd_ppl.errors import ConfigError, LogitsError
from codd_ppl.folders import whole_file
from codd_ppl.training.blocks import spread_blocks
from codd_ppl.typing import Float, Int

__all__ = ["FeatureCache", "restore"]

SHARD = 256
"""Examples of a shard."""


@dataclass(frozen=True)
class FeatureCache:
    """Shards of features in a folder of their own.

    Args:
        path: the folder; made if it isn't there. Shards that are there are kept, and not made again.
        examples: noised blocks in all.
        steps: numbers of reverse steps T; the shards take them in turn.
        top_k: likeliest tokens of each site.
        reduced: components of the hidden states; 0: as they are.
        context: tokens that the network reads before a block.
        seed: of blocks and noise.
    """

    path: Path
    examples: int
    steps: Sequence[int]
    top_k: int = 64
    reduced: int = 256
    context: int = 0
    seed: int = 0

    def components(self, hidden_size: int) -> int:
        """Numbers of a site's hidden state."""
        return min(self.reduced or hidden_size, hidden_size)

    @property
    def shards(self) -> list[Path]:
        """All files of the cache, made or not."""
        return [self.path / f"{i:05d}.safetensors" for i in range(-(-self.examples // SHARD))]

    def size(self, sites: int, hidden_size: int) -> int:
        """Bytes of the whole cache, about: per site 6 for each likely token, 2 for each component, 16 beside them."""
        return self.examples * sites * (6 * self.top_k + 2 * self.components(hidden_size) + 16)

    @torch.no_grad()
    def build(self, denoiser: Denoiser, rows: Rows, pad_token_id: int, batch_size: int = 16) -> Iterator[int]:
        """Run the network on what is missing; yields the number of examples after each shard.

        Args:
            denoiser: frozen; its device is used.
            rows: the text.
            pad_token_id: for contexts that are too short.
            batch_size: blocks in one call of the network.

        Raises:
            ConfigError: more likely tokens than there are.
            LogitsError: NaN among the logits.
        """
        if not 1 <= self.top_k <= denoiser.vocab_size or self.examples < 1 or not self.steps:
            raise ConfigError(
                f"expected top_k from 1 to {denoiser.vocab_size}, examples >= 1 and numbers of steps, found "
                f"{self.top_k}, {self.examples} and {list(self.steps)}"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(rows.blocks), generator=generator)
        order = order.repeat(-(-self.examples // len(order)))[: self.examples]
        with evaluation_mode(denoiser):
            reduction = self._reduction(denoiser, rows, pad_token_id, batch_size)
            for i, path in enumerate(self.shards):
                some = order[i * SHARD : (i + 1) * SHARD]
                if not path.exists():
                    T = self.steps[i % len(self.steps)]
                    own = torch.Generator().manual_seed(self.seed + 1 + i)
                    parts = self._features(denoiser, rows, some, T, reduction, pad_token_id, batch_size, own)
                    with whole_file(path) as draft:
                        save_file({name: torch.cat([p[name] for p in parts]) for name in parts[0]}, draft)
                yield i * SHARD + len(some)

    def reduction(self) -> Float[Tensor, "hidden reduced"] | None:
        """The principal components that the hidden states were reduced to; None: they are as they were."""
        path = self.path / "reduction.safetensors"
        return load_file(path)["reduction"] if path.exists() else None

    def batches(
        self, batch_size: int, epoch: int, rank: int = 0, replicas: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """A pass over the cache in an order that depends on seed and ``epoch`` alone; one shard lies in memory.

        Args:
            batch_size: examples of a batch.
            epoch: number of the pass.
            rank, replicas: this process takes every ``replicas``-th shard.
        """
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        order = (order * replicas)[: -(-len(order) // replicas) * replicas]
        for i in order[rank::replicas]:
            shard = load_file(self.shards[i])
            for some in torch.randperm(len(shard["x0"]), generator=generator).split(batch_size):
                yield {name: value[some] for name, value in shard.items()}

    def _features(
        self,
        denoiser: Denoiser,
        rows: Rows,
        some: Int[Tensor, "examples"],
        T: int,
        reduction: Tensor | None,
        pad_token_id: int,
        batch_size: int,
        generator: torch.Generator,
    ) -> list[dict[str, Tensor]]:
        """Features of some blocks, a part for each call of the network."""
        device = device_of(denoiser, torch.device("cpu"))
        noised = noise(
            rows.blocks[some].long(), T, LinearSchedule(), denoiser.mask_token_id, generator=generator
        )
        parts = []
        for first in range(0, len(some), batch_size):
            here = slice(first, first + batch_size)
            network = denoiser
            if self.context:
                before = rows.context(some[here], self.context, pad_token_id)
                network = InContext(denoiser, before.to(device))
            output = network(noised.xt[here].to(device))
            log_q = output.logits.float().log_softmax(-1)
            if bool(log_q.isnan().any()):
                raise LogitsError("the network's logits have NaN; use another dtype for it, such as bfloat16")
            top, ids = log_q.topk(self.top_k, -1)
            rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
            hidden = output.hidden.float()
            parts.append(
                {
                    "x0": noised.x0[here].int(),
                    "known": noised.known[here],
                    "revealed": noised.revealed[here],
                    "rate": noised.rate[here],
                    "steps": torch.full((len(ids),), T, dtype=torch.int32),
                    "ids": ids.int().cpu(),
                    "top": top.clamp(min=-6e4).half().cpu(),
                    "rest": rest.clamp(min=-6e4).half().cpu(),
                    "hidden": (hidden if reduction is None else hidden @ reduction.to(device))
                    .clamp(-6e4, 6e4)
                    .half()
                    .cpu(),
                }
            )
        return parts

    def _reduction(
        self, denoiser: Denoiser, rows: Rows, pad_token_id: int, batch_size: int
    ) -> Float[Tensor, "hidden reduced"] | None:
        """Principal components of hidden states, computed once and kept in the folder."""
        if self.components(denoiser.hidden_size) == denoiser.hidden_size:
            return None
        if (found := self.reduction()) is not None:
            return found
        device = device_of(denoiser, torch.device("cpu"))
        seen = []
        blocks = spread_blocks(torch.arange(len(rows.blocks))[:, None], SHARD)[:, 0]
        generator = torch.Generator().manual_seed(self.seed)
        for some in blocks.split(batch_size):
            xt = noise(
                rows.blocks[some].long(), 2, LinearSchedule(), denoiser.mask_token_id, generator=generator
            ).xt
            network = denoiser
            if self.context:
                network = InContext(denoiser, rows.context(some, self.context, pad_token_id).to(device))
            seen.append(network(xt.to(device)).hidden.float().flatten(0, 1).cpu())
        states = torch.cat(seen)
        values, vectors = torch.linalg.eigh((states - states.mean(0)).T.cov())
        found = vectors[:, values.argsort(descending=True)[: self.reduced]].contiguous()
        with whole_file(self.path / "reduction.safetensors") as draft:
            save_file({"reduction": found}, draft)
        return found


def restore(
    ids: Int[Tensor, "*batch k"],
    top: Float[Tensor, "*batch k"],
    rest: Float[Tensor, "*batch"],
    log_unigram: Float[Tensor, "vocab"],
) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities over the vocabulary: the likeliest tokens' as they are, the rest in proportion to a unigram.

    q(x) = q_top(x) for the k tokens, else rest u(x) / sum over the others of u; normalised again.

    Args:
        ids: the k tokens.
        top: their log-probabilities.
        rest: log of the others' probability.
        log_unigram: log u.
    """
    ids, top, rest = ids.long(), top.to(log_unigram), rest.to(log_unigram)
    own = log_unigram[ids].exp().sum(-1)
    others = torch.log1p(-own.clamp(max=1 - 1e-6))
    spread = (rest - others)[..., None] + log_unigram
    return spread.scatter(-1, ids, top).log_softmax(-1)
