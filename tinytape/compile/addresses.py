"""Where arrays lie in memory, as kernels are told."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..engine.tree import Array
from ..kernels.address import HEAD, address_of

__all__ = ["bases_of"]


def bases_of(arrays: Sequence[Array], addresses: Sequence[int]) -> bytes:
    """What `kernels.table.addressed` takes: arrays, which must live on, and after them addresses."""
    words = f"{1 + len(arrays) + len(addresses)}q"
    if HEAD:
        return struct.pack(words, len(arrays), *map(id, arrays), *addresses)
    return struct.pack(words, 0, *map(address_of, arrays), *addresses)
