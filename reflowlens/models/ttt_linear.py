"""TTT-Linear: a layer whose hidden state is a linear model, trained on every text that it reads (Sun et al., 2024).

Keys, values and queries are three views of the stream. For each head a linear model z = k W + c learns, from the text
itself, to make of a key what must be added to it for the value:

    ℓ(W, c; k, v) = ½ ‖LN(k W + c) − (v − k)‖²

A text is read in mini-batches of b tokens. All inner gradients of a mini-batch are taken at its start; a token is read
with the steps of the tokens up to itself, which needs no W of its own for each (the dual form), G_s being ∂ℓ/∂z:

    ẑ_t = q_t W + c − η Σ_{s ≤ t} (1 + q_t · k_s) G_s           out_t = q_t + LN(ẑ_t)
    W ← W − η Kᵀ G,    c ← c − η Σ G                             after the mini-batch

The gradient of the language model's loss flows through every inner step, so that the start W₁, c₁ and the views are
learned for being learned from. At the start of a text the state is W₁, c₁.

A text may end within a mini-batch: its last tokens are read like all others. (The published code leaves those at 0,
which never shows where texts are multiples of b long; here an output would then depend on what comes behind.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from reflowlens.models.flow_refiner import GATE_INIT
from reflowlens.models.parts import HookPoint
from reflowlens.ttt_flow_config import TTTFlowConfig

INNER_EPS, OUT_EPS = 1e-6, 1e-5
_START_STD = 0.02


@dataclass
class InnerState:
    """The inner model within a text: as it was when the mini-batch began, and the steps taken since.

    Args:
        W, c: at the start of the mini-batch.
        step_W, step_c: Σ KᵀG and ΣG of the mini-batch so far.
    """

    W: Float[Tensor, "batch head f f"]
    c: Float[Tensor, "batch head f"]
    step_W: Float[Tensor, "batch head f f"]
    step_c: Float[Tensor, "batch head f"]


class InnerStep(nn.Module):
    """One mini-batch of the inner learner; each has hook points of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_W = HookPoint()  # [batch, head, f, f], when the mini-batch begins
        self.hook_c = HookPoint()  # [batch, head, f]
        self.hook_grad = HookPoint()  # [batch, head, pos_in_chunk, f], G

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: InnerState, ttt: TTTLinear
    ) -> tuple[Float[Tensor, "batch head pos f"], InnerState]:
        """Tokens of one mini-batch, the first of them perhaps read before.

        Args:
            q, k, v: [batch, head, pos, f].
            state: before these tokens.

        Returns:
            What each token is read as, and the state after them, its mini-batch not ended.
        """
        W, c, rate = self.hook_W(state.W), self.hook_c(state.c), ttt.rate
        G = self.hook_grad(ttt.inner_gradient(k, v, W, c))
        start = q @ (W - rate * state.step_W) + (c - rate * state.step_c)[..., None, :]
        alike = (1 + q @ k.mT).tril()
        z = start - rate * (alike @ G)
        state = InnerState(W, c, state.step_W + k.mT @ G, state.step_c + G.sum(-2))
        return q + ttt.inner_norm(z), state


