"""The sizes of large pretrained networks, without their weights: all that the time of a call depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codd_ppl.errors import ConfigError

__all__ = ["SHAPES", "BackboneShape", "named_shape"]

NAMES: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "d_model", "n_embd"),
    "layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "inner_size": ("intermediate_size", "mlp_hidden_size", "n_inner"),
}
"""What configurations of ``transformers`` call the sizes that every network has."""

GATED = ("silu", "swish", "swiglu")
"""Activations of networks whose MLP has a gate; others have two matrices, not three."""


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of a bidirectional transformer with untied embeddings: RMSNorm, rotary attention, an MLP, a linear head.

    Attributes:
        name: for tables.
        vocab_size: rows of the embedding and of the head; the mask is one of them.
        hidden_size: width of the residual stream.
        layers: number of blocks.
        heads: of the queries.
        kv_heads: of keys and values, each shared by heads / kv_heads queries (Ainslie et al. 2023, arXiv:2305.13245).
        inner_size: width of the MLP.
        mask_token_id: of the mask.
        gated: silu(gate) * up, as SwiGLU, or gelu(up) alone.

    Raises:
        ConfigError: a size below 1, heads that don't divide the width into even parts, kv_heads that don't divide the
            heads, or a mask outside of the vocabulary.
    """

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    inner_size: int
    mask_token_id: int
    gated: bool = True

    def __post_init__(self) -> None:
        for size in ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "inner_size"):
            value = getattr(self, size)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{self.name}: expected {size} as an integer of at least 1, found {value!r}"
                )
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ConfigError(
                f"{self.name}: expected hidden_size to be a multiple of 2 * heads and heads one of kv_heads, found "
                f"hidden_size = {self.hidden_size}, heads = {self.heads}, kv_heads = {self.kv_heads}; check the "
                "numbers against the network's own configuration"
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(
                f"{self.name}: expected mask_token_id below vocab_size = {self.vocab_size}, found {self.mask_token_id}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> BackboneShape:
        """Read the sizes off a configuration of ``transformers``, under the names of LLaDA, Qwen, BERT or GPT-2.

        Keys and values have as many heads as the queries, the mask is the last token, and the MLP has a gate, unless
        the configuration says otherwise (num_key_value_heads, mask_token_id, hidden_act).

        Raises:
            ConfigError: a size that is missing; see the class for the others.
        """
        found: dict[str, Any] = {}
        for size, names in NAMES.items():
            present = [key for key in names if config.get(key) is not None]
            if not present:
                raise ConfigError(
                    f"{name}: expected {' or '.join(names)}, the {size} of the network, found only "
                    f"{', '.join(sorted(config)) or 'nothing'}; add the key"
                )
            found[size] = config[present[0]]
        heads = _first(config, ("num_key_value_heads", "n_kv_heads"), found["heads"])
        mask = _first(config, ("mask_token_id",), found["vocab_size"] - 1)
        act = _first(config, ("hidden_act", "activation_type", "activation_function"), GATED[0])
        return cls(name, kv_heads=heads, mask_token_id=mask, gated=act in GATED, **found)

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one block."""
        attention = 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_width
        return (
            attention + (3 if self.gated else 2) * self.hidden_size * self.inner_size + 2 * self.hidden_size
        )

    def parameters(self, layers: int | None = None) -> int:
        """Weights of a network with so many blocks, None: with all; embedding and head are in."""
        blocks = self.layers if layers is None else layers
        return 2 * self.vocab_size * self.hidden_size + self.hidden_size + blocks * self.layer_parameters

    def bytes_needed(self, layers: int, batch: int, sites: int, read: int, dtype: torch.dtype) -> int:
        """Bytes of the weights, and about those of a call: a batch that reads ``read`` tokens, logits of ``sites``."""
        stream = batch * read * (8 * self.hidden_size + 3 * self.inner_size)
        return dtype.itemsize * (self.parameters(layers) + stream + batch * sites * self.vocab_size)


SHAPES: Mapping[str, BackboneShape] = {
    # config.json of GSAI-ML/LLaDA-8B-Base (Nie et al. 2025, arXiv:2502.09992): no grouped keys, mask 126,336
    "llada-8b": BackboneShape("LLaDA-8B", 126_464, 4096, 32, 32, 32, 12_288, 126_336),
    # config.json of Dream-org/Dream-v0-Base-7B (Ye et al. 2025, arXiv:2508.15487), the shape of Qwen2.5-7B
    # (arXiv:2412.15115): four heads of keys and values, mask 151,666. Biases of the queries are left out.
    "dream-7b": BackboneShape("Dream-7B", 152_064, 3584, 28, 28, 4, 18_944, 151_666),
    # config.json of google-bert/bert-base-uncased (Devlin et al. 2018, arXiv:1810.04805), mask 103. LayerNorms, biases,
    # learned positions and the head's transform are left out, which are less than a hundredth of the work.
    "bert-base": BackboneShape("BERT-base", 30_522, 768, 12, 12, 12, 3072, 103, gated=False),
}
"""By the names of ``--backbone-config``."""


def named_shape(name: str) -> BackboneShape:
    """The shape of that name, or of a ``config.json`` of ``transformers`` at that path.

    Raises:
        ConfigError: neither, not a JSON object, a missing size.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"--backbone-config: expected one of {', '.join(SHAPES)} or a config.json of transformers, found {name!r}; "
            "give one of these names, or the path of a file that is there"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected a configuration as JSON, but it can't be read: {error}"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path}: expected a JSON object with keys such as hidden_size, found a {type(config).__name__}; give the "
            "config.json of a model"
        )
    return BackboneShape.from_config(config, str(config.get("model_type") or path.parent.name or path.stem))


def _first(config: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    return next((config[key] for key in names if config.get(key) is not None), default)
