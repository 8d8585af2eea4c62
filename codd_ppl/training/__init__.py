"""Train: the Lightning module, and the text or the teacher's own blocks that feed it."""

from codd_ppl.training.data import TextDataModule
from codd_ppl.training.distillation import DistillationDataModule
from codd_ppl.training.judge_module import JudgeModule
from codd_ppl.training.model_callback import ModelFolder
from codd_ppl.training.module import CoDDModule
from codd_ppl.training.pooling import PoolFit, fit_pool
from codd_ppl.training.sampled_blocks import SampledBlocks

__all__ = [
    "CoDDModule",
    "DistillationDataModule",
    "JudgeModule",
    "ModelFolder",
    "PoolFit",
    "SampledBlocks",
    "TextDataModule",
    "fit_pool",
]
