"""The command line: ``codd demo | fit | attach | convert | generate | evaluate | harness | ..``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from codd_ppl.commands.attach_options import add_attach_options
from codd_ppl.commands.backbone_options import add_backbone_options
from codd_ppl.commands.convert_options import add_convert_options
from codd_ppl.commands.evaluate_options import add_evaluate_options
from codd_ppl.commands.generate_options import add_generate_options
from codd_ppl.commands.judge_options import add_judge_options
from codd_ppl.commands.overhead_options import add_overhead_options
from codd_ppl.errors import CoddError, ConfigError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (130 after Ctrl-C, 2 for an error that the message explains)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["fit"]:
            return _fit(words)
        if words[:1] == ["harness"]:
            return _harness(words[1:])
        options = _parser().parse_args(words)
        options.words = words
        return int(options.run(options) or 0)
    except CoddError as error:
        print(f"codd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="codd", description="Coupled discrete diffusion.")
    commands = parser.add_subparsers(
        required=True,
        metavar="demo | fit | attach | convert | generate | evaluate | harness | judge | card | explain | bench",
    )

    demo = commands.add_parser("demo", help="a small network with and without a coupling: compare, sample")
    demo.add_argument("--train", action="store_true", help="train both now, on Shakespeare, a minute or two")
    demo.add_argument("--text", type=Path, help="train on your own .txt or .jsonl (.gz, .xz)")
    demo.add_argument("--fast", action="store_true", help="train in less than a minute, noisier figures")
    demo.add_argument("--output", type=Path, default=Path("codd-demo"), help="folder to write to")
    demo.set_defaults(run=_demo)

    commands.add_parser("fit", help="train by a recipe: codd fit --config models/NAME/RECIPE.yaml")

    attach = commands.add_parser("attach", help="a coupling for a pretrained network, from your own text")
    add_attach_options(attach)
    attach.set_defaults(run=_attach)

    convert = commands.add_parser("convert", help="a coupling from a hidden Markov model of PyJuice (.jpc)")
    add_convert_options(convert)
    convert.set_defaults(run=_convert)

    generate = commands.add_parser("generate", help="write text with a model folder")
    add_generate_options(generate)
    generate.set_defaults(run=_generate)

    evaluate = commands.add_parser("evaluate", help="NELBO_T of a model folder, factorised and coupled")
    add_evaluate_options(evaluate)
    evaluate.set_defaults(run=_evaluate)

    commands.add_parser("harness", help="lm_eval with the model codd: codd harness --model codd --tasks ..")

    judge = commands.add_parser("judge", help="samples under an autoregressive judge of the same text")
    add_judge_options(judge)
    judge.set_defaults(run=_judge)

    card = commands.add_parser(
        "card", help="write the results on cards, and the grid of all, from results*.json"
    )
    card.add_argument("folder", type=Path, nargs="+", help="models/NAME, or models for the grid")
    card.set_defaults(run=_card)

    explain = commands.add_parser("explain", help="print how a model folder or a topology is contracted")
    explain.add_argument("model", type=Path, nargs="?")
    explain.add_argument("--sites", type=int, default=32)
    explain.add_argument("--vocab", type=int, default=27)
    explain.add_argument("--states", type=int, default=64)
    explain.add_argument("--batch", type=int)
    explain.set_defaults(run=_explain)

    bench = commands.add_parser("bench", help="time the inference engine, or the steps of decoding")
    what = bench.add_subparsers(required=True, metavar="inference | decoding | overhead")
    engine = what.add_parser("inference", help="the inference engine against other libraries")
    engine.add_argument("--quick", action="store_true", help="small sizes, a minute")
    engine.add_argument("--only", help="parts, such as T1,T3,numerics; all if left out")
    engine.add_argument("--budget", type=float, default=1800.0, help="seconds; no cell is begun later")
    engine.add_argument("--threads", type=int, default=1)
    engine.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu on a machine in use")
    engine.add_argument("--output", type=Path, default=Path("codd-bench"), help="folder to write to")
    engine.set_defaults(run=_bench)
    decoding = what.add_parser("decoding", help="network and coupling in a step of decoding")
    decoding.add_argument(
        "model", type=Path, nargs="?", help="a model folder or a coupling; default: the demo's"
    )
    decoding.add_argument("--steps", type=int, default=4)
    decoding.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    decoding.add_argument("--drawing", nargs="+", default=["joint", "latent", "any_order", "mode"])
    decoding.add_argument("--repeats", type=int, default=9)
    decoding.add_argument("--threads", type=int, default=1)
    decoding.add_argument("--device", default="cpu", help="such as cuda")
    decoding.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu on a machine in use")
    decoding.add_argument("--output", type=Path, help="also write the figures as JSON")
    add_backbone_options(decoding)
    decoding.set_defaults(run=_bench_decoding)
    overhead = what.add_parser("overhead", help="a coupling beside a network of the shape of LLaDA-8B")
    add_overhead_options(overhead)
    overhead.set_defaults(run=_bench_overhead)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from codd_ppl.demo import DemoSettings, run_demo

    train = options.train or options.fast or options.text is not None
    settings = DemoSettings() if train else DemoSettings.pretrained()
    run_demo(options.text, options.output, DemoSettings.fast() if options.fast else settings, train=train)


def _fit(words: list[str]) -> int:
    from codd_ppl.training.fit_cli import fit

    fit(words)
    return 0


def _attach(options: argparse.Namespace) -> None:
    from codd_ppl.commands.attach import run_attach

    run_attach(options)


def _harness(words: list[str]) -> int:
    try:
        from codd_ppl.evaluation.harness import run_harness
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ConfigError(
            'benchmarks are those of the library lm_eval: install it with pip install "codd-ppl[eval,hf]"'
        ) from error
    run_harness(words)
    return 0


def _convert(options: argparse.Namespace) -> None:
    from codd_ppl.commands.convert import run_convert

    run_convert(options)


def _generate(options: argparse.Namespace) -> None:
    from codd_ppl.commands.generate import run_generate

    run_generate(options)


def _evaluate(options: argparse.Namespace) -> None:
    from codd_ppl.commands.evaluate import run_evaluate

    run_evaluate(options)


def _judge(options: argparse.Namespace) -> None:
    from codd_ppl.commands.judge import run_judge

    run_judge(options)


def _card(options: argparse.Namespace) -> None:
    from codd_ppl.evaluation.card import update_card
    from codd_ppl.evaluation.grid import is_grid, update_grid

    for folder in options.folder:
        print(update_grid(folder) if is_grid(folder) else update_card(folder))


def _explain(options: argparse.Namespace) -> None:
    from codd_ppl import compile, topologies
    from codd_ppl.model_folder import load_model

    if options.model is not None:
        plan = load_model(options.model).coupling.plan
    else:
        plan = compile(topologies.hidden_markov(options.sites, options.vocab, options.states))
    print(plan.explain(options.batch))


def _bench(options: argparse.Namespace) -> None:
    import shlex
    import time

    from codd_ppl.evaluation.benchmark import PARTS, BenchmarkSettings, benchmark_inference

    parts = PARTS if options.only is None else tuple(word.strip() for word in options.only.split(","))
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    settings = BenchmarkSettings(parts, options.quick, options.budget, threads=options.threads, clock=clock)
    words = ["codd", "bench", "inference"] + ["--quick"] * options.quick
    words += ["--clock", "cpu"] * (options.clock == "cpu")
    words += [] if options.only is None else ["--only", options.only]
    benchmark_inference(options.output, settings, shlex.join(words))


def _bench_decoding(options: argparse.Namespace) -> None:
    from codd_ppl.commands.bench_decoding import run_bench_decoding

    run_bench_decoding(options)


def _bench_overhead(options: argparse.Namespace) -> None:
    from codd_ppl.commands.bench_overhead import run_bench_overhead

    run_bench_overhead(options)
