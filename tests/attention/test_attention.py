"""Attention maps against transformers' own, and what is said of them against loops and scipy-like definitions."""

from pathlib import Path

import pytest
import torch

import headshare as hs
from headshare.attention.maps import map_products
from support import tiny


def stock_maps(name: str, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Layers x heads x windows x window x window, by transformers."""
    model = tiny.FAMILIES[name][0].from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.stack(model(tokens, output_attentions=True).attentions).transpose(1, 2).double()


def cosines(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)


@pytest.mark.parametrize("name", sorted(tiny.FAMILIES))
def test_similarities_are_those_of_the_maps_that_transformers_gives(name: str, tmp_path: Path) -> None:
    folder, tokens = tiny.make(name, tmp_path / "dense"), tiny.tokens(10, 3)
    found = map_products(hs.open_checkpoint(folder), tokens)
    maps = stock_maps(name, folder, tokens)
    assert (found.layers, found.heads, found.tokens, found.rows) == (4, 4, 30, 30)
    assert torch.allclose(found.by_head(), cosines(maps.flatten(2).flatten(0, 1)), atol=1e-5)
    assert torch.allclose(found.by_layer(), cosines(maps.mean(1).flatten(1)), atol=1e-5)
    maps[..., 0] = 0
    assert torch.allclose(found.by_head(first=False), cosines(maps.flatten(2).flatten(0, 1)), atol=1e-5)
    assert torch.allclose(found.by_layer(first=False), cosines(maps.mean(1).flatten(1)), atol=1e-5)
