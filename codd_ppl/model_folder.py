"""A trained model on disk: network, coupling and tokenizer in one folder that says what it is.

``model.json`` holds the sizes of the network and the factor graph, ``weights.safetensors`` the weights,
``tokenizer.json`` the tokenizer. A folder is written beside its place and renamed: there is never half of one.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers import BidirectionalTransformer, TransformerConfig
from codd_ppl.errors import ConfigError, DataError
from codd_ppl.folders import whole_folder
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.node_link import graph_from_json, graph_to_json
from codd_ppl.potentials import ContextualLatentPotentials, LatentPotentials, TiedEmissionPotentials
from codd_ppl.potentials.description import build_layer, build_potentials, describe
from codd_ppl.potentials.table import table_shapes
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling

__all__ = [
    "SavedModel",
    "load_contextual",
    "load_coupling",
    "load_denoiser",
    "load_model",
    "save_model",
]

MODEL = "model.json"
"""The file by which a model folder is known."""


@dataclass(frozen=True)
class SavedModel:
    """What a model folder holds; ``about`` is what the writer noted (text, training, figures).

    ``denoiser`` is a :class:`BidirectionalTransformer` there; with a coupling that was attached to a pretrained
    network, that network (a :class:`codd_ppl.denoisers.Denoiser`).
    """

    denoiser: Any
    coupling: CouplingLayer
    tokenizer: Tokenizer | None
    about: dict[str, Any]


def save_model(
    path: str | os.PathLike[str],
    denoiser: BidirectionalTransformer,
    coupling: CouplingLayer | SpanningTreeCoupling,
    tokenizer: Tokenizer | None = None,
    about: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model folder; one that is there already is replaced as a whole.

    Args:
        path: the folder.
        denoiser, coupling, tokenizer: what it holds.
        about: notes of the writer.
        dtype: store the weights in this type, such as ``torch.float16`` for half the size; they are read back in the
            modules' own.

    Raises:
        ConfigError: a network or potentials of a kind that the folder can't describe, or a path that is something else.
    """
    path = Path(path)
    if not isinstance(coupling, CouplingLayer) or not isinstance(denoiser, BidirectionalTransformer):
        raise ConfigError(
            f"a model folder holds a BidirectionalTransformer and a CouplingLayer, found {type(denoiser).__name__} and "
            f"{type(coupling).__name__}; keep torch.save(module.state_dict()) beside the code that builds it"
        )
    about_coupling = describe(coupling)
    if isinstance(coupling.potentials, TiedEmissionPotentials) and not torch.equal(
        coupling.potentials.unembedding, denoiser.unembedding
    ):
        raise ConfigError(
            "the emissions are tied to other vectors than the unembedding of the network, which is what the folder "
            "holds; build TiedEmissionPotentials with denoiser.unembedding"
        )
    config = {
        "format": "codd_ppl model 1",
        "denoiser": asdict(denoiser.config),
        "coupling": about_coupling,
        "graph": graph_to_json(coupling.graph),
        "about": about or {},
    }
    with whole_folder(path, MODEL) as draft:
        (draft / MODEL).write_text(json.dumps(config, indent=1), encoding="utf-8")
        weights = {f"denoiser.{k}": v.contiguous() for k, v in denoiser.state_dict().items()}
        weights |= {f"coupling.{k}": v.contiguous() for k, v in coupling.state_dict().items()}
        if dtype is not None:
            weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        save_file(weights, draft / "weights.safetensors")
        if tokenizer is not None:
            tokenizer.save(str(draft / "tokenizer.json"))
    return path


def load_denoiser(path: str | os.PathLike[str]) -> BidirectionalTransformer:
    """The network of a model folder, to train with; in a recipe, ``class_path: codd_ppl.model_folder.load_denoiser``.

    Raises:
        DataError: no such folder, or one that is damaged.
    """
    network: BidirectionalTransformer = load_model(path).denoiser.train()
    return network


