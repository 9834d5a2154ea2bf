"""``graph``: why a model continues a prompt as it does, as a picture and as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from reflowlens.cli.arguments import Commands, add_command, add_device, add_model


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "graph", _graph, "why a model continues a prompt as it does: its attribution graph, drawn and scored"
    )
    parser.epilog = (
        "Writes OUT/graph.html, which opens without a network; graph.json for the viewers of circuit-tracer and "
        "Neuronpedia; nodes.csv and edges.csv, what is left after pruning. Time: seconds for a short prompt, of which "
        "most are the test whether the graph can be trusted."
    )
    add_model(parser)
    parser.add_argument("prompt", help="the text, two tokens at least")
    parser.add_argument(
        "--dictionary", metavar="D", help="transcoders, by packaged name or folder (default: the model's own neurons)"
    )
    parser.add_argument(
        "--target", nargs="+", metavar="TOKEN", help='what is explained, e.g. " Paris" (default: the likeliest tokens)'
    )
    parser.add_argument("--against", metavar="TOKEN", help="why the target and not this token")
    parser.add_argument("--heads", action="store_true", help="attention heads are nodes too")
    parser.add_argument("--neurons", type=int, default=32, help="without a dictionary: of each block and position")
    parser.add_argument("--node-threshold", type=float, default=0.8, help="share of all influence that is kept")
    parser.add_argument("--edge-threshold", type=float, default=0.98, help="share of all edge scores that is kept")
    parser.add_argument("--memory", type=float, default=1.0, metavar="GB", help="for edges; the largest are kept")
    parser.add_argument("--features", type=Path, metavar="FOLDER", help="feature pages that nodes are linked to")
    parser.add_argument("--lang", choices=["en", "zh"], default="en", help="language of the page")
    parser.add_argument("--out", required=True, type=Path, help="folder of the files; earlier ones are replaced")
    add_device(parser)


def _graph(options: argparse.Namespace) -> None:
    from reflowlens.checkpoints import load_model
    from reflowlens.circuits.attribution.attribute import attribute
    from reflowlens.dictionaries.files import load_dictionary
    from reflowlens.storage.atomic import replacing
    from reflowlens.storage.folders import check_makeable

    check_makeable(options.out)  # before minutes are spent
    model = load_model(options.model, device=options.device)
    graph = attribute(
        model,
        options.prompt,
        options.dictionary and load_dictionary(options.dictionary, model=model, device=options.device),
        options.target,
        against=options.against,
        neurons=options.neurons,
        heads=options.heads,
        memory=1e9 * options.memory,
    ).prune(options.node_threshold, options.edge_threshold)
    page = graph.save(options.out / "graph.html", features=options.features, lang=options.lang)
    graph.save(options.out / "graph.json")
    for name, frame in (("nodes", graph.nodes), ("edges", graph.edges)):
        with replacing(options.out / f"{name}.csv") as new:
            frame.to_csv(new, index=False)
    print(graph)
    print(graph.faithfulness()["verdict"])
    print(page)
