"""Many patched runs of a decoder at once, each only as much of itself as differs from the unpatched run.

A patched run (a *row*) equals the unpatched one in every layer below the patch, and at every position before it. So a
row enters at the layer where it is patched, and only with its positions from the patched one on: its suffix. Rows that
have entered go through the remaining blocks together. Outside attention a block treats every position alike, so the
suffixes lie end to end as one text [1, token, d_model]; in attention the keys and values of a row's prefix are those
of the unpatched run. So is what a suffix has in common with that run where the row enters: until attention has carried
a patched position's change to those behind it, only that position is computed.

The blocks run as they are, hook points included: a point's activation is then the packed one. In the last block only
what is read later asks, where that is one position of each row and nothing is attached (:class:`LastQueries`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from reflowlens.models.attention import Attention
from reflowlens.models.components import Block
from reflowlens.models.parts import is_hooked


@dataclass(frozen=True)
class Layout:
    """Which positions of which rows the packed tokens are.

    Args:
        prompt: the prompt of each row.
        row, position: of each token.
        n_positions: length of the prompts.
    """

    prompt: Int[Tensor, " row"]
    row: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    n_positions: int

    @classmethod
    def empty(cls, n_positions: int, device: torch.device) -> Layout:
        none = torch.empty(0, dtype=torch.long, device=device)
        return cls(none, none, none, n_positions)

    @classmethod
    def of_suffixes(cls, prompt: Int[Tensor, " row"], start: Int[Tensor, " row"], n_positions: int) -> Layout:
        """Row i holds positions ``start[i]`` to the end."""
        everywhere = torch.arange(n_positions, device=start.device) >= start[:, None]
        row, position = everywhere.nonzero(as_tuple=True)
        return cls(prompt, row, position, n_positions)

    @property
    def n_rows(self) -> int:
        return len(self.prompt)

    def extended(self, other: Layout) -> Layout:
        """With the rows of another layout behind."""
        return Layout(
            torch.cat([self.prompt, other.prompt]),
            torch.cat([self.row, other.row + self.n_rows]),
            torch.cat([self.position, other.position]),
            self.n_positions,
        )

    def kept(self, keep: Bool[Tensor, " token"]) -> Layout:
        """With some of the tokens only."""
        return Layout(self.prompt, self.row[keep], self.position[keep], self.n_positions)

    def one_of_each_row(self, tokens: Bool[Tensor, " token"]) -> bool:
        """Whether these are one token of every row."""
        return torch.equal(self.row[tokens], torch.arange(self.n_rows, device=tokens.device))

    def behind(self, first: int) -> Layout:
        """The same tokens where the positions before the first of them are left out of all rows."""
        return Layout(self.prompt, self.row, self.position - first, self.n_positions - first)

    # A list of single numbers selects whole stretches of memory, in a fourth of the time of indices of several axes.

    @functools.cached_property
    def _place(self) -> Int[Tensor, " token"]:
        """The number of each token among all positions of all rows."""
        return self.row * self.n_positions + self.position

    def over(
        self, base: Float[Tensor, "prompt pos *rest"], packed: Float[Tensor, "1 token *rest"]
    ) -> Float[Tensor, "row pos *rest"]:
        """Each row in full: the unpatched run with the row's own positions over it."""
        whole = base.index_select(0, self.prompt)
        whole.flatten(0, 1).index_copy_(0, self._place, packed[0].to(whole.dtype))
        return whole

    def of_rows(self, whole: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "1 token *rest"]:
        """Each token, of rows in full."""
        return whole.flatten(0, 1).index_select(0, self._place)[None]

    def of_prompts(self, whole: Float[Tensor, "prompt pos *rest"]) -> Float[Tensor, "1 token *rest"]:
        """What the unpatched run has where each token is."""
        place = self.prompt[self.row] * self.n_positions + self.position
        return whole.flatten(0, 1).index_select(0, place)[None]


@dataclass(frozen=True)
class PrefixKeysValues:
    """What rows attend to before their suffix, and what of the suffix is the unpatched run's.

    Args:
        layout: of the suffixes.
        differing: of those of their tokens whose stream is not the unpatched run's.
        queries, keys, values: of the unpatched run in the layer, the first two rotated.
    """

    layout: Layout
    differing: Layout
    queries: Float[Tensor, "prompt pos head d_head"]
    keys: Float[Tensor, "prompt pos kv_head d_head"]
    values: Float[Tensor, "prompt pos kv_head d_head"]

    def mix(
        self,
        attn: Attention,
        q: Float[Tensor, "1 differing head d_head"],
        k: Float[Tensor, "1 differing kv_head d_head"],
        v: Float[Tensor, "1 differing kv_head d_head"],
    ) -> Float[Tensor, "1 token head d_head"]:
        """Attention of each row's suffix to its prefix and itself."""
        keys, values = self.differing.over(self.keys, k), self.differing.over(self.values, v)
        first = self._first_query(attn)
        queries = self.differing.behind(first).over(self.queries[:, first:], q)
        return self.layout.behind(first).of_rows(attn.mix(queries, keys, values, mask=None))

    def _first_query(self, attn: Attention) -> int:
        """The position from which on queries are mixed, the first that is any row's own. Where this is in the first
        half, 0, as a causal kernel skips what no query may look at; and where somebody sees the whole square of scores.
        """
        first, half = int(self.layout.position.min()), self.layout.n_positions // 2
        return 0 if first < half or is_hooked(attn.hook_attn_scores, attn.hook_pattern) else first


@dataclass(frozen=True)
class LastQueries:
    """What one position of each row attends to, keys and values of its prefix and of its suffix.

    Args:
        position: that of each row.
        differing: the tokens of the suffixes whose stream is not the unpatched run's.
        keys, values: of the unpatched run in the block's layer.
        resid: what the block reads of the differing tokens.
    """

    position: Int[Tensor, " row"]
    differing: Layout
    keys: Float[Tensor, "prompt pos kv_head d_head"]
    values: Float[Tensor, "prompt pos kv_head d_head"]
    resid: Float[Tensor, "1 differing d_model"]
    block: Block

    def mix(
        self, attn: Attention, q: Float[Tensor, "1 row head d_head"], k: Tensor, v: Tensor
    ) -> Float[Tensor, "1 row head d_head"]:
        k, v = attn.keys_values(self.resid, self.block.ln1, self.differing.position[None])
        keys, values = self.differing.over(self.keys, k), self.differing.over(self.values, v)
        return attn.mix(q.transpose(0, 1), keys, values, self._mask()).transpose(0, 1)

    def _mask(self) -> Bool[Tensor, "row 1 1 pos"] | None:
        """The keys that each row's position may look at; None where it is the last of all."""
        place = torch.arange(self.differing.n_positions, device=self.position.device)
        if bool((self.position == place[-1]).all()):
            return None
        return (place <= self.position[:, None])[:, None, None]


def only(
    asked: Bool[Tensor, " token"] | None, resid: Float[Tensor, "1 token d_model"]
) -> Float[Tensor, "1 asked d_model"]:
    """The tokens that are asked for, by default all."""
    return resid if asked is None else resid.index_select(1, asked.nonzero()[:, 0])


def is_anything_hooked(block: nn.Module) -> bool:
    """Whether something is attached to a point of a block."""
    return any(is_hooked(point) for point in block.modules() if isinstance(point, HookPoint))
