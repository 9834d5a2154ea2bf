"""The two tables of `baselines.md`, from the `comparison.csv` that each of its commands writes.

python -m docs.baseline_tables MODELS/comparison.csv VIEWS/comparison.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pandas as pd

# experiment, metric, what the row is called, and the control in brackets
ROWS = (
    ("recipe_atlas", "codebook_purity", "1: purity of codebooks", "rotated_basis"),
    ("sparsity_profile", "active_share", "2: share of active signals", "gaussian"),
    ("semantic_galaxy", "knn_accuracy", "4: neighbours share a category", "label_permutation"),
    ("semantic_algebra", "accuracy_at_1", "5: analogies answered", "c_alone"),
    ("typo_resilience", "final_cosine_readout", "6: a misspelling is like its word at the end", "unrelated_word"),
    ("layer_evolution", "crystallisation_share", "7: decided at this share of the depth", "untrained"),
    ("layer_evolution", "crystallisation_delay", "7: later behind a clause", "shuffled_clause"),
    ("signal_flow", "leading_share", "8: ten signals' share of the positive contributions", "rotated_basis"),
    ("signal_flow", "neighbour_overlap", "8: leading signals that stay from block to block", "rotated_basis"),
    ("causal_ablation", "remaining_after_one", "9: probability left without the first signal", "rotated_basis"),
    ("emotion_surgery", "best_flip_rate", "10: carriers turned at little cost", "shuffled_labels"),
    ("concept_inception", "closed_share", "11: words that can come too late", "random_recipe"),
    ("genetic_hijack", "log_odds_shift", "12: log odds of the next word, nats", "random_direction"),
    ("genetic_hijack", "sentiment_shift", "12: sentiment of what is written", "random_direction"),
)
OF_VIEWS = ("codebook_purity", "accuracy_at_1", "leading_share", "remaining_after_one")
CALLED = {"shuffled_clause": "its words shuffled", "label_permutation": "permuted labels", "gaussian": "Gaussian"}


def native_table(table: pd.DataFrame) -> list[str]:
    """A row a metric, a column a model through its own view: value, interval, and the control that decides first."""
    own = table[table["view"].isin(["", "native"])]
    models = list(own["model"].unique())
    lines = [f"| native view | {' | '.join(models)} |", f"|{'---|' * (1 + len(models))}"]
    for experiment, metric, called, control in ROWS:
        part = own[(own["experiment"] == experiment) & (own["metric"] == metric)]
        cells = [_cell(part[part["model"] == model], control, interval=True) for model in models]
        shown = CALLED.get(control, control.replace("_", " "))
        lines.append(f"| {called} [{shown}] | {' | '.join(cells)} |")
    return lines


def view_table(table: pd.DataFrame) -> list[str]:
    """A row a metric and view, a column a model: value, and the rotated basis of that view."""
    models, views = list(table["model"].unique()), [view for view in table["view"].unique() if view]
    lines = [f"| | view | {' | '.join(models)} |", f"|{'---|' * (2 + len(models))}"]
    for _, metric, called, _ in (row for row in ROWS if row[1] in OF_VIEWS):
        for view in views:
            part = table[(table["metric"] == metric) & (table["view"] == view)]
            cells = [_cell(part[part["model"] == model], "rotated_basis", interval=False) for model in models]
            lines.append(f"| {called if view == views[0] else ''} | {view} | {' | '.join(cells)} |")
    return lines


def _cell(rows: pd.DataFrame, control: str, *, interval: bool) -> str:
    """``**value (low–high)** [control]``, bold where the claim is supported; empty without a row."""
    if rows.empty:
        return ""
    first, beside = rows.iloc[0], rows.loc[rows["control"] == control, "control_value"]
    text = _number(first["value"])
    if interval and pd.notna(first["low"]):
        text += f" ({_number(first['low'])}–{_number(first['high'])})"
    text = f"**{text}**" if first["verdict"] == "supported" else text
    return text + (f" [{_number(beside.iloc[0])}]" if len(beside) else "")


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def main(paths: Sequence[str]) -> None:
    """Print both tables, and how much of the untrained column is supported."""
    models, views = (pd.read_csv(path, keep_default_na=True) for path in paths)
    both = pd.concat([models, views], ignore_index=True)
    both = both.fillna({"view": "", "verdict": "", "control": ""})
    places = ["model", "view", "experiment", "metric"]
    fresh = both[(both["model"] == "untrained") & (both["verdict"] != "")].drop_duplicates(places)
    supported = fresh[fresh["verdict"] == "supported"]
    print("\n".join([*native_table(both), "", *view_table(both[both["view"] != ""]), ""]))
    print(f"untrained: {len(supported)} of {len(fresh)} verdicts in favour")
    for row in supported.to_dict("records"):
        print(f"  {row['experiment']} {row['metric']}, view {row['view'] or 'native'}: {row['value']:.4g}")


if __name__ == "__main__":
    main(sys.argv[1:])
