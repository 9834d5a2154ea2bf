"""``dictionary evaluate``: a dictionary on held-out documents of prepared data, beside nulls and other dictionaries."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflowlens.cli.arguments import Commands, add_command, add_device
from reflowlens.errors import ReflowlensError

if TYPE_CHECKING:
    import numpy as np

    from reflowlens.dictionaries.dictionary import Dictionary
    from reflowlens.models.base import HookedModel

_FEW = 10  # documents, of which an interval would say little


def add_evaluate(commands: Commands) -> None:
    """Add the command to those of ``dictionary``."""
    parser = add_command(
        commands, "evaluate", _evaluate, "measure a dictionary on held-out documents, beside nulls at equal L0"
    )
    parser.epilog = (
        "Time grows with tokens, layers and rows of the table: each row is a pass for every layer and one for all of "
        "them; --no-nulls is four times as fast."
    )
    parser.add_argument("dictionary", help="packaged name, folder or file")
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="text made by prepare")
    parser.add_argument("--model", help="name, folder or file (default: the one that the dictionary names)")
    parser.add_argument("--tokens", type=int, default=20_000, help="of held-out documents; 0 reads all")
    parser.add_argument("--training-tokens", type=int, default=50_000, help="for means and principal components")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="DICTIONARY",
        help="others at the same hook points in the same table, such as one with a frozen decoder, or one of the "
        "untrained model (fresh weights from the seed that it was trained with)",
    )
    parser.add_argument("--no-nulls", action="store_true", help="leave out the bases that need no training")
    parser.add_argument(
        "--together",
        action="store_true",
        help="of nulls and others, replace all layers at once only, and not each by itself: twice as fast",
    )
    parser.add_argument("--seeds", nargs="+", default=[], metavar="DICTIONARY", help="stability: others of its kind")
    parser.add_argument("--probe", action="store_true", help="k-sparse probes of word categories and text concepts")
    parser.add_argument(
        "--graphs", action="store_true", help="scores of attribution graphs of 60 factual prompts, beside nulls"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="documents read at once")
    parser.add_argument("--resamples", type=int, default=1000, help="of documents, for the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of documents, resamples and the rotated basis")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write")
    add_device(parser)


def _evaluate(options: argparse.Namespace) -> None:
    from analyses.features.evaluation import evaluate_dictionary
    from analyses.features.graph_scores import graph_scores, summary
    from analyses.features.probing import sparse_probing
    from analyses.features.stability import seed_stability
    from analyses.units.terminal import table
    from analyses.words.lexicon import load_lexicon
    from reflowlens.checkpoints import load_model
    from reflowlens.dictionaries.files import load_dictionary

    for name in ("batch_size", "resamples", "training_tokens"):
        if getattr(options, name) < 1:
            raise ReflowlensError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.tokens < 0:
        raise ReflowlensError(f"--tokens must be 0 (all) or more, got {options.tokens}")
    dictionary = load_dictionary(options.dictionary, device=options.device)
    if not (name := options.model or dictionary.cfg.model_name):
        raise ReflowlensError(f"{options.dictionary} does not name its model: give it with --model")
    model = load_model(name, device=options.device)
    held_out = _documents(model, options, "val", options.tokens)
    against = dict(_against(name, model, options) for name in options.against)
    result = evaluate_dictionary(
        model,
        dictionary,
        held_out,
        _documents(model, options, "train", options.training_tokens),
        against=against,
        with_nulls=not options.no_nulls,
        layerwise=not options.together,
        batch_size=options.batch_size,
        resamples=options.resamples,
        seed=options.seed,
        progress=True,
    )
    print(result)
    if options.seeds:
        others = {name: load_dictionary(name, device=options.device) for name in (options.dictionary, *options.seeds)}
        stability = seed_stability(model, others, held_out, seed=options.seed, progress=True)
        print("\nstability over seeds", table(stability), sep="\n")
        result = result.and_frame("stability", stability)
    if options.probe:
        probes = sparse_probing(model, dictionary, held_out, seed=options.seed, progress=True)
        print("\nk-sparse probes, mean over classes", table(probes[probes["class"] == "all"]), sep="\n")
        result = result.and_frame("probes", probes)
    if options.graphs:
        prompts = [one.prompt for one in load_lexicon().factual]
        scores = graph_scores(
            model,
            dictionary,
            prompts,
            against=against,
            with_nulls=not options.no_nulls,
            seed=options.seed,
            progress=True,
        )
        graphs = summary(scores, resamples=options.resamples, seed=options.seed)
        print("\nscores of attribution graphs, mean over prompts", table(graphs), sep="\n")
        result = result.and_frame("graphs", graphs)
    if options.out:
        print(result.save(options.out))


def _documents(model: HookedModel, options: argparse.Namespace, split: str, n_tokens: int) -> list[np.ndarray]:
    """The beginnings of documents in a random order, until there are so many tokens; 0: of all of them.

    Where documents are few, as in a split of one book, their windows stand in for them, and it is said.
    """
    import numpy as np

    from pretraining.dictionaries.documents import document_windows
    from pretraining.evaluate import tokens_for

    data = tokens_for(model, options.data, split)
    windows = document_windows(data, model.cfg.n_ctx, first_only=True)
    if len(windows) < _FEW:
        found, windows = len(windows), document_windows(data, model.cfg.n_ctx)
        if split == "val":
            print(f"held out are {found} documents: their {len(windows)} windows count as such", file=sys.stderr)
    order = np.random.default_rng(options.seed).permutation(len(windows))
    ends = np.cumsum(windows.length[order])
    chosen = order[: max(2, int(np.searchsorted(ends, n_tokens)) + 1)] if n_tokens else order
    spans = zip(windows.start[chosen].tolist(), windows.length[chosen].tolist(), strict=True)
    return [np.asarray(data.tokens[start : start + length]) for start, length in spans]


def _against(
    name: str, model: HookedModel, options: argparse.Namespace
) -> tuple[str, Dictionary | tuple[HookedModel, Dictionary]]:
    """Another dictionary under its own name, with its model if that is the untrained one."""
    from reflowlens.dictionaries.files import dictionary_manifest, load_dictionary
    from reflowlens.models import build_model

    other = load_dictionary(name, device=options.device)
    seed: Any = dictionary_manifest(name)
    for key in ("training", "model", "untrained_seed"):
        seed = seed.get(key) if isinstance(seed, dict) else None
    seed = seed if isinstance(seed, int) else -1
    shown = other.cfg.name or Path(name).name
    return shown, other if seed < 0 else (build_model(model.cfg, seed=seed, device=options.device), other)
