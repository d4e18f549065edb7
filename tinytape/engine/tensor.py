"""`Tensor`: an array, and its place on the tape.

Who owns memory is simple. A leaf (made by `tensor`, a creation function or `copy`) owns its memory and can be
written in place; writing raises the storage's number, so that a walk over records that kept the old values is an
error and never a wrong gradient. The result of an op is a value: nobody can write into it while the tape may hold
it, and the first write to an untracked result gives it memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from .errors import DTypeError, InputError, ShapeError, TapeError
from .operators import Operators
from .tape import Leaf, Node, Storage, enable_grad, here, no_grad, take_number, walk
from .tree import Array, is_array

if TYPE_CHECKING:
    from .op import OpFunction

__all__ = ["Tensor", "default_dtype", "gradient", "set_default_dtype", "tensor"]

_default_dtype: np.dtype[Any] = np.dtype(np.float32)


def default_dtype() -> np.dtype[Any]:
    """The dtype of tensors made from Python floats: float32 unless `set_default_dtype` said otherwise."""
    return _default_dtype


def set_default_dtype(dtype: npt.DTypeLike) -> None:
    """Set the dtype of tensors made from Python floats and of integers that meet a float function.

    Raises
    ------
    DTypeError
        If `dtype` is not a float dtype.
    """
    global _default_dtype
    try:
        found = np.dtype(dtype if cast(Any, dtype) is not None else np.object_)  # NumPy takes None for float64
    except TypeError as error:
        raise DTypeError(f"set_default_dtype: {error}.", "use 'float32' or 'float64'.") from error
    if found.kind != "f":
        raise DTypeError(f"set_default_dtype: dtype is {found}, not a float.", "use 'float32' or 'float64'.")
    _default_dtype = found


class Tensor(Operators):
    """An array that can be differentiated.

    Parameters
    ----------
    data : array_like
        Copied. Arrays and NumPy scalars keep their dtype; Python floats, alone or in lists, become
        `default_dtype`.
    requires_grad : bool
        Whether to collect gradients here. Default False.
    dtype : dtype, optional

    Raises
    ------
    DTypeError
        If the data are not floats, integers or bools, or if gradients are asked of integers or bools.
    ShapeError
        If nested lists are of unequal lengths.
    """

    __slots__ = ("raw", "node", "storage", "__weakref__")

    raw: Array  # nobody but the methods below writes into it
    node: Node | None
    storage: Storage | None

    def __init__(self, data: Any, requires_grad: bool = False, dtype: npt.DTypeLike | None = None) -> None:
        self.raw = _to_array(data, dtype)
        self.node = None
        self.storage = Storage()
        if requires_grad:
            self.requires_grad = True

    @staticmethod
    def of(data: Array, node: Node | None = None, storage: Storage | None = None) -> Tensor:
        """A tensor around an array that nobody else may write."""
        made = object.__new__(Tensor)
        made.raw, made.node, made.storage = data, node, storage
        return made

    # ---- what it is ---------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    @property
    def ndim(self) -> int:
        return self.raw.ndim

    @property
    def size(self) -> int:
        return self.raw.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.raw.dtype

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    @property
    def data(self) -> Array:
        """The values as a read-only view; writes go through `copy_`, ``+=``, ``x[i] = v`` and the optimisers."""
        view = self.values_for("data").view()
        view.flags.writeable = False
        return view

    def numpy(self) -> Array:
        """The values as an array of the caller's own."""
        return self.values_for("numpy()").copy()

    def item(self) -> Any:
        """The one value as a Python number.

        Raises
        ------
        ShapeError
            If there is not exactly one.
        """
        if self.raw.size != 1:
            raise ShapeError(
                f"item(): the tensor has shape {self.shape}, so {self.size} values, not 1.", "index it, or reduce it."
            )
        return self.values_for("item()").item()

    def tolist(self) -> Any:
        return self.values_for("tolist()").tolist()

    @property
    def requires_grad(self) -> bool:
        """Whether gradients reach this tensor. Setting it makes a leaf of a constant, and the other way round."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted == (self.node is not None):
            return
        _refuse_in_trace("requires_grad")
        if self.node is not None and not isinstance(self.node, Leaf):
            raise TapeError(
                f"requires_grad = False on the result of {self.node!r}.", "use detach() for a constant of its values."
            )
        if wanted and self.raw.dtype.kind != "f":
            raise DTypeError(
                f"requires_grad: the tensor has dtype {self.dtype}; only floats have gradients.",
                "use astype('float32').",
            )
        self.node = Leaf(self.shape, self.dtype, self.storage) if wanted else None

    @property
    def is_leaf(self) -> bool:
        """Whether it is not the recorded result of an op."""
        return self.node is None or isinstance(self.node, Leaf)

    @property
    def grad(self) -> Tensor | None:
        """What `backward` has accumulated for this leaf, of its own shape and dtype. None for other tensors."""
        node = self.node
        if not isinstance(node, Leaf):
            return None
        grad = node.grad
        if grad.__class__ is np.ndarray:
            grad = node.grad = Tensor.of(grad, None, Storage())
        return grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if not isinstance(self.node, Leaf):
            if value is None:
                return
            raise TapeError("grad: only a leaf that requires gradients has one.", "set requires_grad = True first.")
        if value is not None:
            value = value if isinstance(value, Tensor) else Tensor(value, dtype=self.dtype)
            if value.node is None and value is not self.grad:
                value = value.copy()  # backward() adds to it in place: it must be nobody else's
            if value.shape != self.shape or value.dtype != self.dtype:
                raise ShapeError(
                    f"grad: {value.dtype}{list(value.shape)} for a tensor {self.dtype}{list(self.shape)}.",
                    "a gradient has its tensor's own shape and dtype.",
                )
        self.node.grad = value

    # ---- gradients ----------------------------------------------------------------------------------------------

    def backward(self, gradient: Any = None, retain_graph: bool = False, create_graph: bool = False) -> None:
        """Add dself/dleaf to the ``.grad`` of every leaf that this tensor was computed from.

        Parameters
        ----------
        gradient : array_like, optional
            dL/dself, of this tensor's shape. Default 1, for a tensor with one element.
        retain_graph : bool
            Keep the records for another walk. Default: free each as it is passed, unless `create_graph`.
        create_graph : bool
            Record the walk itself, so that the gradients can be differentiated.

        Raises
        ------
        ShapeError
            If the tensor has several elements and no `gradient` is given, or its shape differs.
        TapeError
            If nothing was recorded, if the records were freed by an earlier walk, or if values that they kept
            were written since. Nothing is changed then.
        """
        seeds = {_tracked(self, "backward"): _seed(self, gradient, "backward", create_graph)}
        context = here.context
        was, context.recording = context.recording, create_graph
        try:
            found = walk(seeds, free=not (retain_graph or create_graph), differentiable=create_graph)
            for leaf, arrived in cast("dict[Leaf, Any]", found).items():
                before = leaf.grad
                if before is None:
                    leaf.grad = _of_its_own(arrived) if create_graph else arrived
                elif create_graph:
                    leaf.grad = before + arrived if isinstance(before, Tensor) else Tensor(before) + arrived
                elif not isinstance(before, Tensor):
                    np.add(before, arrived, out=before)
                elif before.node is None:
                    total = before.writable()
                    np.add(total, arrived, out=total)
                else:  # left by create_graph: others may depend on it
                    leaf.grad = Tensor(before.raw + arrived)
        finally:
            context.recording = was

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Call `hook` with this tensor's gradient whenever a walk has completed it.

        Parameters
        ----------
        hook : callable
            Takes the gradient as a Tensor; what it returns, unless None, takes the gradient's place.

        Returns
        -------
        callable
            Call it to remove the hook.
        """
        node = _tracked(self, "register_hook")
        shape, dtype = node.shape, node.dtype  # `run` must not hold the node, which holds `run`

        def run(gradient: Any) -> Any:
            replaced: Any = hook(gradient if isinstance(gradient, Tensor) else Tensor(gradient))
            if replaced is None:
                return None
            if not isinstance(replaced, Tensor):
                replaced = Tensor(replaced, dtype=dtype)
            if replaced.shape != shape or replaced.dtype != dtype:
                raise ShapeError(
                    f"register_hook: the hook returned {replaced.dtype}{list(replaced.shape)} for a gradient "
                    f"{dtype}{list(shape)}.",
                    "return a gradient of the same shape and dtype, or None to leave it as it is.",
                )
            return replaced if isinstance(gradient, Tensor) else replaced.raw

        if node.hooks is None:
            node.hooks = []
        hooks = node.hooks
        hooks.append(run)
        return lambda: hooks.remove(run) if run in hooks else None

    def detach(self) -> Tensor:
        """The same values as a constant: no gradient passes. Nothing of the graph is kept alive."""
        return Tensor.of(self.raw, None, self.storage)

    def copy(self) -> Tensor:
        """A constant with memory of its own."""
        _refuse_in_trace("copy()")
        return Tensor(self.raw)

    # ---- writing ------------------------------------------------------------------------------------------------

    def copy_(self, values: Any) -> Tensor:
        """Write `values`, broadcast to this tensor's shape and cast to its dtype, in place.

        Raises
        ------
        TapeError
            If the tensor is a recorded result, or a leaf that requires gradients outside of `no_grad`.
        ShapeError
            If the values do not broadcast to the shape.
        """
        self._write(..., values, "copy_")
        return self

    def __setitem__(self, index: Any, values: Any) -> None:
        self._write(index, values, "x[index] = values")

    def _write(self, index: Any, values: Any, what: str) -> None:
        if isinstance(values, Tensor):
            if values.node is not None and here.context.recording:
                raise TapeError(
                    f"{what}: the values require gradients, and a write is not recorded.",
                    "use tt.index_put(x, index, values) or tt.where, or write values.detach().",
                )
            values = values.raw
        values = _to_write(values, what)
        before = self.storage and self.storage.written
        target = self.writable(what)
        index = _plain_index(index)
        try:
            target[index] = values
        except (ValueError, TypeError, IndexError) as error:
            if self.storage and before:
                self.storage.written = before  # nothing was
            text = f"{what}: {values.shape} into {target.dtype}{list(self.shape)}: {error}."
            if isinstance(error, IndexError):
                raise InputError(text, "an index is what x[index] takes.") from error
            raise ShapeError(text, "the values must broadcast to what is written.") from error

    def writable(self, what: str = "write") -> Array:
        """The array to write into, its storage marked as written."""
        _refuse_in_trace(what)
        if self.node is not None:
            if not isinstance(self.node, Leaf):
                raise TapeError(
                    f"{what}: this tensor is the result of {self.node!r}, which the tape may still need.",
                    "write into x.detach().copy(), or compute a new tensor: tt.index_put, tt.where, x = x + y.",
                )
            if here.context.recording:
                raise TapeError(
                    f"{what}: a leaf of shape {self.shape} that requires gradients is written while recording.",
                    "put the write inside `with tt.no_grad():`, or compute a new tensor.",
                )
        if self.storage is None or self.raw.base is not None:  # an op's result: the tape may hold this memory
            self.raw = self.raw.copy()
            self.storage = Storage()
            if isinstance(self.node, Leaf):
                self.node.storage = self.storage
        self.storage.written = take_number()
        return self.raw

    def in_place(self, other: Any, compute: OpFunction[...], what: str) -> Tensor:
        """``x += y``: a write for plain tensors, ``x = x + y`` where the tape records."""
        tracked = self.node is not None or (isinstance(other, Tensor) and other.node is not None)
        if tracked and here.context.recording and not isinstance(self.node, Leaf):
            if here.context.rule is not None:
                raise TapeError(_RULE.format(what, here.context.rule), _RULE_ADVICE)
            return compute(self, other)
        if here.context.traced is not None and (self.storage is None or self.raw.base is not None):
            return compute(self, other)  # a result, not a tensor from outside
        _refuse_in_trace(what)
        values = compute(self.detach(), other.detach() if isinstance(other, Tensor) else other)
        if values.shape != self.shape:
            raise ShapeError(
                f"{what}: the result has shape {values.shape}, x has {self.shape}.", f"write x = x {what[2]} y."
            )
        if not np.can_cast(values.dtype, self.dtype, "same_kind"):
            raise DTypeError(
                f"{what}: the result has dtype {values.dtype}, x has {self.dtype}.", f"write x = x {what[2]} y."
            )
        return self.copy_(values)

    # ---- Python's and NumPy's protocols -------------------------------------------------------------------------

    def values_for(self, what: str) -> Array:
        _refuse_in_trace(what)
        if here.context.rule is not None and self.node is not None:
            raise TapeError(_RULE.format(what, here.context.rule), _RULE_ADVICE)
        return self.raw

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        values = self.values_for("a NumPy function that takes the bare array")
        if here.context.depth and self.node is not None:
            raise TapeError(
                "np.asarray, or a NumPy function that uses it, on a Tensor that is being differentiated: it would "
                "drop the derivative.",
                "use tt.stack for a list of tensors and ops of tinytape, or x.detach() to drop it on purpose.",
            )
        if copy or (dtype is not None and np.dtype(dtype) != values.dtype):
            return values.astype(dtype or values.dtype)
        return self.data

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **options: Any) -> Any:
        found = UFUNCS.get(ufunc)
        if found is None or method != "__call__" or options:
            extra = "" if method == "__call__" else f".{method}"
            extra += f" with {', '.join(options)}" if options else ""
            raise DTypeError(
                f"np.{ufunc.__name__}{extra} has no derivative rule for a Tensor.",
                "use a tinytape function"
                f"{' without these options' if options else ''}, or pass x.data for plain NumPy.",
            )
        return found(*args)

    def __array_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        found = FUNCTIONS.get(function)
        if found is not None:
            return found(*args, **options)
        if function not in _QUESTIONS and (_any_tracked(args) or _any_tracked(options.values())):
            raise DTypeError(
                f"np.{function.__name__} has no derivative rule for a Tensor.",
                "use a tinytape function, or pass x.data for plain NumPy.",
            )
        return function(*_bare(args), **dict(zip(options, _bare(tuple(options.values())), strict=True)))

    def __dlpack__(self, **options: Any) -> Any:
        """A copy, so that the receiver may write into it."""
        return self.values_for("__dlpack__").copy().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.raw.__dlpack_device__()  # type: ignore[reportReturnType]

    def __bool__(self) -> bool:
        if self.raw.size != 1:
            raise ShapeError(
                f"bool(): the tensor has shape {self.shape}, so {self.size} truth values, not 1.", "use any() or all()."
            )
        _refuse_in_trace("bool()")
        if here.context.rule is not None:  # also of a constant: `if g > 0` asks one
            raise TapeError(_RULE.format("bool()", here.context.rule), _RULE_ADVICE)
        return bool(self.raw.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.raw.dtype.kind not in "iu":
            raise DTypeError(f"index: a tensor of dtype {self.dtype}; an index is an integer.", "use astype('int64').")
        return int(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __len__(self) -> int:
        if not self.raw.ndim:
            raise ShapeError("len(): a 0-d tensor has no length.", "use item() for its value.")
        return len(self.raw)

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if self.node is not None and not isinstance(self.node, Leaf):
            raise TapeError(f"deepcopy of the result of {self.node!r}.", "copy x.detach().")
        made = object.__new__(type(self))
        Tensor.__init__(made, self.raw, requires_grad=self.node is not None)
        if self.grad is not None:
            made.grad = self.grad.copy()
        memo[id(self)] = made
        return made

    def __reduce__(self) -> Any:
        return (type(self), (self.numpy(), self.node is not None))

    def __repr__(self) -> str:
        text = np.array2string(self.raw, separator=", ", prefix="tensor(", threshold=200)
        dtype = "" if self.dtype in (_default_dtype, np.int64, np.bool_) else f", dtype={self.dtype}"
        if isinstance(self.node, Leaf):
            return f"tensor({text}{dtype}, requires_grad=True)"
        return f"tensor({text}{dtype}{'' if self.node is None else f', op={self.node.name}'})"


UFUNCS: dict[np.ufunc, Callable[..., Any]] = {}
"""What a NumPy ufunc means on a Tensor. Filled where the ops are declared."""

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    np.shape: attrgetter("shape"),
    np.ndim: attrgetter("ndim"),
    np.size: attrgetter("size"),
}
"""What another NumPy function means on a Tensor."""

_QUESTIONS: set[Callable[..., Any]] = {np.allclose, np.array_equal, np.isclose, np.may_share_memory}
"""NumPy functions that answer about values, and so may be asked of tracked tensors; not in a rule."""

_RULE = "{}: on a tracked Tensor while {} runs on Tensors; it would drop the derivative."
_RULE_ADVICE = (
    "write it with NumPy functions and ops that return new arrays: no buffers, no branches on values, no .data."
)


def _refuse_in_trace(what: str) -> None:
    """A trace knows ops alone: what is done to values beside them would be done once, and not in every step."""
    traced = here.context.traced
    if traced is not None:
        raise TapeError(
            f"{what}: on a Tensor while {traced} is traced, to be compiled.", "use ops that return new tensors."
        )


def tensor(data: Any, requires_grad: bool = False, dtype: npt.DTypeLike | None = None) -> Tensor:
    """A leaf that holds a copy of `data`; parameters and errors as for `Tensor`."""
    return Tensor(data, requires_grad, dtype)


def gradient(
    target: Any, sources: list[Any], seed: Any = None, retain_graph: bool = False, create_graph: bool = False
) -> list[Tensor | None]:
    """dtarget/dsource for each source; None where there is no path. See `Tape.gradient`."""
    if not isinstance(target, Tensor):
        raise DTypeError(f"gradient: target is a {type(target).__name__}, not a Tensor.", "pass the loss.")
    seeds = {_tracked(target, "gradient"): _seed(target, seed, "gradient", create_graph)}
    nodes = [_tracked(source, "gradient", f"sources[{i}]") for i, source in enumerate(sources)]
    with enable_grad() if create_graph else no_grad():
        found = walk(seeds, set(nodes), free=not (retain_graph or create_graph), differentiable=create_graph)
    arrived = [found.get(node) for node in nodes]
    return [x if x is None else _of_its_own(x) for x in arrived]


def _tracked(value: Any, what: str, name: str = "the tensor") -> Node:
    if not isinstance(value, Tensor):
        raise DTypeError(f"{what}: {name} is a {type(value).__name__}, not a Tensor.", "pass a Tensor.")
    if value.node is None:
        raise TapeError(
            f"{what}: {name} (shape {value.shape}, dtype {value.dtype}) does not depend on anything that requires "
            "gradients.",
            "make the parameters with requires_grad=True, and compute outside of no_grad and after any detach().",
        )
    return value.node


def _of_its_own(gradient: Any) -> Tensor:
    """What a walk returned, with memory of its own: it may be shared with other leaves, or be a broadcast view."""
    if isinstance(gradient, Tensor) and gradient.node is not None:
        return Tensor.of(gradient.raw.copy(), gradient.node)
    return Tensor(gradient)


def _seed(target: Tensor, seed: Any, what: str, create_graph: bool) -> Any:
    if seed is None:
        if target.size != 1:
            raise ShapeError(
                f"{what}: starts from one number; this tensor has shape {target.shape}, so {target.size}.",
                "reduce it with sum() or mean(), or pass gradient= of the same shape.",
            )
        seed = np.ones(target.shape, target.dtype)
    else:
        found = seed.shape if is_array(seed) or isinstance(seed, Tensor) else np.shape(seed)
        if found != target.raw.shape:
            raise ShapeError(
                f"{what}: gradient has shape {found}, the tensor has {target.shape}.", "pass one of the same shape."
            )
        if isinstance(seed, Tensor) and not create_graph:
            seed = seed.raw
        # An array of the caller's goes through the walk as it is: what holds on to it, a hook or a leaf, takes a copy.
        if not isinstance(seed, Tensor) and not (is_array(seed) and seed.dtype == target.dtype and not create_graph):
            seed = Tensor(seed, dtype=target.dtype).raw
    return Tensor.of(seed) if create_graph and not isinstance(seed, Tensor) else seed


def _to_array(data: Any, dtype: npt.DTypeLike | None) -> Array:
    """A new array of floats, integers or bools, in C order."""
    if isinstance(data, Tensor):
        _refuse_in_trace("tensor()")
        data = data.raw
    if dtype is not None and np.iscomplexobj(data):
        raise DTypeError("tensor: data are complex.", "pass data.real or abs(data).")
    try:
        dtype = None if dtype is None else np.dtype(dtype)
    except TypeError as error:
        raise DTypeError(f"tensor: {error}.", "pass a dtype such as 'float32' or np.int64.") from error
    try:
        found = np.array(data, dtype=dtype, order="C")
    except (ValueError, TypeError) as error:
        raise ShapeError(
            f"tensor: cannot make an array of data: {error}.", "pass numbers, in lists of equal length."
        ) from error
    if dtype is None and found.dtype == np.float64 and _of_floats(data):
        found = found.astype(_default_dtype)
    if found.dtype.kind not in "fiub":
        raise DTypeError(f"tensor: data have dtype {found.dtype}.", "tensors are of floats, integers or bools.")
    if not found.dtype.isnative:
        found = found.astype(found.dtype.newbyteorder("="))
    return found


def _of_floats(data: Any) -> bool:
    """Whether nested lists hold Python numbers and not arrays or NumPy scalars, which keep their dtype."""
    while isinstance(data, list | tuple):
        items = cast("list[Any] | tuple[Any, ...]", data)
        if not items:
            return True
        data = items[0]
    return not isinstance(data, np.ndarray | np.generic | Tensor)


def _to_write(values: Any, what: str) -> Array:
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise ShapeError(
            f"{what}: no array can be made of the values: {error}.", "pass lists of equal length."
        ) from error
    if found.dtype.kind not in "fiub":
        raise DTypeError(f"{what}: the values have dtype {found.dtype}.", "write floats, integers or bools.")
    return found


def _plain_index(index: Any) -> Any:
    if isinstance(index, Tensor):
        return index.raw
    return tuple(map(_plain_index, cast("tuple[Any, ...]", index))) if isinstance(index, tuple) else index


def _any_tracked(values: Any) -> bool:
    return any(
        v.node is not None if isinstance(v, Tensor) else _any_tracked(v) if isinstance(v, list | tuple) else False
        for v in values
    )


def _bare(values: Any) -> Any:
    return tuple(
        v.values_for("a NumPy function") if isinstance(v, Tensor) else _bare(v) if isinstance(v, list | tuple) else v
        for v in values
    )
