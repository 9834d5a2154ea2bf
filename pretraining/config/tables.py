"""The tables of a run's configuration, each a frozen dataclass: ``[data]``, ``[optimizer]`` and ``[run]``."""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class DataConfig:
    """``[data]``: a folder made by ``reflowlens prepare``, and how many tokens a training example has."""

    folder: str
    context: int


@dataclass(frozen=True)
class OptimizerConfig:
    """``[optimizer]``.

    Args:
        name: of the blocks' matrices: ``adamw`` or ``muon``.
        rest: of everything else: ``adamw``; ``sgd``, with momentum ``beta1`` and without weight decay; ``adam_rows``,
            AdamW whose scale all coordinates of a token's row share, and all entries of anything else (the basis, a
            norm's weight); or ``muon`` for tables and basis, with AdamW for vectors. Which of them single out no axis:
            :mod:`pretraining.optimizers`.
        freeze_norms: leave the norms' weights as the run finds them: at one, or as ``run.start_from`` has them. Where
            they are not one number a norm, each scales an axis of the stream by itself, whatever trains them.
        learning_rate: the peak rate of what Muon does not update.
        embedding_learning_rate: that of the tables at both ends (embedding, recipe, pairs and values of tokens); 0: the
            same as of the rest of their optimiser.
        matrix_learning_rate: Muon's peak rate, the spectral norm of a step on a square matrix.
        matrix_scale: which other matrices take larger steps under Muon, by the square root of their sides' ratio:
            ``widening``, those with more outputs than inputs, as published (Jordan et al., 2024); or ``narrowing``,
            those with fewer, as the packaged models were trained.
        matrix_dtype: in which Muon orthogonalises: ``bfloat16``, as published, or ``float32``, which rounds too little
            to single out an axis, and is faster where the processor only imitates bfloat16.
        matrix_momentum: Muon's momentum, reached from ``matrix_momentum_start`` over ``matrix_momentum_steps`` steps.
        weight_decay: decoupled, on the blocks' matrices and the signal basis.
        decay_all: on everything else too.
        grad_clip: largest norm of the whole gradient; ``inf`` never clips.
        schedule: after a linear warm-up ``constant``, ``cosine`` down to ``final_fraction`` of the peak, or ``wsd``,
            constant and then linear down to it over the last ``decay_fraction`` of the steps.
        average: decay of an exponential moving average of the weights, which validation losses are then of; it is
            written beside each checkpoint's own weights, in its folder ``average``. 0: none is kept.
    """

    name: str = "adamw"
    rest: str = "adamw"
    freeze_norms: bool = False
    learning_rate: float = 6e-4
    embedding_learning_rate: float = 0.0
    matrix_learning_rate: float = 0.01
    matrix_scale: str = "narrowing"
    matrix_dtype: str = "bfloat16"
    matrix_momentum: float = 0.95
    matrix_momentum_start: float = 0.95
    matrix_momentum_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    decay_all: bool = False
    grad_clip: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    average: float = 0.0


@dataclass(frozen=True)
class RunConfig:
    """``[run]``.

    Args:
        steps: optimiser steps; tokens seen are ``steps * batch_size * context``.
        batch_size: examples a step, over all processes and accumulation steps.
        accumulation: forward passes a step.
        dtype: ``bfloat16`` runs matrix products under autocast; weights and optimiser stay float32. ``auto``: bfloat16
            where the processor has instructions for it, otherwise float32 (:func:`pretraining.machine.decided`).
        compile: run the model through ``torch.compile``. ``auto``: if the run is long enough to make up for it.
        sharding: what several processes share out: ``none``, ``zero1`` (optimiser state) or ``fsdp`` (optimiser state,
            gradients and weights); see :mod:`pretraining.replicas`. Checkpoints are the same whatever it is.
        topk_anneal_fraction: share of the steps over which a ``reflow_topk`` keeps more signals than ``model.topk``:
            all of them at first, half as many after each of equal stages (:mod:`pretraining.annealing`). Evaluations
            and checkpoints are of the model that keeps ``model.topk``.
        eval_tokens: validation tokens of an intermediate evaluation; the last one reads all of them.
        start_from: a checkpoint or a run's folder whose weights the first step finds, instead of fresh ones; ``{seed}``
            in it stands for ``seed``. Optimisers and schedule begin anew. Checkpoints record the step and the hash of
            what was found; of a run that is not at its end the checkpoint is to be named.
        start_rotation: turn what such weights are written in by a random rotation that leaves every logit as it is:
            ``signals``, the gauge of recipe and basis; or ``stream``, the axes of the residual stream
            (:mod:`reflowlens.rotations`). ``none``: as they are.
    """

    out: str
    steps: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    dtype: str = AUTO
    compile: bool | str = AUTO
    eval_interval: int = 500
    eval_tokens: int = 131_072
    checkpoint_interval: int = 500
    keep_checkpoints: int = 2
    wandb_project: str = ""
    sharding: str = "none"
    topk_anneal_fraction: float = 0.0
    start_from: str = ""
    start_rotation: str = "none"
