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


class PublishedTracing:
    """TinyTranscoder's tracing of a feature as it is published, faults included; each is named where it is made.

    Args:
        gpt: the frozen model.
        tokens: of one prompt [pos].
        W_enc, W_dec: of each block [feature, d_model].
        k: features that TopK keeps.
    """

    def __init__(self, gpt: GPT, tokens: Tensor, W_enc: list[Tensor], W_dec: list[Tensor], k: int) -> None:
        self.gpt, self.W_enc, self.W_dec, self.k = gpt, W_enc, W_dec, k
        self.embeddings = gpt.tokens(tokens)
        self.ln1, self.mlp_inputs, self.patterns, self.values = [], [], [], []
        x = self.embeddings + gpt.positions(torch.arange(len(tokens)))
        for block in gpt.blocks:
            normed = block.ln1(x)
            later = torch.ones(len(tokens), len(tokens)).triu(1) == 1
            scores = [head.query(normed) @ head.key(normed).T * head.query.out_features**-0.5 for head in block.heads]
            self.ln1.append(normed)
            self.patterns.append([each.masked_fill(later, float("-inf")).softmax(dim=-1) for each in scores])
            self.values.append([head.value(normed) for head in block.heads])
            mixed = [pattern @ value for pattern, value in zip(self.patterns[-1], self.values[-1], strict=True)]
            x = x + block.projection(torch.cat(mixed, dim=-1))
            self.mlp_inputs.append(block.ln2(x))
            x = x + block.mlp(block.ln2(x))

    def contributions(self, layer: int, index: int, position: int) -> dict[tuple[str, ...], float]:
        """What adds to a feature, by its name."""
        f = self.W_enc[layer][index]
        found = {("embedding", str(position)): self.embeddings[position] @ f}  # without position, norms and biases
        for block in range(layer):  # without the attention of the feature's own layer
            for head, (pattern, values) in enumerate(zip(self.patterns[block], self.values[block], strict=True)):
                for source in range(position + 1):
                    out = values[source] @ self.output_of(block, head)
                    found["attention", str(block), str(head), str(source)] = pattern[position, source] * (out @ f)
            for feature, activation in enumerate(self.activations(block)[position]):
                found["feature", str(block), str(feature)] = activation * (self.W_dec[block][feature] @ f)
        return {name: float(each.detach()) for name, each in found.items()}

    def activations(self, block: int) -> Tensor:
        """Pre-activations in place of what TopK keeps."""
        return self.mlp_inputs[block] @ self.W_enc[block].T

    def first_contributor(self, layer: int, index: int, position: int) -> dict[tuple[str, ...], float]:
        """The routine returns inside its loop."""
        for name, contribution in self.contributions(layer, index, position).items():
            return {name: contribution}
        return {}

    def reconstruction(self, layer: int) -> Tensor:
        """Of the attention's norm, which no transcoder has seen."""
        before = self.ln1[layer] @ self.W_enc[layer].T
        values, places = before.topk(self.k, dim=-1)
        return torch.zeros_like(before).scatter(-1, places, values) @ self.W_dec[layer]

    def pulled_back(self, layer: int, head: int, f: Tensor) -> Tensor:
        """A direction behind a head, before it: by OV, though it is OVᵀ that takes directions back."""
        return f @ (self.gpt.blocks[layer].heads[head].value.weight.T @ self.output_of(layer, head))

    def output_of(self, layer: int, head: int) -> Tensor:
        """W_O of a head [d_head, d_model]."""
        block = self.gpt.blocks[layer]
        return block.projection.weight.T.split(block.heads[0].value.out_features)[head]
