"""Recognition of a model's layouts from its configuration and its tensors' names and shapes, where that is safe."""

import re
from collections.abc import Mapping
from typing import Any

from headshare.architecture.families import (
    FAMILIES,
    Family,
    Gated,
    GatedStacked,
    Interleaved,
    Plain,
    Separate,
    Stacked,
    family_of,
)
from headshare.architecture.heads import Heads, heads_of
from headshare.errors import ArchitectureError, PlanError
from headshare.plan.layout import Layout, Place
from headshare.plan.units import Part, Sublayer

Shapes = Mapping[str, tuple[int, ...]]


def attention_layout(config: Mapping[str, Any], shapes: Shapes) -> Layout:
    """The layout of q, k, v and o, found from the configuration and the tensors' names and shapes.

    Raises:
        ArchitectureError: if the family is unknown and cannot be recognised safely, or if names, shapes
            and configuration contradict each other.
    """
    family, prefix, layers = _recognise(config, shapes)
    heads = heads_of(config)
    # the width that o reads must be the one that the configuration's head counts give
    base = f"{prefix}{family.layer}."
    o_name = f"{base}{family.o}.weight"
    o_shape = _common_shape(o_name, layers, shapes)
    width = o_shape[0 if family.in_out else 1]
    query_heads, kv_heads = _head_counts(heads)
    head_dim = heads.head_dim or width // query_heads
    if width != query_heads * head_dim or query_heads % kv_heads:
        raise ArchitectureError(
            f"{o_name} reads {width} channels, but the configuration says {query_heads} query heads of "
            f"{head_dim}, {kv_heads} key/value heads. headshare shares only where both agree."
        )
    # a unit is a key/value head and the query heads that read it
    rows = _rows_per_group(query_heads // kv_heads * head_dim, head_dim)
    places = _qkv_places(family, base, layers, shapes, kv_heads, rows)
    places[Part.O] = Place(
        tensor=o_name,
        axis=0 if family.in_out else 1,
        shape=o_shape,
        start=0,
        step=rows[Part.Q],
        rows=rows[Part.Q],
    )
    return Layout(kind=Sublayer.ATTENTION, layers=layers, groups=kv_heads, parts=places)


def ffn_layout(config: Mapping[str, Any], shapes: Shapes, groups: int = 1) -> Layout:
    """The layout of gate, up and down, with one unit a layer (groups = 1) or equal groups of neurons.

    Raises:
        ArchitectureError: as `attention_layout`, and where the feed-forward is a mixture of experts.
        PlanError: if the neurons do not divide into that many groups.
    """
    family, prefix, layers = _recognise(config, shapes)
    base = f"{prefix}{family.layer}."
    ffn = family.ffn
    down_name = f"{base}{ffn.down}.weight"
    # only a feed-forward of one down matrix in every layer has a layout
    first = down_name.replace("{layer}", "0")
    if not _in_every_layer(down_name, layers, shapes):
        raise ArchitectureError(
            f"this model has no {first} in every layer: its feed-forward is a mixture of experts or irregular. "
            "Experts are left alone; share its attention with --parts qkv."
        )
    out_axis = 1 if family.in_out else 0
    down_shape = _common_shape(down_name, layers, shapes)
    neurons = down_shape[1 - out_axis]
    if groups < 1 or neurons % groups:
        raise PlanError(f"{neurons} neurons do not divide into {groups} equal groups. Choose a divisor of {neurons}.")
    size = neurons // groups
    # neurons are outputs of gate and up, and inputs of down
    places: dict[Part, Place] = {}
    for part, module, start in _feature_modules(ffn, neurons):
        name = f"{base}{module}.weight"
        shape = _common_shape(name, layers, shapes)
        if shape[out_axis] % neurons:
            raise ArchitectureError(f"{name} is {shape}, but {down_name} reads {neurons} neurons.")
        places[part] = Place(tensor=name, axis=out_axis, shape=shape, start=start, step=size, rows=size)
    places[Part.DOWN] = Place(tensor=down_name, axis=1 - out_axis, shape=down_shape, start=0, step=size, rows=size)
    return Layout(kind=Sublayer.FFN, layers=layers, groups=groups, parts=places)


def _feature_modules(ffn: Gated | GatedStacked | Plain, neurons: int) -> list[tuple[Part, str, int]]:
    """Parts that compute the neurons: for each the part, its module, and the part's first index there."""
    match ffn:
        case Gated():
            return [(Part.GATE, ffn.gate, 0), (Part.UP, ffn.up, 0)]
        case GatedStacked():
            return [(Part.GATE, ffn.gate_up, 0), (Part.UP, ffn.gate_up, neurons)]
        case Plain():
            return [(Part.UP, ffn.up, 0)]


def _rows_per_group(query_rows: int, head_dim: int) -> dict[Part, int]:
    return {Part.Q: query_rows, Part.K: head_dim, Part.V: head_dim}


def _qkv_places(
    family: Family, base: str, layers: int, shapes: Shapes, groups: int, rows: dict[Part, int]
) -> dict[Part, Place]:
    """Places of q, k and v. A shape that the head counts do not give is refused."""
    axis = 1 if family.in_out else 0
    qkv = family.qkv
    places: dict[Part, Place] = {}
    offset = 0
    for part, module in zip(rows, _modules(qkv), strict=True):
        name = f"{base}{module}.weight"
        shape = _common_shape(name, layers, shapes)
        # in a fused matrix a part begins behind the parts before it, of all groups (stacked) or of one (interleaved)
        match qkv:
            case Separate():
                expected = groups * rows[part]
                start = 0
                step = rows[part]
            case Stacked():
                expected = groups * sum(rows.values())
                start = groups * offset
                step = rows[part]
            case Interleaved():
                expected = groups * sum(rows.values())
                start = offset
                step = sum(rows.values())
        offset += rows[part]
        if shape[axis] != expected:
            raise ArchitectureError(
                f"{name} is {shape}; {groups} groups of {rows[Part.Q]} query rows and {rows[Part.K]} key rows "
                f"need {expected} along axis {axis}. This attention is laid out in a way headshare does not know."
            )
        places[part] = Place(tensor=name, axis=axis, shape=shape, start=start, step=step, rows=rows[part])
    return places


def _modules(qkv: Separate | Stacked | Interleaved) -> tuple[str, str, str]:
    if isinstance(qkv, Separate):
        return qkv.q, qkv.k, qkv.v
    return qkv.qkv, qkv.qkv, qkv.qkv


def _head_counts(heads: Heads) -> tuple[int, int]:
    if heads.query_heads is None or heads.kv_heads is None:
        raise ArchitectureError(
            "config.json does not say how many attention heads there are (num_attention_heads). "
            "Without it the rows of one head cannot be found."
        )
    return heads.query_heads, heads.kv_heads


def _common_shape(template: str, layers: int, shapes: Shapes) -> tuple[int, int]:
    """The shape that this tensor has in every layer."""
    distinct = {shapes.get(template.replace("{layer}", str(layer))) for layer in range(layers)}
    if None in distinct:
        layer = next(n for n in range(layers) if template.replace("{layer}", str(n)) not in shapes)
        raise ArchitectureError(f"the tensor {template.replace('{layer}', str(layer))} is missing.")
    if len(distinct) > 1:
        raise ArchitectureError(f"{template} has different shapes in different layers: {sorted(map(str, distinct))}.")
    (shape,) = distinct
    assert shape is not None
    if len(shape) != 2:
        raise ArchitectureError(f"{template} is {shape}, not a matrix.")
    return shape[0], shape[1]


def _recognise(config: Mapping[str, Any], shapes: Shapes) -> tuple[Family, str, int]:
    """The family, the prefix before a layer's path, and the number of layers."""
    layers = heads_of(config).layers
    if layers is None:
        raise ArchitectureError("config.json does not say how many layers there are (num_hidden_layers).")
    model_type = str(config.get("model_type", "unknown"))
    family = family_of(model_type)
    if family is not None:
        prefixes = _prefixes(family, layers, shapes)
        prefix = _the_prefix(prefixes, config, shapes, family)
        if prefix is None:
            raise ArchitectureError(
                f"model type '{model_type}' should hold tensors named like "
                f"*{family.layer.replace('{layer}', '0')}.{_modules(family.qkv)[0]}.weight for each of its {layers} "
                f"layers, in one stack. Found {len(prefixes)} such stacks among {len(shapes)} tensors."
            )
        return family, prefix, layers
    return _recognise_unknown(model_type, shapes, layers)


def _recognise_unknown(model_type: str, shapes: Shapes, layers: int) -> tuple[Family, str, int]:
    """The family, prefix and layers of an unlisted model: accepted only with separate q, k, v and o, in one stack."""
    refusal = f"model type '{model_type}' is not one that headshare knows, and it cannot be recognised safely: "
    # attention to another sequence reads other inputs than a layer's own
    crossed = next((name for name in shapes if re.search(r"cross|encoder_attn|enc_dec", name, re.I)), None)
    if crossed is not None:
        raise ArchitectureError(f"{refusal}it has cross-attention ({crossed}).")
    # every known set of names is tried
    stacks: dict[object, tuple[Family, str]] = {}
    for family in FAMILIES:
        if isinstance(family.qkv, Separate):
            prefixes = _prefixes(family, layers, shapes)
            for prefix in (before for before in prefixes if _o_present(family, before, layers, shapes)):
                # rows that differ in other things than names find the same stack, which is one
                stacks.setdefault((prefix, family.layer, family.qkv, family.o), (family, prefix))
    # exactly one reading may be left
    if not stacks:
        fused = next((name for name in shapes if re.search(r"qkv|query_key_value|W_pack|c_attn", name)), None)
        reason = (
            f"{fused} is fused, and shapes alone do not tell the order of q, k and v in it. "
            if fused
            else f"no separate q, k, v and o matrices were found under a known name in each of {layers} layers. "
        )
        raise ArchitectureError(f"{refusal}{reason}Add a row to headshare/architecture/families.py.")
    if len(stacks) > 1:
        raise ArchitectureError(
            f"{refusal}it has more than one stack of attention layers: {[p for _, p in stacks.values()]}."
        )
    ((family, prefix),) = stacks.values()
    return family, prefix, layers


def _o_present(family: Family, prefix: str, layers: int, shapes: Shapes) -> bool:
    return _in_every_layer(f"{prefix}{family.layer}.{family.o}.weight", layers, shapes)


def _in_every_layer(template: str, layers: int, shapes: Shapes) -> bool:
    return all(template.replace("{layer}", str(layer)) in shapes for layer in range(layers))


def _prefixes(family: Family, layers: int, shapes: Shapes) -> list[str]:
    """The prefixes before this family's layer path under which all layers are present."""
    tail = f"{family.layer.replace('{layer}', '0')}.{_modules(family.qkv)[0]}.weight"
    pattern = re.compile(rf"(?:^|.*\.){re.escape(tail)}$")
    prefixes = {name[: -len(tail)] for name in shapes if pattern.match(name)}
    return sorted(prefix for prefix in prefixes if _is_whole(prefix, family, layers, shapes))


def _is_whole(prefix: str, family: Family, layers: int, shapes: Shapes) -> bool:
    names = [f"{prefix}{family.layer}.{module}.weight" for module in _modules(family.qkv)]
    return all(_in_every_layer(name, layers, shapes) for name in names) and not any(
        name.replace("{layer}", str(layers)) in shapes for name in names
    )


def _the_prefix(prefixes: list[str], config: Mapping[str, Any], shapes: Shapes, family: Family) -> str | None:
    """The only prefix, or the only one, vision aside, whose first layer reads the hidden size; else None."""
    if len(prefixes) <= 1:
        return prefixes[0] if prefixes else None
    first = f"{family.layer.replace('{layer}', '0')}.{_modules(family.qkv)[0]}.weight"
    hidden = heads_of(config).hidden
    axis = 0 if family.in_out else 1
    fitting = [prefix for prefix in prefixes if shapes[prefix + first][axis] == hidden and "vision" not in prefix]
    return fitting[0] if len(fitting) == 1 else None
