"""Native signals against dictionaries: at equal L0 and on the same predictions, which says more?

Signals are held against features that were trained afterwards, and both against bases that nobody trained: ``native``
(of a model without signals ``identity`` is its own), ``varimax``, ``rotated``, ``svd``, ``identity``, the MLP's
``neurons``, each dictionary, and beside each dictionary a random one of its sizes and norms. They are codes
(`analyses.findings.codes`) of two places, the last residual ``stream`` and what the last ``mlp`` writes into it; codes
are compared within a place. L0 is what the dictionaries of the place have on average, and 32 where there is none.

=================  ====================================================================================================
measure            what it is, better first                                                      smallest effect
=================  ====================================================================================================
recovered_mean     share of the loss that the place is worth against the training mean which     0.05, larger
                   L0 coordinates and the constant recover, without the error
auc                of probes on 1 coordinate for concepts of the text, on other documents; all   0.02, larger
                   coordinates may be chosen from
selectivity        on / (on + off): KL of removing the coordinate that tells a concept best,     0.05, larger
                   where the concept holds and where it does not
leading_share      of what the code says for the most probable token, what its 10 largest        0.05, larger
                   coordinates hold; constant and error count against it
=================  ====================================================================================================

**The rule**, decided before anything was measured. Of each place and measure the difference of the model's own code
from another has a 95% interval over held-out documents (percentiles of paired resamples). ``own`` is better where the
whole interval lies above the smallest effect, ``other`` where it lies below its negative, they are ``alike`` where it
lies between the two, and otherwise it is ``undecided``. The verdict of a finding is of the claim that native signals
say it better than a trained dictionary (where there is none: than a rotated basis): supported where ``own``, not
supported where ``other`` or ``alike``, underpowered where undecided or with fewer than 20 documents.

What one coordinate's removal leaves of the top-1 probability (``left_after_one``), the effect of removal (``on``), the
accuracy of probes, stability over seeds (NaN where there is one of a kind), parameters, training tokens and
milliseconds a token stand in the table without a verdict. Removing a coordinate of an exact view puts its training mean
there, of a feature or a neuron 0: either is what the code says where nothing is the matter.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from analyses.features.documents import Documents, token_rows
from analyses.features.probing import Draws
from analyses.features.probing_tasks import Task, probing_tasks
from analyses.findings.code_measures import (
    LEADING,
    Resamples,
    active,
    knocked_out,
    probed,
    recovered,
    removal,
    stability,
)
from analyses.findings.codes import Code, Held, dictionary_code, hold, neuron_code, points_read, view_codes
from analyses.result.finding import Finding
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_rng, derive_seed
from analyses.statistics.resampling import percentile_interval
from analyses.statistics.verdicts import Verdict
from analyses.words.lexicon import load_lexicon
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.dictionaries.files import dictionary_manifest, load_dictionary
from reflowlens.dictionaries.random_dictionary import random_dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.figures.builders import bars
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar

SMALLEST = {"recovered_mean": 0.05, "auc": 0.02, "selectivity": 0.05, "leading_share": 0.05}
"""Measure -> the difference that matters."""
MINIMUM_DOCUMENTS = 20
USUAL_L0 = 32
DEFINITIONS = {
    "recovered_mean": "share of the loss between the training mean in the place and what is there that L0 coordinates "
    "and the code's constant recover, without the error",
    "auc": "area under the ROC curve of a probe on 1 coordinate, mean over concepts of the text, on other documents",
    "selectivity": "KL on / (on + off) of removing the coordinate that tells a concept best, mean over concepts",
    "leading_share": f"share of what the code says for the most probable token that its {LEADING} largest coordinates "
    "hold",
}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    documents: int
    tokens: int
    probed: int
    removed: int
    resamples: int

    @classmethod
    def of(cls, quick: bool) -> Size:
        return cls(60, 48, 600, 40, 400) if quick else cls(400, 128, 3000, 200, 1000)


@torch.no_grad()
def signals_against_dictionaries(
    model: HookedModel,
    dictionaries: Sequence[str | Path | Dictionary] | None = None,
    texts: Documents = (),
    *,
    quick: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Compare a model's signals with dictionaries and with bases that nobody trained.

    Args:
        dictionaries: packaged names, folders, or dictionaries, of the last residual stream or the last MLP; several of
            one size that write to one place are seeds of one kind. None: the views of the model alone.
        texts: documents that nothing was trained on, texts or arrays of tokens; half of them choose means and
            coordinates, the other half is measured.
        quick: 60 documents of 48 tokens and 400 resamples instead of 400 of 128 and 1000.

    Returns:
        A Result with frames ``table`` (a row a place and code: every measure with its interval, costs and stability),
        ``differences`` (the model's own code minus each other, with interval and answer) and ``probes`` (by k), and a
        figure ``table``; findings are the differences from the trained dictionaries.

    Raises:
        ReflowlensError: there are fewer than 4 documents or no concept occurs in them, a dictionary is another model's
            or of neither place, or the model refines its last stream.

    Example: ``signals_against_dictionaries(model, ["reflow-nano-sae"], texts).frames["table"]``
    """
    size = Size.of(quick)
    rows = [row[: size.tokens] for row in token_rows(model, list(texts)[: size.documents])]
    if len(rows) < 4:
        raise ReflowlensError(f"at least 4 documents of 3 tokens are needed, got {len(rows)}: give more text")
    opened = dict(_opened(dictionaries or ()))
    for dictionary, _ in opened.values():
        check_belongs(dictionary, model)
    held = hold(model, rows, points_read(model, [dictionary for dictionary, _ in opened.values()]))
    task = _concepts(model, rows, size, seed)
    first = np.unique(task.unit[task.training])  # the documents that choose
    chooses = torch.as_tensor(np.isin(held.document.cpu().numpy(), first))
    training, test = held.of(chooses), held.of(~chooses)
    trained = [dictionary_code(model, name, one, tokens) for name, (one, tokens) in opened.items()]
    random = [
        dictionary_code(model, f"random {name}", random_dictionary(one, derive_seed(seed, name)), 0.0)
        for name, (one, _) in opened.items()
    ]
    neurons = neuron_code(model)
    codes = [*view_codes(model, training, seed), *([neurons] if neurons else []), *trained, *random]
    l0 = {place: _l0(place, trained, training) for place in held.places}
    measures = ~np.isin(np.arange(len(rows)), first)
    over = Resamples.of(measures, size.resamples, derive_seed(seed, "documents"))
    some = test.of(_prompts(test, size.removed * 5, seed))
    measured: dict[tuple[str, str], dict[str, Draws]] = {}
    probes: list[dict[str, object]] = []
    for code in bar(
        codes,
        show=sys.stderr.isatty() if progress is None else progress,
        unit="code",
        desc="signals against dictionaries",
    ):
        found = recovered(code, test, training.places[code.place].mean(dim=0), l0[code.place], over)
        for k in (1, 8):
            told = probed(code, held, task, k, over, derive_seed(seed, "probes", k))
            probes.append({"place": code.place, "code": code.name, "k": k, **{m: d[0] for m, d in told.items()}})
            found |= told if k == 1 else {}
        found |= removal(code, held, task, over, size.removed, derive_seed(seed, "removal"))
        found |= knocked_out(code, some, over)
        measured[code.place, code.name] = found
    alike = {code.name: [other for other in trained if _same_kind(code, other)] for code in trained}
    alike |= {code.name: [other for other in random if _same_kind(code, other)] for code in random}
    table = pd.DataFrame([_row(code, measured, l0, alike, test) for code in codes])
    names = [code.name for code in trained]
    differences = _differences(measured, codes[0].name, names)
    findings = _findings(differences, names, int(measures.sum()))
    frames = {"table": table, "differences": differences, "probes": pd.DataFrame(probes)}
    return Result(
        name="signals_against_dictionaries",
        title="Signals against dictionaries",
        params={
            "dictionaries": names,
            "documents": len(rows),
            "tokens": len(held),
            "l0": l0,
            "quick": quick,
            "seed": seed,
            "model_hash": hash_of(model),
        },
        findings=findings,
        frames=frames,
        figures={"table": _figure(table)},
        notes=_notes(table, differences, codes[0].name),
    )


