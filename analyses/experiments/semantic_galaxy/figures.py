"""Frames and figures of the Semantic Galaxy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from sklearn.manifold import TSNE

from analyses.experiments.semantic_galaxy.measure import COMPONENTS, Galaxy, LabelNull
from analyses.statistics.intervals import bootstrap_band
from analyses.statistics.pvalues import holm, permutation_pvalue
from analyses.words.tokens import LabelledWords
from reflowlens.figures.builders import bars, histogram_with_control
from reflowlens.figures.scatter import scatter
from reflowlens.signals import SignalView

TOP_SIGNALS = 5


def word_frame(view: SignalView, words: LabelledWords, galaxy: Galaxy, method: str, seed: int) -> pd.DataFrame:
    """A row a word: its coordinates (of t-SNE too, if that is the ``method``), silhouettes and strongest signals."""
    recipes = view.recipe[words.ids].float().cpu()
    largest = recipes.abs().topk(min(TOP_SIGNALS, recipes.shape[1]), dim=1).indices
    signs = [["+" if value > 0 else "−" for value in row] for row in recipes.gather(1, largest).tolist()]
    frame = pd.DataFrame(
        {
            "word": words.words,
            "category": words.category_of,
            **{f"pc{i + 1}": galaxy.components[:, i] for i in range(COMPONENTS)},
            **galaxy.silhouettes,
            "nearest": [words.words[i] for i in galaxy.neighbors[:, 0]],
            "own_category": galaxy.hits,
            "signals": [
                " ".join(f"{sign}{signal}" for sign, signal in zip(*pair, strict=True))
                for pair in zip(signs, largest.tolist(), strict=True)
            ],
        }
    )
    if method == "tsne":
        perplexity = min(30.0, (len(frame) - 1) / 3)
        embedded = TSNE(2, metric="cosine", init="pca", perplexity=perplexity, random_state=seed).fit_transform(
            recipes.numpy()
        )
        frame = frame.assign(tsne1=embedded[:, 0], tsne2=embedded[:, 1])
    return frame


def category_frame(words: LabelledWords, galaxy: Galaxy, null: LabelNull, seed: int) -> pd.DataFrame:
    """A row a category, the tightest first."""
    rows = []
    for label, category in enumerate(words.categories):
        own = words.labels == label
        values = galaxy.silhouettes["silhouette"][own]
        low, high = bootstrap_band(values, seed=seed)
        rows.append(
            {
                "category": category,
                "words": int(own.sum()),
                "silhouette": values.mean(),
                "low": float(low),
                "high": float(high),
                "permuted_labels": null.by_category[:, label].mean(),
                "knn_accuracy": galaxy.hits[own].mean(),
                "p": permutation_pvalue(values.mean(), null.by_category[:, label]),
            }
        )
    frame = pd.DataFrame(rows).assign(p_holm=lambda frame: holm(frame["p"]))
    return frame.sort_values("silhouette", ascending=False, kind="stable", ignore_index=True)


def galaxy_figures(frames: Mapping[str, pd.DataFrame], found: Mapping[str, float], method: str) -> dict[str, go.Figure]:
    """``galaxy``, ``galaxy_3d``, ``categories`` and ``null``; ``found`` are the metrics."""
    hover = ["word", "category", "nearest", "signals"]
    x, y = ("tsne1", "tsne2") if method == "tsne" else ("pc1", "pc2")
    categories = frames["categories"].melt(
        id_vars=["category", "words", "knn_accuracy", "p_holm"],
        value_vars=["silhouette", "permuted_labels"],
        var_name="labels",
        value_name="mean",
    )
    spread = frames["categories"].set_index("category")
    measured = categories["labels"] == "silhouette"
    for end in ("low", "high"):
        categories[end] = np.where(measured, categories["category"].map(spread[end]), categories["mean"])
    null = frames["permutations"]["silhouette"]
    both = pd.DataFrame({"silhouette": null, "labels": "permuted labels"})
    figure = histogram_with_control(
        both,
        "silhouette",
        "labels",
        controls=("permuted labels",),
        title="Silhouette of the categories against permuted categories",
        x_title="mean silhouette",
    )
    figure.add_vline(found["silhouette"], line_width=2, annotation_text="measured", annotation_position="top left")
    ends = min(null.min(), found["silhouette"]), max(null.max(), found["silhouette"])
    margin = 0.05 * (ends[1] - ends[0])
    figure.update_xaxes(range=[ends[0] - margin, ends[1] + margin])  # plotly's own range ends at the line
    return {
        "galaxy": scatter(frames["words"], x, y, "category", hover=hover, title="The lexicon's words by their recipes"),
        "galaxy_3d": scatter(
            frames["words"],
            "pc1",
            "pc2",
            "category",
            "pc3",
            hover=hover,
            title="The same along three principal components",
        ),
        "categories": bars(
            categories.replace({"labels": {"silhouette": "categories", "permuted_labels": "permuted labels"}}),
            "category",
            "mean",
            "low",
            "high",
            "labels",
            controls=("permuted labels",),
            horizontal=True,
            hover=["words", "knn_accuracy", "p_holm"],
            title="Silhouette of each category",
            y_title="mean silhouette",
        ),
        "null": figure,
    }
