"""A Lightning callback that leaves a model folder, so that what was trained can be used without Lightning."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.folders import check_target
from codd_ppl.judge import JUDGE
from codd_ppl.model_folder import MODEL, save_model
from codd_ppl.training.judge_module import JudgeModule
from codd_ppl.training.module import CoDDModule

__all__ = ["ModelFolder"]


class ModelFolder(L.Callback):
    """Writes network, coupling and tokenizer with ``save_model`` when training ends, or when Ctrl-C ends it; of a
    :class:`JudgeModule`, the judge.

    The place is checked before the first step. After another error nothing is written, so that a run which failed
    doesn't replace a model that works; Lightning's own checkpoints serve to go on with.

    Beside them stand the step, the text, and the seconds that fitting took by the clock: the potentials' start from the
    text and validation included, and what came before a checkpoint that was resumed.

    Args:
        path: the folder to write; one that holds a model already is replaced.

    Raises:
        ConfigError: when training starts, a path that holds something other than a model.
    """

    def __init__(self, path: str | os.PathLike[str] = "codd-model") -> None:
        super().__init__()
        self.path = Path(path)
        self.before = 0.0  # seconds of the run that a checkpoint resumes
        self.begin: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out now whether the folder can be written."""
        check_target(self.path, JUDGE if isinstance(pl_module, JudgeModule) else MODEL)
        self.begin = time.perf_counter()
        if not self._fits(pl_module):
            rank_zero_warn(
                f"no model folder will be written to {self.path}: it holds a CoDDModule with a "
                "BidirectionalTransformer; keep Lightning's checkpoints instead"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After every ``on_train_end``: the weights are the averaged ones, if a callback averages."""
        self._save(trainer, pl_module, interrupted=False)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Keep what Ctrl-C stopped."""
        if isinstance(exception, KeyboardInterrupt):
            self._save(trainer, pl_module, interrupted=True)

    @property
    def seconds(self) -> float:
        """How long fitting took up to now."""
        return self.before + (0.0 if self.begin is None else time.perf_counter() - self.begin)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was written."""
        self.before = float(state_dict["seconds"])

    @staticmethod
    def _fits(pl_module: L.LightningModule) -> bool:
        model = isinstance(pl_module, CoDDModule) and isinstance(pl_module.denoiser, BidirectionalTransformer)
        return model or isinstance(pl_module, JudgeModule)

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, interrupted: bool) -> None:
        if not trainer.is_global_zero or not self._fits(pl_module):
            return
        data: Any = getattr(trainer, "datamodule", None)
        about: dict[str, Any] = {
            "step": trainer.global_step,
            "text": str(getattr(data, "path", None)),
            "seconds": round(self.seconds, 1),
        }
        if interrupted:
            about["interrupted"] = True
        tokenizer = getattr(data, "tokenizer", None)
        if isinstance(pl_module, JudgeModule):
            written = pl_module.judge.save(self.path, tokenizer, about)
        else:
            assert isinstance(pl_module, CoDDModule)
            assert isinstance(pl_module.denoiser, BidirectionalTransformer)
            written = save_model(self.path, pl_module.denoiser, pl_module.coupling, tokenizer, about)
        rank_zero_info(f"model folder: {written}")
