"""A student's objective: the next token, its teacher's distribution and its teacher's readout signals."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix

from pretraining.batches import batch_at
from pretraining.config import TrainConfig
from pretraining.distillation.config import DistillationConfig
from pretraining.distillation.losses import logit_losses
from pretraining.objective import Losses, Objective
from reflowlens.checkpoints import load_model
from reflowlens.errors import ReflowlensError
from reflowlens.models.base import HookedModel
from reflowlens.models.numerics import wide
from reflowlens.models.reflow import ReFlow
from reflowlens.models.residual import Readout
from reflowlens.signals import SignalView, random_rotation, rotate, signal_view
from reflowlens.storage.model_hash import model_hash

if TYPE_CHECKING:
    from pretraining.token_files import TokenStream


def objective_of(
    cfg: TrainConfig, tokens: TokenStream, device: torch.device | str = "cpu"
) -> tuple[TrainConfig, Objective]:
    """What a run minimises, and its configuration with the teacher's hash entered.

    Args:
        tokens: the training stream, on whose first batch the variances of the teacher's signals are measured.

    Raises:
        ReflowlensError: the teacher does not exist or is another than the hash says, reads another vocabulary or a
            shorter context, or has no signals, or not as many, or as wide, as the student is to share.
    """
    asked = cfg.distillation
    if asked is None or not asked.needs_teacher:
        return cfg, Objective()
    teacher = load_model(asked.teacher, device=device).requires_grad_(False)
    found = model_hash(teacher)
    if asked.hash not in ("", found):
        raise ReflowlensError(
            f"the teacher {asked.teacher!r} has the hash {found[:12]}..., but distillation.hash is {asked.hash[:12]}..."
        )
    check_teacher(cfg, asked, teacher)
    variances = None
    view = _teacher_view(cfg, asked, teacher)
    if asked.signals and view is not None:
        x, _ = batch_at(tokens, 0, cfg.run.batch_size, cfg.data.context, cfg.run.seed)
        variances = signal_variances(teacher, view.basis, x.to(teacher.cfg.device))
    with_hash = dataclasses.replace(asked, hash=found)
    return dataclasses.replace(cfg, distillation=with_hash), Distilled(with_hash, teacher, view, variances)


def check_teacher(cfg: TrainConfig, asked: DistillationConfig, teacher: HookedModel) -> None:
    """Raise unless a student of this configuration can learn from the teacher what is asked."""
    ours, theirs, name = cfg.model, teacher.cfg, f"the teacher {asked.teacher!r}"
    for field in ("tokenizer_name", "d_vocab"):
        if getattr(ours, field) != getattr(theirs, field):
            raise ReflowlensError(
                f"{name} has {field} {getattr(theirs, field)!r}, the student {getattr(ours, field)!r}: both need one "
                f"vocabulary; give model.{field}={getattr(theirs, field)}"
            )
    if theirs.n_ctx < cfg.data.context:
        raise ReflowlensError(
            f"{name} reads at most n_ctx={theirs.n_ctx} tokens, and data.context is {cfg.data.context}: give "
            f"data.context={theirs.n_ctx} or less"
        )
    if not asked.signals and not asked.shares_basis:
        return
    what = "distillation.signals" if asked.signals else f"distillation.basis={asked.basis!r}"
    for whose, config in ((name, theirs), ("the student", ours)):
        if not config.n_signals:
            raise ReflowlensError(
                f"{what} needs readout signals at both ends, and {whose} has none: {config.architecture!r} does not "
                "factor its embedding"
            )
    for field in ("n_signals", *(["d_model"] if asked.shares_basis else [])):
        if getattr(ours, field) != getattr(theirs, field):
            raise ReflowlensError(
                f"{what} needs as many at both ends: {name} has {field} {getattr(theirs, field)} and the student "
                f"{getattr(ours, field)}; give model.{field}={getattr(theirs, field)}"
            )


def _teacher_view(cfg: TrainConfig, asked: DistillationConfig, teacher: HookedModel) -> SignalView | None:
    """The teacher's signals as a student is to have them; None of a teacher that has none, of which none are asked."""
    if not isinstance(teacher.W_E, FactoredMatrix):
        return None
    view = signal_view(teacher)
    if asked.basis == "rotated":
        return rotate(view, random_rotation(view.n_signals, cfg.run.seed).T)
    return view


