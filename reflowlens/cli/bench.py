"""``bench``: how fast this machine does what reflowlens does, beside another way of doing it."""

from __future__ import annotations

import argparse

from reflowlens.cli.arguments import Commands, add_command, add_device


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "bench", _bench, "measure this machine, each figure a ratio taken side by side in one process"
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="all",
        choices=["all", "hooks", "decode", "sweep", "score", "train", "dictionary", "graph"],
        help="which",
    )
    graph = parser.add_argument_group("of graph")
    graph.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="of the prompts")
    graph.add_argument("--dictionary", nargs="+", help="packaged transcoders (default: all)")
    train = parser.add_argument_group("of train")
    train.add_argument("--preset", help="model's shape, e.g. reflow_1_small (default: reflow_nano on a CPU)")
    train.add_argument("--steps", type=int, default=10, help="timed steps of each variant")
    train.add_argument("--batch", type=int, default=16, help="examples a step")
    train.add_argument("--context", type=int, help="tokens of an example (default: n_ctx)")
    train.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of products")
    add_device(train)
    train.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default: on a GPU)"
    )


def _bench(options: argparse.Namespace) -> None:
    from reflowlens.benchmarks import (
        TrainBench,
        bench_dictionary,
        bench_graph,
        bench_score,
        bench_sweep,
        bench_train,
        run_benchmarks,
    )

    if options.benchmark in ("all", "hooks", "decode"):
        print(run_benchmarks(options.benchmark).to_string(index=False))
    if options.benchmark in ("all", "sweep"):
        print(bench_sweep().to_string(index=False, na_rep="-"))
    if options.benchmark in ("all", "score"):
        print(bench_score().to_string(index=False))
    if options.benchmark in ("all", "train"):
        fields = {name: getattr(options, name) for name in ("batch", "context", "dtype")}
        bench = TrainBench.named(options.preset, device=options.device, compiled=options.compile, **fields)
        print(bench_train(bench, steps=options.steps))
    if options.benchmark in ("all", "dictionary"):
        print(bench_dictionary().to_string(index=False))
    if options.benchmark in ("all", "graph"):
        chosen = {"dictionaries": options.dictionary} if options.dictionary else {}
        print(bench_graph(options.tokens, **chosen).to_string(index=False, na_rep="-"))
