"""Experiment 13, Circuit Tracing: which features made a prediction, along which paths, and what can one of them do?

The demonstrations of TinyTranscoder, each beside what would look the same without any meaning. The graphs are those of
`reflowlens.attribute`, of the packaged dictionary that belongs to the model or of the model's own neurons.

Units of most influence are removed, beside others of their block that write as much (``matched_unit``), and beside
those that write the most (``size``). Paths are the strongest of all, exactly, beside those of the same graph with the
weights of each row shuffled (``shuffled_weights``), of the model's ``neurons`` where there is a dictionary, and of the
``untrained`` model's. Units drawn at random are forced to multiples of the largest activation that they have in text;
beside them stand another unit of their block that writes as much (``matched_unit``: the same token is watched), and
Gaussian directions as large (``random_direction``), each with the tokens that it promotes itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from analyses.controls.nulls import free_untrained, untrained_model
from analyses.experiments.circuit_tracing.figures import tracing_figures
from analyses.experiments.circuit_tracing.findings import DEFINITIONS, PUBLISHED, findings_of
from analyses.experiments.circuit_tracing.forcing import (
    BOUNDS,
    DOSES,
    Forced,
    dose_frame,
    drawn_units,
    matched_units,
    pushes_of,
    random_directions,
)
from analyses.experiments.circuit_tracing.tracing import (
    Paths,
    chosen_units,
    graph_of,
    node_texts,
    path_frame,
    paths_of,
    promoted_by,
    promoted_texts,
    removal_effects,
    shuffled_paths,
    unit_frame,
)
from analyses.experiments.circuit_tracing.trust import SCORES, scores_beside_nulls, validated
from analyses.experiments.circuit_tracing.writers import Writers
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng, derive_seed
from analyses.statistics.intervals import rate_interval
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.circuits.attribution.graph import AttributionGraph
from reflowlens.circuits.task import values_of
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import dictionary_manifest, list_dictionaries, load_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.metrics import target_rank
from reflowlens.models.base import HookedModel
from reflowlens.prompts import Prompts

NEURONS = "neurons"
PATHS_SHOWN = 20
_PROMPTS, _QUICK_PROMPTS = 20, 6
_UNITS, _QUICK_UNITS = 60, 24
_FORCED_PROMPTS, _QUICK_FORCED_PROMPTS = 4, 2
_VALIDATED, _QUICK_VALIDATED = 8, 3


@torch.no_grad()
def circuit_tracing(
    model: HookedModel,
    dictionary: Dictionary | str | None = None,
    prompt: str | None = None,
    target: str | None = None,
    *,
    lexicon: Lexicon | None = None,
    units: int | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Trace predictions to features and paths, and force features to see what they can do.

    Args:
        model: a decoder of which `reflowlens.attribute` makes graphs.
        dictionary: transcoders of its MLPs, or their name; "neurons" for the model's own neurons. Default: the packaged
            dictionary that belongs to the model, otherwise its neurons.
        prompt: shown in detail; default the lexicon's first factual prompt.
        target: the token that is explained there; default the likeliest. Over the prompts it is each prompt's.
        units: how many units are forced, drawn at random from those that are active in the lexicon's texts; default 60.
        quick: fewer prompts and units.

    Returns:
        A Result with frames ``units`` (those of the prompt in detail that have the most influence or write the most,
        and their controls, with what they promote), ``paths`` (the strongest of this prompt), ``prompts`` (a row a
        prompt), ``lengths`` (how influence is shared out among paths by their length), ``forced`` (a row a unit and
        dose) and ``doses`` (means with intervals), and figures ``units``, ``paths``, ``lengths``, ``doses`` and
        ``lifting``.

    Raises:
        ReflowlensError: the model has no attribution graphs, the dictionary is another model's or none of MLPs, the
            target is several tokens, fewer than two units are active in the texts, or the lexicon has fewer than two
            factual or short prompts.

    Example: ``circuit_tracing(rl.load_model("reflow-nano"), prompt="The capital of France is").frames["paths"]``
    """
    lexicon = lexicon or load_lexicon()
    prompts = _some([item.prompt for item in lexicon.factual], _QUICK_PROMPTS if quick else _PROMPTS)
    ends = _some(lexicon.short_prompts, _QUICK_FORCED_PROMPTS if quick else _FORCED_PROMPTS)
    if len(prompts) < 2 or not ends:
        raise ReflowlensError("circuit_tracing needs two factual prompts and a short prompt in the lexicon")
    chosen = _dictionary_of(model, dictionary)
    own, writers = derive_seed(seed, "circuit_tracing"), Writers.of(model, chosen)
    prompt = prompts[0] if prompt is None else prompt
    detail = graph_of(model, chosen, prompt, target)
    n_validated = _QUICK_VALIDATED if quick else _VALIDATED
    fresh = _untrained_graphs(model, prompts, seed, with_scores=chosen is None)
    traced = [
        _traced(writers, each, own, number, fresh[number], validate=number < n_validated)
        for number, each in enumerate(tqdm(prompts, desc="circuit tracing", disable=not progress))
    ]
    texts = [*lexicon.neutral_texts, *(item.prompt for item in lexicon.factual)]
    n_units = units or (_QUICK_UNITS if quick else _UNITS)
    sample, forced = _forced(writers, texts, ends, n_units, own)
    by_prompt = pd.DataFrame([row for row, _ in traced])
    if chosen is not None:
        scores = scores_beside_nulls(writers, prompts, derive_seed(own, "scores"))
        by_prompt = pd.concat([by_prompt, scores.drop(columns="prompt")], axis=1)
    frames = {
        "units": _detail_frame(detail, writers, own),
        "paths": path_frame(detail, writers, PATHS_SHOWN),
        "prompts": by_prompt,
        "lengths": _length_frame([paths for _, paths in traced], seed),
        "forced": sample,
        "doses": dose_frame(forced, seed),
    }
    findings, notes = findings_of(frames["prompts"], forced, seed)
    notes = [*_expected(model, lexicon), *notes]
    return Result(
        name="circuit_tracing",
        title="Circuit Tracing",
        params={
            "dictionary": NEURONS if chosen is None else chosen.cfg.name,
            "prompt": prompt,
            "target": str(detail.nodes["label"].iloc[-1]),
            "units": len(forced["unit"].before),
            "seed": seed,
            "quick": quick,
            "lexicon": lexicon.version,
            "model_hash": hash_of(model),
        },
        findings=findings,
        frames=frames,
        figures=tracing_figures(frames, findings, prompt),
        definitions=DEFINITIONS,
        published=PUBLISHED,
        notes=notes,
    )


