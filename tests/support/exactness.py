"""How exact attribution graphs are: every architecture with every kind of node, against plain autograd.

``python -m tests.support.exactness`` prints the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reflowlens as rl
from reflowlens.circuits.attribution.directions import PLACES
from reflowlens.config import ModelConfig, preset
from reflowlens.models.base import HookedModel
from reflowlens.ttt_flow_config import TTTFlowConfig
from tests.reference.attribution import Frozen, FrozenBDH, FrozenTTTFlow
from tests.support.dictionaries import Kind, dictionary_of
from tests.support.tiny import CONFIGS, FACTORED, NAMES, in_turn, random_model, random_tokens

BDH = ModelConfig(
    architecture="bdh", n_layers=2, d_model=16, n_heads=2, d_head=32, d_mlp=64, d_vocab=256, n_ctx=64,
    tie_word_embeddings=False, tokenizer_name="bytes",
)  # fmt: skip
TINY_TRANSCODER = dataclasses.replace(
    preset("tiny_transcoder_gpt"), d_model=32, n_heads=3, d_head=10, d_mlp=48, d_vocab=288, tokenizer_name="bytes"
)
TTT_FLOW = ModelConfig(
    architecture="ttt_flow", n_layers=5, d_model=16, n_heads=4, n_key_value_heads=2, d_head=6, d_mlp=20, d_vocab=256,
    n_ctx=32, tokenizer_name="bytes",
    ttt_flow=TTTFlowConfig(
        ttt_heads=2, ttt_chunk=3, flow_width=6, flow_hidden=10, bigram_slots=13, bigram_width=6, value_width=5,
        value_layers=2, exclusive_layers=3, rotary_channels=4, rotary_context=16,
    ),
)  # fmt: skip
_DECODER = CONFIGS["gpt2_new"].to_dict() | {"architecture": "decoder"}
_BIASED = {"norm_bias": True, "mlp_bias": True, "attn_out_bias": True, "qkv_bias": True}
_NORMS_BEHIND = {"use_normalization_before_and_after": True, "use_qk_norm": True, "n_key_value_heads": 2}
OPTIONS = {
    "parallel": {"parallel_attn_mlp": True, "normalization_type": "LN", "gated_mlp": False, "act_fn": "gelu"}
    | {"rotary_dim": 4, **_BIASED},
    "parallel_shared": {"parallel_attn_mlp": True, "parallel_shared_ln": True, "n_key_value_heads": 2},
    "norms_behind": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0, "window_size": 2, **_NORMS_BEHIND}
    | {"attn_types": ("local", "global"), "embed_scale": 3.0, "attn_scale": 2.0, "rotary_base_local": 50.0},
    "norms_behind_alone": {"use_normalization_after_only": True, "use_qk_norm": True, "qk_norm_over_heads": True},
}
MODELS = {name: CONFIGS[name] for name in NAMES} | {
    "tiny_transcoder_gpt": TINY_TRANSCODER,
    "bdh": BDH,
    **{name: ModelConfig.from_dict(_DECODER | options) for name, options in OPTIONS.items()},
    "ttt_flow": TTT_FLOW,
}
N_TOKENS, NEURONS = 5, 8


@dataclass(frozen=True)
class Nodes:
    """A kind of nodes.

    Args:
        kind, activation: of a dictionary; None: neurons.
        options: of ``rl.attribute``.
        directions: whether they are targets, at every place and block, and not tokens.
    """

    kind: Kind | None = None
    activation: str = "topk"
    options: Mapping[str, Any] = field(default_factory=dict)
    directions: bool = False


NODES = {
    "transcoders": Nodes("plt"),
    "transcoders, batchtopk": Nodes("plt", "batchtopk"),
    "transcoders, jumprelu": Nodes("plt", "jumprelu"),
    "transcoders, relu": Nodes("plt", "relu"),
    "transcoders with skip": Nodes("skip"),
    "cross-layer": Nodes("clt"),
    "neurons": Nodes(),
    "heads and transcoders": Nodes("plt", options={"heads": True}),
    "heads and neurons": Nodes(options={"heads": True}),
    "heads and cross-layer, jumprelu": Nodes("clt", "jumprelu", {"heads": True}),
    "signals and transcoders": Nodes("plt", options={"signals": True}),
    "signals, heads and cross-layer": Nodes("clt", options={"signals": True, "heads": True}),
    "neurons without signals": Nodes(options={"signals": False}),
    "directions": Nodes(directions=True),
    "directions, skip": Nodes("skip", directions=True),
    "directions, heads and cross-layer": Nodes("clt", options={"heads": True}, directions=True),
}
OF_OPTIONS = ("transcoders with skip", "neurons", "directions", "heads and neurons", "heads and cross-layer, jumprelu")
OF_SIGNALS = [name for name in NODES if "signals" in name]
CASES = [
    (model, nodes)
    for model in MODELS
    for nodes in (("neurons", "directions") if model == "bdh" else OF_OPTIONS if model in OPTIONS else NODES)
    if model in FACTORED or nodes not in OF_SIGNALS
]
# Kinds that differ from others by what no architecture has a part in: on each of two models and one of the rest.
_IN_TURN = (
    "transcoders, batchtopk",
    "transcoders, jumprelu",
    "transcoders, relu",
    "heads and cross-layer, jumprelu",
    "directions, skip",
)
TESTED = [case for case in CASES if case[1] not in _IN_TURN or case[0] in OPTIONS] + in_turn(_IN_TURN)


@dataclass(frozen=True)
class Measured:
    """The worst of a graph.

    Args:
        sums: |Σ edges − value|, relative to the value or, where that is smaller, the largest edge into the target.
        edges: |edge − autograd's|, relative to the largest edge into the target.
        values: |value − that of autograd's run|, relative as sums are.
        of_value: |Σ edges − value| relative to the value itself, however near zero it is.
        n_targets: how many.
    """

    sums: float
    edges: float
    values: float
    of_value: float
    n_targets: int


@cache
def model_of(name: str) -> HookedModel:
    return random_model(MODELS[name]).eval()


def measure(model_name: str, nodes_name: str) -> Measured:
    """The graph of a random prompt, node by node beside autograd."""
    return measure_model(model_of(model_name), nodes_name)


def measure_model(model: HookedModel, nodes_name: str) -> Measured:
    """The same of any model."""
    nodes = NODES[nodes_name]
    tokens = random_tokens(model.cfg, 1, N_TOKENS)[0]
    dictionary = None if nodes.kind is None else dictionary_of(model, nodes.kind, nodes.activation)
    directions = directions_of(model) if nodes.directions else {}
    targets = list(directions.values()) or None
    graph = rl.attribute(model, tokens, dictionary, targets, neurons=NEURONS, progress=False, **nodes.options)
    kinds = set(graph.nodes["kind"])
    if model.cfg.architecture == "bdh":
        frozen: Frozen = FrozenBDH(model, tokens, NEURONS)
    else:
        kind = FrozenTTTFlow if model.cfg.architecture == "ttt_flow" else Frozen
        frozen = kind(model, tokens, dictionary, NEURONS, signals="signal" in kinds, heads="head" in kinds)
    rows, found, worst = list(graph.nodes.itertuples()), graph.matrix.toarray(), []
    expected_targets = targets_of(rows, frozen, directions)
    for i, target in expected_targets.items():
        expected = expected_row(rows, frozen.edges(target))
        largest = np.abs(expected).max()
        size, off = max(abs(rows[i].value), largest), abs(found[i].sum(dtype=np.float64) - rows[i].value)
        edges = np.abs(found[i] - expected).max() / largest
        worst.append((off / size, edges, abs(target.item() - rows[i].value) / size, off / abs(rows[i].value)))
    assert not np.delete(found, list(expected_targets), axis=0).any()
    assert graph.nodes["value"].notna().sum() == len(expected_targets)
    return Measured(*np.max(worst, axis=0).tolist(), len(worst))


def directions_of(model: HookedModel) -> dict[str, rl.DirectionAt]:
    """One at every place of every block, at different positions, by the names of their nodes."""
    generator, found = torch.Generator().manual_seed(3), {}
    places = [place for place in PLACES if f"blocks.0.{PLACES[place]}" in model.hook_dict]
    for layer in range(model.cfg.n_layers):
        for i, place in enumerate(places):
            position = (i + 1) % N_TOKENS
            vector = torch.randn(model.cfg.d_model, generator=generator)
            found[f"direction:{layer}.{place}@{position}"] = rl.DirectionAt(vector, layer, position, place, place)
    last = N_TOKENS - 1
    return found | {f"direction:0.last@{last}": rl.DirectionAt(vector, 0, last, "resid_pre", "last")}


def expected_row(nodes: list[Any], edges: dict[tuple[Any, ...], Tensor]) -> np.ndarray:
    """The edges of one target by autograd, in the order of a graph's nodes."""
    of = {name: product.numpy() for name, product in edges.items()}  # single elements are read sooner than of tensors
    leaf = {name[0]: product for name, product in of.items() if len(name) == 1}
    where = {
        "rest": lambda node: 0.0,
        "logit": lambda node: 0.0,
        "direction": lambda node: 0.0,
        "bias": lambda node: leaf["bias"][node.layer],
        "embedding": lambda node: leaf["embedding"][node.pos],
        "position": lambda node: leaf["position"][node.pos],
        "bigram": lambda node: leaf["bigram"][node.pos],
        "token_value": lambda node: leaf["token_value"][node.pos],
        "signal": lambda node: leaf["signal"][node.pos, node.feature],
        "readout": lambda node: leaf["readout"][0, -1, node.feature],
        "error": lambda node: of["error", node.layer][node.pos],
        "feature": lambda node: of["unit", node.layer][node.pos, node.feature],
        "neuron": lambda node: of["unit", node.layer][node.pos, node.feature],
        "head": lambda node: of["head", node.layer][node.pos, node.feature],
    }
    return np.array([where[node.kind](node) for node in nodes], dtype=np.float32)


def targets_of(nodes: list[Any], frozen: Frozen, directions: Mapping[str, rl.DirectionAt]) -> dict[int, Tensor]:
    """What is attributed, by autograd's run of the frozen model."""
    found = {
        "feature": lambda node: frozen.units[node.layer][node.pos, node.feature],
        "neuron": lambda node: frozen.units[node.layer][node.pos, node.feature],
        "head": lambda node: frozen.heads[node.layer][node.pos, node.feature],
        "readout": lambda node: frozen.readout[node.feature],
        "logit": lambda node: frozen.logits[node.feature] - frozen.logits.mean(),
        "direction": lambda node: frozen.streams[directions[node.node].point][node.pos] @ directions[node.node].vector,
    }
    return {i: found[node.kind](node) for i, node in enumerate(nodes) if node.kind in found}


def main() -> None:
    print("| nodes | " + " | ".join(MODELS) + " |\n|---|" + "---|" * len(MODELS))
    for nodes in NODES:
        cells = []
        for model in MODELS:
            worst = measure(model, nodes) if (model, nodes) in CASES else None
            cells.append("" if worst is None else f"{worst.sums:.0e} · {worst.edges:.0e} · {worst.of_value:.0e}")
        print(f"| {nodes} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
