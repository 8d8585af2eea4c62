"""The few-step sampler: one network call and one exact joint draw per reverse step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress

from codd_ppl.denoisers.protocol import Denoiser, DenoiserOutput
from codd_ppl.denoisers.running import device_of, evaluation_mode
from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.diffusion.schedules import LinearSchedule, Schedule
from codd_ppl.errors import ConfigError, ShapeError, TokenError
from codd_ppl.sampling.protocol import CheckedCoupling, Coupling, JointDistribution, WarmCoupling
from codd_ppl.sampling.unmasking import RevealState, UnmaskingPolicy, unmasking_policy
from codd_ppl.typing import Bool, Int, Tensor

__all__ = ["Generation", "Sampler", "evaluation_mode", "device_of"]


@dataclass(frozen=True)
class Generation:
    """What a sampler wrote.

    Attributes:
        tokens: (batch, sites) int64, the template with every masked site written ((sites,) for such a template).
        nfe: number of network calls that it took; a call serves the whole batch.
        history: int64 of the shape of ``tokens``, the step (0 .. steps - 1, in the order of generation) in
            which a site was revealed; -1 where the template gave the token.
    """

    tokens: Int[Tensor, "*batch sites"]
    nfe: int
    history: Int[Tensor, "*batch sites"]


class Sampler:
    """Generate by T reverse steps, each an exact joint draw of the sites that it reveals.

    Step k = T, ..., 1 runs the network once on the partly masked xt, couples its logits, draws *all* masked
    sites jointly and keeps the revealed set S, which is an exact sample of p(x_S | xt). With
    ``unmasking="random"`` the tokens have the law whose negative log-likelihood NELBO_T bounds (DESIGN 3).

    Args:
        denoiser: the network; called as ``denoiser(xt)``, (batch, sites) int64 -> ``DenoiserOutput``.
        coupling: ``CouplingLayer`` for the same vocabulary; ``topologies.independent`` gives the factorised sampler.
        unmasking: ``"random"``, ``"random_order"``, ``"low_confidence"``, ``"margin"``, ``"entropy"``, or an object.
        steps: number T of reverse steps, and the largest number of network calls.
        schedule: noise schedule that spreads the sites over the steps; linear if None.
        warm_start: start the projection of a step from the weights of the last one. Marginals are nearer to the
            network's after as many sweeps. But the law of a step then depends on the path and not on xt alone (unless
            the sweeps go to the fixed point), so that NELBO_T, which evaluation computes from xt, is no longer its
            bound: off by default.

    Raises:
        ConfigError: steps < 1, unknown policy, vocabularies that differ, or ``warm_start`` for a coupling that doesn't
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
        self.coupling = coupling
        self.warm_start = warm_start
        self.unmasking = unmasking_policy(unmasking)
        self.steps = steps
        self.schedule: Schedule = LinearSchedule() if schedule is None else schedule

    @torch.no_grad()
    def generate(
        self,
        template: Int[Tensor, "*batch sites"],
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Generation:
        """Write the masked sites of the template; known tokens stay as they are.

        Args:
            template: (batch, sites) or (sites,) int64 with ``denoiser.mask_token_id`` where to write. Rows may
                have any number of masked sites, none included. It is moved to the denoiser's device.
            generator: source of all randomness, on the denoiser's device; torch's global one if None.
            progress: show a progress bar on standard error.

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
        masked = xt == self.denoiser.mask_token_id
        if isinstance(self.coupling, CheckedCoupling):
            self.coupling.check(xt, ~masked)
        history = torch.where(masked, self.steps, -1)
        initial = masked.sum(-1)
        rates = self.schedule.reveal_rates(self.steps).tolist()
        alphas = self.schedule.grid(self.steps).tolist()
        nfe = 0
        last: JointDistribution | None = None
        with evaluation_mode(self.denoiser, self.coupling), _progress(progress) as bar:
            task = bar.add_task("unmasking", total=self.steps)
            for step in range(self.steps):
                k = self.steps - step  # the bound counts the same steps down from T to 1
                prediction = _Prediction(self.denoiser, self.coupling, xt, masked, last)
                state = RevealState(
                    masked=masked,
                    step=step,
                    steps=self.steps,
                    rate=rates[k - 1],
                    number=(masked.sum(-1) - _left(initial, alphas[k - 1])).clamp_min(0),
                    generator=generator,
                    coupled=prediction.coupled,
                    network=prediction.network,
                )
                revealed = masked if k == 1 else self._reveal(state)
                if bool(revealed.any()):
                    dist = prediction.dist
                    if isinstance(dist, SetDistribution):
                        dist = dist.restrict(revealed)
                    drawn = dist.sample((), generator=generator)
                    xt = torch.where(revealed, drawn, xt)
                    masked = masked & ~revealed
                    history = torch.where(revealed, step, history)
                last = prediction.made or last if self.warm_start else None
                nfe += prediction.calls
                bar.update(task, completed=step + 1)
        if bool((xt == self.denoiser.mask_token_id).any()):
            raise TokenError(
                f"tokens: expected none to be the mask token {self.denoiser.mask_token_id}, but the denoiser gives it "
                "positive probability; have the denoiser return a logit of -inf for it"
            )
        return Generation(tokens=xt.reshape(template.shape), nfe=nfe, history=history.reshape(template.shape))

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


class _Prediction:
    """The network and the coupled distribution at one xt, each computed at most once, when first asked for."""

    def __init__(
        self,
        denoiser: Denoiser,
        coupling: Coupling,
        xt: Tensor,
        masked: Tensor,
        start: JointDistribution | None,
    ) -> None:
        self._denoiser, self._coupling, self._xt, self._masked = denoiser, coupling, xt, masked
        self._start = start
        self._output: DenoiserOutput | None = None
        self.made: JointDistribution | None = None
        self.calls = 0

    @property
    def output(self) -> DenoiserOutput:
        if self._output is None:
            self._output = self._denoiser(self._xt)
            self.calls += 1
        return self._output

    @property
    def dist(self) -> JointDistribution:
        if self.made is None:
            output, known, coupling = self.output, ~self._masked, self._coupling
            if self._start is not None and isinstance(coupling, WarmCoupling):
                self.made = coupling(
                    output.logits, hidden=output.hidden, tokens=self._xt, known=known, start=self._start
                )
            else:
                self.made = coupling(output.logits, hidden=output.hidden, tokens=self._xt, known=known)
        return self.made

    def coupled(self) -> Tensor:
        return self.dist.marginals

    def network(self) -> Tensor:
        return self.output.logits.softmax(-1)


def _left(initial: Int[Tensor, " batch"], alpha: float) -> Int[Tensor, " batch"]:
    """Sites still masked at alpha: ceil(initial * (1 - alpha)), forgiving rounding errors of the grid."""
    return (initial.double() * (1.0 - alpha - 1e-6)).ceil().long().clamp_min(0)


@contextmanager
def _progress(show: bool) -> Iterator[Progress]:
    """A progress bar on standard error that leaves nothing behind when it is interrupted."""
    with Progress(console=Console(stderr=True), disable=not show, transient=True) as bar:
        yield bar
