"""Attention maps: how alike heads and layers attend on real text, and whether weights tell it.

Maps of all heads are made a few windows at a time, layer by layer, and only their inner products are kept. Chooses
nothing, and changes no model.
"""

from typing import TYPE_CHECKING

from headshare.lazy import lazy_names

if TYPE_CHECKING:
    from headshare.attention.analysis import attention
    from headshare.attention.maps import MapProducts, map_products
    from headshare.attention.result import AttentionResult
    from headshare.attention.weights import similarities
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "headshare.attention.analysis": "attention",
            "headshare.attention.maps": "MapProducts map_products",
            "headshare.attention.result": "AttentionResult",
            "headshare.attention.weights": "similarities",
        },
    )

__all__ = ["AttentionResult", "MapProducts", "attention", "map_products", "similarities"]
