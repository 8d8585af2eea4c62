"""Settings that are a name or an object: policies, ways to draw, strategies."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from codd_ppl.errors import ConfigError

__all__ = ["by_name"]

T = TypeVar("T")


def by_name(setting: str, found: str | T, named: Mapping[str, Callable[[], T]], kind: type, like: str) -> T:
    """The object of that name, with its defaults; an object of this kind is handed back as it is.

    Args:
        setting: its name, for messages.
        found: what the user gave.
        named: name -> class.
        kind: a runtime-checkable protocol that objects must fit.
        like: what an object looks like, for messages.

    Raises:
        ConfigError: unknown name, a class in place of an object, or an object of another kind.
    """
    if isinstance(found, str):
        if found not in named:
            raise ConfigError(
                f"{setting}: expected one of {', '.join(named)} or an object, found {found!r}; pass one of these "
                f"names, or {like}"
            )
        return named[found]()
    if isinstance(found, type) or not isinstance(found, kind):
        raise ConfigError(
            f"{setting}: expected a name or {like}, found {found!r}; pass one of {', '.join(named)}, or an instance of "
            "a class that has that"
        )
    return found
