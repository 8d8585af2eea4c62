"""What ``codd attach`` is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from codd_ppl.attach.examples import Answers, Chat, Conversations, Examples, Texts
from codd_ppl.coupling import CouplingLayer
from codd_ppl.errors import ConfigError
from codd_ppl.graphs import FactorGraph, topologies
from codd_ppl.potentials import ContextualLatentPotentials, LatentPotentials, LogarithmicPool, Potentials

__all__ = ["TOPOLOGIES", "AttachSettings", "hash_of"]

TOPOLOGIES: dict[str, Callable[[int, int, int], FactorGraph]] = {
    "hidden_markov": topologies.hidden_markov,
    "latent_tree": topologies.latent_tree,
    "mixture": lambda sites, vocab, states: topologies.star(sites, vocab, states=states),
}
"""Graphs with latents that a prior is fitted on by expectation maximisation: sites, vocabulary, states."""


def hash_of(value: Any) -> str:
    """A short hash of plain values, for the name of what depends on them."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


LARGE = 8192
"""Vocabularies above it are projected by candidates."""


@dataclass(frozen=True)
class AttachSettings:
    """See ``codd attach --help`` for each.

    Raises:
        ConfigError: settings out of range, or that don't go together.
    """

    backbone: str
    data: Sequence[str]
    out: Path
    work: Path | None = None
    valid_data: Sequence[str] = ()
    fields: Sequence[str] = ("text",)
    prompt_fields: Sequence[str] = ()
    answer_field: str | None = None
    messages_field: str | None = None
    plain_prompts: bool = False
    topology: str = "hidden_markov"
    states: int = 1024
    length: int = 32
    combine: Literal["projected", "product"] = "projected"
    sharpen: float = 1.0
    candidates: int | None = None
    epochs: float = 1.0
    batch_size: int = 64
    smoothing: float = 1e-3
    max_tokens: int | None = None
    held_out: float = 0.02
    pool: bool = False
    contextual: bool = False
    gates: bool = False
    examples: int = 4096
    updates: int = 600
    top_k: int = 64
    reduced: int = 256
    context: int | None = None
    blocks: int = 64
    timing: float = 20.0
    network_batch: int = 16
    device: str = "cpu"
    devices: int = 1
    revision: str | None = None
    trust_remote_code: bool = False
    mask_token_id: int | None = None
    dtype: str | None = None
    weights: Literal["float16", "float32"] = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise ConfigError(f"--topology: expected one of {', '.join(TOPOLOGIES)}, found {self.topology!r}")
        for name in (
            "states",
            "length",
            "batch_size",
            "examples",
            "updates",
            "top_k",
            "network_batch",
            "devices",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}"
                )
        if not 0 <= self.held_out < 1 or (self.held_out == 0 and not self.valid_data):
            raise ConfigError(
                f"--held-out: expected a share above 0 and below 1, or 0 with --valid-data, found {self.held_out}"
            )
        if self.blocks < 0 or self.reduced < 0 or not self.sharpen > 0:
            raise ConfigError(
                "expected --blocks and --reduced of at least 0 and --sharpen above 0, found "
                f"{self.blocks}, {self.reduced} and {self.sharpen}"
            )
        if self.combine == "product" and (self.pool or self.candidates):
            raise ConfigError(
                "--pool and --candidates belong to the projection: leave them out, or --combine product"
            )
        if self.messages_field and (self.answer_field or self.prompt_fields):
            raise ConfigError("expected --messages-field, or --prompt-fields and --answer-field, found both")
        if self.prompt_fields and not self.answer_field:
            raise ConfigError(
                "--prompt-fields: expected --answer-field with it, the text that is to be generated"
            )

    @property
    def folder(self) -> Path:
        """Where tokens, checkpoints and features lie."""
        return self.out.with_name(f"{self.out.name}.work") if self.work is None else self.work

    @property
    def answers(self) -> bool:
        """Whether the data are answers to prompts."""
        return bool(self.answer_field or self.messages_field)

    def reader(self, chat: Chat) -> Examples:
        """What the rows of the data are."""
        if self.messages_field:
            return Conversations(self.messages_field, chat)
        if self.answer_field:
            return Answers(self.prompt_fields, self.answer_field, None if self.plain_prompts else chat)
        return Texts(self.fields)

    def network_context(self, positions: int | None) -> int:
        """Tokens that the network reads before a block: 0 for texts, for answers up to 512 and what it has room for.

        Raises:
            ConfigError: more than the network reads.
        """
        room = None if positions is None else positions - self.length
        if room is not None and room < (self.context or 0):
            raise ConfigError(
                f"--context {self.context or 0} and --length {self.length}: expected at most {positions} tokens "
                "together, the network's positions; lower one of them"
            )
        if self.context is not None:
            return self.context
        return 0 if not self.answers else 512 if room is None else min(512, room)

    def coupling(self, vocab_size: int, hidden_size: int | None = None, reduced: int = 0) -> CouplingLayer:
        """The coupling, its tables still to be filled; with ``hidden_size``, contextual."""
        graph = TOPOLOGIES[self.topology](self.length, vocab_size, self.states)
        potentials: Potentials
        if hidden_size is None:
            potentials = LatentPotentials(graph, self.seed)
        else:
            potentials = ContextualLatentPotentials(
                graph, hidden_size, gates=self.gates, seed=self.seed, mask_ratio=True, reduced=reduced
            )
        candidates = self.candidates or (256 if vocab_size > LARGE else None)
        return CouplingLayer(
            graph,
            vocab_size,
            hidden_size,
            self.combine,
            potentials,
            candidates=candidates if self.combine == "projected" else None,
            pool=LogarithmicPool() if self.pool else None,
        )
