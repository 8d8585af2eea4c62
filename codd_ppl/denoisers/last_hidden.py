"""Hidden states of a network that somebody else runs, caught where its last linear layer reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from codd_ppl.denoisers.backbone import SHIFTED
from codd_ppl.denoisers.pretrained import PretrainedDenoiser
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.typing import Float

__all__ = ["LastHidden"]


class LastHidden:
    """What the last linear layer of a network read in its latest run: the states h_i that contextual couplings read.

    A forward pre-hook keeps them until they are taken; the network's own answers are as they were.

    Args:
        model: of ``transformers``, with ``get_output_embeddings()``; a :class:`PretrainedDenoiser`; or the linear layer
            itself, such as ``denoiser.head``.
        shift: whether the states at a place are about the token after it; they are moved there, as
            :class:`PretrainedDenoiser` does. None: by the type of the model.

    Raises:
        ConfigError: a network whose last layer isn't known.
    """

    def __init__(self, model: nn.Module, shift: bool | None = None) -> None:
        owner: Any = model.model if isinstance(model, PretrainedDenoiser) else model
        if shift is None and isinstance(model, PretrainedDenoiser):
            shift = model.shift
        kind = str(getattr(getattr(owner, "config", None), "model_type", "")).lower()
        self.shift = kind in SHIFTED if shift is None else shift
        head = owner if isinstance(owner, nn.Linear) else None
        if hasattr(owner, "get_output_embeddings"):
            head = owner.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ConfigError(
                f"model: expected one whose get_output_embeddings() is its last layer, found {type(owner).__name__} "
                "without; pass the linear layer that makes the logits"
            )
        self._read: Tensor | None = None
        self._handle = head.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        self._read = given[0].detach()

    def take(self, rows: int, sites: int) -> Float[Tensor, "rows sites hidden"]:
        """The states of the latest run, which are then forgotten.

        Twice as many rows are classifier-free guidance in one run (LLaDA's, :class:`codd_ppl.denoisers.Guided`), whose
        first half has the prompt.

        Args:
            rows, sites: of the text.

        Raises:
            ConfigError: the network didn't run since the states were last taken, or this is closed.
            ShapeError: states of another text.
        """
        read, self._read = self._read, None
        if read is None:
            raise ConfigError(
                "model: expected hidden states of a run of it before this call, found none; run the model that was "
                "given here once before each call, and close only at the end"
            )
        fits = read.is_floating_point() and read.dim() == 3 and read.shape[1] == sites
        if not fits or len(read) not in (rows, 2 * rows):
            raise ShapeError(
                f"model: expected hidden states ({rows}, {sites}, hidden) of the text, found {tuple(read.shape)}; give "
                "the model that this loop runs, on whole texts, without a cache of a part of them"
            )
        read = read[:rows]
        return torch.cat((read[:, :1], read[:, :-1]), 1) if self.shift else read

    def close(self) -> None:
        """Take the hook off the network; more than once is fine."""
        self._handle.remove()
        self._read = None
