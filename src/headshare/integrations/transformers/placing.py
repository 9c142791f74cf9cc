"""Devices of a model's modules, from a device map as transformers has resolved it."""

from typing import Any


def device_of(path: str, device_map: Any) -> str:
    """The device of a module, by the longest of the map's keys that it lies under. Numbers are CUDA devices."""
    places = device_map if isinstance(device_map, dict) else {"": device_map or "cpu"}
    above = [key for key in places if not key or path == key or path.startswith(f"{key}.")]
    return _device_name(places[max(above, key=len)] if above else "cpu")


def device_types(device_map: Any) -> set[str]:
    """Kinds of devices (cpu, cuda, disk) in a device map that transformers has resolved. Numbers are CUDA devices."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
    return {_device_name(place).partition(":")[0] for place in places}


def _device_name(place: Any) -> str:
    return f"cuda:{place}" if isinstance(place, int) else str(place)
