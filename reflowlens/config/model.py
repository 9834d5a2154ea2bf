"""What a model is made of: one frozen dataclass."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from reflowlens.config.architectures import DEFAULTS, FACTORED
from reflowlens.config.checks import check, choice_message
from reflowlens.decoder_options import OPTIONS, DecoderOptions, RotaryScaling
from reflowlens.errors import ReflowlensError, nearest
from reflowlens.ttt_flow_config import TTTFlowConfig

if TYPE_CHECKING:  # which takes longer to import than all that configurations need
    import torch

Fields = TypeVar("Fields")
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
        if self.architecture not in DEFAULTS:
            raise ReflowlensError(choice_message("architecture", self.architecture))
        self._fill_in()
        check(self)
        is_rotary = self.positional_embedding_type == "rotary"
        self.check_options(d_head=self.d_head, is_rotary=is_rotary, is_factored=self.is_factored)

    def _fill_in(self) -> None:
        """The architecture's own choices where nothing is given, and parts that are given as their fields."""
        for name, value in DEFAULTS[self.architecture].items():
            given = getattr(self, name)
            if given is None or given == "" or (name == "eps" and given == 0):
                object.__setattr__(self, name, value)
        if self.architecture == "ttt_flow" and self.ttt_flow is None:
            object.__setattr__(self, "ttt_flow", TTTFlowConfig())
        parts: dict[str, type] = {"rotary_scaling": RotaryScaling, "ttt_flow": TTTFlowConfig}
        for name, kind in parts.items():
            if isinstance(given := getattr(self, name), Mapping):
                object.__setattr__(self, name, _of_fields(name, kind, given))

    @property
    def is_factored(self) -> bool:
        """Whether the embedding is a product of a recipe and a basis."""
        return self.architecture in FACTORED

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
        usual |= DEFAULTS[self.architecture]
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


def _of_fields(name: str, kind: type[Fields], fields: Mapping[str, Any]) -> Fields:
    try:
        return kind(**fields)
    except TypeError as error:
        names = ", ".join(field.name for field in dataclasses.fields(cast(Any, kind)))
        raise ReflowlensError(f"{name} must have {names}, got {', '.join(fields)}") from error
