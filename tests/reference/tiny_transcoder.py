"""The GPT that TinyTranscoder explains, as torch modules with a linear map a head; nothing of reflowlens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    def __init__(self, d_model: int, d_head: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, d_head, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[1:]).triu(1) == 1
        return scores.masked_fill(later, float("-inf")).softmax(dim=-1) @ v


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, d_mlp: int) -> None:
        super().__init__()
        d_head = d_model // n_heads  # rounded down
        self.heads = nn.ModuleList(Head(d_model, d_head) for _ in range(n_heads))
        self.projection = nn.Linear(n_heads * d_head, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.ReLU(), nn.Linear(d_mlp, d_model))
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln1(x)
        x = x + self.projection(torch.cat([head(normed) for head in self.heads], dim=-1))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, n_layers: int, d_model: int, n_heads: int, d_mlp: int, d_vocab: int, n_ctx: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(d_vocab, d_model), nn.Embedding(n_ctx, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_mlp) for _ in range(n_layers))
        self.ln = nn.LayerNorm(d_model)
        self.readout = nn.Linear(d_model, d_vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.readout(self.ln(x))


def in_their_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a hooked model, or their gradients, under the names and in the shapes of `GPT`."""
    theirs = {
        "tokens.weight": ours["embed.W_E"],
        "positions.weight": ours["pos_embed.W_pos"],
        "ln.weight": ours["ln_final.w"],
        "ln.bias": ours["ln_final.b"],
        "readout.weight": ours["unembed.W_U"].T,
        "readout.bias": ours["unembed.b_U"],
    }
    for layer in range(sum(name.endswith("attn.W_O") for name in ours)):
        at = f"blocks.{layer}"
        for name, W in (("query", "W_Q"), ("key", "W_K"), ("value", "W_V")):
            for head, matrix in enumerate(ours[f"{at}.attn.{W}"]):
                theirs[f"{at}.heads.{head}.{name}.weight"] = matrix.T
        theirs[f"{at}.projection.weight"] = ours[f"{at}.attn.W_O"].flatten(0, 1).T
        theirs[f"{at}.projection.bias"] = ours[f"{at}.attn.b_O"]
        for i, part in ((0, "in"), (2, "out")):
            theirs[f"{at}.mlp.{i}.weight"] = ours[f"{at}.mlp.W_{part}"].T
            theirs[f"{at}.mlp.{i}.bias"] = ours[f"{at}.mlp.b_{part}"]
        for norm in ("ln1", "ln2"):
            theirs |= {f"{at}.{norm}.weight": ours[f"{at}.{norm}.w"], f"{at}.{norm}.bias": ours[f"{at}.{norm}.b"]}
    return theirs
