"""The card of models/toys, made from its results.json: no figure of it is typed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from textwrap import fill
from typing import Any

__all__ = ["toy_card"]

NAMES = {
    "factorised": "factorised (the network)",
    "table": "coupled, a table",
    "mixture": "coupled, a mixture",
}


def toy_card(results: Mapping[str, Any]) -> str:
    """Markdown of the results as ``run_toys`` writes them (read back from JSON)."""
    settings = results["settings"]
    parts = [
        "# toys",
        "The toys of the published latent-variable denoisers, two tokens each, with one network for all models: a "
        f"small bidirectional transformer (hidden {settings['hidden']}, layers {settings['layers']}) trained by "
        f"`CoDDModule` on {settings['samples']:,} samples of the law. The couplings are started from the same samples, "
        "without the network, and projected onto a pool of its marginals and their own (six weights, fitted to "
        f"{settings['held_out']:,} other pairs): a table over the two tokens (counts), and a mixture of "
        "products (`topologies.star`, Baum-Welch).",
        f"```bash\n{results['command']}\n```",
        f"Everything below is generated from `results.json` ({results['date']}, {results['device']}, "
        f"{results['cpu_seconds']} CPU seconds and {results['seconds']} seconds in all). Validity: the share of "
        f"{settings['drawn']:,} generated pairs that lie "
        "in the fewest cells holding 99 % of the law, in per cent; mean ± standard deviation over "
        f"{len(settings['seeds'])} seeds (data, network and draws anew). NFE: network calls, one for each "
        "reverse step.",
    ]
    for name, toy in results["toys"].items():
        table = _table(toy, results["quoted"].get(name, {}), settings["steps"])
        parts += [f"## {name}", f"{toy['law']} V = {toy['vocab']}, valid cells: {toy['cells']}.", table]
    parts += [
        "## What the rows are",
        "*exact law*: the data's own validity. *best factorised*: closed form, v/T + (1 - 1/T) v_law, with v the "
        "validity of the product of the marginals and v_law that of the law: a factorised network with exact "
        "conditionals.",
        "KL: from the exact law to the model's one-step law, over all cells, in bits (it sees a lost mode, which "
        "validity does not); for the best factorised model it is the total correlation of the two tokens. fit: CPU "
        "seconds on one core; of the couplings, what comes on top of the network.",
        "*quoted*: as printed by the E-MoE paper (Ivanov et al. 2026) for L = 2, V = 50. Its modes, grid, test of "
        "validity, networks and training may differ from ours: these rows are context, not a measurement. The widths "
        "of our laws were chosen so that the best factorised model has about the quoted MDLM's validity in one step; "
        "wider modes overlap more and leave less to gain.",
        "Limits: with two tokens a table is the whole joint law, so that this shows what a coupling can do, not what a "
        "tree or a mixture does for long texts. From the second step on, the pool decides how far the network's "
        "conditionals are trusted beside its own: without it their errors would stay. The laws are in "
        "`codd_ppl/demo/toy_laws.py`.",
    ]
    return "\n\n".join(part if part[0] in "|`#" else fill(part, 118) for part in parts) + "\n"


def _table(toy: Mapping[str, Any], quoted: Mapping[str, Mapping[str, float]], steps: Sequence[int]) -> str:
    exact = toy["exact"]
    rows = [
        ["", *(f"NFE {T}" for T in steps), "KL, bits", "fit, s"],
        ["---"] * (len(steps) + 3),
        ["exact law", *[_percent(exact["law"])] * len(steps), "0", ""],
        [
            "best factorised",
            *(_percent(exact["best_factorised"][str(T)]) for T in steps),
            f"{exact['total_correlation'] / math.log(2):.3f}",
            "",
        ],
    ]
    for key, model in toy["models"].items():
        kl = [value / math.log(2) for value in model["one_step_kl"]]
        cells = [_spread([100 * v for v in model["validity"][str(T)]], 1) for T in steps]
        rows.append([NAMES[key], *cells, _spread(kl, 3), f"{mean(model['fit_seconds']):.2g}"])
    rows += [[f"{name} (quoted)", *(f"{row[str(T)]}" for T in steps), "", ""] for name, row in quoted.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _spread(values: Sequence[float], digits: int) -> str:
    """mean ± standard deviation."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"
