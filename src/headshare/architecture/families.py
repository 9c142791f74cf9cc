"""Model families as rows of data: the places of q, k, v, o and the feed-forward in a layer, and other differences.

A row is everything that headshare knows of a family. No module outside this package names a model type, or a class or
a tensor of one family. To add a family, add a row here and a tiny config to tests/support/tiny.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Separate:
    """Queries, keys and values as three matrices, unit after unit along the output axis of each."""

    q: str
    k: str
    v: str


@dataclass(frozen=True)
class Stacked:
    """Queries, keys and values as one matrix: all of q, then all of k, then all of v."""

    qkv: str


@dataclass(frozen=True)
class Interleaved:
    """Queries, keys and values as one matrix: unit after unit, each with its own q, k and v."""

    qkv: str


@dataclass(frozen=True)
class Gated:
    """A feed-forward with gate and up side by side, then down."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class GatedStacked:
    """A feed-forward with one matrix of all of gate and then all of up, then down."""

    gate_up: str
    down: str


@dataclass(frozen=True)
class Plain:
    """A feed-forward of up, a nonlinearity and down."""

    up: str
    down: str


@dataclass(frozen=True)
class Linear:
    """The class of linear modules that a family's layers are made of: its name, and how it multiplies.

    Attributes:
        name: of the class; torch's own unless the family brings another.
        in_out: the weight is stored (input, output), and the product is x W + b.
        bias_after: the bias is added to the product once that is rounded, not within it.
        sizes: attributes of the module that hold the weight's two sizes.
    """

    name: str = "Linear"
    in_out: bool = False
    bias_after: bool = False
    sizes: tuple[str, str] = ("out_features", "in_features")


@dataclass(frozen=True)
class Counts:
    """The numbers of an attention module that are proportional to its count of heads, or to the width of its values.

    They are attributes of its own, and settings that it reads from the model's configuration. `unless` is a setting
    under which more depends on that; such models keep all their heads, or the width of their values.
    """

    attributes: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    unless: str | None = None


@dataclass(frozen=True)
class MultiQuery:
    """Settings of a family that does not always state its count of key/value heads.

    If `setting` is true or absent, there is one key/value head. If it is false, there are as many as query heads. If
    the setting `unless` is true, they are counted as in other families.
    """

    setting: str
    unless: str


@dataclass(frozen=True)
class Family:
    """A family's row: module paths below one layer, and all else that is particular to these model types.

    Attributes:
        name: of the row.
        model_types: as `config.json` writes them.
        layer: the layer's own path, after any prefix.
        qkv: where queries, keys and values are computed.
        o: the attention's output projection.
        ffn: the feed-forward.
        linear: the class of the linear modules.
        post_norm: each sublayer ends in a norm of its output plus its input, as in BERT.
        removable: how attention counts its heads, where tests/test_removed_units.py shows that layers with fewer heads
            work. Most modules reshape by the size of a head, and so count nothing. None: not shown to work.
        narrow_values: attributes that are proportional to the width of values, where tests/test_narrow_values.py shows
            that layers work whose values are narrower than their keys. None: not shown to work.
        encoder: the model sees the whole text, unless its configuration says `is_decoder`.
        offset_positions: positions are counted from behind the padding token's number.
        multi_query: how key/value heads are counted, where not by their own setting alone.
        embedding: the end of the input embedding's path.
        tied_outputs: tensors of the output embedding, which some checkpoints hold too where it is the input's.
        optional: modules of the bare model that checkpoints need not have.
        buffers: ends of names of tensors that older checkpoints hold and that are no parameters.
        masks: the same for masks of four axes, which are called as parameters of other models are.
        old_names: ends of tensors' names as they are and as older checkpoints write them.
    """

    name: str
    model_types: tuple[str, ...]
    layer: str
    qkv: Separate | Stacked | Interleaved
    o: str
    ffn: Gated | GatedStacked | Plain
    linear: Linear = Linear()
    post_norm: bool = False
    removable: Counts | None = None
    narrow_values: Counts | None = None
    encoder: bool = False
    offset_positions: bool = False
    multi_query: MultiQuery | None = None
    embedding: str = "embed_tokens"
    tied_outputs: tuple[str, ...] = ("lm_head.weight",)
    optional: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    old_names: tuple[tuple[str, str], ...] = ()

    @property
    def in_out(self) -> bool:
        """True if weights are stored (input, output)."""
        return self.linear.in_out


_LLAMA_FFN = Gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_ROTARY = "rotary_emb.inv_freq"
_NEOX_FFN = Plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

