"""The command ``codd fit``: LightningCLI over CoDDModule, a data module and a model folder."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from codd_ppl.errors import CoddError, ConfigError
from codd_ppl.training.data import TextDataModule
from codd_ppl.training.model_callback import ModelFolder
from codd_ppl.training.module import CoDDModule

__all__ = ["fit"]


class _FitCLI(LightningCLI):
    """With ``--model_folder.path``, where the model goes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelFolder, "model_folder")


def fit(words: Sequence[str]) -> None:
    """Train by a recipe: ``words`` are "fit" and the options of LightningCLI.

    ``data`` holds the settings of a :class:`TextDataModule`, or ``class_path`` and ``init_args`` of any data module,
    such as :class:`codd_ppl.training.DistillationDataModule`.

    Raises:
        ConfigError: settings of the data beside their ``class_path``.
        CoddError: what a part of the recipe raises when it is built, or the run.
        SystemExit: a recipe that names what there isn't; LightningCLI has printed what, and where.
    """
    named = _names_a_class(words)
    with warnings.catch_warnings():  # the words are given, whatever sys.argv holds
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # lightning's own use of jsonargparse
        try:
            _FitCLI(
                CoDDModule,
                LightningDataModule if named else TextDataModule,
                subclass_mode_data=named,
                args=list(words),
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
            )
        except ValueError as error:  # jsonargparse wraps what the constructor of a part says
            own: BaseException | None = error
            while own is not None and not isinstance(own, CoddError):
                own = own.__cause__
            if own is None or own is error:
                raise
            raise own from None


def _names_a_class(words: Sequence[str]) -> bool:
    """Whether the recipe or the options name the class of the data module."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    for option in ("--data", "--data.class_path"):
        parser.add_argument(option, dest="data", action="append", default=[])
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return False  # LightningCLI will say what is wrong
    values = [_read(path).get("data") for path in found.config] + found.data
    return any(_is_class(value) for value in values)


def _is_class(data: Any) -> bool:
    if isinstance(data, str):
        return not Path(data).is_file() or "class_path" in _read(data)
    if not isinstance(data, dict) or "class_path" not in data:
        return False
    beside = sorted(map(str, data.keys() - {"class_path", "init_args", "dict_kwargs"}))
    if beside:
        raise ConfigError(
            f"data: expected class_path and init_args, found {', '.join(beside)} beside them; put "
            "settings under init_args"
        )
    return True


def _read(path: str) -> dict[str, Any]:
    """A YAML file's mapping; empty where there is none, as LightningCLI will say."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