class TTTLinear(nn.Module):
    """The refiner of a model ``d_model`` wide that reads at most ``n_ctx`` tokens.

    Example:
        >>> layer = TTTLinear(TTTFlowConfig(), d_model=512, n_ctx=2048)
        >>> sum(parameter.numel() for parameter in layer.parameters()), len(layer.steps)
        (1083905, 128)
    """

    def __init__(self, cfg: TTTFlowConfig, d_model: int, n_ctx: int) -> None:
        super().__init__()
        self.n_heads, self.chunk, width = cfg.ttt_heads, cfg.ttt_chunk, d_model // cfg.ttt_heads
        self.rate = cfg.ttt_rate / width  # η
        self.W_Q, self.W_K, self.W_V, self.W_O = (nn.Parameter(torch.empty(d_model, d_model)) for _ in range(4))
        self.W_start = nn.Parameter(torch.empty(self.n_heads, width, width))  # W₁
        self.b_start = nn.Parameter(torch.empty(self.n_heads, width))  # c₁
        self.w_inner = nn.Parameter(torch.empty(self.n_heads, width))  # of LN, per head
        self.b_inner = nn.Parameter(torch.empty(self.n_heads, width))
        self.w_norm = nn.Parameter(torch.empty(d_model))  # of the norm of all heads' outputs
        self.b_norm = nn.Parameter(torch.empty(d_model))
        self.gate = nn.Parameter(torch.empty(1))  # γ
        self.steps = nn.ModuleList([InnerStep() for _ in range(-(-n_ctx // self.chunk))])
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()  # [batch, pos, head, f]
        self.hook_out = HookPoint()  # [batch, pos, head, f]
        self.hook_delta = HookPoint()  # [batch, pos, d_model], what is added to the stream

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """The views orthogonal; W_O 0, so that it begins as nothing."""
        for weight in (self.W_Q, self.W_K, self.W_V):
            nn.init.orthogonal_(weight, generator=generator)
        self.W_start.normal_(0.0, _START_STD, generator=generator)
        for weight in (self.W_O, self.b_start, self.b_inner, self.b_norm):
            weight.zero_()
        for weight in (self.w_inner, self.w_norm):
            weight.fill_(1.0)
        self.gate.fill_(GATE_INIT)

    def first_state(self, batch: int) -> InnerState:
        """The state at the start of a text."""
        W = self.W_start.expand(batch, -1, -1, -1)
        c = self.b_start.expand(batch, -1, -1)
        return InnerState(W, c, torch.zeros_like(W), torch.zeros_like(c))

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        state: InnerState | None = None,
        read: int = 0,
        texts: Int[Tensor, "text longest"] | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], InnerState]:
        """Add to the stream what the inner learner makes of it.

        Args:
            state: after the tokens of the text that were read before; None: none were.
            read: how many.
            texts: where the tokens of texts packed into the rows lie (:func:`each_text_alone`), each read from the
                start; states are then one a text. None: a text a row.

        Returns:
            The refined stream, and the state after it.
        """
        q, k, v = (hook(self._heads(x @ W)) for hook, W in self._views())
        if texts is None:
            read_as, state = self._read(q, k, v, state or self.first_state(len(x)), read)
        else:
            q_, k_, v_ = (part.flatten(0, 1)[texts.clamp(min=0)] for part in (q, k, v))
            of_texts, state = self._read(q_, k_, v_, self.first_state(len(texts)), 0)
            held = texts >= 0
            read_as = torch.zeros_like(q).flatten(0, 1).index_copy(0, texts[held], of_texts[held]).view_as(q)
        out = self.hook_out(read_as)
        normal = torch.nn.functional.layer_norm(out.flatten(2), x.shape[-1:], self.w_norm, self.b_norm, OUT_EPS)
        return x + self.hook_delta(self.gate.sigmoid() * (normal @ self.W_O)), state

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, state: InnerState, read: int
    ) -> tuple[Float[Tensor, "batch pos head f"], InnerState]:
        """What each token is read as, mini-batch by mini-batch; views [batch, pos, head, f]."""
        q, k, v = (rearrange(part, "batch pos head f -> batch head pos f") for part in (q, k, v))
        outs, first, n = [], 0, q.shape[2]
        while first < n:
            step, into = divmod(read + first, self.chunk)
            last = min(first + self.chunk - into, n)
            tokens = (part[:, :, first:last] for part in (q, k, v))
            out, state = self.steps[step](*tokens, state, self)
            outs.append(out)
            if (read + last) % self.chunk == 0:
                state = self._next_state(state)
            first = last
        return rearrange(torch.cat(outs, dim=2), "batch head pos f -> batch pos head f"), state

    def inner_norm(self, z: Float[Tensor, "batch head pos f"]) -> Float[Tensor, "batch head pos f"]:
        """LN of the inner loss, with a weight and a bias a head."""
        normal = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=INNER_EPS)
        return normal * self.w_inner[:, None] + self.b_inner[:, None]

    def inner_loss(
        self, k: Tensor, v: Tensor, W: Float[Tensor, "batch head f f"], c: Float[Tensor, "batch head f"]
    ) -> Float[Tensor, "batch head pos"]:
        """ℓ of each token under one state."""
        return 0.5 * (self.inner_norm(k @ W + c[..., None, :]) - (v - k)).pow(2).sum(-1)

    def inner_gradient(
        self, k: Tensor, v: Tensor, W: Float[Tensor, "batch head f f"], c: Float[Tensor, "batch head f"]
    ) -> Float[Tensor, "batch head pos f"]:
        """∂ℓ/∂z of each token, through LN."""
        z = k @ W + c[..., None, :]
        centred = z - z.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + INNER_EPS).sqrt()
        normal = centred / scale
        error = normal * self.w_inner[:, None] + self.b_inner[:, None] - (v - k)
        along = error * self.w_inner[:, None]
        return (along - along.mean(-1, keepdim=True) - normal * (along * normal).mean(-1, keepdim=True)) / scale

    def _next_state(self, state: InnerState) -> InnerState:
        W, c = state.W - self.rate * state.step_W, state.c - self.rate * state.step_c
        return InnerState(W, c, torch.zeros_like(W), torch.zeros_like(c))

    def _views(self) -> list[tuple[HookPoint, Tensor]]:
        return [(self.hook_q, self.W_Q), (self.hook_k, self.W_K), (self.hook_v, self.W_V)]

    def _heads(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos head f"]:
        return x.unflatten(-1, (self.n_heads, -1))


def each_text_alone(positions: Int[Tensor, "batch pos"]) -> Int[Tensor, "text longest"]:
    """Where the tokens of texts packed into rows lie in the flattened rows, a row a text; -1 beyond its end.

    >>> each_text_alone(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[ 0,  1,  2],
            [ 3,  4, -1]])
    """
    flat = positions.flatten()
    text = (flat == 0).cumsum(0) - 1
    places = torch.full((int(text[-1]) + 1, int(flat.max()) + 1), -1, device=flat.device)
    places[text, flat] = torch.arange(len(flat), device=flat.device)
    return places