def load_coupling(
    path: str | os.PathLike[str],
    graph: FactorGraph | None = None,
    combine: Literal["projected", "product"] | None = None,
) -> CouplingLayer:
    """The coupling of a model folder, to train on; in a recipe, ``class_path: codd_ppl.model_folder.load_coupling``.

    Args:
        path: the folder.
        graph: put its tables on this graph instead, whose ties name the same tables: a tied chain of another length.
        combine: how to combine logits and prior instead; a product has no pool.

    Raises:
        DataError: no such folder, or one that is damaged.
        ConfigError: a graph with tables of other names or shapes, or potentials other than :class:`LatentPotentials`.
    """
    coupling = load_model(path).coupling
    potentials: Any = coupling.potentials
    if graph is not None:
        static = _expect_latent(path, coupling)
        here, there = table_shapes(graph), table_shapes(coupling.graph)
        if here != there:
            raise ConfigError(
                f"graph: expected tables {there} as in {path}, found {here}; give the same ties and cardinalities"
            )
        potentials = LatentPotentials(graph)
        potentials.load_state_dict(static.state_dict())
    settings = describe(coupling)
    if combine is not None:
        settings["combine"] = combine
    if settings["combine"] == "product":
        settings["pool"] = None
    layer: CouplingLayer = build_layer(
        CouplingLayer, graph or coupling.graph, coupling.vocab_size, potentials, settings
    )
    if layer.pool is not None:
        layer.pool = coupling.pool
    return layer.train()


def load_contextual(
    path: str | os.PathLike[str],
    width: int = 128,
    gates: bool = False,
    seed: int = 0,
    emission_rank: int = 0,
    mask_ratio: bool = False,
) -> CouplingLayer:
    """The coupling of a model folder with its latents made contextual: it starts as it is there.

    In a recipe, ``class_path: codd_ppl.model_folder.load_contextual``.

    Args:
        path: the folder.
        width, gates, seed, emission_rank, mask_ratio: of the :class:`ContextualLatentPotentials` made of its tables.

    Raises:
        DataError: no such folder, or one that is damaged.
        ConfigError: its potentials aren't :class:`LatentPotentials`.
    """
    saved = load_model(path)
    coupling, static = saved.coupling, _expect_latent(path, saved.coupling)
    potentials = ContextualLatentPotentials(
        coupling.graph,
        saved.denoiser.hidden_size,
        width=width,
        gates=gates,
        seed=seed,
        emission_rank=emission_rank,
        mask_ratio=mask_ratio,
    )
    potentials.static = static
    coupling.potentials, coupling.hidden_size = potentials, potentials.hidden_size
    return coupling.train()


def load_model(path: str | os.PathLike[str]) -> SavedModel:
    """Read what :func:`save_model` wrote.

    Raises:
        DataError: no such folder, or one that is damaged.
    """
    path = Path(path)
    try:
        config = json.loads((path / MODEL).read_text(encoding="utf-8"))
        denoiser = BidirectionalTransformer.from_config(TransformerConfig(**config["denoiser"]))
        graph, about = graph_from_json(config["graph"]), config["coupling"]
        potentials = build_potentials(graph, about, denoiser.unembedding)  # filled with the weights below
        coupling = build_layer(CouplingLayer, graph, denoiser.vocab_size, potentials, about)
        weights = load_file(path / "weights.safetensors")
        for name, module in (("denoiser.", denoiser), ("coupling.", coupling)):
            module.load_state_dict(
                {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}
            )
        tokenizer = path / "tokenizer.json"
        return SavedModel(
            denoiser.eval(),
            coupling.eval(),
            Tokenizer.from_file(str(tokenizer)) if tokenizer.is_file() else None,
            config["about"],
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path}: expected a model folder written by save_model (model.json, weights.safetensors), but "
            f"{type(error).__name__}: {error}; train one with `codd demo` or `codd fit`"
        ) from error


def _expect_latent(path: str | os.PathLike[str], coupling: CouplingLayer) -> LatentPotentials:
    if type(coupling.potentials) is not LatentPotentials:
        raise ConfigError(
            f"{path}: expected a coupling with LatentPotentials, found {type(coupling.potentials).__name__}; take it "
            "as it is with load_coupling(path), or give another folder"
        )
    return coupling.potentials
