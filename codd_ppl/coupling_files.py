"""A coupling on disk: a JSON file that says what it is, and its weights as safetensors. No pickle anywhere.

``coupling.json`` holds the graph, the kind of potentials and their settings, versions, and which backbone and tokenizer
the coupling is for; ``coupling.safetensors`` the weights. A folder is written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from codd_ppl.errors import ConfigError, DataError
from codd_ppl.folders import whole_folder
from codd_ppl.graphs import FactorGraph
from codd_ppl.graphs.node_link import graph_from_json, graph_to_json
from codd_ppl.potentials.description import build_layer, build_potentials, describe

__all__ = ["PretrainedCoupling", "Vocabulary", "vocabulary_hash"]

FORMAT = "codd_ppl coupling 1"
T = TypeVar("T", bound="PretrainedCoupling")
CONFIG, WEIGHTS = "coupling.json", "coupling.safetensors"


@runtime_checkable
class Vocabulary(Protocol):
    """A tokenizer, of ``tokenizers`` or ``transformers``."""

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""


def vocabulary_hash(tokenizer: Vocabulary) -> str:
    """SHA-256 of the tokens and their ids, hex: two tokenizers with the same one number their tokens alike."""
    words = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
    return hashlib.sha256(words.encode()).hexdigest()


class PretrainedCoupling:
    """The part of :class:`codd_ppl.CouplingLayer` that writes and reads folders, and the hub."""

    graph: FactorGraph
    vocab_size: int
    loaded_config: dict[str, Any] | None = None
    """What the file said, without the graph; None if the coupling wasn't read from one."""

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        backbone: str | None = None,
        tokenizer: Vocabulary | None = None,
        about: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write a folder; one that holds a coupling already is replaced as a whole.

        Args:
            directory: the folder.
            backbone: name of the network that the coupling is for, such as "GSAI-ML/LLaDA-8B-Instruct".
            tokenizer: of the network; a hash of its vocabulary is kept.
            about: notes, JSON values.
            dtype: store the weights in this type, such as ``torch.float16``.

        Raises:
            ConfigError: potentials of a kind that a file can't describe, or a place that holds something else.
        """
        path, layer = Path(directory), cast(Any, self)
        config = {
            "format": FORMAT,
            "versions": {name: _version(name) for name in ("codd_ppl", "torch")},
            "vocab_size": self.vocab_size,
            "coupling": describe(layer),
            "backbone": backbone,
            "tokenizer": None if tokenizer is None else vocabulary_hash(tokenizer),
            "about": about or {},
            "graph": graph_to_json(self.graph),
        }
        with whole_folder(path, CONFIG) as draft:
            (draft / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
            weights = {name: value.detach().contiguous() for name, value in layer.state_dict().items()}
            if dtype is not None:
                weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
            save_file(weights, draft / WEIGHTS)
        return path

    @classmethod
    def from_pretrained(
        cls: type[T],
        name_or_path: str | os.PathLike[str],
        revision: str | None = None,
        backbone: str | None = None,
        tokenizer: Vocabulary | None = None,
        unembedding: Tensor | None = None,
    ) -> T:
        """Read a folder, or a repository of the hub, in eval mode.

        Args:
            name_or_path: a folder, or an id such as "owner/name".
            revision: commit, branch or tag on the hub.
            backbone: name of the network that you will use it with: the one that the file names, if it names one.
            tokenizer: of that network; its vocabulary must be the one that the coupling was made for.
            unembedding: of that network, for emissions that are tied to it.

        Raises:
            DataError: nothing there, or a damaged folder.
            ConfigError: another backbone or vocabulary than the coupling is for.
        """
        path = _local(os.fspath(name_or_path), revision)
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                raise ValueError(f"format {config['format']!r}")
            _check(str(name_or_path), config, backbone, tokenizer)
            graph = graph_from_json(config["graph"])
            about = config["coupling"]
            potentials = build_potentials(graph, about, unembedding)
            layer = build_layer(cls, graph, config["vocab_size"], potentials, about)
            layer.load_state_dict(load_file(path / WEIGHTS))
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise DataError(
                f"{name_or_path}: expected a coupling written by save_pretrained ({CONFIG}, {WEIGHTS}), but "
                f"{type(error).__name__}: {error}"
            ) from error
        layer.loaded_config = {key: value for key, value in config.items() if key != "graph"}
        found: T = layer.eval()
        return found

    def push_to_hub(
        self,
        repo_id: str,
        backbone: str | None = None,
        tokenizer: Vocabulary | None = None,
        about: dict[str, Any] | None = None,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "A coupling of codd_ppl",
    ) -> str:
        """Write it to a repository of the hub, which is made if it isn't there; returns the address of the commit.

        Raises:
            ConfigError: as :meth:`save_pretrained`, or ``huggingface_hub`` is missing.
        """
        hub = _hub()
        with tempfile.TemporaryDirectory() as folder:
            written = self.save_pretrained(Path(folder) / "coupling", backbone, tokenizer, about)
            hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            done = hub.upload_folder(
                repo_id=repo_id, folder_path=written, token=token, commit_message=commit_message
            )
        return str(done)


def _check(name: str, config: dict[str, Any], backbone: str | None, tokenizer: Vocabulary | None) -> None:
    """Whether the coupling is for this network."""
    made_for = config.get("backbone")
    if backbone is not None and made_for is not None and backbone != made_for:
        raise ConfigError(
            f"{name}: expected the backbone {made_for!r}, which this coupling was made for, found {backbone!r}; "
            "attach one to your own backbone"
        )
    if tokenizer is not None and config.get("tokenizer") not in (None, vocabulary_hash(tokenizer)):
        raise ConfigError(
            f"{name}: expected the vocabulary that this coupling was made for ({config['vocab_size']} tokens, hash "
            f"{config['tokenizer'][:12]}, backbone {made_for!r}), found another one "
            f"({len(tokenizer.get_vocab())} tokens, hash {vocabulary_hash(tokenizer)[:12]}); use the tokenizer of "
            f"{made_for or 'its backbone'}"
        )


def _local(name: str, revision: str | None) -> Path:
    """The folder, downloaded from the hub if it isn't one."""
    if Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return Path(name).expanduser()
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: expected a folder or a repository of the hub, found neither ({type(error).__name__}: "
            f"{str(error).strip()[:200]})"
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            'the hub needs the library huggingface_hub: install it with pip install "codd-ppl[hf]"'
        ) from error
    return huggingface_hub


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