def _expected(model: HookedModel, lexicon: Lexicon) -> list[str]:
    """How often the model says what the factual prompts ask for: otherwise its graphs explain something else."""
    known = [item for item in lexicon.factual if model.tokenizer.is_single_token(item.target)]
    if len(known) < 2:
        return []
    prompts = Prompts.of([{"clean": item.prompt, "answer": item.target} for item in known])
    first = (values_of(model, prompts, target_rank) == 1).double().cpu().numpy()
    low, high = rate_interval(first)
    aside = "" if first.mean() > 0.5 else ": what the graphs explain is mostly another token, not the fact"
    share = f"{int(first.sum())} of {len(known)} factual prompts ({low:.3f} to {high:.3f})"
    return [f"the likeliest token is the expected one after {share}{aside}"]


def packaged_dictionary(model: HookedModel) -> str | None:
    """The name of the packaged per-layer transcoders of a model's MLPs, if there are any."""
    for name in list_dictionaries():
        cfg = DictionaryConfig.from_dict(dictionary_manifest(name)["config"])
        if cfg.kind == "transcoder" and not cfg.cross_layer and cfg.model_hash == hash_of(model):
            return name
    return None


def _dictionary_of(model: HookedModel, dictionary: Dictionary | str | None) -> Dictionary | None:
    if isinstance(dictionary, Dictionary):
        return dictionary
    name = packaged_dictionary(model) if dictionary is None else dictionary
    return None if name is None or name == NEURONS else load_dictionary(name, model=model, device=model.cfg.device)


