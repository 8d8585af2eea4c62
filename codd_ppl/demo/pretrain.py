"""Make the model that comes with the package: ``python -m codd_ppl.demo.pretrain FOLDER``, half an hour on one core."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from codd_ppl.demo.run import run_demo
from codd_ppl.demo.settings import DemoSettings
from codd_ppl.model_folder import load_model, save_model

__all__ = ["SETTINGS", "pretrain"]

SETTINGS = replace(
    DemoSettings(),
    hidden=128,
    layers=3,
    dropout=0.1,
    states=128,
    train_steps=3000,
    train_seconds=1e5,
    epochs=8.0,
    fit_seconds=1e5,
)
"""A larger network, trained to where more steps on this text bring little, and a prior of more states."""


def pretrain(folder: str | Path, settings: DemoSettings = SETTINGS) -> Path:
    """Train on the text that comes with the package and write the model in half precision."""
    with tempfile.TemporaryDirectory() as room:
        made = run_demo(folder=room, settings=settings).folder / "model"
        model = load_model(made)
        return save_model(folder, model.denoiser, model.coupling, model.tokenizer, model.about, torch.float16)


if __name__ == "__main__":
    print(pretrain(sys.argv[1]))
