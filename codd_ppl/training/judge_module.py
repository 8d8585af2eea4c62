"""Training of an autoregressive judge of samples: a LightningModule for ``codd fit``."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import Tensor, nn

from codd_ppl.errors import ConfigError
from codd_ppl.judge import CausalJudge
from codd_ppl.training.optimizers import adamw, warmup_and_cosine
from codd_ppl.typing import Float, Int

__all__ = ["JudgeModule"]


class JudgeModule(L.LightningModule):
    """Maximum likelihood of text blocks under a :class:`codd_ppl.judge.CausalJudge`.

    Logged: ``train_loss`` (nats per token), ``valid_bits`` (bits per token).

    Args:
        vocab_size, hidden_size, layers, heads, length: of the judge.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: linear warm-up; then a cosine down to a tenth over the rest of the run.

    Raises:
        ConfigError: sizes that don't go together, or data of another vocabulary.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 256,
        layers: int = 6,
        heads: int = 8,
        length: int = 1024,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        self.judge = CausalJudge(vocab_size, hidden_size, layers, heads, length)
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps

    def training_step(self, batch: Int[Tensor, "batch sites"], batch_idx: int) -> Float[Tensor, ""]:
        """Mean of -log P(x_i | before), nats."""
        loss = -self.judge(batch).mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Int[Tensor, "batch sites"], batch_idx: int) -> None:
        """The same in bits."""
        bits = -self.judge(batch).mean() / math.log(2)
        self.log("valid_bits", bits, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def setup(self, stage: str) -> None:
        """Check the data's vocabulary."""
        data: Any = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "vocab_size", self.judge.vocab_size)
        if found != self.judge.vocab_size:
            raise ConfigError(
                f"vocab_size: expected {found} as in the tokenizer of the data, found {self.judge.vocab_size}; judge "
                "and model need the same tokenizer"
            )

    def configure_optimizers(self) -> Any:
        """AdamW, linear warm-up and a cosine to a tenth."""
        optimizer = adamw(
            self.judge, nn.Identity(), self.learning_rate, self.learning_rate, self.weight_decay
        )
        total = max(1, int(min(self.trainer.estimated_stepping_batches, 1e9)))
        schedule = warmup_and_cosine(optimizer, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
