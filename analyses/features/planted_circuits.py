"""Models whose circuit is known, so that it is known what an attribution graph of them must show.

Weights are set by hand. Heads of block 0 look for a token each and carry it, wherever it stood, to every later
position; ReLU neurons read what was carried, or each other, and the readout reads the last of them. Everything else is
zero, and all parts have coordinates of the stream of their own, so that the weight of every edge is a line of
arithmetic.

:func:`two_hop`      A makes f active in block 0, f makes g active in block 1, g raises B; nothing else leads to B.
:func:`gate`         f is active only if A and C were both in the text (or, its twin, if either was), and raises B.
:func:`suppression`  as two hops, and C makes s active, which lowers the pre-activation of g.

:func:`exact_dictionary` has the neurons as features. :func:`collapsed` is a cross-layer dictionary of two hops that
says the same of every MLP's output and knows nothing of the second hop: f itself writes, in block 1, what g does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from reflowlens.config import ModelConfig
from reflowlens.dictionaries.config import DictionaryConfig
from reflowlens.dictionaries.dictionary import Dictionary
from reflowlens.errors import ReflowlensError
from reflowlens.models import build_model
from reflowlens.models.components import Block
from reflowlens.models.decoder import Decoder
from reflowlens.models.residual import OwnUnembed

BALLAST = 4.0  # in every token's embedding: what queries read, and most of what norms divide by
ATTENTION = 200.0  # score of a token that a head looks for; of all others it is 0
CARRIED, INTO_F, OUT_OF_F, INTO_G, INTO_G_FROM_S, OUT_OF_G, READOUT = 1.5, 0.9, 2.0, 1.25, -0.8, 3.0, 2.5
SOURCES, TARGETS = "ACEGIK", "BDFHJL"
OTHER = "."


@dataclass(frozen=True, eq=False)
class PlantedCircuit:
    """A model, a prompt, and what made the prediction of it.

    Args:
        prompt: the tokens are bytes.
        target: the token that is raised.
        units: block and number of each neuron, by its letter.
        activation: of each on the prompt's last position.
        edges: weights by source and target: tokens of the prompt, units, ``"bias"`` (of the block) and the target,
            whose logit is less the vocabulary's mean.
    """

    name: str
    model: Decoder
    prompt: str
    target: str
    units: Mapping[str, tuple[int, int]]
    activation: Mapping[str, float]
    edges: Mapping[tuple[str, str], float]

    def node(self, name: str, kind: str = "feature") -> str:
        """What a graph calls it; ``kind`` is of its units, ``"feature"`` or ``"neuron"``."""
        if name in self.units:
            block, index = self.units[name]
            return f"{kind}:{block}.{index}@{len(self.prompt) - 1}"
        if name == self.target:
            return f"logit:{ord(name)}"
        return "bias:0" if name == "bias" else f"embedding@{self.prompt.index(name)}"


def two_hop(n: int = 1, present: int = 1) -> PlantedCircuit:
    """A → f → g → B.

    Args:
        n: circuits beside each other, A to B, C to D, …
        present: of how many of them the prompt has the source: units and edges are theirs, f2 and g2 of the second.
            What raises other tokens than B lowers it against the vocabulary's mean.

    Raises:
        ReflowlensError: not 1 ≤ ``present`` ≤ ``n`` ≤ 6.
    """
    if not 1 <= present <= n <= len(SOURCES):
        raise ReflowlensError(f"1 to {len(SOURCES)} circuits and no more of them present, got {n!r} and {present!r}")
    planted = _Planted(SOURCES[:n], d_mlp=n)
    for i, target in enumerate(TARGETS[:n]):
        planted.neuron(0, i, {planted.carried[i]: INTO_F}, planted.f[i], OUT_OF_F)
        planted.neuron(1, i, {planted.f[i]: INTO_G}, planted.g[i], OUT_OF_G)
        planted.read_out(target, planted.g[i])
    carried = CARRIED / planted.scale()
    f = INTO_F * carried / planted.scale(*[carried] * present)
    written = OUT_OF_F * f
    g = INTO_G * written / planted.scale(*[carried, written] * present)
    end = planted.scale(*[carried, written, OUT_OF_G * g] * present)
    units: dict[str, tuple[int, int]] = {}
    edges: dict[tuple[str, str], float] = {}
    for i, source in enumerate(SOURCES[:present]):
        letters = [f"{letter}{i + 1 if i else ''}" for letter in "fg"]
        units |= {letter: (block, i) for block, letter in enumerate(letters)}
        read = OUT_OF_G * g / end
        raised = planted.logit(read) if i == 0 else -READOUT * read / planted.model.cfg.d_vocab  # the mean logit
        edges |= {(source, letters[0]): f, (letters[0], letters[1]): g, (letters[1], "B"): raised}
    activation = {letter: (f, g)[block] for letter, (block, _) in units.items()}
    return PlantedCircuit("two hops", planted.model, f"{SOURCES[:present]}{OTHER * 2}", "B", units, activation, edges)


def gate(kind: Literal["and", "or"] = "and") -> PlantedCircuit:
    """A and C → f → B: each of the two adds as much to f, of which the bias takes 3/2 (or, of an ``"or"``, 1/2)."""
    if kind not in ("and", "or"):
        raise ReflowlensError(f"a gate is 'and' or 'or', got {kind!r}")
    planted = _Planted("AC", d_mlp=1)
    carried = CARRIED / planted.scale()
    each = INTO_F * carried / planted.scale(carried, carried)
    bias = -(1.5 if kind == "and" else 0.5) * each
    planted.neuron(0, 0, dict.fromkeys(planted.carried, INTO_F), planted.f[0], OUT_OF_F, bias)
    planted.read_out("B", planted.f[0])
    f = 2 * each + bias
    out = OUT_OF_F * f
    edges = {
        ("A", "f"): each,
        ("C", "f"): each,
        ("bias", "f"): bias,
        ("f", "B"): planted.logit(out / planted.scale(carried, carried, out)),
    }
    return PlantedCircuit(f"{kind} gate", planted.model, f"AC{OTHER}", "B", {"f": (0, 0)}, {"f": f}, edges)


def suppression(copies: int = 1, weight: float = INTO_G_FROM_S) -> PlantedCircuit:
    """A → f → g → B, and C → s, which lowers g.

    Args:
        copies: neurons that read what f does and write a part each of what it writes, beside each other: f, f2, f3, …
        weight: by which g reads s; of f it is 1.25.

    Raises:
        ReflowlensError: ``copies`` is not 1 or more, or the weight leaves g silent or raises it.
    """
    if copies < 1:
        raise ReflowlensError(f"copies must be 1 or more, got {copies!r}")
    if not -INTO_G < weight < 0:
        raise ReflowlensError(f"weight must be between {-INTO_G} and 0, got {weight!r}")
    planted = _Planted("AC", d_mlp=copies + 1)
    for i in range(copies):
        planted.neuron(0, i, {planted.carried[0]: INTO_F}, planted.f[0], OUT_OF_F / copies)
    planted.neuron(0, copies, {planted.carried[1]: INTO_F}, planted.f[1], OUT_OF_F)
    planted.neuron(1, 0, {planted.f[0]: INTO_G, planted.f[1]: weight}, planted.g[0], OUT_OF_G)
    planted.read_out("B", planted.g[0])
    carried = CARRIED / planted.scale()
    f = INTO_F * carried / planted.scale(carried, carried)
    written = OUT_OF_F * f
    before_g = planted.scale(carried, carried, written, written)
    from_f, from_s = INTO_G * written / before_g, weight * written / before_g
    g = from_f + from_s
    end = planted.scale(carried, carried, written, written, OUT_OF_G * g)
    letters = ["f", *(f"f{i}" for i in range(2, copies + 1))]
    edges = {("A", letter): f for letter in letters} | {("C", "s"): f}
    edges |= {(letter, "g"): from_f / copies for letter in letters}
    edges |= {("s", "g"): from_s, ("g", "B"): planted.logit(OUT_OF_G * g / end)}
    units = {letter: (0, i) for i, letter in enumerate(letters)} | {"s": (0, copies), "g": (1, 0)}
    activation = dict.fromkeys([*letters, "s"], f) | {"g": g}
    return PlantedCircuit("suppression", planted.model, f"AC{OTHER}", "B", units, activation, edges)


class _Planted:
    """A model of two blocks that does nothing yet but carry tokens, a head of block 0 for each.

    Coordinates of the stream: the ballast, each token that is carried, all other tokens, and of each carried token
    where it is carried to and where what reads it writes, in block 0 and in block 1.
    """

    @torch.no_grad()
    def __init__(self, tokens: str, d_mlp: int) -> None:
        n = len(tokens)
        groups = [range(2 + i * n, 2 + (i + 1) * n) for i in range(4)]
        token, self.carried, self.f, self.g = groups
        model: Any = build_model(
            ModelConfig(
                architecture="gpt2", normalization_type="RMS", act_fn="relu", mlp_bias=True, tie_word_embeddings=False,
                n_layers=2, d_model=2 + 4 * n, n_heads=n, d_head=1, d_mlp=d_mlp, d_vocab=256, n_ctx=16,
                tokenizer_name="bytes", model_name="planted",
            )
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            if not name.endswith(".w"):
                parameter.zero_()
        model.embed.W_E[:, :2] = torch.tensor([BALLAST, 1.0])
        attention = model.blocks[0].attn
        for head, byte in enumerate(tokens.encode()):
            model.embed.W_E[byte, 1], model.embed.W_E[byte, token[head]] = 0.0, 1.0
            attention.W_Q[head, 0, 0] = ATTENTION
            attention.W_K[head, token[head], 0] = attention.W_V[head, token[head], 0] = 1.0
            attention.W_O[head, 0, self.carried[head]] = CARRIED
        self.model = cast(Decoder, model.requires_grad_(False))

    def neuron(self, block: int, i: int, reads: Mapping[int, float], to: int, writes: float, bias: float = 0.0) -> None:
        mlp = cast(Block, self.model.blocks[block]).mlp
        assert mlp.b_in is not None
        for coordinate, weight in reads.items():
            mlp.W_in[coordinate, i] = weight
        mlp.W_out[i, to], mlp.b_in[i] = writes, bias

    def read_out(self, token: str, coordinate: int) -> None:
        cast(OwnUnembed, self.model.unembed).W_U[coordinate, ord(token)] = READOUT

    def scale(self, *added: float) -> float:
        """What a norm divides by where this was added to an embedding, all in coordinates of their own."""
        cfg = self.model.cfg
        return math.sqrt((BALLAST**2 + 1 + sum(x * x for x in added)) / cfg.d_model + cfg.eps)

    def logit(self, read: float) -> float:
        return READOUT * (1 - 1 / self.model.cfg.d_vocab) * read


@torch.no_grad()
def exact_dictionary(model: Decoder, *, cross_layer: bool = False) -> Dictionary:
    """Every neuron of ungated ReLU MLPs as a feature; of a cross-layer dictionary too they write in their own block.

    Raises:
        ReflowlensError: the MLPs are others.
    """
    cfg = model.cfg
    if cfg.act_fn != "relu" or cfg.gated_mlp:
        raise ReflowlensError(
            "neurons are features of a transcoder only where MLPs are ungated and their activation ReLU"
        )
    blocks = range(cfg.n_layers)
    dictionary = Dictionary(
        DictionaryConfig(
            tuple(f"blocks.{block}.ln2.hook_normalized" for block in blocks),
            tuple(f"blocks.{block}.hook_mlp_out" for block in blocks),
            cfg.d_model, cfg.d_model, cfg.d_mlp, "relu", cross_layer=cross_layer, name="exact",
        )
    )  # fmt: skip
    for layer, block in zip(dictionary.each_layer(), cast("list[Block]", list(model.blocks)), strict=True):
        for parameter in layer.parameters():
            parameter.zero_()
        layer.W_enc.copy_((block.ln2.w[:, None] * block.mlp.W_in).T)
        layer.W_dec[:, 0] = block.mlp.W_out
        for bias, own in ((layer.b_enc, block.mlp.b_in), (layer.b_dec, block.mlp.b_out)):
            if own is not None:
                bias.copy_(own)
        if block.ln2.b is not None:
            layer.b_enc.add_(block.ln2.b @ block.mlp.W_in)
    return dictionary.requires_grad_(False)


def collapsed(circuit: PlantedCircuit) -> Dictionary:
    """A cross-layer dictionary of :func:`two_hop` without g: f writes in block 1 what g does.

    It is exact wherever every f has the activation that f has on the prompt, or none: of one circuit on every text.
    """
    dictionary = exact_dictionary(circuit.model, cross_layer=True)
    first, second = dictionary.each_layer()
    first.W_dec[:, 1] = circuit.activation["g"] / circuit.activation["f"] * second.W_dec[:, 0]
    second.W_enc.zero_()
    second.W_dec.zero_()
    return dictionary
