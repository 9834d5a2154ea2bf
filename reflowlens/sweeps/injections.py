"""What directions added to the residual stream do from their layer on, for many at once.

Prompts are read once. An injection into layer l changes nothing before l, nor at earlier positions, so each of many
injections runs only its own positions through the blocks from l on (:mod:`reflowlens.sweeps.packed`); the numbers are
those of one whole pass with :func:`steer` each. Layer ``n_layers`` is the end: the stream that is unembedded.

Where a pass cannot start from a block (``Architecture.stages`` is ``"whole"``), each injection is a whole pass.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflowlens.errors import ReflowlensError
from reflowlens.interventions.values import Position, Steer
from reflowlens.models.base import HookedModel
from reflowlens.models.text import TextInput
from reflowlens.prompts import Prompts
from reflowlens.sweeps.packed import Packed, UnpatchedRun
from reflowlens.sweeps.reading import attached_points
from reflowlens.sweeps.suffixes import Layout

Where: TypeAlias = "Literal['last', 'all'] | str"
READ_LAST = "hook_refined"  # the stream that logits are read off where it is not the last residual stream
_AT_ONCE = 2**22  # entries of a [row, pos, d_model] block: 16 MB, of which a pass holds a few


class Injections:
    """Prompts read once, and the streams that they end in when directions are added on the way.

    Args:
        model: a hooked model to which nothing is attached.
        prompts: texts or tokens; of :class:`reflowlens.Prompts` the clean ones.
        where: the positions that a direction is added to: ``"last"``, each prompt's last; ``"all"``; a role of
            :class:`reflowlens.Prompts`, or the text of a token (``" film"``), from whose last occurrence on it is
            added.

    Raises:
        ReflowlensError: hooks are attached to the model, or a prompt lacks the token.

    Example:
        >>> import reflowlens as rl
        >>> runs = Injections(rl.load_model("reflow-nano"), ["The film was", "The food is"])
        >>> runs.final(3, torch.tensor([0, 0, 1]), torch.ones(3, 256)).shape
        torch.Size([3, 256])
    """

    def __init__(self, model: HookedModel, prompts: TextInput | Prompts, where: Where = "last") -> None:
        if attached_points(model):
            raise ReflowlensError(
                "directions are added to the model as it is: leave rl.intervene and remove hooks first"
            )
        self.model = model
        self._table = prompts if isinstance(prompts, Prompts) else None
        self.tokens, lengths = model.tokens_and_lengths(prompts.clean if isinstance(prompts, Prompts) else prompts)
        self.last = torch.tensor(lengths, device=self.tokens.device) - 1
        self.start = self._starts(where)
        self._unsteered = UnpatchedRun(model, self.tokens, stream_points(model) if model.stages == "whole" else ())
        self.streams = [self._stream(layer) for layer in self.layers]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def layers(self) -> range:
        """Where a direction can be added: the stream that each block reads, and the end."""
        return range(self.model.cfg.n_layers + 1)

    def unsteered(self, layer: int) -> Float[Tensor, "prompt d_model"]:
        """The stream at each prompt's last position as it is."""
        return self.streams[layer][torch.arange(len(self), device=self.last.device), self.last]

    def rms(self) -> Float[Tensor, "layer prompt"]:
        """Root mean square of the unsteered streams, the unit of strength."""
        return torch.stack([rms(self.unsteered(layer)) for layer in self.layers])

    def final(
        self, layer: int | Int[Tensor, " row"], prompt: Int[Tensor, " row"], change: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """The stream that each row ends in at its last position: a prompt of these with a change added at a layer.

        Args:
            layer: one for all rows, or one a row.
        """
        layers = torch.as_tensor(layer, device=prompt.device).expand(len(prompt))
        run = self._run_whole if self.model.stages == "whole" else self._run
        change = change.to(self.streams[0])
        final = torch.empty_like(change)
        for rows in layers.argsort(stable=True).split(max(1, _AT_ONCE // self.streams[0][0].numel())):
            final[rows] = run(layers[rows], prompt[rows], change[rows])
        return final

    @torch.no_grad()
    def _run(
        self, layers: Int[Tensor, " row"], prompt: Int[Tensor, " row"], change: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        entering: dict[int, list[Packed]] = {}
        for layer in layers.unique().tolist():
            cell = (layers == layer).nonzero()[:, 0]
            layout = self._layout(prompt[cell])
            unsteered = layout.of_prompts(self.streams[layer])
            rows = Packed(layout, cell, unsteered + change[cell[layout.row]])
            entering[self._unsteered.first_stage(layer)] = [rows]
        position = torch.arange(self.tokens.shape[1], device=prompt.device)
        is_last = position == self.last[:, None]
        packed = self._unsteered.finish(entering, is_read=is_last)
        ends = is_last[packed.token_prompt, packed.layout.position]
        final = torch.empty_like(change)
        final[packed.cell[packed.layout.row[ends]]] = packed.resid[0, ends]
        return final

    @torch.no_grad()
    def _run_whole(
        self, layers: Int[Tensor, " row"], prompt: Int[Tensor, " row"], change: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        final = torch.empty_like(change)
        for layer in layers.unique().tolist():
            here = layers == layer
            final[here] = self._run_whole_at(layer, prompt[here], change[here])
        return final

    def _run_whole_at(
        self, layer: int, prompt: Int[Tensor, " row"], change: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        layout = self._layout(prompt)

        def add(x: Float[Tensor, "row pos d_model"], hook: Any) -> Tensor:
            x = x.clone()
            x[layout.row, layout.position] += change.to(x)[layout.row]
            return x

        with self.model.hooks([(stream_points(self.model)[layer], add)]):
            final = self.model.final_stream(self.tokens[prompt])
        return final[torch.arange(len(prompt), device=prompt.device), self.last[prompt]]

    def _stream(self, layer: int) -> Float[Tensor, "prompt pos d_model"]:
        if self.model.stages == "whole":
            return self._unsteered.cache[stream_points(self.model)[layer]]
        return self._unsteered.resid(layer)

    def _layout(self, prompt: Int[Tensor, " row"]) -> Layout:
        """Each row's positions from where its prompt is steered to its last token."""
        position = torch.arange(self.tokens.shape[1], device=prompt.device)
        steered = (position >= self.start[prompt, None]) & (position <= self.last[prompt, None])
        row, place = steered.nonzero(as_tuple=True)
        return Layout(prompt, row, place, len(position))

    def _starts(self, where: Where) -> Int[Tensor, " prompt"]:
        if where in ("last", "all"):
            return self.last if where == "last" else torch.zeros_like(self.last)
        if self._table is not None and where.partition(":")[0] in self._table.frame:
            return torch.tensor(self._table.positions(self.model, where), device=self.last.device)
        wanted = self.model.to_single_token(where)
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        found = torch.where((self.tokens == wanted) & (position <= self.last[:, None]), position, -1).amax(dim=1)
        if bool((found < 0).any()):
            missing = int(found.argmin())
            text = self.model.to_string(self.tokens[missing, : int(self.last[missing]) + 1])
            raise ReflowlensError(f"the prompt {text!r} has no token {where!r} to steer from")
        return found


def steer(
    model: HookedModel, layer: int, direction: Float[Tensor, " d_model"], alpha: float, position: Position = None
) -> Steer:
    """The same injection as an intervention for ``rl.intervene``: into the stream that a block reads, or the last one.

    Example: ``with rl.intervene(model, steer(model, 3, direction, 40.0)): model.generate("The film was")``
    """
    if layer < model.cfg.n_layers:
        return Steer("resid_pre", direction, alpha, layer=layer, position=position)
    if not model.reads_last_stream:
        return Steer(READ_LAST, direction, alpha, position=position)
    return Steer("resid_post", direction, alpha, layer=layer - 1, position=position)


def stream_points(model: HookedModel) -> list[str]:
    """The hook points of the streams that a direction can be added to, by layer: what each block reads, and the end."""
    end = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post" if model.reads_last_stream else READ_LAST
    return [f"blocks.{layer}.hook_resid_pre" for layer in range(model.cfg.n_layers)] + [end]


def rms(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Root mean square of the entries, ‖x‖ / √d."""
    return vectors.float().pow(2).mean(dim=-1).sqrt()
