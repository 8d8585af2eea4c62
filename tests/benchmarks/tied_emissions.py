"""What emissions tied to a network's unembedding lose: ``python tests/benchmarks/tied_emissions.py TEXT HELD_OUT``.

A small network is trained on byte pairs, a hidden Markov model is fitted by Baum-Welch, and its emissions are fitted by
vectors: the network's, and random ones of the same width. Writes tied_emissions.json here; about a minute.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch

from codd_ppl import topologies
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.potentials import LatentPotentials, TiedEmissionPotentials, baum_welch
from codd_ppl.potentials.expectation import Expectation
from codd_ppl.potentials.running_counts import RunningCounts
from codd_ppl.training.blocks import cut_blocks
from codd_ppl.training.text_files import read_documents
from codd_ppl.training.tokenizer import build_tokenizer, encode_documents

VOCAB, SITES, STATES, WIDTH = 1024, 32, 64, 64
SECONDS = 20.0
RANKS = (8, 32, 64)


def network(blocks: torch.Tensor) -> tuple[BidirectionalTransformer, float]:
    """Trained on random masks for :data:`SECONDS` of processor time; the loss of the last hundred, bits."""
    torch.manual_seed(0)
    model = BidirectionalTransformer(VOCAB, WIDTH, 3, 4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 2e-3), list[float]()
    began = time.process_time()
    while time.process_time() - began < SECONDS:
        x0 = blocks[torch.randint(len(blocks), (32,))]
        masked = torch.rand(x0.shape) < torch.rand(32, 1).clamp(min=0.1)
        logits = model(torch.where(masked, model.mask_token_id, x0)).logits
        loss = torch.nn.functional.cross_entropy(logits[masked], x0[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) / math.log(2))
    return model, sum(losses[-100:]) / 100


def bits(graph, tables: dict[str, torch.Tensor], blocks: torch.Tensor) -> float:
    """Of held-out text, bits per token."""
    counts = {k: RunningCounts(v.detach().exp(), torch.zeros(v.shape[-1])) for k, v in tables.items()}
    found = Expectation(graph).log_likelihood(counts, blocks)
    return -float(found.mean(dtype=torch.float64)) / SITES / math.log(2)


def main(text: str, held_out: str) -> dict:
    documents, others = read_documents(text, limit=1_500_000), read_documents(held_out, limit=150_000)
    tokenizer = build_tokenizer("bpe", documents, VOCAB)
    blocks, valid = (cut_blocks(encode_documents(tokenizer, d, "\n"), SITES) for d in (documents, others))
    blocks, valid = blocks[:12_000], valid[:500]
    model, loss = network(blocks)
    graph = topologies.hidden_markov(SITES, VOCAB, STATES)
    began = time.process_time()
    tables, _ = baum_welch(graph, blocks, epochs=2, progress=False)
    seconds = time.process_time() - began
    free = bits(graph, tables, valid)
    rows = []
    for name, vectors in (("network", model.unembedding), ("random", torch.randn(VOCAB, WIDTH))):
        for rank in RANKS:
            tied = TiedEmissionPotentials(graph, vectors, rank)
            began = time.process_time()
            fit = tied.start_from(tables)
            row = {
                "vectors": name,
                "rank": rank,
                "parameters": tied.states.numel() + tied.projection.numel() + VOCAB,
                "seconds": round(time.process_time() - began, 1),
                "cross_entropy": round(fit.loss, 3),
                "lost": round(fit.lost, 3),
                "held_out": round(bits(graph, tied(), valid), 3),
            }
            print(row, flush=True)
            rows.append(row)
    return {
        "what": "bits per token; lost: KL of the free emissions from the tied, weighted by the states' frequencies",
        "vocab": VOCAB,
        "states": STATES,
        "sites": SITES,
        "width": WIDTH,
        "network_bits_per_masked_token": round(loss, 3),
        "free": {
            "parameters": LatentPotentials(graph)()["emission"].numel(),
            "seconds": round(seconds, 1),
            "entropy": round(fit.entropy, 3),
            "unigram": round(fit.start, 3),
            "held_out": round(free, 3),
        },
        "tied": rows,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = {
        "command": "python tests/benchmarks/tied_emissions.py TEXT HELD_OUT",
        "texts": [Path(path).name for path in sys.argv[1:]],
        "date": str(date.today()),
        "device": f"CPU, 1 thread of {os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        **main(*sys.argv[1:]),
    }
    target = Path(__file__).with_suffix(".json")
    draft = target.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, target)
    print(json.dumps(report, indent=1))
