"""``features``: pages that show what each feature of a dictionary, or each unit of a model, responds to."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.cli.arguments import Commands, add_command, add_device, add_model
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    from reflowlens.models.base import HookedModel


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands, "features", _features, "pages that show what each feature or unit responds to, writes and is worth"
    )
    parser.epilog = (
        "Time, with six layers of 2,048 features of reflow-nano and 100,000 tokens: 1.5 minutes on two cores. "
        "OUT/index.html opens without a network; index.html#layer=3&feature=17 is one feature."
    )
    add_model(parser)
    parser.add_argument(
        "--dictionary", metavar="D", help="packaged name or folder (default: units that the architecture is made of)"
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="TEXT",
        help="held-out text: a .txt, .jsonl or table, packed or not, or a folder made by prepare",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the pages; earlier pages are replaced")
    parser.add_argument(
        "--hook",
        nargs="+",
        metavar="POINT",
        help="without a dictionary: hook points, or kinds at every level, e.g. mlp_post, unembed_signal, xy_sparse",
    )
    parser.add_argument("--layers", nargs="+", metavar="L", help="of the pages, e.g. 2 3 (default: all)")
    parser.add_argument("--features", type=int, metavar="N", help="the first N of each layer (default: all)")
    parser.add_argument("--tokens", type=int, default=100_000, help="of the text at most; documents are taken in order")
    parser.add_argument("--context", type=int, help="tokens of a block at most (default: the model's n_ctx)")
    parser.add_argument("--top", type=int, default=12, help="contexts where a feature is largest")
    parser.add_argument("--samples", type=int, default=3, help="contexts of each fifth of its activations")
    parser.add_argument("--removed", type=int, default=24, help="features a layer whose removal is measured; 0: none")
    parser.add_argument(
        "--json",
        action="store_true",
        help="a JSON file a feature too, for the viewers of Neuronpedia and circuit-tracer",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    add_device(parser)


def _features(options: argparse.Namespace) -> None:
    from analyses import feature_dashboards
    from reflowlens.checkpoints import load_model
    from reflowlens.dictionaries.files import load_dictionary
    from reflowlens.notebook.feature_pages import check_pages_replaceable

    for name in ("features", "tokens", "context", "top", "samples"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ReflowlensError(f"--{name} must be at least 1, got {value}")
    check_pages_replaceable(options.out)  # before minutes are spent
    model = load_model(options.model, device=options.device)
    dictionary = options.dictionary and load_dictionary(options.dictionary, model=model, device=options.device)
    pages = feature_dashboards(
        model,
        _documents(model, options.data),
        dictionary or None,
        points=options.hook,
        layers=options.layers,
        n_features=options.features,
        n_tokens=options.tokens,
        context=options.context,
        n_top=options.top,
        n_interval=options.samples,
        n_removed=options.removed,
        seed=options.seed,
        data_name=options.data.name,
        progress=True,
    )
    print(pages.save(options.out, json=options.json, progress=True))


def _documents(model: HookedModel, path: Path) -> Iterator[Any]:
    """The documents of a file or folder of text, or those of the validation tokens of prepared data."""
    from pretraining.texts import documents_of
    from pretraining.token_files import MANIFEST_NAME

    if path.is_dir() and (path / MANIFEST_NAME).is_file():
        yield from _prepared_documents(model, path)
    else:
        yield from documents_of(path)


def _prepared_documents(model: HookedModel, folder: Path) -> Iterator[Any]:
    """Each with the id that ends it, which the model was trained to predict."""
    import numpy as np

    from pretraining.evaluate import tokens_for

    data = tokens_for(model, folder, "val")
    tokens = data.tokens[:]
    yield from np.split(tokens, np.flatnonzero(tokens == data.manifest.end_id) + 1)
