"""The door to the library ``transformers``, which the extra ``hf`` installs: nothing else imports it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from codd_ppl.errors import ConfigError

__all__ = ["quiet_transformers", "transformers_library"]


def transformers_library() -> Any:
    """The module ``transformers``.

    Raises:
        ConfigError: it isn't installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            'networks of the library transformers need it: install it with pip install "codd-ppl[hf]"'
        ) from error
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The same without its progress bars, for files of a few megabytes."""
    library = transformers_library()
    bars = library.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield library
    finally:
        if shown:
            bars.enable_progress_bar()
