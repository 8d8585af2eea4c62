"""Orders of the projection's updates, side by side: ``python tests/benchmarks/sweeps.py FOLDER`` writes json and md.

Text of a to z and space, a hidden Markov model fitted to it, the marginals of a small network, known tokens from
held-out text. Every variant updates w_i = q_i / cav_i; they differ in how many sites use the same messages:

    blocks of b    b consecutive sites together, then the messages go on (1: the library's sweep; all: Jacobi)
    odd/even       every second site, new messages, the others

damped by d: w <- w_old^(1-d) w_new^d. None of this is public but the sweep itself, which is ``project``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from codd_ppl import CouplingLayer, topologies
from codd_ppl.denoisers import BidirectionalTransformer
from codd_ppl.inference import log_partition, marginals
from codd_ppl.inference.projection import project

VOCAB, SITES = 27, 128
RATIOS = (0.25, 0.5, 0.75, 1.0)
VARIANTS: dict[str, tuple[int, float]] = {  # sites that use the same messages (0: odd/even), d
    "sequential": (1, 1.0),
    "blocks of 4": (4, 1.0),
    "blocks of 4, d = .5": (4, 0.5),
    "blocks of 8": (8, 1.0),
    "blocks of 8, d = .5": (8, 0.5),
    "odd/even": (0, 1.0),
    "odd/even, d = .5": (0, 0.5),
    "Jacobi": (SITES, 1.0),
    "Jacobi, d = .5": (SITES, 0.5),
    "Jacobi, d = .3": (SITES, 0.3),
}


def text(path: str) -> Tensor:
    """Blocks of a to z and space, (n, sites)."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        plain = re.sub("[^a-z]+", " ", file.read().lower())
    ids = torch.tensor([0 if c == " " else ord(c) - 96 for c in plain])
    return ids[: len(ids) // SITES * SITES].view(-1, SITES)


def network(blocks: Tensor, seconds: float) -> BidirectionalTransformer:
    """A small network trained on masks of every ratio."""
    torch.manual_seed(0)
    net = BidirectionalTransformer(VOCAB, hidden_size=96, layers=2, heads=4)
    optimizer, begin = torch.optim.AdamW(net.parameters(), 3e-3), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        x0 = blocks[torch.randint(len(blocks), (32,))]
        masked = torch.rand(x0.shape) < torch.rand(len(x0), 1).clamp(min=0.05)
        loss = torch.nn.functional.cross_entropy(
            net(torch.where(masked, VOCAB, x0)).logits[masked], x0[masked]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@dataclass
class Problem:
    """One batch: the prior's tables, log q, what is known."""

    plan: object
    tables: dict[str, Tensor]
    sites: tuple[str, ...]
    log_q: Tensor
    known: Tensor
    tokens: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        tables = {k: t.to(dtype) for k, t in self.tables.items()}
        return Problem(self.plan, tables, self.sites, self.log_q.to(dtype), self.known, self.tokens)

    def project(self, sweeps: int, start: Tensor | None = None, tolerance: float = 0.0) -> Tensor:
        given = (self.plan, self.tables, self.sites, self.log_q, ~self.known)
        return project(*given, sweeps, tolerance, self.tokens, start=start)

    def law(self, log_w: Tensor) -> dict[object, Tensor]:
        values = torch.arange(VOCAB)
        clash = self.known[..., None] & (values != self.tokens[..., None])
        return {**self.tables, self.sites: log_w.masked_fill(clash, -math.inf)}

    def quality(self, log_w: Tensor, fixed: Tensor, fixed_partition: Tensor) -> dict[str, float]:
        """Total variation of the marginals from q; KL(fixed point || law), nats, and bits of the text, per site."""
        q, found = self.log_q.exp(), marginals(self.plan, self.law(log_w))[self.sites]
        variation = 0.5 * (found - q).abs().sum(-1)[~self.known]
        gain = (q * (fixed - log_w)).sum(-1).masked_fill(self.known, 0.0).sum(-1)
        total = log_partition(self.plan, self.law(log_w))
        kl = gain - fixed_partition + total
        truth = torch.zeros_like(log_w).masked_fill(torch.arange(VOCAB) != self.tokens[..., None], -math.inf)
        seen = log_partition(self.plan, {**self.tables, self.sites: log_w + truth})
        masked = (~self.known).sum()
        return {
            "tv_max": float(variation.max()),
            "tv_mean": float(variation.mean()),
            "kl": float(kl.sum() / masked),
            "bits": float((total - seen).sum() / masked / math.log(2)),
        }


class Rounds:
    """Updates of a problem in blocks, as plain torch operations on (sites, batch, ..)."""

    def __init__(self, problem: Problem) -> None:
        self.emit, self.move = problem.tables["emission"].exp(), problem.tables["transition"].exp()
        self.initial, self.known = problem.tables["initial"].exp(), problem.known.T
        self.log_q = problem.log_q.transpose(0, 1)
        seen = torch.nn.functional.one_hot(problem.tokens.T, VOCAB).to(self.emit.dtype)
        self.given = torch.where(self.known[..., None], seen @ self.emit.T, 1.0)

    def messages(self, log_w: Tensor, sites: slice | Sequence[int]) -> Tensor:
        w = log_w[sites]
        sent = (w - w.amax(-1, keepdim=True)).exp() @ self.emit.T
        return torch.where(self.known[sites, :, None], self.given[sites], sent)

    def left(self, first: Tensor, messages: Sequence[Tensor]) -> list[Tensor]:
        """Messages from the left to each of some sites and the one after them."""
        result = [first]
        for m in messages:
            v = result[-1] * m
            result.append((v / v.amax(-1, keepdim=True)) @ self.move)
        return result

    def right(self, messages: Sequence[Tensor]) -> list[Tensor]:
        result = [torch.ones_like(messages[0])]
        for m in reversed(messages[1:]):
            v = result[-1] * m
            result.append((v / v.amax(-1, keepdim=True)) @ self.move.T)
        return result[::-1]

    def updated(self, log_w: Tensor, belief: Tensor, sites: slice | Tensor, d: float) -> Tensor:
        cavity = belief @ self.emit
        new = self.log_q[sites] - (cavity / cavity.sum(-1, keepdim=True)).log()
        new = torch.where(self.known[sites, :, None], 0.0, new)
        return new if d == 1 else (1 - d) * log_w[sites] + d * new

    def run(self, block: int, d: float, sweeps: int, start: Tensor | None) -> list[Tensor]:
        """Log-weights (batch, sites, vocab) after each sweep."""
        log_w = torch.zeros_like(self.log_q) if start is None else start.transpose(0, 1).clone()
        begin, result = self.initial.expand(log_w.shape[1], -1), []
        sent = list(self.messages(log_w, slice(None)) if start is not None else self.at_first())
        for _ in range(sweeps):
            if block:
                right, left = self.right(sent), begin
                for low in range(0, SITES, block):
                    some = slice(low, low + block)
                    fronts = self.left(left, sent[some])[:-1] if block > 1 else [left]
                    belief = torch.stack(fronts) * torch.stack(right[some])
                    log_w[some] = self.updated(log_w, belief, some, d)
                    sent[some] = self.messages(log_w, some).unbind(0)
                    if low + block < SITES:
                        left = self.left(left, sent[some])[-1]
            else:
                for parity in (0, 1):
                    some = slice(parity, None, 2)
                    left, right = self.left(begin, sent)[:-1][some], self.right(sent)[some]
                    log_w[some] = self.updated(log_w, torch.stack(left) * torch.stack(right), some, d)
                    sent[some] = self.messages(log_w, some).unbind(0)
            result.append(log_w.transpose(0, 1).clone())
        return result

    def at_first(self) -> Tensor:
        return torch.where(self.known[..., None], self.given, self.emit.sum(-1))


def seconds(calls: dict[str, object], repeats: int) -> dict[str, float]:
    """Processor seconds of each call, medians of interleaved repetitions."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.process_time()
            call()  # type: ignore[operator]
            taken[name].append(time.process_time() - begin)
    return {name: median(values) for name, values in taken.items()}


def until(problem: Problem, start: Tensor | None, most: int, fixed: Tensor, partition: Tensor) -> list[dict]:
    """Sweeps that each sequence needs to each tolerance, and the marginals that it then has."""
    rows = []
    trail, changes = [problem.project(1, start)], []
    if start is not None:
        changes.append((trail[0] - start).masked_fill(problem.known[..., None], 0.0).abs().amax((1, 2)))
    for _ in range(most - 1):
        trail.append(problem.project(1, trail[-1]))
        changes.append((trail[-1] - trail[-2]).abs().amax((1, 2)))
    change = torch.stack(changes)
    for tolerance in (1e-1, 1e-2, 1e-3):
        done = change <= tolerance
        reached = bool(done.any(0).all())
        count = done.int().argmax(0) + (1 if start is not None else 2)
        count = torch.where(done.any(0), count, most)
        stopped = torch.stack([trail[int(k) - 1][b] for b, k in enumerate(count)])
        row = {"tolerance": tolerance, "mean": float(count.double().mean()), "most": int(count.max())}
        rows.append({**row, "all reached": reached, **problem.quality(stopped, fixed, partition)})
    return rows


def measure(
    states: int, blocks: Tensor, net: BidirectionalTransformer, options: argparse.Namespace
) -> list[dict]:
    """All variants at all mask ratios for one number of states."""
    graph = topologies.hidden_markov(SITES, VOCAB, states)
    coupling = CouplingLayer(graph, VOCAB)
    held, batch = blocks[-options.batch :], options.batch
    coupling.init_from_corpus(blocks[: -len(blocks) // 10], progress=False, epochs=options.epochs)
    order = torch.rand(batch, SITES, generator=torch.Generator().manual_seed(1))
    rows = []
    with torch.no_grad():
        tables = {k: t.double() for k, t in coupling.potentials(None).items()}

        def problem(ratio: float) -> Problem:
            known = order >= ratio
            logits = net(torch.where(known, held, VOCAB)).logits
            return Problem(coupling.plan, tables, graph.tokens, logits.double().log_softmax(-1), known, held)

        for ratio in RATIOS:
            now = problem(ratio)
            fixed = now.project(400, tolerance=1e-9)
            partition = log_partition(now.plan, now.law(fixed))
            starts: dict[str, Tensor | None] = {"cold": None}
            if ratio < 1:  # one of eight steps earlier, there one sweep from w = 1
                earlier = problem(ratio + 0.125).project(1)
                starts["warm"] = earlier.masked_fill(now.known[..., None], 0.0)
            row: dict = {"states": states, "ratio": ratio, "fixed": now.quality(fixed, fixed, partition)}
            own = now.log_q.gather(-1, held[..., None])[~now.known]
            row["independent bits"] = float(-own.mean() / math.log(2))
            quick, calls = Rounds(now.to(torch.float32)), {}
            single = now.to(torch.float32)
            for name, start in starts.items():
                rounds = Rounds(now)
                row[name] = {}
                for variant, (block, d) in VARIANTS.items():
                    found = rounds.run(block, d, options.sweeps, start)
                    row[name][variant] = [now.quality(w, fixed, partition) for w in found]
                library = now.project(1, start)
                row[name]["difference from project"] = float(
                    (rounds.run(1, 1.0, 1, start)[0] - library).abs().amax()
                )
                row[name]["tolerance"] = until(now, start, 80, fixed, partition)
                begin = None if start is None else start.float()
                for variant, (block, d) in VARIANTS.items() if name == "cold" else ():
                    calls[variant] = partial(quick.run, block, d, 1, None)
                calls[f"project, {name}"] = partial(single.project, 1, begin)
            row["seconds"] = seconds(calls, options.repeats)
            rows.append(row)
            print(states, ratio, json.dumps(row["seconds"]), file=sys.stderr, flush=True)
    return rows


def number(value: float) -> str:
    return "diverged" if not math.isfinite(value) else f"{value:.2g}"


def page(data: dict) -> str:
    """The results as markdown."""
    rows, shown = data["rows"], [k for k in (1, 2, 4) if k <= data["about"]["sweeps"]]
    after = " / ".join(map(str, shown))
    lines = [
        "# Orders of the projection's updates",
        "",
        "Written by the command below; all figures: `sweeps.json`.",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in data["about"].items()]

    def table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        lines.extend(["", f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"])
        lines.extend("| " + " | ".join(cells) + " |" for cells in body)

    names = {
        "tv_mean": "mean total variation",
        "tv_max": "largest total variation",
        "kl": "KL to the fixed point, nats",
    }
    for states in data["about"]["states"]:
        mine = [row for row in rows if row["states"] == states]
        for key, name in names.items():
            body = []
            for start in ("cold", "warm"):
                for variant in VARIANTS:
                    cells = [variant + (", from the step before" if start == "warm" else "")]
                    taken = [row["seconds"][variant] / row["seconds"]["sequential"] for row in mine]
                    cells.append(f"{median(taken):.2f}")
                    for row in mine:
                        found = row[start][variant] if start in row else []
                        cells.append(" / ".join(number(found[k - 1][key]) for k in shown) if found else "-")
                    body.append(cells)
            head = ["updates", "time", *(f"{row['ratio']:.0%} masked" for row in mine)]
            table(f"{states} states: {name} after {after} sweeps", head, body)
    body = [
        [
            *(str(row["states"]), f"{row['ratio']:.0%}", f"{row['independent bits']:.3f}"),
            *(
                " / ".join(f"{row[s]['sequential'][k - 1]['bits']:.3f}" for k in shown) if s in row else "-"
                for s in ("cold", "warm")
            ),
            f"{row['fixed']['bits']:.3f}",
        ]
        for row in rows
    ]
    head = ["states", "masked", "independent", f"after {after} sweeps", "from the step before", "fixed point"]
    table("Bits per masked character of the held-out text, all at once", head, body)
    for start in ("cold", "warm"):
        body = []
        for row in rows:
            for t in row[start]["tolerance"] if start in row else ():
                cells = [str(row["states"]), f"{row['ratio']:.0%}", f"{t['tolerance']:g}", f"{t['mean']:.1f}"]
                cells += [f"{t['most']}" + ("" if t["all reached"] else " (cut)"), number(t["tv_max"])]
                body.append([*cells, number(t["tv_mean"]), number(t["kl"]), f"{t['bits']:.3f}"])
        head = [
            "states",
            "masked",
            "tolerance",
            "sweeps, mean",
            "most",
            "largest variation",
            "mean",
            "KL",
            "bits",
        ]
        table(
            f"Sweeps to a tolerance, {'from w = 1' if start == 'cold' else 'from the step before'}",
            head,
            body,
        )
    body = []
    for row in rows:
        taken = row["seconds"]
        warm = f"{taken['project, warm'] / taken['project, cold']:.2f}" if "project, warm" in taken else "-"
        cells = [
            f"{1e3 * taken['project, cold']:.3g}",
            f"{taken['project, cold'] / taken['sequential']:.2f}",
            warm,
        ]
        body.append([str(row["states"]), f"{row['ratio']:.0%}", *cells])
    head = ["states", "masked", "ms", "/ the plain torch sweep above", "with a start / without"]
    table("One sweep of `project`", head, body)
    return "\n".join(lines) + "\n"


def clean(value: object) -> object:
    """None for what json has no number for."""
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--states", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seconds", type=float, default=60.0, help="of the network's training")
    parser.add_argument("--epochs", type=float, default=4.0, help="of the prior's")
    parser.add_argument("--sweeps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    blocks = text(options.text)
    net = network(blocks[: -len(blocks) // 10], options.seconds)
    rows = [row for states in options.states for row in measure(states, blocks, net, options)]
    about = {
        "command": "python tests/benchmarks/sweeps.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{platform.processor() or platform.machine()}, one thread, processor time, float32",
        "states": options.states,
        "batch": options.batch,
        "sites": SITES,
        "vocabulary": VOCAB,
        "sweeps": options.sweeps,
        "training": f"{options.seconds:g} s for the network, {options.epochs:g} passes over the text for the prior",
        "torch": torch.__version__,
    }
    data = {"about": about, "rows": rows}
    (options.folder / "sweeps.md").write_text(page(data), encoding="utf-8")
    (options.folder / "sweeps.json").write_text(json.dumps(clean(data), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
