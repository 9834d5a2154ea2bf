"""Refinement: what a model's two refiners do, and whether they help each other.

Two questions that are easily taken for one. Whether two refiners *trained together* depend on each other is seen in one
model, by switching each off (`gates`): it measures how far they have adapted to each other. Whether a model gains more
from both than from each *alone* is seen only in models trained with and without, over several seeds (`retrained`): one
run a cell cannot tell an interaction from the spread between runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analyses.experiments.refinement.figures import refinement_figures
from analyses.experiments.refinement.findings import DEFINITIONS, Found
from analyses.experiments.refinement.gains import gain_frame
from analyses.experiments.refinement.gates import CELLS, cells_of, effects, gate_losses, refiners_of
from analyses.experiments.refinement.inner import (
    AS_IS,
    NO_LEARNING,
    PREVIOUS,
    inner_curves,
    inner_frame,
    learned,
    learning_losses,
)
from analyses.experiments.refinement.logits import logit_frame, step_losses
from analyses.experiments.refinement.planted import planted_frame
from analyses.experiments.refinement.retrained import (
    AS_TRAINED,
    PUBLISHED,
    PUBLISHED_INTERACTION,
    READING,
    design_losses,
    effect_frame,
    in_words,
    packed_name,
    read_grid,
    run_frame,
    weighted,
)
from analyses.experiments.refinement.texts import Losses, read_texts
from analyses.experiments.refinement.untying import untying_frame, untying_losses
from analyses.experiments.refinement.velocity import velocity_frames, visited
from analyses.result.model_identity import hash_of
from analyses.result.result import Result
from analyses.statistics.draws import derive_seed
from analyses.words.lexicon import Lexicon, load_lexicon
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel


@torch.no_grad()
def refinement(
    model: HookedModel,
    texts: Sequence[str | Sequence[int]] | None = None,
    *,
    grid: str | Path | None = None,
    bits: int = 6,
    lexicon: Lexicon | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Result:
    """Whether two refiners help each other, and what each does.

    `texts`: documents that the model was not trained on, text or token ids, each read from its beginning as far as the
    model reads; default the lexicon's neutral texts. `grid`: a folder of models trained with each refiner, both and
    neither over seeds (`read_grid`). `bits`: of the packed copies, on which losses are measured too. `quick`: the first
    quarter of the texts, at least two.

    Returns a Result with frames

    - `gates`: loss by which gates are open, and by weights (as trained, packed); `effects`: what these say;
    - `retrained`, `retrained_effects`: the same of the grid's models, beside `published`;
    - `inner`: the inner learner's losses and steps by head and mini-batch, with its controls; `learning`: the model's
      loss in them; `planted`: the same on texts where there is something to learn, and where there is nothing;
    - `logits`: what each refiner adds to the logits before the cap;
    - `steps`: loss by the flow's step; `untying`: what parts of the flow gain; `velocity`, `directions`, `jacobian`:
      the velocity as a field (`velocity_frames`);
    - `gains`: by position in the text, whether the token to predict occurred before, and its frequency (`gain_frame`).

    Raises ReflowlensError for a model without refiners, fewer than two texts, or a grid without two whole seeds.

    Example: `refinement(model, documents, grid="out/ttt_flow_micro_grid").frames["retrained_effects"]`
    """
    ttt, flow = refiners_of(model)
    if ttt is None and flow is None:
        raise ReflowlensError(
            f"{model.cfg.model_name or model.cfg.architecture} has no refiners: a ttt_flow model with TTT or flow was "
            "expected"
        )
    documents = list(texts) if texts is not None else list((lexicon or load_lexicon()).neutral_texts)
    documents = documents[: max(2, len(documents) // 4)] if quick else documents
    read = read_texts(model, documents)
    own = derive_seed(seed, "refinement")
    found = Found(read, seed)
    frames: dict[str, pd.DataFrame] = {}
    notes: list[str] = []

    gates = {weights: gate_losses(each, read) for weights, each in weighted(model, bits).items()}
    frames["gates"] = found.frame(gates, "cell")
    if len(gates[AS_TRAINED]) == len(CELLS):
        of_both = {weights: effects(cells) for weights, cells in gates.items()}
        frames["effects"] = found.frame(of_both, "effect")
        found.add_gates(of_both, packed_name(bits))
    else:
        notes.append("the model has one refiner: two are needed to ask whether they help each other")

    whole = gates[AS_TRAINED][cells_of(model)[-1]]
    gains = {name: loss - whole for name, loss in _switched_off(gates[AS_TRAINED])}
    if ttt is not None:
        learning = learning_losses(model, read)
        frames["learning"] = found.frame({AS_TRAINED: learning}, "control")
        gains["learning"] = learning[NO_LEARNING] - learning[AS_IS]
        gains[PREVIOUS] = learning[NO_LEARNING] - learning[PREVIOUS]
        found.add_learning(learning)
        frames["planted"] = planted_frame(model, own)
        found.add_planted(frames["planted"])
        curves = inner_curves(model, read, own)
        frames["inner"] = inner_frame(curves)
        of_texts = {name: learned(each) for name, each in curves.items()}
        if len(of_texts[AS_IS]["generalisation"]):
            found.add_inner(of_texts)
        else:
            del frames["inner"]
            notes.append(f"no text has three mini-batches of {ttt.chunk} tokens: inner learning is not shown")
    frames["gains"] = gain_frame(gains, whole, read, ttt.chunk if ttt is not None else 16, seed)
    frames["logits"] = logit_frame(model, read)
    if flow is not None:
        frames["steps"] = found.add_steps(step_losses(model, read))
        frames |= velocity_frames(model, read, own)
        frames["untying"] = untying_frame(untying_losses(model, read, visited(model, read), own), read, seed)
        found.add_velocity(frames["velocity"])
        found.add_untying(frames["untying"])
    if grid is not None:
        checkpoints, left_out = read_grid(grid)
        held_out, sums = design_losses(checkpoints, documents, bits, progress)
        frames["retrained"] = run_frame(checkpoints, sums, held_out)
        frames["retrained_effects"] = effect_frame(sums, held_out, seed)
        frames["published"] = pd.DataFrame({"cell": list(PUBLISHED), "bits_per_byte": list(PUBLISHED.values())})
        judged = found.add_retrained(frames["retrained_effects"], packed_name(bits))
        notes += [*left_out, in_words(judged), READING]
    params: dict[str, Any] = {"texts": len(read.tokens), "tokens": int(read.lengths.sum()), "bits": bits}
    params |= {"grid": None if grid is None else str(grid), "seed": seed, "quick": quick, "model_hash": hash_of(model)}
    return Result(
        name="refinement",
        title="Refinement",
        params=params,
        findings=found.findings,
        frames=frames,
        figures=refinement_figures(frames),
        definitions=DEFINITIONS,
        published={"retrained_interaction": PUBLISHED_INTERACTION},
        notes=notes,
    )


def _switched_off(cells: Mapping[str, Losses]) -> Iterable[tuple[str, Losses]]:
    """Losses without a refiner, by its name, and without any, as "both" where there are two."""
    if len(cells) < len(CELLS):
        return [(next(cell for cell in cells if cell != "none"), cells["none"])]
    return [("ttt", cells["flow"]), ("flow", cells["ttt"]), ("both", cells["none"])]
