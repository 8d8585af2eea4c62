"""Training of a coupled masked diffusion model: the bound as the loss, for the network, the potentials or both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn

from codd_ppl.coupling import CouplingLayer
from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.diffusion import coupled_nelbo, factorised_nelbo, noise
from codd_ppl.diffusion.nelbo import NoisedBatch
from codd_ppl.diffusion.schedules import LinearSchedule, Schedule, check_steps
from codd_ppl.errors import ConfigError
from codd_ppl.spanning_tree_coupling import SpanningTreeCoupling
from codd_ppl.training.draws import noise_generator, pick_steps, possible_steps
from codd_ppl.training.optimizers import adamw, warmup_and_cosine
from codd_ppl.training.starts import check_data, chosen_starts, start_from_data
from codd_ppl.typing import Float, Int

__all__ = ["CoDDModule"]


class CoDDModule(L.LightningModule):
    """Trains denoiser and coupling on NELBO_T, in nats per token (DESIGN section 3; arXiv:2603.00045):

        loss = 1/sites E_k E_{xt_k ~ q} ( E_S [ -T log p(x_S | xt_k) ]
                                          + marginal_weight T r_k sum_{i masked} -log softmax(l_i)[x0_i] )

    The second term anchors the network's own single-token predictions, which the first alone lets drift: a product
    coupling only asks that logits and potentials *together* are right. It is the bound of the factorised network at the
    same noise and from the same forward pass; each masked token has MDLM's weight, T r_k = 1/t for linear noise
    (arXiv:2406.07524). It anchors what ``steps`` visits: with ``steps=1`` the fully masked input alone.

    A loss is a function of the weights, the batch, ``seed`` and the global step alone, so that an interrupted run that
    is resumed from its checkpoint goes on exactly as it would have. Logged: ``train_loss`` (nats per token),
    ``valid_bits`` (bits per token), for each number of steps of ``valid_steps`` also ``valid_bits_T<steps>``; with an
    anchor also its own ``train_marginal_loss`` and ``valid_marginal_bits_T<steps>``, without ``marginal_weight``.

    Args:
        denoiser: an ``nn.Module`` with ``vocab_size``, ``mask_token_id`` and ``hidden_size`` (see ``denoisers``).
        coupling: over the same vocabulary; ``topologies.independent`` trains the factorised model (MDLM's loss).
        steps: reverse steps T that the model is trained for: a number, several (one is drawn for each batch), or
            "any": a power of two up to the number of sites, drawn for each batch.
        schedule: noise; linear by default.
        freeze_denoiser: train the potentials alone; the network runs without gradient, in eval mode.
        freeze_coupling: train the network alone, for the coupling as it is.
        learning_rate: of the network (AdamW).
        potentials_learning_rate: of the potentials; ten times ``learning_rate`` by default, without weight decay.
        weight_decay: of the network's matrices.
        warmup_steps: linear warm-up; then a cosine down to a tenth over the rest of the run.
        init_from_corpus: start the potentials from the training blocks of the data module (which must have
            ``train_blocks()``, as :class:`TextDataModule` has) before a fresh run; not when one is resumed. A mapping
            gives settings, such as ``{"epochs": 1}`` for Baum-Welch.
        fit_pool: fit the weights of the coupling's pool (see :func:`fit_pool`) before a fresh run, after the potentials
            have started, to the validation blocks of the data module (``valid_blocks()``). A mapping gives settings.
        valid_steps: numbers of steps to validate at; the largest of ``steps`` by default.
        seed: of the noise.
        marginal_weight: of the anchor; 0: none.

    Raises:
        ConfigError: everything frozen, a setting out of range, a frozen network to anchor, or sizes that differ.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        coupling: CouplingLayer | SpanningTreeCoupling,
        steps: int | Sequence[int] | Literal["any"] = "any",
        schedule: Schedule | None = None,
        freeze_denoiser: bool = False,
        freeze_coupling: bool = False,
        learning_rate: float = 1e-3,
        potentials_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        init_from_corpus: bool | Mapping[str, Any] = False,
        fit_pool: bool | Mapping[str, Any] = False,
        valid_steps: Sequence[int] | None = None,
        seed: int = 0,
        marginal_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        if self.network.vocab_size != coupling.vocab_size:
            raise ConfigError(
                f"coupling.vocab_size: expected {self.network.vocab_size} as in denoiser.vocab_size, found "
                f"{coupling.vocab_size}; build both for the vocabulary of the data"
            )
        if not 0 <= marginal_weight < math.inf or (marginal_weight and freeze_denoiser):
            raise ConfigError(
                "expected marginal_weight >= 0, and 0 with freeze_denoiser=True (what doesn't change needs no anchor), "
                f"found {marginal_weight} with freeze_denoiser={freeze_denoiser}"
            )
        self.steps = possible_steps(steps, coupling.sites)
        self.valid_steps = [check_steps(T) for T in valid_steps or (max(self.steps),)]
        self.schedule = schedule or LinearSchedule()
        self.freeze_denoiser, self.freeze_coupling = freeze_denoiser, freeze_coupling
        self.learning_rate, self.marginal_weight = learning_rate, marginal_weight
        own_rate = potentials_learning_rate
        self.potentials_learning_rate = 10 * learning_rate if own_rate is None else own_rate
        self.weight_decay, self.warmup_steps, self.seed = weight_decay, warmup_steps, seed
        self.starts = chosen_starts(init_from_corpus, fit_pool)
        denoiser.requires_grad_(not freeze_denoiser)
        self.coupling = coupling.requires_grad_(not freeze_coupling)
        if not any(p.requires_grad for p in self.parameters()):
            raise ConfigError(
                "nothing to train: expected parameters in the denoiser or the coupling that are not frozen; set "
                "freeze_denoiser=False, or give the coupling factors"
            )

    @property
    def network(self) -> Denoiser:
        """The denoiser, with what the protocol says of it."""
        return cast(Denoiser, self.denoiser)

    # --- the loss -----------------------------------------------------------------------------------

    def forward(self, noised: NoisedBatch) -> Float[Tensor, "*batch"]:
        """NELBO_T of each sequence for one draw of the noise, nats."""
        return self.bound(noised, self.predict(noised))

    def predict(self, noised: NoisedBatch) -> DenoiserOutput:
        """What the network says of xt; without gradient if it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_denoiser):
            return self.network(noised.xt)

    def bound(self, noised: NoisedBatch, output: DenoiserOutput) -> Float[Tensor, "*batch"]:
        """NELBO_T of each sequence, coupled, from what the network said; nats."""
        if isinstance(self.coupling, CouplingLayer) and not self.coupling.plan.factors:
            return factorised_nelbo(noised, output.logits)
        dist = self.coupling(output.logits, hidden=output.hidden, tokens=noised.xt, known=noised.known)
        return coupled_nelbo(noised, output.logits, dist)

    def noise(self, x0: Int[Tensor, "batch sites"], steps: int, salt: int) -> NoisedBatch:
        """The noise that belongs to this seed, process and ``salt``, whatever was drawn before."""
        generator = noise_generator(self.seed, salt, self.global_rank)
        return noise(x0, steps, self.schedule, self.network.mask_token_id, generator)

    def training_step(self, batch: Int[Tensor, "batch sites"], batch_idx: int) -> Float[Tensor, ""]:
        """Mean loss of a batch, nats per token."""
        steps = pick_steps(self.steps, self.seed, self.global_step)
        noised = self.noise(batch, steps, self.global_step + 1)
        output = self.predict(noised)
        loss = self.bound(noised, output).mean() / batch.shape[-1]
        if self.marginal_weight:
            marginal = factorised_nelbo(noised, output.logits).mean() / batch.shape[-1]
            self.log("train_marginal_loss", marginal, batch_size=len(batch))
            loss = loss + self.marginal_weight * marginal
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Int[Tensor, "batch sites"], batch_idx: int) -> None:
        """Bits per token at each of ``valid_steps``, with the same noise every time."""
        found, unit = [], batch.shape[-1] * math.log(2)
        for steps in self.valid_steps:
            noised = self.noise(batch, steps, -1 - batch_idx)
            output = self.predict(noised)
            found.append(self.bound(noised, output).mean() / unit)
            self.log(f"valid_bits_T{steps}", found[-1], batch_size=len(batch), sync_dist=True)
            if self.marginal_weight:
                marginal = factorised_nelbo(noised, output.logits).mean() / unit
                self.log(f"valid_marginal_bits_T{steps}", marginal, batch_size=len(batch), sync_dist=True)
        self.log("valid_bits", found[-1], prog_bar=True, batch_size=len(batch), sync_dist=True)

    # --- the run --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the data's vocabulary and length."""
        check_data(self.trainer, self.coupling)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed run doesn't start the potentials anew."""
        self.starts = []

    def on_fit_start(self) -> None:
        """Start the potentials and the pool from the data of a fresh run."""
        if self.starts:
            start_from_data(self.trainer, self.denoiser, self.coupling, self.starts)
        self.starts = []

    def on_train_epoch_start(self) -> None:
        """A frozen network stays in eval mode: its dropout is off."""
        if self.freeze_denoiser:
            self.denoiser.eval()

    def configure_optimizers(self) -> Any:
        """AdamW with separate rates, linear warm-up and a cosine to a tenth."""
        optimizer = adamw(
            self.denoiser, self.coupling, self.learning_rate, self.potentials_learning_rate, self.weight_decay
        )
        total = max(1, int(min(self.trainer.estimated_stepping_batches, 1e9)))
        schedule = warmup_and_cosine(optimizer, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
