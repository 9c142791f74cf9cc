"""The class of a checkpoint's model: the one that config.json names, or else the one that its type and tensors tell.

A configuration need not name a class, and some name one in an older spelling or from outside transformers. What
follows from it (whether a model predicts the next token, and so can be measured by its predictions) is decided here.
"""

from collections.abc import Collection, Mapping
from typing import Any

from headshare.architecture.config import text_config
from headshare.architecture.families import CAUSAL_CLASSES, TIED_OUTPUTS, WITH_IMAGES, family_of
from headshare.errors import CheckpointError


def class_name(config: Mapping[str, Any], tensors: Collection[str]) -> str | None:
    """The name of transformers' class for a model with this config.json and these tensors; None for the bare model.

    Where config.json names none that transformers has, a model is of the class that predicts the next token if there
    is one for its type and it holds an output embedding, of its own or tied to the input's.

    Raises:
        CheckpointError: if config.json does not name classes as a list.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"config.json has architectures {names!r:.100}; it should be a list.")
    named = str(names[0]) if names else ""
    kind = getattr(transformers, named, None) if named.isidentifier() else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return named
    model_type = str(config.get("model_type"))
    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if by_type is None or not predicts_next(by_type, config):
        return None
    has_head = any(name in tensors for name in TIED_OUTPUTS)
    return by_type if has_head or text_config(config).get("tie_word_embeddings") else None


def predicts_next(name: str | None, config: Mapping[str, Any]) -> bool:
    """Whether a model class of this name, with this config.json, predicts the next token."""
    family = family_of(str(config.get("model_type")))
    sees_what_follows = family is not None and family.encoder and not config.get("is_decoder", False)
    from_another_text = config.get("is_encoder_decoder", False)
    return (name or "").endswith(CAUSAL_CLASSES) and not sees_what_follows and not from_another_text


def reads_images(name: str | None) -> bool:
    """Whether a model class of this name reads images too."""
    return (name or "").endswith(WITH_IMAGES)
