"""A coupling in somebody else's generation loop: a function from the network's logits to coupled ones.

Loops such as LLaDA's ``generate`` (arXiv:2502.09992) and Dream's ``diffusion_generate`` (arXiv:2508.15487) take a token
for each masked place from the logits, by itself, and keep some of them. Here the tokens are drawn before, jointly, and
the logits are written so that the loop can only find these.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from codd_ppl.denoisers.last_hidden import LastHidden
from codd_ppl.denoisers.running import device_of, evaluation_mode
from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.errors import ConfigError, LogitsError, ShapeError, TokenError
from codd_ppl.sampling.cover import Cover, aligned_cover
from codd_ppl.sampling.drawing import Draw, drawing_method
from codd_ppl.sampling.logits import LogitsTransform, chain_of
from codd_ppl.sampling.protocol import CheckedCoupling, Coupling, JointDistribution
from codd_ppl.typing import Float, Int

__all__ = ["CoupledLogits"]

CERTAIN = 64.0
"""Largest log-odds that is written: p is 1 in any arithmetic, and exp of it fits into float32."""


class CoupledLogits:
    """Logits whose argmax, at all masked places together, is one joint draw of the coupled law.

        hook = CoupledLogits(coupling, mask_token_id, start=prompt.shape[1])
        model.diffusion_generate(prompt, generation_logits_hook_func=hook.dream, temperature=0.0, ..)    # Dream
        logits = hook(x, model(x).logits)                     # LLaDA: the line of its loop that runs the model

    **The temperature of the loop must be 0** (and its top-k and top-p unset): the randomness is the hook's, that of
    ``drawing`` and ``logits``. With x_M ~ p(x_M | xt) drawn, the logits of a masked place i become

        log p_i  at x_i,    log (1 - p_i) / (V - 1)  elsewhere,    p_i = p(x_i | xt), its single-site marginal

    up to a constant, over the V tokens that may be written, so that a loop that ranks places by the softmax reads the
    probability that the coupled law gives to the token; p_i is raised to just above 1 / V where it is below, or another
    token would be the largest. Probability, margin and entropy then rank alike, by p_i. The mask itself gets none.

    An order that doesn't look at values (Dream's ``alg="origin"``, LLaDA's ``remasking="random"``) keeps an exact draw
    of p(x_S | xt) for the places S that it reveals. By confidence it prefers likely tokens, as these loops do with the
    network's own draws; :class:`codd_ppl.Sampler` ranks by the marginals alone, and stays exact.

    Texts are covered by blocks of the coupling's sites that begin at ``start``; in one call different blocks are
    independent given the known text. The window of a block that the end of the text cuts short ends there, as that of
    :class:`codd_ppl.sampling.BlockSampler`: it begins before the block, and masked places there are summed out. What is
    not masked is known text to the coupling, padding too, which a window reaches only where the text from ``start`` on
    has fewer places than the coupling sites. All windows of all rows are one query of the coupling; where that has a
    law for each set of sites (spanning trees), the set is that of all masked places of a block. Logits elsewhere are
    returned as they were, and the given ones aren't changed. Transform logits before this hook, not after.

    Args:
        coupling: any; of the vocabulary of the model. Columns of the logits beyond it are padding, never drawn.
        mask_token_id: of the mask.
        start: first place of the first block, the end of the prompt: one integer if prompts are of one length or padded
            on the left, else one for each row. Masked places before it are left to the loop.
        drawing, logits: how the tokens are drawn, and transforms such as ``[Temperature(0.8), TopP(0.9)]`` of the
            logits before they are coupled, as of :class:`codd_ppl.Sampler`.
        blocks: largest number of blocks with masks that are coupled in each row, from the left; None: all. For loops
            that fill blocks of their own from left to right: 1 where the length of these divides the coupling's sites
            or is the same. Masked places beyond keep the network's logits: the loop must not reveal them.
        generator: source of all randomness, on the device of the logits; torch's global one if None.
        model: for couplings that read hidden states, the network that the loop runs; see
            :class:`codd_ppl.denoisers.last_hidden.LastHidden`.
        shift: of the same.

    Raises:
        ConfigError: a setting that is out of range; on the call, a text shorter than the coupling or its ``start``, a
            coupling or generator on another device, or one that reads hidden states without ``model``.
        ShapeError: starts that aren't integers; on the call, logits that don't fit the text or the coupling.
        LogitsError: NaN or +inf at a masked place, or no token left there.
        TokenError: a known token outside of the coupling's vocabulary.
        InfeasibleError: a coupling with constraints that the known tokens break.
    """

    def __init__(
        self,
        coupling: Coupling,
        mask_token_id: int,
        start: int | Sequence[int] | Tensor = 0,
        drawing: str | Draw = "joint",
        logits: LogitsTransform | Sequence[LogitsTransform] | None = None,
        blocks: int | None = None,
        generator: torch.Generator | None = None,
        model: nn.Module | None = None,
        shift: bool | None = None,
    ) -> None:
        self.start = torch.as_tensor(start).cpu()
        if self.start.dtype not in (torch.int64, torch.int32) or self.start.dim() > 1:
            raise ShapeError(
                f"start: expected an integer or one for each row, found {self.start.dtype} {tuple(self.start.shape)}; "
                "pass prompt.shape[1], or the lengths of the prompts"
            )
        if bool((self.start < 0).any()) or mask_token_id < 0:
            raise ConfigError(
                f"expected start and mask_token_id of at least 0, found {self.start.tolist()} and {mask_token_id}"
            )
        if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
            raise ConfigError(f"blocks: expected an integer of at least 1, or None for all, found {blocks!r}")
        self.coupling, self.mask_token_id, self.blocks = coupling, mask_token_id, blocks
        self.drawing, self.logits = drawing_method(drawing), chain_of(logits)
        self.generator = generator
        self._hidden = None if model is None else LastHidden(model, shift)

    @torch.no_grad()
    def __call__(
        self, x: Int[Tensor, "rows places"], logits: Float[Tensor, "rows places columns"]
    ) -> Float[Tensor, "rows places columns"]:
        """Coupled logits; the same object where nothing is masked. As ``transformers``' logits processors are called.

        Args:
            x: tokens, with masks.
            logits: of the model, each at the place that it is about.
        """
        self._check(x, logits)
        x = x.to(logits.device, torch.int64)
        start = self.start.to(x.device, torch.int64).expand(len(x))
        cover = aligned_cover(x == self.mask_token_id, self.coupling.sites, start, self.blocks)
        if not len(cover.row):
            return logits
        vocab, mask, about = self.coupling.vocab_size, self.mask_token_id, torch.finfo(logits.dtype)
        window, site = cover.chosen.nonzero(as_tuple=True)
        row, place = cover.row[window], cover.place[window, site]
        with evaluation_mode(self.coupling):
            law = self._law(x, logits, cover)
            drawn = self.drawing.draw(law, cover.chosen, self.generator)[window, site]
            if bool(((drawn < 0) | (drawn >= vocab) | (drawn == mask)).any()):
                raise TokenError(
                    f"expected draws of tokens from 0 to {vocab - 1} without the mask {mask}, whose logit is -inf, "
                    f"found others; {type(self.coupling).__name__} must rule out what the logits do"
                )
            chance = law.marginals[window, site, drawn].clamp(0, 1)  # sums that are rounded
        # Log-odds, as all others are at 0. The floor is what the rounding of logits and softmax can't undo.
        odds = chance.log() - torch.log1p(-chance) + log(max(vocab - 1 - (mask < vocab), 1))
        floor = 8 * about.eps + 4 * vocab * about.smallest_normal * about.eps
        coupled = logits.clone()
        coupled[row, place] = 0.0
        coupled[row, place, vocab:] = about.min
        if mask < vocab:
            coupled[row, place, mask] = about.min
        coupled[row, place, drawn] = odds.clamp(floor, CERTAIN).to(logits.dtype)
        return coupled

    def dream(
        self, step: int | None, x: Int[Tensor, "rows places"], logits: Float[Tensor, "rows places columns"]
    ) -> Float[Tensor, "rows places columns"]:
        """The same with the arguments of Dream's ``generation_logits_hook_func``, whose logits are in place already."""
        return self(x, logits)

    def close(self) -> None:
        """Take the hook off ``model``, if there is one; so does leaving a ``with`` block."""
        if self._hidden is not None:
            self._hidden.close()

    def __enter__(self) -> CoupledLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _law(self, x: Tensor, logits: Tensor, cover: Cover) -> JointDistribution:
        """The coupled law of the windows."""
        coupling, where = self.coupling, (cover.row[:, None], cover.place)
        tokens, known = x[where], x[where] != self.mask_token_id
        inside = logits[(*where, slice(coupling.vocab_size))]  # a copy
        inside = inside.float() if inside.dtype in (torch.float16, torch.bfloat16) else inside
        inside[known] = 0.0  # nobody reads them, and those of padding may be NaN
        if self.mask_token_id < coupling.vocab_size:
            inside[..., self.mask_token_id] = -torch.inf
        largest = inside.amax(-1)
        for window, site in (~largest.isfinite()).nonzero()[:1].tolist():
            raise LogitsError(
                f"logits: expected finite ones (or -inf for some tokens), the largest is {largest[window, site]:g} at "
                f"place {cover.place[window, site]} of row {cover.row[window]}; look for an overflow in the model (try "
                "float32), or for masks of attention that hide all of the text"
            )
        for window, site in (known & ((tokens < 0) | (tokens >= coupling.vocab_size))).nonzero()[:1].tolist():
            raise TokenError(
                f"x: expected known tokens from 0 to {coupling.vocab_size - 1}, the coupling's, found "
                f"{tokens[window, site]} at place {cover.place[window, site]} of row {cover.row[window]}; build the "
                "coupling with all tokens of the model's tokenizer"
            )
        for transform in self.logits:
            inside = transform(inside)
        hidden = None
        if self._hidden is not None:
            hidden = self._hidden.take(*x.shape).to(logits.device)[where]
        if isinstance(coupling, CheckedCoupling):
            coupling.check(tokens, known)
        law: Any
        try:
            law = coupling(inside, hidden=hidden, tokens=tokens, known=known)
        except ShapeError as error:
            if hidden is not None:
                raise
            raise ConfigError(
                f"model: the coupling may read hidden states, which a loop doesn't pass on; give the network that it "
                f"runs as model=.. ({error})"
            ) from error
        return law.restrict(cover.chosen) if isinstance(law, SetDistribution) else law

    def _check(self, x: Tensor, logits: Tensor) -> None:
        sites, vocab = self.coupling.sites, self.coupling.vocab_size
        if x.dim() != 2 or x.is_floating_point() or x.dtype == torch.bool:
            raise ShapeError(
                f"x: expected integer tokens (rows, places), found {x.dtype} {tuple(x.shape)}; pass the whole text, "
                "masks included"
            )
        if not logits.is_floating_point() or logits.dim() != 3 or logits.shape[:2] != x.shape:
            raise ShapeError(
                f"logits: expected floating ones ({len(x)}, {x.shape[1]}, columns), a row for each token of x, found "
                f"{logits.dtype} {tuple(logits.shape)}; run the model on the whole text, not on a part with a cache"
            )
        if logits.shape[2] < vocab:
            raise ShapeError(
                f"logits: expected at least {vocab} columns, the vocabulary of the coupling, found {logits.shape[2]}; "
                "use a coupling of this model's vocabulary"
            )
        if self.start.dim() == 1 and len(self.start) != len(x):
            raise ShapeError(
                f"start: expected one for each of the {len(x)} rows, found {len(self.start)}; n texts of one prompt "
                "are n rows: start.repeat_interleave(n)"
            )
        if self.start.numel() and int(self.start.max()) > x.shape[1]:
            raise ConfigError(
                f"start: expected at most {x.shape[1]}, the length of the text, found {int(self.start.max())}; it is "
                "the length of the prompt, padding on its left included"
            )
        if x.shape[1] < sites:
            raise ConfigError(
                f"x: expected at least the {sites} sites of the coupling, found {x.shape[1]} places; let the loop "
                f"write more, or shorten a tied chain with codd_ppl.sampling.extended(coupling, {x.shape[1]})"
            )
        device = device_of(self.coupling, default=logits.device)
        drawn_on = device if self.generator is None else self.generator.device
        if device != logits.device or drawn_on.type != device.type:
            raise ConfigError(
                f"expected coupling and generator on {logits.device}, where the logits are, found them on {device} and "
                f"{drawn_on}; move them with coupling.to({str(logits.device)!r}) and "
                f"torch.Generator({str(logits.device)!r})"
            )
