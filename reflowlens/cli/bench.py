"""``bench``: how fast this machine does what reflowlens does, beside another way of doing it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from reflowlens.cli.arguments import Commands, add_command, add_device
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.benchmarks.train import TrainComparison

# BENCHMARKS, which take long to import
_NAMES = ["hooks", "decode", "generate", "sweep", "score", "collection", "load", "train", "dictionary", "graph"]


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "bench", _bench, "measure this machine, each figure a ratio taken side by side in one process"
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="all",
        choices=["all", *_NAMES, "check"],
        help="which; check: the ratios of the quick forms beside stored ones, exit status 1 if one fell",
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: each below two minutes")
    check = parser.add_argument_group("of check")
    check.add_argument("--against", metavar="FILE", help="stored ratios (default: those that are packaged)")
    check.add_argument(
        "--of", nargs="+", choices=_NAMES, help="which benchmarks are measured (default: those stored; to --write, all)"
    )
    check.add_argument("--write", action="store_true", help="store what is measured in that file instead")
    parser.add_argument_group(
        "of sweep",
        "other_ms: TransformerLens's functions or, with the extra `bench`, nnsight, each cell an invoke and a layer's "
        "invokes one batch. difference: the largest between the two results. flops: matrix products of a whole pass a "
        "cell over those of what a cell changes and the metric reads, the ratio that arithmetic alone gives. floor: "
        "the share of ours_ms that the latter would take at the rate of one plain product of the model's shape, "
        "measured beside it: 1 is the floor itself",
    )
    graph = parser.add_argument_group("of graph")
    graph.add_argument("--tokens", type=int, nargs="+", help="of the prompts (default: 16 32 64 128 256)")
    graph.add_argument("--dictionary", nargs="+", help="packaged transcoders (default: all)")
    train = parser.add_argument_group("of train")
    train.add_argument("--preset", help="model's shape, e.g. reflow_1_small (default: reflow_nano on a CPU)")
    train.add_argument("--steps", type=int, help="timed steps of each variant (default: 10, quick 3)")
    train.add_argument("--batch", type=int, help="examples a step (default: 16, quick 4)")
    train.add_argument("--context", type=int, help="tokens of an example (default: n_ctx)")
    train.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of products (default: bfloat16 where the processor multiplies in it, otherwise float32)",
    )
    add_device(train)
    train.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default: on a GPU)"
    )


def _bench(options: argparse.Namespace) -> int | None:
    from reflowlens.benchmarks import BENCHMARKS

    if options.benchmark == "check":
        return _check(options)
    if options.against or options.of or options.write:
        raise ReflowlensError("--against, --of and --write are of `reflowlens bench check`")
    of_graph = {"n_tokens": options.tokens, "dictionaries": options.dictionary}
    given = {"graph": {name: value for name, value in of_graph.items() if value is not None}}
    for name in _NAMES if options.benchmark == "all" else [options.benchmark]:
        if name == "train":
            print(_trained(options), flush=True)
            continue
        measure = BENCHMARKS[name].quick if options.quick else BENCHMARKS[name].rows
        for line in BENCHMARKS[name].lines(measure(**given.get(name, {}))):
            print(line, flush=True)
    return None


def _check(options: argparse.Namespace) -> int:
    from reflowlens.benchmarks import check, machine

    path = options.against or check.STORED
    stored = check.read_ratios(path) if not options.write or os.path.exists(path) else []
    known = _NAMES if options.write else [name for name in _NAMES if name in {each.benchmark for each in stored}]
    names = [name for name in options.of or known if options.write or name in known]
    if not names:
        raise ReflowlensError(f"no stored ratios of these in {path}: `reflowlens bench check --write` stores them")
    print(machine(), flush=True)
    found = []
    for name, row, ratio in check.measured(names):
        found.append((name, row, ratio))
        print(f"{ratio:10.4g}  {name}: {row}", flush=True)
    if options.write:
        check.write_ratios(path, found, stored)
        return 0
    table = check.compared(stored, found, names)
    wrong = table[table["what"].isin(["fell", "missing"])]
    elsewhere = sorted({each.machine for each in stored} - {machine()})
    if elsewhere:
        print(f"stored ratios were measured on {'; '.join(elsewhere)}")
    new = int((table["what"] == "new").sum())
    told = f"no ratio fell by more than its tolerance: {len(table) - new} compared, {new} not stored"
    print(wrong.to_string(index=False) if len(wrong) else told)
    return int(len(wrong) > 0)


def _trained(options: argparse.Namespace) -> TrainComparison:
    from reflowlens.benchmarks import TrainBench, bench_train

    batch, steps = (4, 3) if options.quick else (16, 10)
    fields = {"batch": options.batch or batch, "context": options.context, "dtype": options.dtype}
    bench = TrainBench.named(options.preset, device=options.device, compiled=options.compile, **fields)
    return bench_train(bench, steps=options.steps or steps)
