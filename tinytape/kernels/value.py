"""Values while LLVM code is being written: numbers and vectors with Python's operators.

A `Value` stands for a register. Adding two writes an instruction and gives the register that it fills, so that a
formula in `maths` reads as one, and is written straight into the kernel that calls it. Python numbers become
constants of the other side's type. Nothing is reordered and nothing is contracted: `fma` says where a product is
added without rounding.
"""

# pyright: basic

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .processor import FUSED

__all__ = ["Value", "call", "fma", "select", "splat"]

_WORD = ir.IntType(32)


class Value:
    """A register of floats, integers or bits: one, or a vector of them.

    Parameters
    ----------
    builder : ir.IRBuilder
        Where instructions are written.
    raw : ir.Value
        The register in LLVM's terms.
    """

    __slots__ = ("builder", "raw")

    def __init__(self, builder: ir.IRBuilder, raw: Any) -> None:  # to llvmlite's annotations few values have a type
        self.builder = builder
        self.raw = raw

    # ---- types ----

    @property
    def lanes(self) -> int:
        """How many elements, and 0 for a plain number."""
        return self.raw.type.count if isinstance(self.raw.type, ir.VectorType) else 0

    @property
    def element(self) -> ir.Type:
        """The type of one element."""
        return self.raw.type.element if self.lanes else self.raw.type

    @property
    def is_double(self) -> bool:
        """Whether elements have 64 bits."""
        return self.element in (ir.DoubleType(), ir.IntType(64))

    def shaped(self, element: ir.Type) -> ir.Type:
        """The type of as many elements of another kind."""
        return ir.VectorType(element, self.lanes) if self.lanes else element

    def constant(self, number: Any) -> Value:
        """A number in every lane, in this value's type."""
        content = [ir.Constant(self.element, number)] * self.lanes if self.lanes else number
        return self.new(ir.Constant(self.raw.type, content))

    def new(self, raw: Any) -> Value:
        """Another register of the same program."""
        return Value(self.builder, raw)

    # ---- bits ----

    @property
    def bits(self) -> Value:
        """The same bits, as integers."""
        return self.new(self.builder.bitcast(self.raw, self.shaped(ir.IntType(64 if self.is_double else 32))))

    @property
    def floats(self) -> Value:
        """The same bits, as floats."""
        return self.new(
            self.builder.bitcast(self.raw, self.shaped(ir.DoubleType() if self.is_double else ir.FloatType()))
        )

    # ---- operators ----

    def _is_float(self) -> bool:
        return isinstance(self.element, ir.FloatType | ir.DoubleType)

    def _with(self, other: Any, on_floats: str, on_integers: str = "", swap: bool = False) -> Value:
        other = other if isinstance(other, Value) else self.constant(other)
        left, right = (other, self) if swap else (self, other)
        instruction = getattr(self.builder, on_floats if self._is_float() else on_integers)
        return self.new(instruction(left.raw, right.raw))

    def __add__(self, other: Any) -> Value:
        return self._with(other, "fadd", "add")

    def __radd__(self, other: Any) -> Value:
        return self._with(other, "fadd", "add", swap=True)

    def __sub__(self, other: Any) -> Value:
        return self._with(other, "fsub", "sub")

    def __rsub__(self, other: Any) -> Value:
        return self._with(other, "fsub", "sub", swap=True)

    def __mul__(self, other: Any) -> Value:
        return self._with(other, "fmul", "mul")

    def __rmul__(self, other: Any) -> Value:
        return self._with(other, "fmul", "mul", swap=True)

    def __truediv__(self, other: Any) -> Value:
        return self._with(other, "fdiv")

    def __rtruediv__(self, other: Any) -> Value:
        return self._with(other, "fdiv", swap=True)

    def __neg__(self) -> Value:
        return self.new(self.builder.fneg(self.raw))

    def __lshift__(self, other: int) -> Value:
        return self._with(other, "", "shl")

    def __rshift__(self, other: int) -> Value:
        """Shift to the right, zeros coming in."""
        return self._with(other, "", "lshr")

    def __and__(self, other: Any) -> Value:
        return self._with(other, "", "and_")

    def __or__(self, other: Any) -> Value:
        return self._with(other, "", "or_")

    def __xor__(self, other: Any) -> Value:
        return self._with(other, "", "xor")

    # ---- comparisons: one bit a lane ----

    def compare(self, relation: str, other: Any, or_nan: bool = False) -> Value:
        """Bits that say where `relation` holds, also (`or_nan`) where either side is NaN."""
        other = other if isinstance(other, Value) else self.constant(other)
        if not self._is_float():
            return self.new(self.builder.icmp_signed(relation, self.raw, other.raw))
        instruction = self.builder.fcmp_unordered if or_nan else self.builder.fcmp_ordered
        return self.new(instruction(relation, self.raw, other.raw))

    def __lt__(self, other: Any) -> Value:
        return self.compare("<", other)

    def __le__(self, other: Any) -> Value:
        return self.compare("<=", other)

    def __gt__(self, other: Any) -> Value:
        return self.compare(">", other)

    def __ge__(self, other: Any) -> Value:
        return self.compare(">=", other)

    def equals(self, other: Any) -> Value:
        """Bits that say where the sides are equal."""
        return self.compare("==", other)

    def differs(self, other: Any) -> Value:
        """Bits that say where the sides are not equal, as NaN is to everything."""
        return self.compare("!=", other, or_nan=True)

    def is_nan(self) -> Value:
        """Bits that say where this is NaN."""
        return self.compare("uno", self, or_nan=True)


def splat(number: Value, lanes: int) -> Value:
    """A vector with the same number in every lane."""
    vector = ir.VectorType(number.raw.type, lanes)
    first = number.builder.insert_element(ir.Constant(vector, ir.Undefined), number.raw, ir.Constant(_WORD, 0))
    zeros = ir.Constant(ir.VectorType(_WORD, lanes), None)
    return number.new(number.builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros))


def select(condition: Value, a: Any, b: Any) -> Value:
    """`a` where the bits of `condition` are set, `b` elsewhere; one of both may be a Python number."""
    if not isinstance(a, Value):
        a = b.constant(a)
    elif not isinstance(b, Value):
        b = a.constant(b)
    return a.new(a.builder.select(condition.raw, a.raw, b.raw))


def call(name: str, *arguments: Value) -> Value:
    """LLVM's function ``llvm.<name>`` of arguments of one type, such as ``"sqrt"`` or ``"fabs"``."""
    first = arguments[0]
    suffix = (f"v{first.lanes}" if first.lanes else "") + ("f64" if first.is_double else "f32")
    signature = ir.FunctionType(first.raw.type, [first.raw.type] * len(arguments))
    function = cgutils.get_or_insert_function(first.builder.module, signature, f"llvm.{name}.{suffix}")
    return first.new(first.builder.call(function, [argument.raw for argument in arguments]))


def fma(a: Value, b: Any, c: Any) -> Value:
    """``a * b + c``, rounded once where the machine can."""
    if not FUSED:
        return a * b + c
    b, c = (x if isinstance(x, Value) else a.constant(x) for x in (b, c))
    return call("fma", a, b, c)
