"""The command ``codd fit``: LightningCLI over CoDDModule, a data module and a model folder."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from lightning import LightningDataModule, LightningModule
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
    such as :class:`codd_ppl.training.DistillationDataModule`; in the same way ``model`` holds the settings of a
    :class:`CoDDModule`, or names another class, such as :class:`codd_ppl.training.JudgeModule`.

    Raises:
        ConfigError: settings of data or model beside their ``class_path``.
        CoddError: what a part of the recipe raises when it is built, or the run.
        SystemExit: a recipe that names what there isn't; LightningCLI has printed what, and where.
    """
    data, model = (_names_a_class(words, part) for part in ("data", "model"))
    with warnings.catch_warnings():  # the words are given, whatever sys.argv holds
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # lightning's own use of jsonargparse
        try:
            _FitCLI(
                LightningModule if model else CoDDModule,
                LightningDataModule if data else TextDataModule,
                subclass_mode_model=model,
                subclass_mode_data=data,
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


def _names_a_class(words: Sequence[str], part: Literal["data", "model"]) -> bool:
    """Whether the recipe or the options name the class of the data module, or of the model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    for option in (f"--{part}", f"--{part}.class_path"):
        parser.add_argument(option, dest="given", action="append", default=[])
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return False  # LightningCLI will say what is wrong
    values = [_read(path).get(part) for path in found.config] + found.given
    return any(_is_class(value, part) for value in values)


def _is_class(value: Any, part: str) -> bool:
    if isinstance(value, str):
        return not Path(value).is_file() or "class_path" in _read(value)
    if not isinstance(value, dict) or "class_path" not in value:
        return False
    beside = sorted(map(str, value.keys() - {"class_path", "init_args", "dict_kwargs"}))
    if beside:
        raise ConfigError(
            f"{part}: expected class_path and init_args, found {', '.join(beside)} beside them; put "
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
