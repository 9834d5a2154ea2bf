"""What a model is made of: one frozen dataclass, and the published configurations by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from reflowlens.decoder_options import OPTIONS, DecoderOptions, is_integer, is_positive
from reflowlens.decoder_options import RotaryScaling as RotaryScaling
from reflowlens.errors import ReflowlensError
from reflowlens.ttt_flow_config import TTTFlowConfig

if TYPE_CHECKING:  # which takes longer to import than all that configurations need
    import torch

_DECODER: dict[str, Any] = {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "eps": 1e-6,
    "positional_embedding_type": "rotary",
    "rotary_adjacent_pairs": False,
}
_REFLOW = _DECODER | {"rotary_adjacent_pairs": True}
_GPT2 = {
    "act_fn": "gelu",
    "gated_mlp": False,
    "normalization_type": "LN",
    "eps": 1e-5,
    "positional_embedding_type": "standard",
    "rotary_adjacent_pairs": False,
}
_BDH = {
    "act_fn": "relu",
    "gated_mlp": False,
    "normalization_type": "LN",
    "eps": 1e-5,
    "positional_embedding_type": "rotary",
    "rotary_adjacent_pairs": True,
}
_TTT_FLOW = _DECODER | {"act_fn": "leaky_relu_squared", "gated_mlp": False, "rotary_adjacent_pairs": False}
# What the name of an architecture gives a field unless a configuration says otherwise. nanoGPT's GPT-2 has learned
# positions, LayerNorm and an ungated exact GELU; the decoders after it RMSNorm, SwiGLU and rotary positions. reFlow's
# public model file rotates adjacent channels; GPT-2-New and Llama, as transformers stores it, rotate halves. "decoder"
# is what else is read from transformers' folders: its options say which family it is.
_DEFAULTS = {
    "gpt2": _GPT2,
    "gpt2_new": _DECODER,
    "llama": _DECODER,
    "decoder": _DECODER,
    "reflow": _REFLOW,
    "reflow_topk": _REFLOW,
    "reflow_lite": _REFLOW,
    "bdh": _BDH,
    "ttt_flow": _TTT_FLOW,
}
ARCHITECTURES = tuple(_DEFAULTS)
_FACTORED = ("reflow", "reflow_topk", "reflow_lite")
_UNPRUNED = {"topk": None, "topk_ends": "both", "topk_gradient": "kept"}
_NEURONS_IN_HEADS = ("bdh",)  # heads share out a block's neurons
_BIASES = ("norm_bias", "qkv_bias", "attn_out_bias", "mlp_bias", "unembed_bias")
# What an architecture is made of, and no configuration changes.
_FIXED: dict[str, dict[str, Any]] = {
    "decoder": {"positional_embedding_type": "rotary"},
    "bdh": {name: value for name, value in _BDH.items() if name != "eps"}
    | {"n_key_value_heads": None, "tie_word_embeddings": False, "rotary_scaling": None}
    | dict.fromkeys(_BIASES, False)
    | OPTIONS,
    "ttt_flow": {name: value for name, value in _TTT_FLOW.items() if name != "eps"}
    | {"tie_word_embeddings": True, "rotary_scaling": None, "dropout": 0.0}
    | dict.fromkeys(_BIASES, False)
    | OPTIONS,
}
_CHOICES: dict[str, Collection[object]] = {
    "architecture": _DEFAULTS.keys(),
    "act_fn": ("gelu", "gelu_new", "relu", "silu", "leaky_relu_squared"),
    "normalization_type": ("LN", "RMS"),
    "positional_embedding_type": ("standard", "rotary"),
    "tokenizer_name": ("gpt2", "gpt2_16k", "gpt2_1k", "bytes"),
    "basis_init": ("orthogonal", "gpt2"),
    "topk_ends": ("both", "input", "output"),
    "topk_gradient": ("kept", "straight_through"),
}
_OPTIONAL_SIZES = ("n_key_value_heads", "n_signals", "original_n_ctx")
# Far beyond any model: a damaged number is refused before it is built, and no product of sizes overflows.
LARGEST = {"n_layers": 1 << 14, "d_model": 1 << 20, "n_heads": 1 << 14, "d_head": 1 << 20, "d_mlp": 1 << 24}
LARGEST |= dict.fromkeys(("d_vocab", "n_ctx", "n_key_value_heads", "n_signals", "original_n_ctx"), 1 << 24)
FILE_TOKENIZER = "tokenizer.json:"  # begins the name of a tokenizer that is a file; its hash follows


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderOptions):
    """The sizes and choices that make up a model, in TransformerLens's field names.

    Beside these fields there are those of :class:`~reflowlens.decoder_options.DecoderOptions`, such as
    ``parallel_attn_mlp`` or ``window_size``, of decoders with attention heads and MLPs.

    Args:
        architecture: one of ``gpt2``, ``gpt2_new``, ``llama``, ``decoder``, ``reflow``, ``reflow_topk``,
            ``reflow_lite``, ``bdh``, ``ttt_flow``.
        n_layers, d_model, n_heads, d_head, d_mlp: the decoder's sizes; ``n_heads * d_head`` need not equal ``d_model``.
            Of ``bdh`` ``n_layers`` are its levels, ``d_mlp`` the neurons of a level and ``d_head`` those of a head.
        n_key_value_heads: heads that own keys and values (grouped-query attention); None: one per query head.
        d_vocab: rows of the embedding, at least as many as the tokenizer has tokens.
        n_ctx: longest input in tokens.
        n_signals: S, the width of the recipe, the first factor of the embedding; None if it is not factored.
        topk: entries kept per row of the recipe, its largest positive ones (``reflow_topk`` only); ``n_signals``
            leaves the ReLU alone.
        topk_ends: where the recipe is so pruned: at ``both`` ends, or only at the ``input`` or the ``output``, the
            other using it as it is stored.
        topk_gradient: which entries learn: those ``kept``, or all, as if nothing were pruned (``straight_through``;
            Bengio et al., 2013).
        act_fn: activation of the MLPs: ``gelu``, ``gelu_new`` (its tanh approximation), ``relu``, ``silu`` or
            ``leaky_relu_squared`` (of slope 0.5).
        gated_mlp: MLPs multiply their activation by a second projection (SwiGLU with ``silu``).
        normalization_type: ``LN`` (LayerNorm) or ``RMS`` (RMSNorm).
        eps: added to the variance, or to the mean square, inside norms.
        positional_embedding_type: ``standard`` (learned) or ``rotary``.
        rotary_base: θ of rotary positions: channel pair i turns by ``θ ** (-2 i / d_head)`` radians per position.
        rotary_adjacent_pairs: rotate channels (0, 1), (2, 3), … instead of (i, i + d_head / 2).
        rotary_scaling: a :class:`RotaryScaling` (or its fields); None: frequencies are not rescaled.
        norm_bias: norms have a bias ``b``.
        qkv_bias, attn_out_bias: attention has ``b_Q``, ``b_K``, ``b_V``; it has ``b_O``.
        mlp_bias: MLPs have ``b_in`` and ``b_out``, gated ones ``b_gate`` too.
        tie_word_embeddings: logits are read through the embedding; False gives the model a matrix ``unembed.W_U``.
        unembed_bias: logits have a bias ``unembed.b_U``, of a model whose ``tie_word_embeddings`` is False.
        dropout: probability with which training zeroes an entry of an attention pattern and of what attention and MLP
            add to the stream; of ``bdh`` a neuron.
        tokenizer_name: ``gpt2``, ``gpt2_16k``, ``gpt2_1k``, ``bytes``, or the name of a ``tokenizer.json`` that
            lies beside the weights (:func:`reflowlens.tokenizers.ranks.open_tokenizer`).
        initializer_range: standard deviation of every normal initialisation.
        scale_residual_init: decoders divide that of ``W_O`` and ``W_out`` by √(2 n_layers), as GPT-2 does.
        basis_init: ``orthogonal`` keeps the embedding's standard deviation at ``initializer_range``;
            ``gpt2`` draws the basis like every other matrix.
        ttt_flow: a :class:`~reflowlens.ttt_flow_config.TTTFlowConfig` (or its fields), of ``ttt_flow`` only.
        model_name: what the model is called; free text.
        original_architecture: the class of transformers that the model was imported from, to which an export goes back;
            empty of others, and of Llama and GPT-2.
        original_n_ctx: the longest input that an imported model was made for, to which an export goes back, where
            ``n_ctx`` keeps less of it; None otherwise.
        device, weights_dtype: where the parameters are, and the name of their type; kept up to date by the model.
        use_attn_result, use_attn_in, use_split_qkv_input, use_hook_mlp_in: TransformerLens's switches. Their hook
            points always exist and are computed when hooked; a switch adds them to the default cache.

    ``None``, ``""`` and an ``eps`` of 0 mean the architecture's own choice.

    Raises:
        ReflowlensError: a field has a value that is not allowed; the message names the field and the allowed values.

    >>> ModelConfig(architecture="gpt2_new", n_layers=2, d_model=64, n_heads=2, d_head=32, d_mlp=256, d_vocab=512,
    ...             n_ctx=64).normalization_type
    'RMS'
    """

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_key_value_heads: int | None = None
    n_signals: int | None = None
    topk: int | None = None
    topk_ends: Literal["both", "input", "output"] = "both"
    topk_gradient: Literal["kept", "straight_through"] = "kept"
    act_fn: str = ""
    gated_mlp: bool | None = None
    normalization_type: str = ""
    eps: float = 0.0
    positional_embedding_type: str = ""
    rotary_base: float = 10_000.0
    rotary_adjacent_pairs: bool | None = None
    rotary_scaling: RotaryScaling | None = None
    norm_bias: bool = False
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    unembed_bias: bool = False
    dropout: float = 0.0
    tokenizer_name: str = "gpt2"
    initializer_range: float = 0.02
    scale_residual_init: bool = True
    basis_init: Literal["orthogonal", "gpt2"] = "orthogonal"
    ttt_flow: TTTFlowConfig | None = None
    model_name: str = ""
    original_architecture: str = ""
    original_n_ctx: int | None = None
    device: str = "cpu"
    weights_dtype: str = dataclasses.field(default="float32", compare=False)
    use_attn_result: bool = False
    use_attn_in: bool = False
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False

    attn_only = False  # TransformerLens asks; none of these architectures is.

    def __post_init__(self) -> None:
        if self.architecture not in _DEFAULTS:
            raise ReflowlensError(_choice_message("architecture", self.architecture))
        for name, value in _DEFAULTS[self.architecture].items():
            given = getattr(self, name)
            if given is None or given == "" or (name == "eps" and given == 0):
                object.__setattr__(self, name, value)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed and not (name == "tokenizer_name" and self.has_file_tokenizer):
                raise ReflowlensError(_choice_message(name, getattr(self, name)))
        for field in dataclasses.fields(self):
            if str(field.type).startswith("bool") and not isinstance(getattr(self, field.name), bool):
                raise ReflowlensError(
                    f"{field.name} must be True or False (in TOML true or false), got {getattr(self, field.name)!r}"
                )
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if name in _OPTIONAL_SIZES and value is None:
                continue
            if not (is_integer(value) and value >= 1):
                raise ReflowlensError(f"{name} must be a positive integer, got {value!r}")
            if value > largest:
                raise ReflowlensError(f"{name} must be at most {largest:,}, got {value:,}")
        for name in ("eps", "rotary_base", "initializer_range"):
            if not is_positive(getattr(self, name)):
                raise ReflowlensError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        self._check_heads()
        self._check_rotary()
        self._check_signals()
        self._check_readout()
        self._check_neurons()
        self._check_ttt_flow()
        is_rotary = self.positional_embedding_type == "rotary"
        self.check_options(d_head=self.d_head, is_rotary=is_rotary, is_factored=self.is_factored)

    def _check_heads(self) -> None:
        if self.n_heads % self.kv_heads:
            raise ReflowlensError(f"n_key_value_heads must divide n_heads={self.n_heads}, got {self.n_key_value_heads}")

    def _check_rotary(self) -> None:
        if self.positional_embedding_type == "rotary" and self.d_head % 2:
            raise ReflowlensError(f"d_head must be even for rotary positions, got {self.d_head}")
        if isinstance(self.rotary_scaling, Mapping):
            object.__setattr__(self, "rotary_scaling", _of_fields("rotary_scaling", RotaryScaling, self.rotary_scaling))
        if not isinstance(self.rotary_scaling, RotaryScaling | None):
            raise ReflowlensError(f"rotary_scaling must be None or a RotaryScaling, got {self.rotary_scaling!r}")

    def _check_signals(self) -> None:
        if self.is_factored and self.n_signals is None:
            raise ReflowlensError(f"n_signals must be a positive integer for architecture {self.architecture!r}")
        if self.is_factored and not self.tie_word_embeddings:
            raise ReflowlensError(
                f"tie_word_embeddings must be True for architecture {self.architecture!r}: "
                "recipe and basis serve both ends"
            )
        if not self.is_factored and self.n_signals is not None:
            raise ReflowlensError(
                f"n_signals must be None for architecture {self.architecture!r}: its embedding is not factored"
            )
        if self.architecture == "reflow_topk":
            if not (is_integer(self.topk) and 1 <= self.topk <= (self.n_signals or 0)):
                raise ReflowlensError(
                    f"topk must be an integer between 1 and n_signals={self.n_signals}, got {self.topk!r}"
                )
            return
        for name, unpruned in _UNPRUNED.items():
            if getattr(self, name) != unpruned:
                raise ReflowlensError(
                    f"{name} must be {unpruned!r} for architecture {self.architecture!r}: only reflow_topk prunes"
                )

    def _check_readout(self) -> None:
        if self.unembed_bias and self.tie_word_embeddings:
            raise ReflowlensError(
                "unembed_bias must be False with tie_word_embeddings=True: a readout of its own alone has a bias"
            )

    def _check_neurons(self) -> None:
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ReflowlensError(f"dropout must be a number from 0 to below 1, got {self.dropout!r}")
        in_heads = self.architecture in _NEURONS_IN_HEADS
        if in_heads and self.d_mlp != self.n_heads * self.d_head:
            raise ReflowlensError(
                f"d_mlp must be n_heads * d_head = {self.n_heads * self.d_head}, the neurons of a level, "
                f"got {self.d_mlp}"
            )
        for name, value in _FIXED.get(self.architecture, {}).items():
            if getattr(self, name) != value:
                raise ReflowlensError(
                    f"{name} must be {value!r} for architecture {self.architecture!r}, got {getattr(self, name)!r}"
                )

    def _check_ttt_flow(self) -> None:
        is_one = self.architecture == "ttt_flow"
        if is_one and self.ttt_flow is None:
            object.__setattr__(self, "ttt_flow", TTTFlowConfig())
        if isinstance(self.ttt_flow, Mapping):
            object.__setattr__(self, "ttt_flow", _of_fields("ttt_flow", TTTFlowConfig, self.ttt_flow))
        if not isinstance(self.ttt_flow, TTTFlowConfig if is_one else None.__class__):
            expected = "a TTTFlowConfig" if is_one else "None"
            raise ReflowlensError(
                f"ttt_flow must be {expected} for architecture {self.architecture!r}, got {self.ttt_flow!r}"
            )
        if self.ttt_flow is not None:
            self.ttt_flow.check(d_model=self.d_model, d_head=self.d_head, n_layers=self.n_layers)

    @property
    def is_factored(self) -> bool:
        """Whether the embedding is a product of a recipe and a basis."""
        return self.architecture in _FACTORED

    @property
    def has_one_embedding(self) -> bool:
        """Whether a token enters as the vector that its logit is read with."""
        return self.tie_word_embeddings and self.topk_ends == "both"

    @property
    def has_file_tokenizer(self) -> bool:
        """Whether the tokenizer is a ``tokenizer.json`` that lies beside the weights."""
        return isinstance(self.tokenizer_name, str) and self.tokenizer_name.startswith(FILE_TOKENIZER)

    @property
    def kv_heads(self) -> int:
        """Number of heads that own keys and values."""
        return self.n_key_value_heads or self.n_heads

    @property
    def d_vocab_out(self) -> int:
        """TransformerLens's name for the size of the output vocabulary, which is that of the input's."""
        return self.d_vocab

    @property
    def dtype(self) -> torch.dtype:
        """TransformerLens's name for the parameters' type."""
        import torch

        return cast("torch.dtype", getattr(torch, self.weights_dtype))

    @property
    def default_prepend_bos(self) -> bool:
        """Whether texts begin with the tokenizer's beginning token unless ``prepend_bos`` says otherwise."""
        from reflowlens.tokenizers.by_name import get_tokenizer

        return get_tokenizer(self.tokenizer_name).bos_token is not None

    def to_dict(self) -> dict[str, Any]:
        """The fields that describe the model, without where it is or which points are cached.

        What few models have is left out where a model does not have it: the description, and with it the hash, of a
        model written before these fields existed stays what it was.
        """
        fields = dataclasses.asdict(self)
        absent = {name for name, value in _OF_FEW_MODELS.items() if fields[name] == value}
        return {name: value for name, value in fields.items() if name not in absent | _RUNTIME}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ReflowlensError: a field is unknown, missing or has a value that is not allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ReflowlensError(f"unknown model field {name!r}{nearest(name, sorted(known))}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(fields)):
            raise ReflowlensError(f"the model configuration lacks {', '.join(missing)}")
        return cls(**fields)

    def __repr__(self) -> str:
        """The fields that the architecture and the defaults do not give: what one would write."""
        given = {name: getattr(self, name) for name in self._given()}
        return f"ModelConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def _given(self) -> list[str]:
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        usual |= _DEFAULTS[self.architecture]
        return [name for name, value in usual.items() if getattr(self, name) != value]

    def _repr_html_(self) -> str:
        from reflowlens.notebook.html import folded, table, titled

        every = self.to_dict()
        given = {name: every[name] for name in self._given() if name in every}
        rest = {name: value for name, value in every.items() if name not in given}
        tables = [
            table(["field", "value"], [(name, json.dumps(value)) for name, value in fields.items()])
            for fields in (given, rest)
        ]
        return titled("ModelConfig", "", tables[0], folded(f"{len(rest)} fields at their defaults", tables[1]))


_RUNTIME = {
    *("device", "weights_dtype"),
    *("use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"),
}
_OF_FEW_MODELS = {
    "topk_ends": "both",
    "topk_gradient": "kept",
    "rotary_scaling": None,
    "norm_bias": False,
    "qkv_bias": False,
    "attn_out_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "unembed_bias": False,
    "dropout": 0.0,
    "scale_residual_init": True,
    "ttt_flow": None,
    "original_architecture": "",
    "original_n_ctx": None,
    **OPTIONS,
}


def nearest(name: Any, candidates: list[str]) -> str:
    """A clause such as ``; did you mean 'd_model'?``, or nothing when no candidate is near."""
    if not isinstance(name, str):  # what was given in its place is in the message
        return ""
    matches = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""


Fields = TypeVar("Fields")


def _of_fields(name: str, kind: type[Fields], fields: Mapping[str, Any]) -> Fields:
    try:
        return kind(**fields)
    except TypeError as error:
        names = ", ".join(field.name for field in dataclasses.fields(cast(Any, kind)))
        raise ReflowlensError(f"{name} must have {names}, got {', '.join(fields)}") from error


def _choice_message(field: str, value: object) -> str:
    return f"{field} must be one of {', '.join(map(repr, _CHOICES[field]))}, got {value!r}"


def _published(architecture: str, n_layers: int, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "d_model": 1024,
        "n_heads": 16,
        "d_head": 64,
        "d_mlp": 2816,
        "d_vocab": 50304,
        "n_ctx": 1024,
    }
    return ModelConfig(architecture=architecture, n_layers=n_layers, **(sizes | fields))


def _ttt_flow(n_layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="ttt_flow",
        n_layers=n_layers,
        d_model=512,
        n_heads=8,
        n_key_value_heads=4,
        d_head=64,
        d_mlp=1536,
        d_vocab=1024,
        n_ctx=2048,
        tokenizer_name="gpt2_1k",
    )


# The seven published configurations of the reFlow family, BDH's, and the GPT that TinyTranscoder explains. The family's
# published parameter counts determine the sizes; head counts do not show in a count and follow nanoGPT (head width 64).
PRESETS: dict[str, ModelConfig] = {
    "gpt2": _published("gpt2", 36, d_mlp=4096),
    "gpt2_new": _published("gpt2_new", 36),
    "reflow_1": _published("reflow", 32, n_signals=1024),
    "reflow_1_big": _published("reflow", 36, n_signals=1024),
    "reflow_1_topk_big": _published("reflow_topk", 36, n_signals=1024, topk=64),
    "reflow_1_lite": _published("reflow_lite", 32, n_signals=1024, n_key_value_heads=4),
    "reflow_1_small": _published("reflow", 6, d_model=512, n_heads=8, d_mlp=1536, n_signals=512),
    # Any text length would do: n_ctx bounds what is read at once.
    "bdh": ModelConfig(
        architecture="bdh",
        n_layers=6,
        d_model=256,
        n_heads=4,
        d_head=8192,
        d_mlp=32_768,
        d_vocab=256,
        n_ctx=4096,
        rotary_base=65_536.0,
        dropout=0.1,
        tie_word_embeddings=False,
        tokenizer_name="bytes",
    ),
    "tiny_transcoder_gpt": ModelConfig(
        architecture="gpt2",
        n_layers=2,
        d_model=512,
        n_heads=12,
        d_head=42,  # 512 // 12: the heads are 504 channels together
        d_mlp=2048,
        d_vocab=50_257,
        n_ctx=64,
        act_fn="relu",
        norm_bias=True,
        attn_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        unembed_bias=True,
        dropout=0.1,
        scale_residual_init=False,
    ),
    "ttt_flow_10l": _ttt_flow(10),
    "ttt_flow_11l": _ttt_flow(11),
}


def preset(name: str) -> ModelConfig:
    """A published configuration by name.

    Raises:
        ReflowlensError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise ReflowlensError(f"unknown preset {name!r}{nearest(name, list(PRESETS))} Presets: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], model_name=name)
