"""Train: the Lightning module and the text data that feed it."""

from codd_ppl.training.data import TextDataModule
from codd_ppl.training.model_callback import ModelFolder
from codd_ppl.training.module import CoDDModule
from codd_ppl.training.pooling import PoolFit, fit_pool

__all__ = ["CoDDModule", "ModelFolder", "PoolFit", "TextDataModule", "fit_pool"]
