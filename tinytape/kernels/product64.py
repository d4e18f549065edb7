"""Matrix products of float64, as `product` describes them."""

# pyright: basic

from __future__ import annotations

import numpy as np

from .product import bind

__all__ = [
    "column_sums",
    "outer_product",
    "outer_scratch",
    "pack",
    "pack_panels",
    "packed_size",
    "panels",
    "product",
    "product_steps",
]

_bound = bind(np.float64)

panels = _bound.panels
packed_size = _bound.packed_size
pack = _bound.pack
pack_panels = _bound.pack_panels
product = _bound.product
product_steps = _bound.product_steps
outer_scratch = _bound.outer_scratch
outer_product = _bound.outer_product
column_sums = _bound.column_sums
