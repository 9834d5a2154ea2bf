"""What transformers' families of decoders differ in: names of modules, names of fields, and a few traits.

A family is a table (:mod:`reflowlens.conversion.families.table`); what is done with one is here, once for all. Both
directions are read off the same table, so that what is imported can be exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from reflowlens.config import ModelConfig
from reflowlens.conversion.families.traits import ACTIVATIONS, Trait
from reflowlens.conversion.layout import SAME, TRANSPOSED, VECTOR, Entry, Piece
from reflowlens.decoder_options import is_positive
from reflowlens.errors import ReflowlensError

_BIASES = ("norm_bias", "qkv_bias", "attn_out_bias", "mlp_bias", "unembed_bias")
_BY_HEAD = " by head"
# What a transformers folder says nothing about, or says elsewhere.
_UNSTATED = (
    *("tokenizer_name", "model_name", "original_architecture", "original_n_ctx", "device", "weights_dtype"),
    *("initializer_range", "scale_residual_init", "basis_init", "dropout"),
    *("use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of transformers, by how its folders say what our model says.

    Args:
        class_name, model_type: as ``config.json`` has them.
        architecture: of ours that it becomes.
        stem: begins the names of all tensors but the readout's.
        ends: by our name of a module at either end (``embed``, ``pos_embed``, ``ln_final``, ``unembed``) theirs.
        layers: where blocks are, ``{}`` standing for the number of one.
        parts: by our name of a part of a block theirs: ``ln1``, ``ln2``, ``ln1_post``, ``ln2_post``, ``attn.q_norm``,
            ``attn.k_norm``, ``attn.Q``, ``attn.K``, ``attn.V``, ``attn.O``, ``mlp.gate``, ``mlp.in``, ``mlp.out``; of
            matrices that are stored as one ``attn.QKV`` (side by side), ``attn.QKV by head`` and ``mlp.gate in``.
        fields: by our name of a field theirs, of what both say alike.
        fixed: our fields that are the same in every model of the family.
        required: their fields that must have a value, or our models cannot compute it.
        constants: further fields of ``config.json`` on export.
        traits: what takes more than a name.
        norm_shift: what their norms' weights are more than ours: -1 where they multiply by 1 + w.
        position_rows: rows of their table of positions that no position has, before the others.
        stored_transposed: their matrices are [in, out], as ours are.
        buffers: a pattern of stored tensors that are computed anew.
        aliases: other names under which a tensor is stored, by theirs.
        folded: by the end of a parameter's name of ours what it is multiplied by as it is read, from their
            configuration: a number that our decoders have no field for, because weights can hold it.
    """

    class_name: str
    model_type: str
    architecture: str
    stem: str
    ends: Mapping[str, str]
    layers: str
    parts: Mapping[str, str]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    traits: Sequence[Trait] = ()
    norm_shift: float = 0.0
    position_rows: int = 0
    stored_transposed: bool = False
    buffers: str = r".*\.rotary_emb\.inv_freq"  # stored by old versions
    aliases: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)

    @property
    def embedding(self) -> str:
        """The name of the tensor of token embeddings."""
        return f"{self.ends['embed']}.weight"

    def model_config(self, hf: Any) -> ModelConfig:
        """The shape of a model, from transformers' configuration object.

        Raises:
            ReflowlensError: it is of a kind that our models do not know; the message names the field.
        """
        for name, value in self.required.items():
            given = getattr(hf, name, value)
            wanted = getattr(hf, value[1:]) if isinstance(value, str) and value.startswith("=") else value
            if given != wanted and not (given is None and wanted is False):
                raise ReflowlensError(f"{name} is {given!r}, and a {self.class_name} can be read with {wanted!r}")
        ours: dict[str, Any] = {name: getattr(hf, theirs) for name, theirs in self.fields.items()}
        if ours["act_fn"] not in ACTIVATIONS:
            raise ReflowlensError(f"activation {ours['act_fn']!r} is not known: {', '.join(ACTIVATIONS)} are")
        ours["act_fn"] = ACTIVATIONS[ours["act_fn"]]
        ours["d_head"] = getattr(hf, "head_dim", None) or ours["d_model"] // ours["n_heads"]
        ours["d_mlp"] = ours["d_mlp"] or 4 * ours["d_model"]
        if ours.get("n_key_value_heads") == ours["n_heads"]:
            ours["n_key_value_heads"] = None
        for trait in self.traits:
            ours |= trait.read(hf, ours)
        return ModelConfig(architecture=self.architecture, **ours, **self.fixed)

    def factor(self, hf: Any, name: str) -> float:
        """What a parameter of ours is multiplied by as it is read.

        Raises:
            ReflowlensError: theirs is no positive number.
        """
        for end, of in self.folded.items():
            if name.endswith(end):
                factor = of(hf)
                if not is_positive(factor):
                    raise ReflowlensError(f"what {name} is multiplied by must be a positive number, got {factor!r}")
                return float(factor)
        return 1.0

    def hf_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """``config.json`` of a model."""
        theirs = {theirs: getattr(cfg, name) for name, theirs in self.fields.items()}
        if "n_key_value_heads" in self.fields:
            theirs[self.fields["n_key_value_heads"]] = cfg.kv_heads
        for trait in self.traits:
            theirs |= trait.write(cfg)
        required = {
            name: theirs[value[1:]] if isinstance(value, str) and value.startswith("=") else value
            for name, value in self.required.items()
        }
        whose = {"architectures": [self.class_name], "model_type": self.model_type}
        return whose | theirs | required | dict(self.constants) | {"initializer_range": cfg.initializer_range}

    def as_family(self, cfg: ModelConfig) -> ModelConfig:
        """The model as one of the family: one embedding matrix, and every bias that the family has."""
        biases = {name: value for name, value in self.fixed.items() if name in _BIASES and value}
        if "qkv_bias" not in self.fixed and cfg.qkv_bias != cfg.attn_out_bias:
            biases |= {"qkv_bias": True, "attn_out_bias": True}  # one flag for both
        unfactored: dict[str, Any] = {"n_signals": None, "topk": None, "topk_ends": "both", "topk_gradient": "kept"}
        unfactored["tie_word_embeddings"] = cfg.has_one_embedding
        if cfg.kv_heads == cfg.n_heads:
            unfactored["n_key_value_heads"] = None  # as families are read
        return dataclasses.replace(cfg, architecture=self.architecture, **unfactored, **biases)

    def fits(self, cfg: ModelConfig) -> bool:
        """Whether the decoder is one of the family but for its embedding and absent biases: reads back as it is."""
        if cfg.d_model % cfg.n_heads or (cfg.architecture == "gpt2") != ("pos_embed" in self.ends):
            return False  # the latter adds learned positions, whatever else it has
        try:
            ours = self.as_family(cfg)
            theirs = self.hf_config(ours)
            read = self.model_config(SimpleNamespace(**{"head_dim": None, **theirs}))
        except (ReflowlensError, AttributeError):
            return False
        ignored = dict.fromkeys(_UNSTATED) | self._turned_anew(cfg)
        return all(
            getattr(ours, each.name) == getattr(read, each.name)
            for each in dataclasses.fields(ModelConfig)
            if each.name not in ignored
        )

    def _turned_anew(self, cfg: ModelConfig) -> dict[str, None]:
        """Which channels turn together is a matter of their order, unless they differ in more."""
        any_order = cfg.rotary_dim is None and not cfg.use_qk_norm
        return {"rotary_adjacent_pairs": None} if any_order else {}

    # ------------------------------------------------------------------------------------------------------- tensors

    def layout(self, cfg: ModelConfig) -> list[Entry]:
        """Where each tensor of theirs is in our model."""
        entries = [Entry(self.embedding, [Piece("embed.W_E", SAME)])]
        if "pos_embed" in self.ends:
            positions = Piece("pos_embed.W_pos", SAME, rows_before=self.position_rows)
            entries.append(Entry(f"{self.ends['pos_embed']}.weight", [positions]))
        entries += self._norm(self.ends["ln_final"], "ln_final", cfg)
        if not cfg.tie_word_embeddings:
            entries.append(Entry(f"{self.ends['unembed']}.weight", [Piece("unembed.W_U", TRANSPOSED)]))
        if cfg.unembed_bias:
            entries.append(Entry(f"{self.ends['unembed']}.bias", [Piece("unembed.b_U", VECTOR)]))
        for layer in range(cfg.n_layers):
            for part, module in self.parts.items():
                entries += self._part(f"{self.layers.format(layer)}.{module}", f"blocks.{layer}.", part, cfg)
        return entries

    def _part(self, theirs: str, block: str, part: str, cfg: ModelConfig) -> list[Entry]:
        place, _, kinds = part.rpartition(".")
        if kinds in ("ln1", "ln2", "ln1_post", "ln2_post", "q_norm", "k_norm"):
            return self._norm(theirs, f"{block}{part}", cfg)
        ours = f"{block}{place}."
        if place == "mlp":
            pattern = SAME if self.stored_transposed else TRANSPOSED
            matrices = [Piece(f"{ours}W_{kind}", pattern) for kind in kinds.split()]
            biases = [Piece(f"{ours}b_{kind}", VECTOR) for kind in kinds.split()]
            return self._linear(theirs, matrices, biases if cfg.mlp_bias else [])
        if kinds == "O":
            pattern = self._stored("head d_head d_model", "(head d_head)", "d_model")
            matrix = Piece(f"{ours}W_O", pattern, {"head": cfg.n_heads})
            return self._linear(theirs, [matrix], [Piece(f"{ours}b_O", VECTOR)] if cfg.attn_out_bias else [])
        if kinds.endswith(_BY_HEAD):
            return self._by_head(theirs, ours, kinds.removesuffix(_BY_HEAD), cfg)
        matrices, biases = [], []
        for kind in kinds:
            # A value's channels are not turned: any order that both ends agree on will do, and theirs is ours.
            turned = cfg.rotary_adjacent_pairs and not self.fixed.get("rotary_adjacent_pairs") and kind != "V"
            channels = "(pair two)" if turned else "(two pair)"
            sizes = {"head": cfg.n_heads if kind == "Q" else cfg.kv_heads, "two": 2}
            pattern = self._stored(f"head d_model {channels}", "d_model", "(head two pair)")
            matrices.append(Piece(f"{ours}W_{kind}", pattern, sizes))
            biases.append(Piece(f"{ours}b_{kind}", f"head {channels} -> (head two pair)", sizes))
        return self._linear(theirs, matrices, biases if cfg.qkv_bias else [])

    def _by_head(self, theirs: str, ours: str, kinds: str, cfg: ModelConfig) -> list[Entry]:
        """Of each head queries, keys and values one after the other."""
        head = {"head": cfg.n_heads}
        matrices = [Piece(f"{ours}W_{kind}", "head d_model d_head -> head d_head d_model") for kind in kinds]
        biases = [Piece(f"{ours}b_{kind}", "head d_head -> head d_head") for kind in kinds]
        entries = [Entry(f"{theirs}.weight", matrices, 1, "head row d_model -> (head row) d_model", head)]
        if cfg.qkv_bias:
            entries.append(Entry(f"{theirs}.bias", biases, 1, "head row -> (head row)", head))
        return entries

    def _linear(self, theirs: str, matrices: Sequence[Piece], biases: Sequence[Piece]) -> list[Entry]:
        entries = [Entry(f"{theirs}.weight", matrices, axis=int(self.stored_transposed))]
        return [*entries, Entry(f"{theirs}.bias", biases)] if biases else entries

    def _stored(self, ours: str, into: str, out: str) -> str:
        return f"{ours} -> {into} {out}" if self.stored_transposed else f"{ours} -> {out} {into}"

    def _norm(self, theirs: str, ours: str, cfg: ModelConfig) -> list[Entry]:
        entries = [Entry(f"{theirs}.weight", [Piece(f"{ours}.w", VECTOR, shift=self.norm_shift)])]
        return [*entries, Entry(f"{theirs}.bias", [Piece(f"{ours}.b", VECTOR)])] if cfg.norm_bias else entries
