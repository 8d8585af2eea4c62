"""Masked diffusion as a Pyro program: the reverse process is the model, the noising process the guide.

The sites are the partially masked sequences x_T, ..., x_0. Given x_k, one step chooses a set S of the
masked sites, each with probability r_k, and writes tokens there:

    model   p(x_{k-1} | x_k)      = Bernoulli(S; r_k) p(x_S | x_k)      tokens from the coupled denoiser
    guide   q(x_{k-1} | x_k, x0)  = Bernoulli(S; r_k) [x_S = x0_S]      tokens from the data

The choice of S has the same law in both and cancels, so that `pyro.infer.Trace_ELBO` estimates the
NELBO_T of `codd_ppl.diffusion.nelbo`, in nats, summed over the data plate.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Predictive

from codd_ppl.diffusion.schedules import LinearSchedule, Schedule, check_steps
from codd_ppl.diffusion.transitions import NoisedSequence, PosteriorReveal, RevealStep
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.typing import Int, Tensor

__all__ = ["ReverseProcess"]


@dataclass(frozen=True, eq=False)
class ReverseProcess:
    """The T-step reverse process of a denoiser with a coupling, and the noising guide that trains it.

        process = ReverseProcess(denoiser, coupling, steps=4)
        svi = SVI(process.model, process.guide, Adam({"lr": 1e-3}), Trace_ELBO())       # the whole chain
        svi = SVI(process.step_model, process.step_guide, Adam({"lr": 1e-3}), Trace_ELBO())  # one step, times T
        svi.step(x0)                                                                    # x0: (batch, sites)
        process.predictive(100)()["x_0"]                        # generate; template=... to fill in

    Both losses are unbiased for the sum over the batch of NELBO_T, in nats. The parameters are
    registered with `pyro.module` under ``{name}.denoiser`` and ``{name}.coupling``.

    Args:
        denoiser: xt (n, sites) -> an output with ``.logits`` and ``.hidden``.
        coupling: ``coupling(logits, hidden=..., tokens=xt, known=known)`` -> the joint of the masked sites.
        steps: T >= 1.
        schedule: a `Schedule`; linear by default.
        mask_token_id: the denoiser's own by default.
        name: prefix in the parameter store; two processes in one store need two names.
    """

    denoiser: Callable[[Tensor], Any]
    coupling: Callable[..., Any]
    steps: int
    schedule: Schedule = field(default_factory=LinearSchedule)
    mask_token_id: int = -1
    name: str = "reverse"

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.mask_token_id < 0:
            found = getattr(self.denoiser, "mask_token_id", None)
            if found is None:
                raise ConfigError(
                    f"expected a mask token, found none: {type(self.denoiser).__name__} has no mask_token_id; "
                    f"pass ReverseProcess(..., mask_token_id=...)"
                )
            object.__setattr__(self, "mask_token_id", int(found))

    # ------------------------------------------------------------------ the whole chain

    def model(self, x0: Tensor | None = None, template: Tensor | None = None) -> Int[Tensor, "*batch sites"]:
        """Run all T steps from ``template`` (all masked by default) to x_0, which is observed if given.

        Without ``x0`` this generates; a template with known sites fills in the others.
        """
        self._register_parameters()
        start = self._start(x0, template)
        with pyro.plate("data", len(start), dim=-1):
            x = pyro.sample(f"x_{self.steps}", dist.Delta(start, event_dim=1))
            for k in range(self.steps, 0, -1):
                x = pyro.sample(f"x_{k - 1}", self.reveal_step(x, k), obs=x0 if k == 1 else None)
        return x

    def guide(self, x0: Tensor, template: Tensor | None = None) -> None:
        """Noise ``x0``: the latent x_{T-1}, ..., x_1 of `model`, drawn from q given x0."""
        start = self._start(x0, template)
        with pyro.plate("data", len(start), dim=-1):
            x = pyro.sample(f"x_{self.steps}", dist.Delta(start, event_dim=1))
            for k in range(self.steps, 1, -1):
                x = pyro.sample(f"x_{k - 1}", self._posterior_reveal(x, x0, k))

    def predictive(self, num_samples: int) -> Predictive:
        """Run the model forward: ``predictive(n)(template=...)["x_0"]`` is (n, batch, sites), finished tokens."""
        return Predictive(self.model, num_samples=num_samples, return_sites=["x_0"], parallel=True)

    # ------------------------------------------------------------------ one step, scaled by T

    def step_model(self, x0: Int[Tensor, "batch sites"], subsample_size: int = 1) -> None:
        """One random step k of the model, counted T times: x_k from the noise, x_{k-1} from the denoiser."""
        self._register_parameters()
        steps, data = self._step_plates(x0, subsample_size)
        with steps as index, data:
            k = torch.as_tensor(index, device=x0.device).unsqueeze(-1) + 1
            xk = pyro.sample("x_k", self._noised(x0, k))  # the guide's law too, so it cancels
            pyro.sample("x_k-1", self.reveal_step(xk, k))

    def step_guide(self, x0: Int[Tensor, "batch sites"], subsample_size: int = 1) -> None:
        """The noise for `step_model`: x_k from q(x_k | x0), then x_{k-1} from q(x_{k-1} | x_k, x0)."""
        steps, data = self._step_plates(x0, subsample_size)
        with steps as index, data:
            k = torch.as_tensor(index, device=x0.device).unsqueeze(-1) + 1
            xk = pyro.sample("x_k", self._noised(x0, k))
            pyro.sample("x_k-1", self._posterior_reveal(xk, x0, k))

    # ------------------------------------------------------------------ their parts

    def reveal_step(self, xt: Int[Tensor, "*#batch sites"], k: int | Int[Tensor, "*#batch"]) -> RevealStep:
        """p(x_{k-1} | x_k = xt): one call of the denoiser, one of the coupling."""
        known = xt != self.mask_token_id
        output = self.denoiser(xt.reshape(-1, xt.shape[-1]))
        logits, hidden = (
            values if values is None else values.reshape(*xt.shape, values.shape[-1])
            for values in (output.logits, output.hidden)
        )
        joint = self.coupling(logits, hidden=hidden, tokens=xt, known=known)
        return RevealStep(xt, self._rate(k, xt), joint, self.mask_token_id)

    def _posterior_reveal(self, xt: Tensor, x0: Tensor, k: int | Tensor) -> PosteriorReveal:
        return PosteriorReveal(xt, x0, self._rate(k, xt), self.mask_token_id)

    def _noised(self, x0: Tensor, k: Tensor) -> NoisedSequence:
        return NoisedSequence(x0, self.schedule.grid(self.steps).to(x0.device)[k], self.mask_token_id)

    def _rate(self, k: int | Tensor, like: Tensor) -> Tensor:
        return self.schedule.reveal_rates(self.steps).to(like.device)[k - 1]

    def _step_plates(self, x0: Tensor, subsample_size: int) -> tuple[pyro.plate, pyro.plate]:
        if x0.ndim != 2:
            raise ShapeError(
                f"expected x0 of shape (batch, sites), found {tuple(x0.shape)}; flatten the batch"
            )
        steps = pyro.plate("steps", self.steps, subsample_size=subsample_size, dim=-2)
        return steps, pyro.plate("data", len(x0), dim=-1)

    def _start(self, x0: Tensor | None, template: Tensor | None) -> Int[Tensor, "batch sites"]:
        """x_T: the template, or a fully masked sequence for each one of ``x0`` (one if there is none)."""
        if template is None:
            shape = (1, self.coupling.sites) if x0 is None else x0.shape  # type: ignore[attr-defined]
            device = None if x0 is None else x0.device
            template = torch.full(shape, self.mask_token_id, device=device)
        if template.ndim != 2 or (x0 is not None and x0.shape != template.shape):
            found = None if x0 is None else tuple(x0.shape)
            raise ShapeError(
                f"expected x0 and template of one shape (batch, sites), found x0 {found}, "
                f"template {tuple(template.shape)}; give both a batch dimension"
            )
        return template

    def _register_parameters(self) -> None:
        store = pyro.get_param_store()
        for part, module in (("denoiser", self.denoiser), ("coupling", self.coupling)):
            if not isinstance(module, torch.nn.Module):
                continue
            if any(parameter.requires_grad for parameter in module.parameters()):
                pyro.module(f"{self.name}.{part}", module)
            for name, parameter in module.named_parameters():
                key = f"{self.name}.{part}$$${name}"
                if parameter.requires_grad and key in store and store[key].data_ptr() != parameter.data_ptr():
                    raise ConfigError(
                        f"expected the parameter store to hold this {part}'s {name}, found another tensor under "
                        f"{key!r}, so that Pyro would train the wrong one; call pyro.clear_param_store(), or "
                        f"pass ReverseProcess(..., name=...)"
                    )
