"""What a benchmark's task wants written: its generation settings, in the words of this library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codd_ppl.errors import ConfigError

__all__ = ["WantedText", "flag_of", "wanted_text", "whole_number"]

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the number of tokens to write; the first that is there counts."""

READ = ("until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS)


@dataclass(frozen=True)
class WantedText:
    """How a text is to be written.

    Attributes:
        stops: strings that end it.
        length: at most so many tokens.
        sampler: arguments of :meth:`codd_ppl.Sampler.from_arguments`, as (name, value).
        unread: settings that have no meaning here.
    """

    stops: tuple[str, ...] = ()
    length: int = 256
    sampler: tuple[tuple[str, Any], ...] = ()
    unread: tuple[str, ...] = ()


def wanted_text(
    settings: Mapping[str, Any],
    length: int = 256,
    drawing: str | None = None,
    temperature: float | None = None,
) -> WantedText:
    """Read the generation settings of a task of ``lm_eval``.

    Greedy decoding (``do_sample=False``, ``temperature=0``, or neither) is ``drawing="mode"``; else tokens are drawn
    jointly, the network's logits at the temperature (1 if ``do_sample`` comes alone), with ``top_k`` and ``top_p``.

    Args:
        settings: ``until``, ``max_gen_toks`` or another name for it, ``do_sample``, ``temperature``, ``top_k`` and
            ``top_p``; others are noted as unread.
        length: where the task gives none.
        drawing: instead of what the task says; None: as it says.
        temperature: likewise; 0 is greedy.

    Raises:
        ConfigError: ``until`` that is no string and no list of strings, or numbers that are none.
    """
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    if not all(isinstance(stop, str) for stop in stops):
        raise ConfigError(f"until: expected strings, found {until!r}; correct the task's generation_kwargs")
    said = [(name, settings[name]) for name in LENGTHS if settings.get(name) is not None]
    asked, sampled = settings.get("temperature"), settings.get("do_sample")
    if temperature is not None:
        tau = temperature
    elif asked is None:
        tau = 1.0 if sampled else 0.0
    else:
        tau = 0.0 if sampled is False else float(asked)
    sampler: dict[str, Any] = {"drawing": drawing or ("joint" if tau > 0 else "mode")}
    if tau > 0:
        given = {"temperature": tau, "top_k": settings.get("top_k"), "top_p": settings.get("top_p")}
        sampler |= {name: value for name, value in given.items() if value is not None}
    return WantedText(
        stops=tuple(stop for stop in stops if stop),
        length=whole_number(*said[0]) if said else length,
        sampler=tuple(sampler.items()),
        unread=tuple(sorted(set(settings) - {*READ})),
    )


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A whole number that came as a number or in letters.

    Raises:
        ConfigError: it is none, or below ``least``.
    """
    try:
        number = float(value)
        if isinstance(value, bool) or number != int(number) or number < least:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}: expected a whole number of at least {least}, found {value!r}") from None
    return int(number)


def flag_of(name: str, value: Any) -> bool:
    """A truth value that came as one or in letters.

    Raises:
        ConfigError: it is none.
    """
    said = str(value).lower()
    if said not in ("true", "false"):
        raise ConfigError(f"{name}: expected true or false, found {value!r}")
    return said == "true"
