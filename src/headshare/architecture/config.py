"""A checkpoint's configuration with its family's defaults filled in, as a plain dictionary of its text model."""

from collections.abc import Mapping
from typing import Any

from headshare.errors import ArchitectureError
from headshare.files.untrusted import foreign


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's settings, defaults included where transformers knows the model type; no remote code is run.

    Raises:
        ArchitectureError: if transformers knows the type and refuses the values.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(raw.get("model_type", "unknown"))
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    if model_type not in CONFIG_MAPPING:
        nested = plain.get("text_config")
        return {**plain, **nested} if isinstance(nested, dict) else plain
    with foreign(f"config.json is not a valid '{model_type}' configuration", ArchitectureError):
        config = CONFIG_MAPPING[model_type].from_dict(plain).get_text_config()
        names = {*config.to_dict(), *getattr(config, "attribute_map", {})}
        return {name: getattr(config, name, None) for name in names} | {"model_type": model_type}