_LLAMA = Family(
    name="llama",
    model_types=(
        *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        *("gemma", "gemma2", "gemma3", "gemma3_text", "smollm3", "olmo", "granite"),
    ),
    layer="layers.{layer}",
    qkv=Separate("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    ffn=_LLAMA_FFN,
    removable=Counts(),
    narrow_values=Counts(unless="clip_qkv"),
    tied_outputs=("lm_head.weight", "language_model.lm_head.weight"),
    buffers=(_ROTARY,),
)
_BERT = Family(
    name="bert",
    model_types=("bert",),
    layer="layer.{layer}",
    qkv=Separate("attention.self.query", "attention.self.key", "attention.self.value"),
    o="attention.output.dense",
    ffn=Plain("intermediate.dense", "output.dense"),
    post_norm=True,
    removable=Counts(),
    narrow_values=Counts(),
    encoder=True,
    embedding="word_embeddings",
    tied_outputs=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    optional=("pooler",),
    buffers=("position_ids",),
    old_names=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
)
_ROBERTA = replace(
    _BERT,
    name="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    offset_positions=True,
    tied_outputs=("lm_head.decoder.weight", "lm_head.decoder.bias"),
)

FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    replace(_LLAMA, name="olmo2", model_types=("olmo2",), removable=None),  # its norms of q and k are over all heads
    Family(
        name="phi3",
        model_types=("phi3",),
        layer="layers.{layer}",
        qkv=Stacked("self_attn.qkv_proj"),
        o="self_attn.o_proj",
        ffn=GatedStacked("mlp.gate_up_proj", "mlp.down_proj"),
        removable=Counts(attributes=("num_key_value_heads",), settings=("num_attention_heads",)),
        buffers=(_ROTARY,),
    ),
    Family(
        name="baichuan",
        model_types=("baichuan",),
        layer="layers.{layer}",
        qkv=Stacked("self_attn.W_pack"),
        o="self_attn.o_proj",
        ffn=_LLAMA_FFN,
        buffers=(_ROTARY,),
    ),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        layer="h.{layer}",
        qkv=Stacked("attn.c_attn"),
        o="attn.c_proj",
        ffn=Plain("mlp.c_fc", "mlp.c_proj"),
        linear=Linear("Conv1D", in_out=True, sizes=("nx", "nf")),
        removable=Counts(attributes=("num_heads", "split_size")),
        embedding="wte",
        buffers=(".attn.masked_bias",),
        masks=(".attn.bias",),
    ),
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        layer="layers.{layer}",
        qkv=Interleaved("attention.query_key_value"),
        o="attention.dense",
        ffn=_NEOX_FFN,
        removable=Counts(),
        embedding="embed_in",
        tied_outputs=("embed_out.weight",),
        buffers=(_ROTARY, "attention.masked_bias"),
        masks=(".attention.bias",),
        old_names=(("lm_head.weight", "embed_out.weight"),),
    ),
    Family(
        name="falcon",
        model_types=("falcon",),
        layer="h.{layer}",
        qkv=Interleaved("self_attention.query_key_value"),
        o="self_attention.dense",
        ffn=_NEOX_FFN,
        linear=Linear("FalconLinear", bias_after=True),
        removable=Counts(attributes=("num_heads", "num_kv_heads"), unless="alibi"),
        multi_query=MultiQuery("multi_query", unless="new_decoder_architecture"),
        embedding="word_embeddings",
        buffers=(_ROTARY,),
    ),
    Family(
        name="opt",
        model_types=("opt",),
        layer="layers.{layer}",
        qkv=_LLAMA.qkv,
        o="self_attn.out_proj",
        ffn=Plain("fc1", "fc2"),
        removable=Counts(attributes=("num_heads",)),
        narrow_values=Counts(),
    ),
    _BERT,
    _ROBERTA,
    replace(
        _ROBERTA,
        name="mpnet",
        model_types=("mpnet",),
        qkv=Separate("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        o="attention.attn.o",
        removable=None,  # its relative biases are one for each head
        narrow_values=Counts(attributes=("all_head_size",)),
    ),
)


def family_of(model_type: str) -> Family | None:
    """The family whose row lists this model type, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def _of_all_rows(facts: Callable[[Family], Iterable[str]]) -> tuple[str, ...]:
    """The values of a fact over all rows, each once."""
    return tuple(dict.fromkeys(value for family in FAMILIES for value in facts(family)))


# Facts of all rows together, for questions about a name alone, also in models that no row lists.
INPUT_EMBEDDINGS = _of_all_rows(lambda family: (f"{family.embedding}.weight",))
TIED_OUTPUTS = _of_all_rows(lambda family: family.tied_outputs)
OPTIONAL = _of_all_rows(lambda family: family.optional)
BUFFERS = _of_all_rows(lambda family: family.buffers)
MASKS = _of_all_rows(lambda family: family.masks)
OLD_NAMES: Mapping[str, str] = {new: old for family in FAMILIES for new, old in family.old_names}
LINEARS: Mapping[str, Linear] = {family.linear.name: family.linear for family in FAMILIES}

# Facts of no family: ends of transformers' names for classes that predict the next token. The last also read images.
WITH_IMAGES = "ForConditionalGeneration"
CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel", WITH_IMAGES)


def is_embedding(name: str) -> bool:
    """True if this is the name of an input embedding's weight, or of an output embedding's."""
    return name.endswith(INPUT_EMBEDDINGS) or name in TIED_OUTPUTS


def names_elsewhere(name: str) -> list[str]:
    """The names that the weight of this name may have in another release of transformers: new for old, old for new."""
    pairs = [pair for one in OLD_NAMES.items() for pair in (one, one[::-1])]
    return [name.removesuffix(here) + there for here, there in pairs if name.endswith(here)]
