"""What a run takes from its data before the first step: a check of sizes, and the starts of potentials and pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.errors import ConfigError
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.training.pooling import fit_pool
from codd_ppl.typing import Int, Tensor

__all__ = ["CorpusStart", "PoolStart", "Start", "check_data", "chosen_starts", "start_from_data"]

Coupling = CouplingLayer | SpanningTreeCoupling


@runtime_checkable
class Start(Protocol):
    """Changes the coupling before a fresh run, by blocks of the data module."""

    name: ClassVar[str]
    """The setting of ``CoDDModule`` that asks for it."""
    source: ClassVar[str]
    """The method of the data module that gives the blocks."""

    def run(
        self, denoiser: nn.Module, coupling: Coupling, blocks: Int[Tensor, "blocks sites"], progress: bool
    ) -> None:
        """Change ``coupling``."""


@dataclass(frozen=True)
class CorpusStart:
    """The potentials from the training blocks alone: ``coupling.init_from_corpus(blocks, **settings)``."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "init_from_corpus"
    source: ClassVar[str] = "train_blocks"

    def run(
        self, denoiser: nn.Module, coupling: Coupling, blocks: Int[Tensor, "blocks sites"], progress: bool
    ) -> None:
        """Counts or Baum-Welch; the network is not run."""
        coupling.init_from_corpus(blocks, progress=progress, **self.settings)


@dataclass(frozen=True)
class PoolStart:
    """The weights of the coupling's pool from the validation blocks: ``fit_pool(.., blocks, **settings)``."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "fit_pool"
    source: ClassVar[str] = "valid_blocks"

    def run(
        self, denoiser: nn.Module, coupling: Coupling, blocks: Int[Tensor, "blocks sites"], progress: bool
    ) -> None:
        """See :func:`codd_ppl.training.fit_pool`."""
        fit = fit_pool(denoiser, cast(CouplingLayer, coupling), blocks, **self.settings)
        rank_zero_info(f"bits per masked token by mask ratio: {fit}")


def chosen_starts(
    init_from_corpus: bool | Mapping[str, Any], fit_pool: bool | Mapping[str, Any]
) -> list[Start]:
    """The starts that the settings of a ``CoDDModule`` ask for, in their order: potentials, then pool."""
    asked = ((CorpusStart, init_from_corpus), (PoolStart, fit_pool))
    return [kind({} if how is True else dict(how)) for kind, how in asked if how is not False]


def start_from_data(
    trainer: L.Trainer, denoiser: nn.Module, coupling: Coupling, starts: Sequence[Start]
) -> None:
    """Run the starts in one process, which tells the others.

    Raises:
        ConfigError: no data module, or one without the blocks that a start needs.
    """
    data: Any = getattr(trainer, "datamodule", None)
    for start in starts:
        if not hasattr(data, start.source):
            raise ConfigError(
                f"{start.name} needs a data module with {start.source}(), such as TextDataModule; or call it yourself: "
                "coupling.init_from_corpus(blocks), training.fit_pool(denoiser, coupling, blocks)"
            )
        if trainer.is_global_zero:
            rank_zero_info(f"{start.name}: starting the coupling from the data")
            progress = trainer.progress_bar_callback is not None
            start.run(denoiser, coupling, getattr(data, start.source)(), progress)
        if trainer.world_size > 1:
            coupling.load_state_dict(trainer.strategy.broadcast(coupling.state_dict()))


def check_data(trainer: L.Trainer, coupling: Coupling) -> None:
    """Whether the data module's vocabulary and blocks, if it says what they are, fit the coupling.

    Raises:
        ConfigError: another number of tokens, or another length.
    """
    data: Any = getattr(trainer, "datamodule", None)
    size, sites = getattr(data, "vocab_size", None), getattr(data, "block_length", None)
    if size is not None and size != coupling.vocab_size:
        raise ConfigError(
            f"the data's tokenizer has {size} tokens, expected vocab_size = {coupling.vocab_size} of the "
            "denoiser and the coupling; build them with vocab_size=data.vocab_size"
        )
    if sites is not None and sites != coupling.sites:
        raise ConfigError(
            f"the data's blocks have {sites} tokens, expected {coupling.sites}, the sites of the coupling's "
            "graph; set block_length, or build the graph for that length"
        )
