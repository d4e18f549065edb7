"""Vectors of float32: everything that a kernel of this dtype may use, under plain names."""

# pyright: basic
# ruff: noqa: F401, F403 - this module is a list of names from others

from numba import types

from . import processor
from .arithmetic import *
from .maths import *
from .memory import Memory, store, store_strided
from .trigonometry import *
from .vector import largest, only, smallest, total

LANES = processor.LANES[4]

_memory = Memory(types.float32)

load = _memory.load()
strided = _memory.strided()
get = _memory.get()
put = _memory.put()
fill = _memory.fill()
prefetch = _memory.prefetch()