@torch.no_grad()
def signal_variances(
    teacher: HookedModel, basis: Float[Tensor, "S d_model"], tokens: Int[Tensor, "batch pos"], rows: int = 8
) -> Float[Tensor, " S"]:
    """The variance of each readout signal over all positions of some texts, which are read ``rows`` at a time."""
    read = [_signals(teacher, teacher.final_stream(part), basis) for part in tokens.split(rows)]
    return torch.cat(read).flatten(0, 1).double().var(dim=0, correction=0).to(basis.dtype)


def _signals(
    model: HookedModel, stream: Float[Tensor, "batch pos d_model"], basis: Float[Tensor, "S d_model"]
) -> Float[Tensor, "batch pos S"]:
    return wide(model.ln_final(stream) @ basis.T)


class Distilled(Objective):
    """The sum of a student's three losses, each times its weight (:class:`DistillationConfig`).

    Args:
        teacher: in evaluation mode, without gradients.
        view: its signals as the student is to have them.
        variances: of those signals; None where their loss has no weight.
    """

    def __init__(
        self,
        cfg: DistillationConfig,
        teacher: HookedModel,
        view: SignalView | None,
        variances: Float[Tensor, " S"] | None,
    ) -> None:
        self.cfg, self.teacher, self.view, self.variances = cfg, teacher, view, variances

    def prepare(self, model: HookedModel) -> None:
        """The teacher's basis and recipe where they are shared; frozen ones get no gradient and no step."""
        if not self.cfg.shares_basis or self.view is None:
            return
        embed = cast(ReFlow, model).embed
        with torch.no_grad():
            embed.W_basis.copy_(self.view.basis)
            if self.cfg.recipe != "own":
                embed.W_recipe.copy_(self.view.recipe)
                if not torch.equal(cast(ReFlow, model).effective_recipe(), self.view.recipe.to(embed.W_recipe)):
                    raise ReflowlensError(
                        f"distillation.recipe={self.cfg.recipe!r}: a {model.cfg.architecture!r} cannot have the recipe "
                        f"of this {self.teacher.cfg.architecture!r}, whose entries it would prune"
                    )
        embed.W_basis.requires_grad_(self.cfg.basis == "start")
        embed.W_recipe.requires_grad_(self.cfg.recipe != "frozen")

    def losses(self, model: HookedModel, x: Int[Tensor, "batch pos"], y: Int[Tensor, "batch pos"]) -> Losses:
        """``loss``, and its parts before they are weighted: ``loss_tokens``, ``loss_logits``, ``loss_signals``."""
        weights = self.cfg
        theirs, wanted = self._read_by_teacher(x)

        def read(ours: Readout) -> Losses:
            if theirs is None:
                loss = ours.loss(y)
                parts, total = {"loss_tokens": loss.detach()}, weights.tokens * loss
            else:
                found = logit_losses(
                    ours, theirs, y, tokens=weights.tokens, logits=weights.logits, temperature=weights.temperature
                )
                parts, total = {"loss_tokens": found.tokens, "loss_logits": found.logits}, found.total
            if wanted is not None and self.variances is not None:
                difference = wide(cast(ReFlow, model).signals_of(ours)) - wanted
                error = (difference.square() / self.variances).mean()
                parts, total = {**parts, "loss_signals": error.detach()}, total + weights.signals * error
            return {"loss": total, **parts}

        return cast(Losses, model(x, read))

    @torch.no_grad()
    def _read_by_teacher(
        self, x: Int[Tensor, "batch pos"]
    ) -> tuple[Readout | None, Float[Tensor, "batch pos S"] | None]:
        """Its readout and its signals, each where it is asked for."""
        if not self.cfg.logits and not self.cfg.signals:
            return None, None
        stream = self.teacher.final_stream(x)
        readout = self.teacher.read_final(stream) if self.cfg.logits else None
        wanted = _signals(self.teacher, stream, self.view.basis) if self.view and self.cfg.signals else None
        return readout, wanted
