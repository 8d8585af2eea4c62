"""The arguments of a model in a benchmark, which come as numbers or in letters."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from codd_ppl.errors import ConfigError
from codd_ppl.evaluation.wanted import flag_of, whole_number

__all__ = ["HarnessSettings"]

FLAGS = ("factorised", "lookahead", "trust_remote_code")
WHOLE = {"mask_token_id": 0, "seed": 0}
WHOLE |= {name: 1 for name in ("steps", "block_length", "max_gen_toks", "max_length", "batch_size")}
WHOLE |= {name: 1 for name in ("likelihood_steps", "likelihood_draws")}


@dataclass(frozen=True)
class HarnessSettings:
    """What ``--model_args`` of the model ``codd`` may hold (:class:`codd_ppl.evaluation.harness.CoDDHarness`).

    Attributes:
        backbone: folder or hub id of a masked model of ``transformers``, or a model folder of codd_ppl.
        coupling: folder or hub id of a coupling; None: the model folder's own, else none, which is ``factorised``.
        factorised: draw tokens independently, for comparison, in windows as long as those of the coupling.
        steps: reverse steps for ``max_gen_toks`` tokens, as LLaDA counts them; None: one a token.
        block_length: tokens of a block; None: the sites of the coupling, 32 without one.
        max_gen_toks: tokens of a text whose task doesn't say how many.
        unmasking: policy of the sampler.
        drawing: of the sampler; None: as the task says.
        temperature: of the network's logits, 0 for the mode; None: as the task says.
        lookahead: the network also reads the masks right of a block, as in LLaDA's own sampler.
        likelihood_steps: T of the bound for a block; None: as many as a block takes in writing; 1 is exact.
        likelihood_draws: of the noise, for every block, a network call each.
        batch_size: texts or windows in a network call.
        device: None: a GPU if there is one.
        max_length: largest number of tokens that the network reads; None: what its configuration and tokenizer say.
        revision, coupling_revision: commits on the hub.
        trust_remote_code, mask_token_id, dtype: of :meth:`PretrainedDenoiser.from_pretrained`.
        seed: of all draws.
    """

    backbone: str
    coupling: str | None = None
    factorised: bool = False
    steps: int | None = None
    block_length: int | None = None
    max_gen_toks: int = 256
    unmasking: str = "low_confidence"
    drawing: str | None = None
    temperature: float | None = None
    lookahead: bool = False
    likelihood_steps: int | None = None
    likelihood_draws: int = 32
    batch_size: int = 1
    device: str | None = None
    max_length: int | None = None
    revision: str | None = None
    coupling_revision: str | None = None
    trust_remote_code: bool = False
    mask_token_id: int | None = None
    dtype: str | None = None
    seed: int = 0

    @classmethod
    def read(cls, **given: Any) -> HarnessSettings:
        """Settings from what ``lm_eval`` hands over; None is the default, and ``max_batch_size`` is its own affair.

        Raises:
            ConfigError: unknown names, no backbone, or values that can't be meant.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known - {"max_batch_size"})
        if unknown or given.get("backbone") is None:
            found = f"unknown: {', '.join(unknown)}" if unknown else "no backbone"
            raise ConfigError(
                f"model_args: expected backbone=ID_OR_PATH and any of {', '.join(sorted(known))}, found {found}"
            )
        values = {name: value for name, value in given.items() if name in known and value is not None}
        for name, value in values.items():
            if name in FLAGS:
                values[name] = flag_of(name, value)
            elif name in WHOLE:
                values[name] = whole_number(name, value, WHOLE[name])
            elif name == "temperature":
                values[name] = _temperature(value)
            else:
                values[name] = str(value)
        settings = cls(**values)
        if settings.temperature == 0 and settings.drawing not in (None, "mode"):
            raise ConfigError(
                f"temperature: 0 says drawing=mode, found drawing={settings.drawing}; leave one of the two out"
            )
        return settings

    def steps_of_block(self, length: int) -> int:
        """The share of ``steps`` that a block of so many tokens takes: steps * length / max_gen_toks.

        Raises:
            ConfigError: it is no whole number.
        """
        total = self.max_gen_toks if self.steps is None else self.steps
        share, rest = divmod(total * length, self.max_gen_toks)
        if rest or not share:
            raise ConfigError(
                f"steps: expected a multiple of max_gen_toks / block_length = {self.max_gen_toks} / {length}, so that "
                f"every block takes as many, found {total}, {total * length / self.max_gen_toks:.2f} for each"
            )
        return share


def _temperature(value: Any) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ConfigError(f"temperature: expected a number of at least 0, found {value!r}; 0 is drawing=mode")
    return number
