"""Training of a contextual coupling on cached features of a frozen network, which is not run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from codd_ppl.attach.features import FeatureCache, restore
from codd_ppl.coupling import CouplingLayer
from codd_ppl.diffusion import coupled_nelbo
from codd_ppl.diffusion.nelbo import NoisedBatch
from codd_ppl.training.optimizers import warmup_and_cosine
from codd_ppl.typing import Float

__all__ = ["CachedFeatures", "CachedModule"]


class CachedFeatures(IterableDataset[dict[str, Tensor]]):
    """Batches of a cache, pass after pass; those of a resumed run go on where it stood.

    Args:
        cache: all its shards are there.
        batch_size: examples of a batch.
        rank, replicas: this process among those that share the cache.
        skip: batches that were taken before.
    """

    def __init__(
        self, cache: FeatureCache, batch_size: int, rank: int = 0, replicas: int = 1, skip: int = 0
    ) -> None:
        super().__init__()
        self.cache, self.batch_size, self.rank, self.replicas, self.skip = (
            cache,
            batch_size,
            rank,
            replicas,
            skip,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        taken, epoch = 0, 0
        while True:
            for batch in self.cache.batches(self.batch_size, epoch, self.rank, self.replicas):
                taken += 1
                if taken > self.skip:
                    yield batch
            epoch += 1


class CachedModule(L.LightningModule):
    """The bound of a coupling, in nats per token, on cached features: the loss of
    :class:`codd_ppl.CoDDModule` with a frozen network, whose unlikely tokens follow a unigram
    (:func:`codd_ppl.attach.features.restore`).

    Args:
        coupling: its parameters with ``requires_grad`` are trained; it reads hidden states as they are in the cache.
        log_unigram: (vocab,) of the text.
        cache: the features.
        batch_size: examples of an update.
        learning_rate: of AdamW, without weight decay; 20 steps of warm-up, then a cosine to a tenth.
    """

    log_unigram: Tensor

    def __init__(
        self,
        coupling: CouplingLayer,
        log_unigram: Float[Tensor, "vocab"],
        cache: FeatureCache,
        batch_size: int = 16,
        learning_rate: float = 4e-3,
    ) -> None:
        super().__init__()
        self.coupling, self.cache, self.batch_size = coupling, cache, batch_size
        self.learning_rate = learning_rate
        self.register_buffer("log_unigram", log_unigram.float(), persistent=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Float[Tensor, ""]:
        """Mean loss of a batch, nats per token."""
        x0, known = batch["x0"].long(), batch["known"]
        log_q = restore(batch["ids"], batch["top"], batch["rest"], self.log_unigram)
        dist = self.coupling(log_q, hidden=batch["hidden"].float(), tokens=x0, known=known)
        noised = NoisedBatch(x0, x0, known, batch["revealed"], batch["steps"], batch["rate"], steps=1)
        loss = (batch["steps"] * coupled_nelbo(noised, log_q, dist)).mean() / x0.shape[-1]
        self.log("bits per token", loss.detach() / math.log(2), prog_bar=True, batch_size=len(x0))
        return loss

    def train_dataloader(self) -> Any:
        """The cache, from where a resumed run stood."""
        features = CachedFeatures(
            self.cache, self.batch_size, self.global_rank, self.trainer.world_size, self.trainer.global_step
        )
        return DataLoader(features, batch_size=None)

    def configure_optimizers(self) -> Any:
        """AdamW, warm-up and cosine."""
        trained = [p for p in self.coupling.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)
        schedule = warmup_and_cosine(optimizer, 20, max(1, int(self.trainer.max_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is frozen stays out of the file."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is frozen is as it is here."""
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
