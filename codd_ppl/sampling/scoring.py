"""Exact log-probabilities of what a sampler wrote, and the best of several texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from codd_ppl.denoisers.protocol import Denoiser
from codd_ppl.diffusion.nelbo import SetDistribution
from codd_ppl.diffusion.schedules import Schedule
from codd_ppl.errors import ConfigError, ShapeError
from codd_ppl.sampling.protocol import Coupling, JointDistribution
from codd_ppl.sampling.sampler import Sampler
from codd_ppl.sampling.step import OnStep, Step
from codd_ppl.sampling.texts import TextGeneration, TextSampler
from codd_ppl.typing import Float, Int, Tensor

__all__ = ["Best", "PathScore", "best_of", "path_nelbo"]


class PathScore:
    """Sums the joint log-probability of a generation over its steps; pass it as ``on_step``.

        score = sum_k log p(x_{S_k} | xt_k)

    for the sets S_k that the steps revealed: log p(x | S_T, ..., S_1), nats, the exact log-probability of the tokens
    given where each step wrote. With one step it is log p(x | template) itself; over paths of random unmasking its
    expectation for a given x is -NELBO_T(x). The laws are those of the coupling at temperature 1, whatever the sampler
    drew with. Tokens that are cut off afterwards (behind a stop, beyond a text shorter than the graph) count: they were
    drawn jointly with the others.

    Args:
        texts: number of texts of the generation.
    """

    def __init__(self, texts: int) -> None:
        self.log_prob: Float[Tensor, " texts"] = torch.zeros(texts, dtype=torch.float64)

    def __call__(self, step: Step) -> None:
        """Add what the step's tokens cost."""
        if step.dist is None:
            return
        found = step.dist.log_prob(step.tokens, sites=step.revealed).double().cpu()
        rows = range(len(found)) if step.rows is None else step.rows
        self.log_prob.index_add_(0, torch.tensor(list(rows), dtype=torch.int64), found)


@dataclass(frozen=True)
class Best:
    """The best of ``count`` texts for each template.

    Attributes:
        generation: the chosen ones; ``nfe`` and ``calls`` are those of all texts together.
        log_prob: (templates,) float64, the score of the chosen (:class:`PathScore`), nats.
        scores: (templates, count) float64, of all.
    """

    generation: TextGeneration
    log_prob: Float[Tensor, " templates"]
    scores: Float[Tensor, "templates count"]


def best_of(
    sampler: TextSampler,
    templates: Sequence[Tensor] | Tensor,
    count: int,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Best:
    """Write every template ``count`` times and keep the text of the highest joint log-probability (ties: the first).

    Args:
        sampler: writes the texts.
        templates: as the sampler takes them.
        count: texts for each template.
        generator: source of all randomness.
        on_step: called after every step; text j of template i is row ``i * count + j``.

    Raises:
        ConfigError: ``count`` < 1.
    """
    if count < 1:
        raise ConfigError(f"count: expected at least 1, found {count}")
    texts = [text for text in templates for _ in range(count)]
    score = PathScore(len(texts))

    def both(step: Step) -> None:
        score(step)
        if on_step is not None:
            on_step(step)

    found = sampler.generate(texts, generator, both)
    scores = score.log_prob.reshape(-1, count)
    best = scores.argmax(-1) if len(scores) else scores.new_zeros(0, dtype=torch.int64)
    chosen = (torch.arange(len(scores)) * count + best).tolist()
    generation = TextGeneration(
        tokens=tuple(found.tokens[i] for i in chosen),
        history=tuple(found.history[i] for i in chosen),
        lengths=found.lengths[chosen],
        nfe=found.nfe.reshape(-1, count).sum(-1),
        calls=found.calls,
    )
    return Best(generation, score.log_prob[chosen], scores)


@torch.no_grad()
def path_nelbo(
    denoiser: Denoiser,
    coupling: Coupling,
    tokens: Int[Tensor, "texts sites"],
    template: Int[Tensor, "texts sites"],
    steps: int,
    draws: int = 1,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
) -> Float[Tensor, " texts"]:
    """NELBO_T of given texts, given their templates' known tokens: an unbiased estimate, nats (DESIGN section 3).

    The reverse process is run with random unmasking, writing the given tokens, and the log-probabilities that its steps
    give them are summed. To re-score texts however they were made; lower is better.

    Args:
        denoiser, coupling, steps, schedule: of the reverse process; the coupling has the sites of the texts.
        tokens: what to score.
        template: mask tokens where the score asks for the token.
        draws: paths for each text, one batch.
        generator: of the paths.

    Raises:
        ConfigError: ``draws`` < 1, or ``steps`` < 1.
        ShapeError: tokens and template of different shapes.
    """
    if draws < 1:
        raise ConfigError(f"draws: expected at least 1, found {draws}")
    if tokens.shape != template.shape:
        raise ShapeError(
            f"expected tokens of the template's shape {tuple(template.shape)}, found {tuple(tokens.shape)}"
        )
    many = tokens.repeat(draws, 1)
    score = PathScore(len(many))
    sampler = Sampler(denoiser, _Forced(coupling, many), "random", steps, schedule)
    sampler.generate(template.repeat(draws, 1), generator, on_step=score)
    return -score.log_prob.reshape(draws, len(tokens)).mean(0)


class _Forced(nn.Module):
    """A coupling whose laws "draw" given tokens."""

    def __init__(self, coupling: Coupling, tokens: Tensor) -> None:
        super().__init__()
        self.coupling, self.tokens = coupling, tokens
        self.sites, self.vocab_size = coupling.sites, coupling.vocab_size

    def forward(self, logits: Tensor, **inputs: Any) -> _ForcedLaw:
        return _ForcedLaw(self.coupling(logits, **inputs), self.tokens)


class _ForcedLaw:
    def __init__(self, law: JointDistribution, tokens: Tensor) -> None:
        self.law, self.tokens = law, tokens

    @property
    def marginals(self) -> Tensor:
        return self.law.marginals

    def restrict(self, sites: Tensor) -> _ForcedLaw:
        law = self.law.restrict(sites) if isinstance(self.law, SetDistribution) else self.law
        return _ForcedLaw(law, self.tokens)

    def log_prob(self, value: Tensor, /, sites: Tensor | None = None) -> Tensor:
        return self.law.log_prob(value, sites=sites)

    def sample(
        self, sample_shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.tokens
