"""Frames and figures of the Recipe Atlas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.controls.bases import Bases, as_one_basis
from analyses.experiments.recipe_atlas.pairs import Pairs, label_cosines, share_label, top_pairs
from analyses.experiments.recipe_atlas.purity import POLES, Codebooks
from analyses.measures.neighbors import cosine_neighbors
from analyses.words.tokens import LabelledWords
from reflowlens.figures.builders import bars, histogram_with_control
from reflowlens.figures.heatmap import heatmap
from reflowlens.signals import SignalView

PURITY_CONTROLS = ("shuffled_recipe", "rotated_basis")


def neighbor_frame(
    view: SignalView,
    words: LabelledWords,
    probes: Mapping[str, int],
    candidates: Sequence[int],
    k: int,
    *,
    with_embedding: bool,
) -> pd.DataFrame:
    """A row a probe, space and neighbour: the k candidates nearest to each probe, by cosine, in R and in E."""
    category = dict(zip(words.ids.tolist(), words.category_of, strict=True))
    tokens = torch.tensor(list(probes.values()), device=view.recipe.device)
    allowed = torch.as_tensor(candidates, device=view.recipe.device)
    frames = []
    for space in ("R", "E") if with_embedding else ("R",):
        rows = view.recipe if space == "R" else view.embedding
        found = cosine_neighbors(rows[tokens], rows, k, candidates=allowed, exclude=tokens[:, None])
        near = found.ids.flatten().tolist()
        frames.append(
            pd.DataFrame(
                {
                    "probe": np.repeat(list(probes), k),
                    "probe_category": np.repeat([category.get(token, "") for token in probes.values()], k),
                    "space": space,
                    "rank": np.tile(np.arange(1, k + 1), len(probes)),
                    "neighbor": [text.strip(" ") for text in view.model.tokenizer.to_str_tokens(near)],
                    "category": [category.get(token, "") for token in near],
                    "cosine": found.cosines.flatten().cpu().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def pair_frame(words: LabelledWords, pairs: Mapping[str, Pairs], texts: Mapping[str, list[str]]) -> pd.DataFrame:
    """A row a space and pair. ``texts``: the words of a space whose words are not the lexicon's, in the same order."""
    frames = []
    for space, found in pairs.items():
        named = texts.get(space, words.words)
        frames.append(
            pd.DataFrame(
                {
                    "space": space,
                    "rank": range(1, len(found.cosines) + 1),
                    "pair": [f"{named[a]} – {named[b]}" for a, b in zip(found.first, found.second, strict=True)],
                    "category": [words.category_of[a] for a in found.first],
                    "other_category": [words.category_of[b] for b in found.second],
                    "valid": share_label(found, words.labels),
                    "cosine": found.cosines,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def similarity_frame(rows: Float[Tensor, "word S"], words: LabelledWords) -> pd.DataFrame:
    """A row a pair of categories: the mean cosine between their different words."""
    cosines = label_cosines(rows, words.labels)
    n = len(words.categories)
    return pd.DataFrame(
        {
            "category": np.repeat(words.categories, n),
            "other": np.tile(words.categories, n),
            "cosine": cosines.ravel(),
        }
    )


def codebook_frame(words: LabelledWords, codebooks: Codebooks) -> pd.DataFrame:
    """A row a signal and end, the purest first; without an entropy where too few words have an entry of the sign."""
    frames = []
    for pole, sign in enumerate(POLES):
        labels = words.labels[codebooks.words[pole]]
        commonest = [int(np.bincount(row).argmax()) for row in labels]
        frames.append(
            pd.DataFrame(
                {
                    "signal": range(len(labels)),
                    "sign": sign,
                    "purity": codebooks.purity[pole],
                    "entropy": codebooks.entropy[pole],
                    "category": [words.categories[label] for label in commonest],
                    "share": [(row == label).mean() for row, label in zip(labels, commonest, strict=True)],
                    "words": [" ".join(words.words[i] for i in row) for row in codebooks.words[pole]],
                }
            )
        )
    return pd.concat(frames).sort_values("purity", ascending=False, kind="stable", ignore_index=True)


def purity_frame(codebooks: Bases[Codebooks]) -> pd.DataFrame:
    """A row a basis and signal; all rotations are one basis."""
    frames = []
    for basis, each in codebooks.named("trained").items():
        purity = each.signal_purity()
        frames.append(pd.DataFrame({"basis": basis, "signal": range(len(purity)), "purity": purity}))
    return as_one_basis(pd.concat(frames, ignore_index=True))


def random_band(rows: Float[Tensor, "word S"]) -> tuple[float, float]:
    """Between which the cosines of 95% of the pairs of some rows lie."""
    cosines = top_pairs(rows, len(rows) * (len(rows) - 1) // 2).cosines
    low, high = np.quantile(cosines, [0.025, 0.975])
    return float(low), float(high)


def atlas_figures(frames: Mapping[str, pd.DataFrame], band: tuple[float, float]) -> dict[str, go.Figure]:
    """``neighbors``, ``pairs``, ``similarity`` and ``purity``.

    Args:
        band: of the cosines of frequency-matched random words, shaded behind the pairs.
    """
    purity = frames["purity"].dropna(subset=["purity"])
    neighbors = frames["neighbors"].query("space == 'R'")
    best = frames["pairs"].query("space == 'R'")
    best = best.assign(words=np.where(best["valid"], "of one category", "of different categories"))
    pairs = bars(
        best,
        "pair",
        "cosine",
        color="words",
        horizontal=True,
        hover=["category", "other_category"],
        title="Words with the most similar recipes",
        x_title="pair",
    )
    pairs.add_vrect(
        *band,
        fillcolor="#8C8C8C",
        opacity=0.25,
        line_width=0,
        layer="below",
        name="95% of random pairs as frequent",
        showlegend=True,
    )
    pairs.update_layout(barmode="overlay")
    return {
        "neighbors": heatmap(
            neighbors.iloc[::-1].sort_values("rank", kind="stable"),
            "rank",
            "probe",
            "cosine",
            text="neighbor",
            hover=["probe_category", "category"],
            title="Nearest words by the cosine of their recipes",
        ),
        "pairs": pairs,
        "similarity": heatmap(
            frames["similarity"],
            "category",
            "other",
            "cosine",
            title="Mean cosine between the recipes of two categories",
        ).update_layout(height=680, meta={"min_width": 700}),
        "purity": histogram_with_control(
            purity[purity["basis"].isin(["trained", *PURITY_CONTROLS, "varimax"])],
            "purity",
            "basis",
            controls=PURITY_CONTROLS,
            bins=24,
            title="How pure the codebooks of signals are",
        ),
    }