def answer(low: float, high: float, smallest: float) -> str:
    """What an interval of the own code's lead says: ``own``, ``other``, ``alike`` or ``undecided``.

    >>> answer(0.1, 0.2, 0.05), answer(-0.02, 0.03, 0.05), answer(-0.2, 0.2, 0.05)
    ('own', 'alike', 'undecided')
    """
    if low > smallest:
        return "own"
    if high < -smallest:
        return "other"
    return "alike" if -smallest < low and high < smallest else "undecided"


def better_verdict(answered: str, documents: int) -> Verdict:
    """Claim: native signals say it better than what they are held against; the module has the rule."""
    if documents < MINIMUM_DOCUMENTS or answered == "undecided":
        return "underpowered"
    return "supported" if answered == "own" else "not supported"


def _opened(dictionaries: Sequence[str | Path | Dictionary]) -> list[tuple[str, tuple[Dictionary, float]]]:
    """Each by its name, with the tokens that it was trained on, NaN where that is not known."""
    found: list[tuple[str, tuple[Dictionary, float]]] = []
    for i, one in enumerate(dictionaries):
        if isinstance(one, Dictionary):
            found.append((one.cfg.name or f"dictionary {i}", (one, float("nan"))))
            continue
        dictionary, tokens = load_dictionary(one), dictionary_manifest(one).get("tokens_seen")
        name = dictionary.cfg.name or Path(one).name
        found.append((name, (dictionary, float(tokens) if isinstance(tokens, int) else float("nan"))))
    names = [name for name, _ in found]
    return [(f"{name} {i}" if names.count(name) > 1 else name, one) for i, (name, one) in enumerate(found)]


