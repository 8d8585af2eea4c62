"""Masked models of the library ``transformers`` as denoisers; the one door to it (the extra ``hf`` installs it).

Whatever a model needs is in its configuration or its tokenizer: the id of the mask, the width, whether its logits at a
place speak of the next one (as in models made from autoregressive ones). Nothing of it is written here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from codd_ppl.denoisers.backbone import Backbone, positions, read_part
from codd_ppl.denoisers.protocol import DenoiserOutput
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.typing import Int

__all__ = ["PretrainedDenoiser", "quiet_transformers", "read_backbone", "transformers_library"]

WIDTHS = ("hidden_size", "d_model", "hidden_dim", "n_embd", "dim")
"""What configurations call the width."""


class PretrainedDenoiser(nn.Module):
    """A frozen network of ``transformers`` that predicts masked tokens: LLaDA (arXiv:2502.09992), Dream
    (arXiv:2508.15487), MDLM (arXiv:2406.07524), BERT and its kin. Made by :meth:`from_pretrained`.

    The mask's own logit is -inf: it is no token. ``hidden`` is what the last linear layer reads, the vector whose
    product with the unembedding gives the logits.

    Args:
        model: called as ``model(input_ids=..)``, with an output that has ``logits``.
        mask_token_id: of the mask.
        shift: whether logits (and hidden states) at a place are about the token after it; they are moved to that token,
            and the first token gets its own, as Dream's own sampler does.
        pad_token_id: tokens that the others don't see, by the model's ``attention_mask``; None: there are none.
        tokenizer: of the model.

    Attributes:
        tokenizer: None where the model came without one.
        positions: the longest text that the model reads; None where its configuration doesn't say.
        words: the tokenizer as ``transformers`` knows it, with a chat template if it has one; None where there is none.

    Raises:
        ConfigError: a mask outside of the vocabulary, or a configuration without a width.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_token_id: int,
        shift: bool = False,
        pad_token_id: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        owner: Any = model
        config = owner.config
        widths = [int(value) for name in WIDTHS if isinstance(value := getattr(config, name, None), int)]
        if not widths:
            raise ConfigError(
                f"{type(model).__name__}: expected a configuration with one of {', '.join(WIDTHS)}, found none; wrap "
                "the model in a class with vocab_size, mask_token_id, hidden_size and __call__ (see "
                "codd_ppl.denoisers.Denoiser)"
            )
        self.vocab_size, self.hidden_size = int(config.vocab_size), widths[0]
        self.positions = positions(config)
        if not 0 <= mask_token_id < self.vocab_size:
            raise ConfigError(
                f"mask_token_id: expected an id below vocab_size = {self.vocab_size}, found {mask_token_id}; give the "
                "id that the model was trained with"
            )
        self.model: Any = model.requires_grad_(False)
        self.mask_token_id, self.shift, self.pad_token_id = mask_token_id, shift, pad_token_id
        self.tokenizer = tokenizer
        self.words: Any = None
        self._takes = inspect.signature(model.forward).parameters
        head = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._read: list[Tensor] = []
        self._head = head is not None
        if head is not None:
            head.register_forward_pre_hook(lambda _, given: self._read.append(given[0]))
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        revision: str | None = None,
        trust_remote_code: bool = False,
        mask_token_id: int | None = None,
        shift: bool | None = None,
        dtype: torch.dtype | str | None = None,
        **settings: Any,
    ) -> PretrainedDenoiser:
        """Read a model, and its tokenizer if it has one, from a folder or the hub.

        Args:
            name_or_path: a folder, or an id such as "bert-base-uncased".
            revision: commit or branch on the hub.
            trust_remote_code: run Python code that comes with the model, which LLaDA, Dream and MDLM need. From the hub
                only with a full commit as revision, so that it is the code you have read.
            mask_token_id: if neither the configuration nor the tokenizer says it.
            shift: whether logits are about the next token; None: by the type of the model.
            dtype: of the weights; None: as they are stored.
            settings: more for ``transformers``' ``from_pretrained``, such as ``device_map``.

        Raises:
            ConfigError: no id of the mask, code that is not trusted or not pinned, or ``transformers`` is missing.
            DataError: nothing that can be read there.
        """
        library, name = transformers_library(), os.fspath(name_or_path)
        given: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        with quiet_transformers():
            backbone = Backbone.read(library, name, **given, mask_token_id=mask_token_id, shift=shift)
            own = getattr(backbone.config, "auto_map", None) or {}
            masked = "AutoModelForMaskedLM" in own or "AutoModel" not in own
            kind = library.AutoModelForMaskedLM if masked else library.AutoModel
            model = read_part(kind, name, **given, config=backbone.config, dtype=dtype or "auto", **settings)
        network = cls(
            model,
            backbone.mask_token_id,
            shift=backbone.shift,
            pad_token_id=backbone.pad_token_id,
            tokenizer=backbone.tokenizer,
        )
        network.words = backbone.words
        return network

    def forward(self, xt: Int[Tensor, "batch sites"]) -> DenoiserOutput:
        """Logits and hidden states of every site.

        Raises:
            ShapeError: more sites than the model has positions for.
        """
        if self.positions is not None and xt.shape[-1] > self.positions:
            raise ShapeError(
                f"expected at most {self.positions} tokens, the positions of {type(self.model).__name__}, found "
                f"{xt.shape[-1]}; shorten the prompt, or let the network read less of it (context=.. of BlockSampler)"
            )
        given: dict[str, Any] = {"input_ids": xt}
        if self.pad_token_id is not None and "attention_mask" in self._takes:
            given["attention_mask"] = (xt != self.pad_token_id).long()
        if "timesteps" in self._takes:  # MDLM's, which doesn't use them
            given["timesteps"] = torch.zeros(len(xt), device=xt.device)
        if not self._head:
            given["output_hidden_states"] = True
        self._read.clear()
        output = self.model(**given)
        logits = output.logits if hasattr(output, "logits") else output[0]
        hidden = self._read[-1] if self._head else output.hidden_states[-1]
        self._read.clear()
        if self.shift:
            logits, hidden = (torch.cat((t[:, :1], t[:, :-1]), 1) for t in (logits, hidden))
        mask = torch.tensor([self.mask_token_id], device=logits.device)
        return DenoiserOutput(logits=logits.index_fill(-1, mask, -torch.inf), hidden=hidden)


def read_backbone(name_or_path: str | os.PathLike[str], **settings: Any) -> Backbone:
    """Configuration and tokenizer of a model, without its weights; settings and errors of :meth:`Backbone.read`."""
    with quiet_transformers() as library:
        return Backbone.read(library, os.fspath(name_or_path), **settings)


def transformers_library() -> Any:
    """The module ``transformers``.

    Raises:
        ConfigError: it isn't installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            'networks of the library transformers need it: install it with pip install "codd-ppl[hf]"'
        ) from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The same without its progress bars, for files of a few megabytes."""
    library = transformers_library()
    bars = library.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield library
    finally:
        if shown:
            bars.enable_progress_bar()
