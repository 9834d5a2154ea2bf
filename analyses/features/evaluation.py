"""How well a dictionary says what its model's layers write, on documents held out, and what of it any basis would.

    held_out, training = ...                      # documents: texts, or arrays of tokens
    result = evaluate_dictionary(model, dictionary, held_out, training)
    print(result)
    result.frames["layers"], result.frames["differences"]

Per layer and together: L0; FVU = Σ‖y - ŷ‖² / Σ‖y - ȳ‖², ȳ the mean over the documents measured on; the cosine of y and
ŷ; ``dead``, the share of features that are never active on these documents, and ``dense``, of those active at more than
a tenth of the positions; and what the model predicts with ŷ in place of y, at one layer or at all of them: its
cross-entropy ``loss``, ``kl`` = KL(model‖replaced), ``agreement`` in the likeliest token, and the loss recovered,
(loss_0 - loss) / (loss_0 - loss of the model), where loss_0 is that with zeros (``recovered_zero``) or with the
training mean (``recovered_mean``) in place of y. "all" replaces every layer in one pass, each reading what the replaced
pass holds; its L0, FVU, cosine, dead and dense are means over layers, which count alike. Position 0 of a document is
neither measured nor replaced, and the predictions are those of the positions behind it.

Documents are the unit of replication: intervals are percentiles over resamples of whole documents (of ``dense``, of
runs of documents), the same resamples for everything, so that differences are paired. ``dead`` has no interval: a
resample leaves documents out and can only find more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from analyses.features.documents import Documents, document_batches, token_rows
from analyses.features.metrics import METRICS, Metrics, Resampling, difference_rows, layer_rows
from analyses.features.reconstructors import OfDictionary, Reconstructor, nulls
from analyses.features.replacement import activations
from analyses.features.sums import DocumentSums, document_sums
from analyses.result.model_identity import hash_of
from analyses.units.points import level_of
from analyses.units.terminal import table
from reflowlens.activations.moments import Moments
from reflowlens.dictionaries.belonging import check_belongs
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.storage.atomic import replacing

_COMPARED = ("l0", "fvu", "loss", "recovered_zero", "recovered_mean")  # of all metrics those shown as differences


@dataclass(frozen=True, eq=False)
class DictionaryEvaluation:
    """A dictionary and its nulls on held-out documents; :func:`evaluate_dictionary` makes one, and its module defines
    the metrics.

    Args:
        params: what was measured: the dictionary's and the model's names and hash, the number of ``documents``,
            ``positions`` and ``predictions``, ``model_loss`` with its interval, and the arguments.
        frames: ``layers``, a row a dictionary or null (column ``dictionary``) and layer (its block, or "all"), a column
            a metric with ``_low`` and ``_high``; ``differences``, a row a null or other dictionary, layer and
            ``metric``: its ``difference`` from the dictionary, ``low`` and ``high``.
    """

    params: Mapping[str, Any]
    frames: Mapping[str, pd.DataFrame]

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold: ``params``, and every frame as a list of rows, None for what is not a number."""
        frames = {name: json.loads(frame.to_json(orient="records")) for name, frame in self.frames.items()}
        return {"params": dict(self.params), "frames": frames}

    def save(self, path: str | Path) -> Path:
        """Write the JSON of :meth:`to_json` to a file, whole or not at all.

        Raises:
            ReflowlensError: it cannot be written.
        """
        path = Path(path)
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ReflowlensError(f"cannot write {path}: {error.strerror}") from error
        return path

    def and_frame(self, name: str, frame: pd.DataFrame) -> DictionaryEvaluation:
        """The same with one more frame, such as `analyses.features.stability.seed_stability`'s."""
        return DictionaryEvaluation(self.params, {**self.frames, name: frame})

    def together(self) -> pd.DataFrame:
        """The rows of all layers together, a row a dictionary or null, without the intervals."""
        layers = self.frames["layers"]
        return layers.loc[layers["layer"] == "all", ["dictionary", *METRICS]].reset_index(drop=True)

    def __str__(self) -> str:
        """Tables for a terminal: the dictionary layer by layer, everything together, and the differences in between."""
        layers, params = self.frames["layers"], self.params
        own = layers.loc[layers["dictionary"] == params["dictionary"], ["layer", *METRICS]]
        loss, low, high = params["model_loss"]
        lines = [
            f"{params['dictionary']} of {params['model']}: {params['documents']:,} documents, {params['positions']:,} "
            f"positions; the model's own loss is {loss:.4f} [{low:.4f}, {high:.4f}]",
            "",
            table(own),
            "",
            "all layers together, beside nulls at equal L0 (mean over layers; predictions with all layers replaced)",
            table(self.together()),
        ]
        differences = self.frames["differences"]
        shown = differences[(differences["layer"] == "all") & differences["metric"].isin(_COMPARED)]
        if len(shown):
            lines += ["", f"difference from {params['dictionary']}", table(shown.drop(columns="layer"))]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import table as html_table
        from reflowlens.notebook.html import titled

        together = self.together()
        rows = [tuple(row) for row in together.itertuples(index=False)]
        what = f"{self.params['dictionary']}: {self.params['documents']:,} documents, all layers together"
        return titled("DictionaryEvaluation", what, html_table(list(together.columns), rows))


