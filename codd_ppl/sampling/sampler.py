"""The few-step sampler: one network call and one joint draw per reverse step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.denoisers.running import device_of, evaluation_mode
from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.diffusion.schedules import LinearSchedule, Schedule
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.sampling.activation import ActivatedCoupling
from codd_ppl.sampling.arguments import sampler_arguments
from codd_ppl.sampling.drawing import Draw, drawing_method
from codd_ppl.sampling.generation import Generation
from codd_ppl.sampling.logits import LogitsTransform, chain_of
from codd_ppl.sampling.policies import unmasking_policy
from codd_ppl.sampling.prediction import Prediction
from codd_ppl.sampling.protocol import CheckedCoupling, Coupling, JointDistribution, WarmCoupling
from codd_ppl.sampling.remasking import Remasking, RemaskState, remasking_strategy
from codd_ppl.sampling.step import OnStep, Step
from codd_ppl.sampling.unmasking import RevealState, UnmaskingPolicy
from codd_ppl.typing import Bool, Int, Tensor

__all__ = ["Generation", "Sampler", "evaluation_mode", "device_of"]


class Sampler:
    """Generate by T reverse steps, each a joint draw of the sites that it reveals.

    Step k = T, ..., 1 runs the network once on the partly masked xt, couples its logits, draws *all* masked
    sites jointly and keeps the revealed set S, which is an exact sample of p(x_S | xt). With
    ``unmasking="random"`` the tokens have the law whose negative log-likelihood NELBO_T bounds (DESIGN 3). A step that
    reveals nothing calls no network, and generation ends when nothing is masked.

    Args:
        denoiser: the network; called as ``denoiser(xt)``, (batch, sites) int64 -> ``DenoiserOutput``.
        coupling: ``CouplingLayer`` for the same vocabulary; ``topologies.independent`` gives the factorised sampler.
        unmasking: ``"random"``, ``"random_order"``, ``"low_confidence"``, ``"margin"``, ``"entropy"``; adaptive,
            so that easy text takes fewer steps: ``"joint_confidence"``, ``"joint_entropy"``, ``"entropy_bound"``; or an
            object (:mod:`codd_ppl.sampling.unmasking`, :mod:`codd_ppl.sampling.adaptive`).
        steps: number T of reverse steps, and the largest number of network calls: the last step reveals all that is
            left. Give an adaptive policy as many as there are sites if it shall never be overruled.
        schedule: noise schedule that spreads the sites over the steps; linear if None.
        warm_start: start the projection of a step from the weights of the last one. Marginals are nearer to the
            network's after as many sweeps. But the law of a step then depends on the path and not on xt alone (unless
            the sweeps go to the fixed point), so that NELBO_T, which evaluation computes from xt, is no longer its
            bound: off by default.
        drawing: how the revealed tokens are drawn: ``"joint"`` (exact), ``"latent"``, ``"any_order"``, ``"mode"``,
            ``"k_best"``, or an object such as ``AnyOrder(temperature=0.7)`` (:mod:`codd_ppl.sampling.drawing`).
        logits: transforms of the network's logits before they are coupled, in order, such as
            ``[Temperature(0.8), TopK(50), TopP(0.9)]`` (:mod:`codd_ppl.sampling.logits`).
        active_below: couple a row only while at most this share of its sites is masked, and draw it from the product of
            the network's marginals before (:class:`codd_ppl.sampling.ActivatedCoupling`); None: always couple.
        remasking: mask written tokens again, so that they can be corrected: ``"cap"``, ``"rescale"``, ``"confidence"``,
            or an object (:mod:`codd_ppl.sampling.remasking`); None: what is written stays.

    Raises:
        ConfigError: steps < 1, unknown names, vocabularies that differ, or ``warm_start`` for a coupling that doesn't
            iterate (see :class:`codd_ppl.sampling.WarmCoupling`).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        coupling: Coupling,
        unmasking: str | UnmaskingPolicy = "random",
        steps: int = 4,
        schedule: Schedule | None = None,
        warm_start: bool = False,
        drawing: str | Draw = "joint",
        logits: LogitsTransform | Sequence[LogitsTransform] | None = None,
        active_below: float | None = None,
        remasking: str | Remasking | None = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps: expected an integer of at least 1, found {steps!r}; pass e.g. steps=4")
        if denoiser.vocab_size != coupling.vocab_size:
            raise ConfigError(
                f"coupling.vocab_size: expected {denoiser.vocab_size} as in denoiser.vocab_size, found "
                f"{coupling.vocab_size}; build the coupling with vocab_size={denoiser.vocab_size}"
            )
        if warm_start and not (isinstance(coupling, WarmCoupling) and coupling.warm_starts):
            raise ConfigError(
                f"warm_start: {type(coupling).__name__} has no projection to start; leave it False, or couple with "
                'CouplingLayer(graph, vocab, combine="projected") on a graph with factors'
            )
        self.denoiser = denoiser
        self.coupling = coupling if active_below is None else ActivatedCoupling(coupling, active_below)
        self.warm_start = warm_start
        self.unmasking = unmasking_policy(unmasking)
        self.drawing = drawing_method(drawing)
        self.logits = chain_of(logits)
        self.remasking = None if remasking is None else remasking_strategy(remasking)
        self.steps = steps
        self.schedule: Schedule = LinearSchedule() if schedule is None else schedule

    @classmethod
    def from_arguments(cls, denoiser: Denoiser, coupling: Coupling, **arguments: Any) -> "Sampler":
        """A sampler from what users of LLaDA, Dream or diffusers type.

            Sampler.from_arguments(denoiser, coupling, steps=16, alg="entropy", temperature=0.7, top_p=0.95)

        The table of names is in :mod:`codd_ppl.sampling.arguments`; the sampler's own are fine too.

        Raises:
            ConfigError: a name that means something else here (the message says what to do), or an unknown one.
        """
        return cls(denoiser, coupling, **sampler_arguments(**arguments))

    @torch.no_grad()
    def generate(
        self,
        template: Int[Tensor, "*batch sites"],
        generator: torch.Generator | None = None,
        progress: bool = False,
        on_step: OnStep | None = None,
        record: bool = False,
    ) -> Generation:
        """Write the masked sites of the template; known tokens stay as they are.

        Args:
            template: (batch, sites) or (sites,) int64 with ``denoiser.mask_token_id`` where to write. Rows may
                have any number of masked sites, none included. It is moved to the denoiser's device.
            generator: source of all randomness, on the denoiser's device; torch's global one if None.
            progress: show a progress bar on standard error.
            on_step: called with a :class:`Step` after every reverse step, to stream or to score.
            record: note the confidence of every token, which asks the coupling for its marginals in every step.

        Raises:
            ShapeError: wrong dtype, dimension or length.
            TokenError: ids that are neither in the vocabulary nor the mask token.
            ConfigError: a generator on another device, or a policy that reveals what is not masked.
            InfeasibleError: the coupling has a constraint that the known tokens break, before the network is run.
        """
        self._check(template)
        device = device_of(self.denoiser, default=template.device)
        if generator is not None and generator.device.type != device.type:
            raise ConfigError(
                f"generator: expected one on {device}, where the denoiser is, found one on {generator.device}; "
                f"build it as torch.Generator(device={device.type!r})"
            )
        xt = torch.atleast_2d(template.to(device))
        masked = open_sites = xt == self.denoiser.mask_token_id
        if isinstance(self.coupling, CheckedCoupling):
            self.coupling.check(xt, ~masked)
        history = torch.where(masked, self.steps, -1)
        noted = record or (self.remasking is not None and self.remasking.needs_confidence)
        confidence = torch.ones(xt.shape, device=device) if noted else None
        rates = self.schedule.reveal_rates(self.steps).tolist()
        alphas = self.schedule.grid(self.steps).tolist()
        nfe = 0
        last: JointDistribution | None = None
        with evaluation_mode(self.denoiser, self.coupling), _progress(progress) as bar:
            task = bar.add_task("unmasking", total=self.steps)
            for step in range(self.steps):
                if self.remasking is None and not bool(masked.any()):
                    break
                k = self.steps - step  # the bound counts the same steps down from T to 1
                again, rate = torch.zeros_like(masked), rates[k - 1]
                if self.remasking is not None:
                    written = open_sites & ~masked
                    now = RemaskState(open_sites, written, alphas[k], alphas[k - 1], confidence, generator)
                    again, rate = self.remasking.remask(now), self.remasking.rate(now)
                prediction = Prediction(self.denoiser, self.coupling, xt, masked, last, self.logits)
                left = _left(open_sites.sum(-1), alphas[k - 1])
                state = RevealState(
                    masked=masked,
                    step=step,
                    steps=self.steps,
                    rate=rate,
                    number=((masked | again).sum(-1) - left).clamp_min(0),
                    generator=generator,
                    coupled=prediction.coupled,
                    network=prediction.network,
                    joint=prediction.joint,
                )
                revealed = masked if k == 1 else self._reveal(state)
                law: JointDistribution | None = None
                if bool(revealed.any()):
                    dist = prediction.dist
                    if isinstance(dist, SetDistribution):
                        dist = dist.restrict(revealed)
                    law = dist
                    drawn = self.drawing.draw(dist, revealed, generator)
                    xt = torch.where(revealed, drawn, xt)
                    history = torch.where(revealed, step, history)
                    if confidence is not None:
                        own = prediction.coupled().gather(-1, drawn.clamp_min(0)[..., None])[..., 0]
                        confidence = torch.where(revealed, own.to(confidence.dtype), confidence)
                masked = (masked & ~revealed) | again
                xt = torch.where(again, self.denoiser.mask_token_id, xt)
                last = prediction.made or last if self.warm_start else None
                nfe += prediction.calls
                bar.update(task, completed=step + 1)
                if on_step is not None:
                    on_step(Step(step, self.steps, xt, revealed, history, law))
        if bool((xt == self.denoiser.mask_token_id).any()):
            raise TokenError(
                f"tokens: expected none to be the mask token {self.denoiser.mask_token_id}, but the denoiser gives it "
                "positive probability; have the denoiser return a logit of -inf for it"
            )
        shape = template.shape
        noted_here = confidence.reshape(shape) if record and confidence is not None else None
        return Generation(xt.reshape(shape), nfe, history.reshape(shape), noted_here)

    def _reveal(self, state: RevealState) -> Bool[Tensor, "batch sites"]:
        """Ask the policy, and hold it to its contract."""
        revealed = self.unmasking.reveal(state)
        name = type(self.unmasking).__name__
        if revealed.dtype != torch.bool or revealed.shape != state.masked.shape:
            raise ShapeError(
                f"{name}.reveal: expected bool {tuple(state.masked.shape)}, found {revealed.dtype} "
                f"{tuple(revealed.shape)}; return a mask of the shape of state.masked"
            )
        if bool((revealed & ~state.masked).any()):
            raise ConfigError(
                f"{name}.reveal: expected a subset of state.masked, found sites that are known already; "
                "return revealed & state.masked"
            )
        return revealed

    def _check(self, template: Tensor) -> None:
        vocab, mask, sites = self.denoiser.vocab_size, self.denoiser.mask_token_id, self.coupling.sites
        if template.dtype != torch.int64 or template.dim() not in (1, 2):
            raise ShapeError(
                f"template: expected int64 of shape (batch, sites) or (sites,), found {template.dtype} "
                f"{tuple(template.shape)}; convert with .long() and flatten the batch dimensions"
            )
        if template.shape[-1] != sites:
            raise ShapeError(
                f"template: expected {sites} sites as in the coupling's graph, found {template.shape[-1]}; cut "
                f"the text into blocks of {sites}, or build the coupling on a graph of {template.shape[-1]} sites"
            )
        wrong = (template != mask) & ((template < 0) | (template >= vocab))
        if bool(wrong.any()):
            where = wrong.nonzero()[0].tolist()
            raise TokenError(
                f"template: expected ids in 0..{vocab - 1}, or the mask token {mask}, found "
                f"{int(template[wrong][0])} at {where}; encode the text with the denoiser's own tokenizer"
            )


def _left(initial: Int[Tensor, " batch"], alpha: float) -> Int[Tensor, " batch"]:
    """Sites still masked at alpha: ceil(initial * (1 - alpha)), forgiving rounding errors of the grid."""
    return (initial.double() * (1.0 - alpha - 1e-6)).ceil().long().clamp_min(0)


@contextmanager
def _progress(show: bool) -> Iterator[Progress]:
    """A progress bar on standard error that leaves nothing behind when it is interrupted."""
    with Progress(console=Console(stderr=True), disable=not show, transient=True) as bar:
        yield bar