def _some(items: Sequence[str], n: int) -> list[str]:
    """At most n different ones of them, spread evenly."""
    different = list(dict.fromkeys(items))
    return different[:: max(1, len(different) // n)][:n]


def _untrained_graphs(
    model: HookedModel, prompts: Sequence[str], seed: int, *, with_scores: bool
) -> list[tuple[Paths, dict[str, float]]]:
    """Paths and scores of each prompt's graph in the untrained model, which is then let go."""
    untrained = untrained_model(model, seed)
    graphs = (graph_of(untrained, None, prompt) for prompt in prompts)
    found = [(paths_of(graph), graph.scores() if with_scores else {}) for graph in graphs]
    del untrained, graphs
    free_untrained(model)
    return found


def _traced(
    writers: Writers, prompt: str, seed: int, number: int, untrained: tuple[Paths, dict[str, float]], validate: bool
) -> tuple[dict[str, object], dict[str, Paths]]:
    """What the graphs of one prompt say, a row of numbers, and how influence is shared out among paths."""
    model, graph = writers.model, graph_of(writers.model, writers.dictionary, prompt)
    chosen = chosen_units(unit_frame(graph, writers), derive_rng(seed, "chosen_units", number))
    target = int(graph.nodes["feature"].iloc[-1])
    effects = removal_effects(graph, writers, prompt, chosen)
    promoting = {name: float((promoted_by(writers, units) == target).any(1).mean()) for name, units in chosen.items()}
    paths = {"model": paths_of(graph), "shuffled_weights": shuffled_paths(graph, seed, str(number))}
    if writers.dictionary is not None:
        paths[NEURONS] = paths_of(graph_of(model, None, prompt))
    paths["untrained"], untrained_scores = untrained
    scores = {"model": graph.scores(), "untrained": untrained_scores} if writers.dictionary is None else {}
    row = {
        "prompt": prompt,
        "target": str(graph.nodes["label"].iloc[-1]),
        "probability": float(model(prompt)[0, -1].softmax(-1)[target]),
        **{f"{score}_{name}": each[score] for score in SCORES for name, each in scores.items()},
        **(validated(graph, derive_seed(seed, "validated", number)) if validate else {}),
        **{f"removal_{name}": effect for name, effect in effects.items()},
        **{f"promoting_{name}": share for name, share in promoting.items()},
        **{f"strongest_{name}": each.strongest for name, each in paths.items()},
        **{f"multi_hop_{name}": each.multi_hop for name, each in paths.items()},
    }
    return row, paths


def _forced(
    writers: Writers, texts: Sequence[str], prompts: Sequence[str], n: int, seed: int
) -> tuple[pd.DataFrame, dict[str, Forced]]:
    """Units drawn at random and forced: a row a unit and dose, and the same beside its controls."""
    model = writers.model
    ends = [model.to_tokens(prompt)[0] for prompt in prompts]
    sample = drawn_units(writers, texts, n, seed)
    own = pushes_of(writers, sample, ends)
    series = {
        "unit": own,
        "matched_unit": pushes_of(writers, matched_units(writers, sample, seed), ends, own.tokens),
        "random_direction": random_directions(writers, own, seed),
    }
    forced = {name: Forced.of(writers, each, ends) for name, each in series.items()}
    unit = forced["unit"]
    names = [f"{block}.{index}" for block, index in zip(sample.block.tolist(), sample.index.tolist(), strict=True)]
    texts = model.tokenizer.to_str_tokens(own.tokens[:, 0].tolist())
    lifts = {f"lifts_{bound}": np.repeat(unit.lifts[:, i], len(DOSES)) for i, bound in enumerate(BOUNDS)}
    columns = {
        "unit": np.repeat(names, len(DOSES)),
        "largest": np.repeat(sample.largest.cpu().numpy(), len(DOSES)),
        "token": np.repeat(np.array(texts, dtype=object), len(DOSES)),
        "before": np.repeat(unit.before, len(DOSES)),
        "dose": np.tile(DOSES, len(names)),
        "probability": unit.probability.ravel(),
    }
    return pd.DataFrame(columns | lifts), forced


def _detail_frame(graph: AttributionGraph, writers: Writers, seed: int) -> pd.DataFrame:
    """The units of the prompt in detail, by how they were chosen, with what they promote."""
    text, parts = node_texts(graph), []
    for name, units in chosen_units(unit_frame(graph, writers), derive_rng(seed, "chosen_units", "detail")).items():
        promoted = promoted_by(writers, units)
        first, more = (promoted_texts(writers.model, promoted, k) for k in (1, 5))
        part = units.assign(chosen=name, unit=units["node"].map(text), promotes_most=first, promotes=more)
        parts.append(part.drop(columns="node"))
    frame = pd.concat(parts, ignore_index=True)
    frame = frame.astype({"layer": int, "feature": int, "pos": int})
    return frame[["chosen", "unit", *(name for name in frame if name not in ("chosen", "unit"))]]


def _length_frame(paths: Sequence[Mapping[str, Paths]], seed: int) -> pd.DataFrame:
    """A row a series and number of edges: the share of influence, mean over prompts."""
    longest = max(len(each.by_length) for row in paths for each in row.values())
    frames = []
    for series in paths[0]:
        table = np.stack([np.pad(row[series].by_length, (0, longest - len(row[series].by_length))) for row in paths])
        frames.append(pd.DataFrame({"series": series, "edges": np.arange(1, longest + 1), "share": table.mean(0)}))
    return pd.concat(frames, ignore_index=True)
