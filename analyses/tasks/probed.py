"""Places of prompts that have a label, and the activations there: what probes are fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.statistics.draws import derive_rng
from reflowlens.activations.stream import Occurrences, measured
from reflowlens.errors import ReflowlensError
from reflowlens.interventions.passes import is_intervened
from reflowlens.models.base import HookedModel
from reflowlens.progress import bar
from reflowlens.prompts import At, Prompts
from reflowlens.scoring.batches import by_length

_FEW_TYPES = 10  # of tokens: with fewer, a random label for each would be next to none


@dataclass(frozen=True, eq=False)
class Places:
    """The n places that a probe reads.

    Args:
        ids: the tokens of each prompt.
        prompt, position: where each place is.
        label: what a probe is to tell, of ``classes``.
        group: numbers of what is held out together.
        kind: numbers of what a control task gives one label: the token at the place, or the group.
        kind_name: which of the two.
    """

    ids: Sequence[Sequence[int]]
    prompt: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    classes: Sequence[str]
    group: Int[np.ndarray, " n"]
    kind: Int[np.ndarray, " n"]
    kind_name: str

    @classmethod
    def of(
        cls, model: HookedModel, prompts: Prompts, label: str, at: At, together: str | None, most: int, seed: int
    ) -> Places:
        """The places of some prompts; arguments as for :func:`analyses.tasks.probes.linear_probes`.

        Raises:
            ReflowlensError: as for `linear_probes`.
        """
        tokens, lengths = model.tokens_and_lengths(prompts.clean)
        ids = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
        found = _labelled(model, prompts, label, at, lengths)
        frame = pd.DataFrame(found, columns=["prompt", "position", "label"])
        if len(frame) > most:
            chosen = derive_rng(seed, "probe_places").choice(len(frame), most, replace=False)
            frame = frame.iloc[np.sort(chosen)]
        classes, numbers = np.unique(frame["label"].astype(str), return_inverse=True)
        if len(classes) < 2:
            raise ReflowlensError(f"a probe tells labels apart, and {label!r} has one: {', '.join(classes) or 'none'}")
        prompt, position = frame["prompt"].to_numpy(), frame["position"].to_numpy()
        same = prompts.clean if together is None else [str(value) for value in prompts.column(together)]
        group = np.unique(np.array(same, dtype=object)[prompt].astype(str), return_inverse=True)[1]
        token = np.array([ids[i][j] for i, j in zip(prompt, position, strict=True)])
        of_tokens = np.unique(token, return_inverse=True)[1]
        has_types = of_tokens.max() + 1 >= _FEW_TYPES
        kind, kind_name = (of_tokens, "token") if has_types else (group, "group")
        return cls(ids, prompt, position, numbers, classes.tolist(), group, kind, kind_name)

    def __len__(self) -> int:
        return len(self.prompt)

    def control_labels(self, seed: int) -> NDArray[np.int64]:
        """Labels of a control task (Hewitt and Liang, 2019): each kind has one, drawn as the labels are distributed.

        What a probe can learn of them is what it can learn by heart.
        """
        rng, n = derive_rng(seed, "control_task"), int(self.kind.max()) + 1
        drawn = rng.choice(self.label, size=n)
        if len(np.unique(drawn)) < 2:  # of few kinds: any two of them differ
            drawn[0] = rng.choice(self.label[self.label != drawn[0]])
        return drawn[self.kind]

    def frame(self, model: HookedModel, fold: NDArray[np.int64]) -> pd.DataFrame:
        """A row a place: ``prompt``, ``position``, ``token``, ``label``, ``group`` and ``fold``."""
        strings = [model.to_single_str_token(self.ids[i][j]) for i, j in zip(self.prompt, self.position, strict=True)]
        return pd.DataFrame(
            {
                "prompt": self.prompt,
                "position": self.position,
                "token": strings,
                "label": [self.classes[i] for i in self.label],
                "group": self.group,
                "fold": fold,
            }
        )


def activations_at(
    model: HookedModel, places: Places, points: Sequence[str], *, progress: bool, desc: str
) -> dict[str, Float[np.ndarray, "n feature"]]:
    """Activations of some hook points at the places, in float32: prompts are streamed, and nothing else is kept."""
    kept: dict[str, Float[np.ndarray, "n feature"]] = {}
    of_prompt: dict[int, list[int]] = {}
    for number, prompt in enumerate(places.prompt.tolist()):
        of_prompt.setdefault(prompt, []).append(number)
    prompts = list(of_prompt)

    def run(chosen: list[int]) -> None:
        rows = [places.ids[prompts[i]] for i in chosen]
        number = torch.full((len(rows), max(map(len, rows))), -1)
        for row, i in enumerate(chosen):
            numbers = of_prompt[prompts[i]]
            number[row, places.position[numbers]] = torch.tensor(numbers)

        def keep(name: str, x: Float[Tensor, "place *feature"], occurrences: Occurrences) -> None:
            own = number[occurrences.row.cpu(), occurrences.position.cpu()]
            asked = own >= 0
            found = x[asked.to(x.device)].flatten(1).float().cpu().numpy()
            if name not in kept:
                kept[name] = np.empty((len(places), found.shape[1]), np.float32)
            kept[name][own[asked].numpy()] = found

        for _ in measured(model, [rows], points, keep):
            pass

    lengths = [len(places.ids[prompt]) for prompt in prompts]
    device = next(model.parameters()).device
    with bar(show=progress, total=len(prompts), unit="prompt", desc=desc) as shown:
        for chosen, _ in by_length(lengths, run, device, alike=is_intervened(model)):
            shown.update(len(chosen))
    for name, x in kept.items():
        if not np.isfinite(x).all():
            raise ReflowlensError(f"{name!r} holds NaN or infinite values")
    return kept


def _labelled(
    model: HookedModel, prompts: Prompts, label: str, at: At, lengths: Sequence[int]
) -> list[tuple[int, int, Any]]:
    """Prompt, position and label of each place that has one."""
    labels = _whole(prompts.column(label))
    if not (isinstance(at, str) and at == "all"):
        positions = prompts.positions(model, at)
        return [(i, p, value) for i, (p, value) in enumerate(zip(positions, labels, strict=True)) if _is_label(value)]
    places = []
    for i, (value, n) in enumerate(zip(labels, lengths, strict=True)):
        several = isinstance(value, list | tuple | np.ndarray)
        if several and len(value) != n:
            raise ReflowlensError(f"row {i}, column {label!r}: {len(value)} labels are given for {n} tokens")
        each = _whole(list(value)) if several else [value] * n
        places += [(i, p, one) for p, one in enumerate(each) if _is_label(one)]
    return places


def _is_label(value: Any) -> bool:
    """Whether it is neither missing (None, NaN) nor empty."""
    return not pd.api.types.is_scalar(value) or not (pd.isna(value) or (isinstance(value, str) and value == ""))


def _whole(values: list[Any]) -> list[Any]:
    """Integers as such where pandas holds them as floats because one is missing: the label 1, not 1.0."""
    known = [value for value in values if _is_label(value)]
    if len(known) == len(values) or not all(isinstance(value, float) and value.is_integer() for value in known):
        return values
    return [int(value) if _is_label(value) else None for value in values]