@torch.no_grad()
def evaluate_dictionary(
    model: HookedModel,
    dictionary: Dictionary,
    held_out: Documents,
    training: Documents,
    *,
    against: Mapping[str, Dictionary | tuple[HookedModel, Dictionary]] | None = None,
    with_nulls: bool = True,
    layerwise: bool = True,
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
) -> DictionaryEvaluation:
    """Measure a dictionary on documents that it was not trained on, beside nulls at equal L0 and other dictionaries.

    Args:
        model: the one that the dictionary was trained on.
        held_out: documents to measure on, of any lengths: texts or arrays of tokens [token]; of each the first
            ``n_ctx`` tokens are read, and position 0 is left out.
        training: documents for the means, the principal components and the L0 at which nulls are compared.
        against: other dictionaries by name that write to the same hook points, such as those with a frozen decoder; of
            one of another model, such as the untrained one, that model too: it is measured on its own activations.
        with_nulls: also the nulls of `analyses.features.reconstructors`.
        layerwise: of nulls and other dictionaries too, the predictions with each layer replaced by itself; False leaves
            out these (NaN), which halves the time.
        batch_size: documents read at once, which memory grows with.
        resamples: of the documents, for the intervals.
        seed: of the resamples, and of the rotated basis.
        progress: show a bar, or lines where there is no terminal; by default only on a terminal.

    Raises:
        ReflowlensError: the dictionary is not one of this model, one of ``against`` writes elsewhere or has the name of
            another row, activations are not finite, or there are fewer than 2 documents of 3 tokens.

    Example: ``print(evaluate_dictionary(model, dictionary, held_out=texts, training=other_texts))``
    """
    model = check_belongs(dictionary, model)
    for point in (*dictionary.cfg.reads, *dictionary.cfg.writes):
        if not point.startswith("blocks."):
            raise ReflowlensError(f"{point!r} is in no block: dictionaries of blocks are evaluated")
    name = dictionary.cfg.name or "dictionary"
    show = sys.stderr.isatty() if progress is None else progress
    rows, others = token_rows(model, held_out), token_rows(model, training)
    moments, l0 = training_statistics(model, dictionary, others, batch_size)
    own: dict[str, Reconstructor] = {name: OfDictionary(dictionary)}
    own |= dict(nulls(model, dictionary.cfg.writes, moments, l0, seed)) if with_nulls else {}
    runs = [(model, own, moments)]
    for key, other in (against or {}).items():
        its_model, it = other if isinstance(other, tuple) else (model, other)
        _check_comparable(key, it, its_model, name, dictionary, model)
        if any(key in known for _, known, _ in runs):
            raise ReflowlensError(f"{key!r} is already a row of the table: give the other dictionary another name")
        if its_model is model:
            own[key] = OfDictionary(it)
        else:
            runs.append((its_model, {key: OfDictionary(it)}, training_statistics(its_model, it, others, batch_size)[0]))
    resampling = Resampling(len(rows), resamples, seed)
    metrics: dict[str, Metrics] = {}
    every: list[DocumentSums] = []
    for its_model, these, its_moments in runs:
        means = [its_moments[point].mean.float() for point in dictionary.cfg.writes]
        sums = document_sums(
            its_model, these, rows, means, batch_size=batch_size, layerwise=None if layerwise else [name], progress=show
        )
        metrics |= {key: resampling.of(sums, key) for key in these}
        every.append(sums)
    blocks = [level_of(point) for point in dictionary.cfg.writes]
    nulls_and_others = {key: its for key, its in metrics.items() if key != name}
    frames = {
        "layers": pd.DataFrame([row for key, its in metrics.items() for row in layer_rows(key, blocks, its)]),
        "differences": pd.DataFrame(
            [row for key, its in nulls_and_others.items() for row in difference_rows(key, blocks, its, metrics[name])],
            columns=["dictionary", "layer", "metric", "difference", "low", "high"],
        ),
    }
    params = {
        "dictionary": name,
        "model": model.cfg.model_name or model.cfg.architecture,
        "model_hash": hash_of(model),
        "documents": len(rows),
        "positions": int(every[0].positions.sum()),
        "predictions": int(every[0].predictions.sum()),
        "model_loss": list(resampling.model_loss(every[0])),
        "training_documents": len(others),
        "resamples": resamples,
        "seed": seed,
    }
    return DictionaryEvaluation(params, frames)


@torch.no_grad()
def training_statistics(
    model: HookedModel, dictionary: Dictionary, rows: Sequence[Int[Tensor, " _token"]], batch_size: int
) -> tuple[dict[str, Moments], list[float]]:
    """Moments of what is written at each point, with the products of all pairs, and the L0 of each layer."""
    cfg = dictionary.cfg
    moments: dict[str, Moments] = {}
    active = torch.zeros(cfg.n_layers)
    for batch in document_batches(rows, batch_size):
        found = activations(model, batch, [*cfg.reads, *cfg.writes])
        for point in cfg.writes:
            part = Moments.of(batch.within(found[point]), pairs=True)
            moments[point] = moments[point].merge(part) if point in moments else part
        features = dictionary.encode([batch.within(found[point]) for point in cfg.reads])
        active += torch.tensor([float((of_layer != 0).sum()) for of_layer in features])
    return moments, (active / moments[cfg.writes[0]].n).tolist()


def _check_comparable(
    key: str, other: Dictionary, its_model: HookedModel, name: str, dictionary: Dictionary, model: HookedModel
) -> None:
    check_belongs(other, its_model)
    if other.cfg.writes != dictionary.cfg.writes:
        raise ReflowlensError(
            f"{key} writes to {', '.join(other.cfg.writes)} and {name} to {', '.join(dictionary.cfg.writes)}: "
            "dictionaries are compared at the same hook points"
        )
    if its_model.cfg.tokenizer_name != model.cfg.tokenizer_name:
        raise ReflowlensError(
            f"the model of {key} reads {its_model.cfg.tokenizer_name!r} tokens and that of {name} "
            f"{model.cfg.tokenizer_name!r}"
        )