def _concepts(model: HookedModel, rows: Sequence[torch.Tensor], size: Size, seed: int) -> Task:
    tasks = probing_tasks(model, rows, load_lexicon(), size.probed, derive_seed(seed, "concepts"))
    found = next((task for task in tasks if task.name == "concepts"), None)
    if found is None:
        raise ReflowlensError(f"no concept of a text occurs often enough in {len(rows)} documents: give more text")
    return found


def _l0(place: str, trained: Sequence[Code], held: Held) -> int:
    found = [float(active(code, held).mean()) for code in trained if code.place == place]
    return max(1, round(float(np.mean(found)))) if found else USUAL_L0


def _prompts(held: Held, most: int, seed: int) -> torch.Tensor:
    """Positions at which predictions are knocked out."""
    return torch.as_tensor(np.sort(derive_rng(seed, "prompts").permutation(len(held))[:most]))


def _same_kind(a: Code, b: Code) -> bool:
    return a.place == b.place and a.writes.shape == b.writes.shape


def _row(
    code: Code,
    measured: Mapping[tuple[str, str], Mapping[str, Draws]],
    l0: Mapping[str, int],
    alike: Mapping[str, Sequence[Code]],
    held: Held,
) -> dict[str, object]:
    row: dict[str, object] = {"place": code.place, "code": code.name, "l0": l0[code.place], "width": len(code.writes)}
    for measure, draws in measured[code.place, code.name].items():
        row[measure] = float(draws[0])
        if len(draws) > 1:
            row[f"{measure}_low"], row[f"{measure}_high"] = _interval(draws)
    return row | {
        "stability": stability(alike.get(code.name, ())),
        "parameters": code.parameters,
        "training_tokens": code.training_tokens,
        "ms_per_token": code.milliseconds(held),
    }


def _interval(draws: Draws) -> tuple[float, float]:
    """Of the resamples that have a value; NaN where none has."""
    known = draws[1:][np.isfinite(draws[1:])]
    return percentile_interval(known) if len(known) else (float("nan"), float("nan"))


def _differences(
    measured: Mapping[tuple[str, str], Mapping[str, Draws]], own: str, trained: Sequence[str]
) -> pd.DataFrame:
    """The own code minus each other one of its place, of every measure with a smallest effect."""
    found = []
    for (place, name), theirs in measured.items():
        for measure, smallest in SMALLEST.items():
            if name == own:
                continue
            difference = measured[place, own][measure] - theirs[measure]
            low, high = _interval(difference)
            answered = answer(low, high, smallest)
            values = {"difference": float(difference[0]), "low": low, "high": high, "answer": answered}
            found.append({"place": place, "measure": measure, "against": name, "trained": name in trained, **values})
    return pd.DataFrame(found)


def _findings(differences: pd.DataFrame, trained: Sequence[str], documents: int) -> dict[str, Finding]:
    """Own minus trained; beside it what an untrained code in the own one's place would lead by."""
    found = {}
    judged = differences[differences["trained"]] if trained else differences[differences["against"] == "rotated"]
    for row in judged[judged["low"].notna()].to_dict("records"):
        place, measure, against = (str(row[name]) for name in ("place", "measure", "against"))
        same = differences[(differences["place"] == place) & (differences["measure"] == measure)]
        leads = {str(other["against"]): row["difference"] - other["difference"] for other in same.to_dict("records")}
        controls = {f"{name} instead": lead for name, lead in leads.items() if name in ("varimax", "rotated", "svd")}
        found[f"{measure}_{place}_against_{against}".replace(" ", "_")] = Finding(
            row["difference"],
            (row["low"], row["high"]),
            controls,
            better_verdict(str(row["answer"]), documents),
            definition=f"own code minus {against}: {DEFINITIONS[measure]}",
        )
    return found


def _notes(table: pd.DataFrame, differences: pd.DataFrame, own: str) -> list[str]:
    notes = [f"{own} is the model's own code; L0 is the dictionaries', 32 where a place has none"]
    if table["stability"].isna().any():
        lone = ", ".join(dict.fromkeys(table.loc[table["stability"].isna(), "code"]))
        notes.append(f"stability over seeds is NaN of {lone}: there is one of a kind")
    if worthless := list(dict.fromkeys(table.loc[table["recovered_mean"].isna(), "place"])):
        notes.append(f"recovered_mean is NaN in {', '.join(worthless)}: the training mean may predict as well")
    for (place, against), rows in differences[differences["trained"]].groupby(["place", "against"], sort=False):
        said = ", ".join(f"{row.measure} {row.answer}" for row in rows.itertuples())
        notes.append(f"{place}, {own} against {against}: {said}")
    return notes


def _figure(table: pd.DataFrame) -> go.Figure:
    long = pd.concat(
        [
            pd.DataFrame(
                {
                    "measure": measure,
                    "code": table["code"] + " (" + table["place"] + ")",
                    "value": table[measure],
                    "low": table[f"{measure}_low"],
                    "high": table[f"{measure}_high"],
                }
            )
            for measure in SMALLEST
        ],
        ignore_index=True,
    )
    return bars(long, "code", "value", "low", "high", color="measure", horizontal=True, title="Codes at equal L0")
