"""Peak memory of ``codd attach`` on 200 MB of text: ``python tests/benchmarks/attach_memory.py``, a quarter of an hour.

Writes attach_memory.json here. The text is drawn on the spot, words of frequency 1 / (rank + 10); network and tokenizer
have LLaDA's vocabulary (126,464) and no more than they need, the prior has 1,024 states. It is fitted to a fiftieth of
an epoch: how long it is fitted changes the time and not the memory. The network is not loaded (``--blocks 0``), so that
what is measured is the process without it: the most that was resident at a time, by the kernel's count.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

VOCAB, STATES, BYTES = 126_464, 1024, 200_000_000
SPECIAL = ["[PAD]", "[UNK]", "[MASK]", "[EOS]"]


def backbone(folder: Path) -> list[str]:
    """A masked model with a word for each token; returns the words."""
    words = [f"w{i}" for i in range(VOCAB - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "mask_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForMaskedLM(BertConfig(vocab_size=VOCAB, pad_token_id=0, eos_token_id=3, **sizes)).save_pretrained(
        folder
    )
    return words


def corpus(path: Path, words: list[str]) -> int:
    """Documents of 400 words until there are enough bytes; returns how many bytes."""
    generator, written = torch.Generator().manual_seed(0), 0
    weights = 1 / (torch.arange(len(words), dtype=torch.float64) + 10)
    with path.open("w", encoding="utf-8") as file:
        while written < BYTES:
            for row in (
                torch.multinomial(weights, 400 * 500, True, generator=generator).view(500, 400).tolist()
            ):
                written += file.write(json.dumps({"text": " ".join(words[i] for i in row)}) + "\n")
    return written


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = corpus(folder / "text.jsonl", backbone(folder / "network"))
        settings = f"--states {STATES} --length 32 --epochs 0.02 --batch-size 256 --blocks 0 --timing 0"
        command = f"codd attach --backbone network --data text.jsonl --out coupling {settings}"
        begin = time.perf_counter()
        subprocess.run(shlex.split(command), cwd=folder, check=True)
        report = {
            "command": "python tests/benchmarks/attach_memory.py",
            "attach": command,
            "date": str(date.today()),
            "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
            "torch": torch.__version__,
            "vocab": VOCAB,
            "states": STATES,
            "text_bytes": size,
            "coupling_bytes": sum(p.stat().st_size for p in (folder / "coupling").iterdir()),
            "seconds": round(time.perf_counter() - begin),
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        }
    target = Path(__file__).with_suffix(".json")
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)
    print(json.dumps(report, indent=1))
