"""Calling an op: compute on arrays and, where an argument is tracked, record a node.

`call` says what a call means. Ops with a fixed number of arguments have the same steps written out (`_WRITTEN`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .errors import DTypeError, InputError, ShapeError, TinytapeError
from .tape import Node, Part, Storage, here, take_number
from .tensor import Tensor, default_dtype
from .tree import Array, is_array

if TYPE_CHECKING:
    from .op import Op

__all__ = ["ALL_ARGUMENTS", "NOT_A_VALUE", "OUT", "bind_options", "call", "unwritten"]

OUT, NOT_A_VALUE, ALL_ARGUMENTS = -1, -2, -3  # see Op.sources


def call(declared: Op, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What calling an op means: compute on arrays and, if an argument is tracked, record a node."""
    if not any(isinstance(x, Tensor) for x in args):
        return declared.forward(*args, **options)
    data = tuple(x.raw if isinstance(x, Tensor) else operand(x, declared) for x in args)
    nodes = tuple(x.node if isinstance(x, Tensor) else None for x in args)
    storages = tuple(x.storage if isinstance(x, Tensor) else None for x in args)
    context = here.context
    try:
        out = declared.forward(*data, **options)
    except TinytapeError:
        raise  # not from itself: that would be a cycle, which keeps the graph alive
    except NUMPYS_ERRORS as error:
        raise explain(declared, error, data) from error
    if declared.several:
        outs = tuple(fresh(x, data) for x in out)
    else:
        data, settled = settle(declared, fresh(out, data), data, options)
        outs = (settled,)
    floats = any(x.dtype.kind == "f" for x in outs)
    if not floats or declared.kind == "constant" or all(n is None for n in nodes) or not context.recording:
        results = tuple(result(x, None, data, storages) for x in outs)
        returned = results if declared.several else results[0]
        if context.tape is not None:
            context.tape.note(declared, args, options, returned)
        return returned
    kept, watched = _keep(declared, args, data, nodes, storages, options, outs[0])
    shapes, dtypes = tuple(x.shape for x in outs), tuple(x.dtype for x in outs)
    if not declared.several:
        shapes, dtypes = shapes[0], dtypes[0]
    node = Node(take_number(), declared, nodes, kept, shapes, dtypes, watched, context.step)
    if declared.several:  # a result that cannot be differentiated (indices) is a constant
        heads = [Part(node, i) if x.dtype.kind == "f" else None for i, x in enumerate(outs)]
    else:
        heads = [node]
    results = tuple(result(x, head, data, storages) for x, head in zip(outs, heads, strict=True))
    returned = results if declared.several else results[0]
    if context.tape is not None:
        context.tape.append(node, args, options, returned)
    return returned


def _keep(
    declared: Op,
    args: tuple[Any, ...],
    data: tuple[Any, ...],
    nodes: tuple[Node | None, ...],
    storages: tuple[Storage | None, ...],
    options: dict[str, Any],
    out: Any,
) -> tuple[tuple[Any, ...], tuple[Storage | None, ...] | None]:
    """The values that the rule asks for, and the leaves' memory among them."""
    kept: list[Any] = []
    watched: list[Storage | None] = []
    for name, source in zip(declared.needs, declared.sources, strict=True):
        if name == "out":
            kept.append(out if out.base is None else apart(out, data, storages))
        elif name == "wants":
            kept.append(tuple(n is not None for n in nodes))
        elif name.endswith("_shape") and name not in options:
            shapes = tuple(shape_of(x) for x in data)
            kept.append(shapes if declared.variadic else shapes[declared.arguments.index(name[:-6])])
        elif source == ALL_ARGUMENTS:
            kept.append(tuple(own(x) if x is y else x for x, y in zip(data, args, strict=True)))
            watched.extend(storages)
        elif source >= 0:
            kept.append(own(data[source]) if data[source] is args[source] else data[source])
            watched.append(storages[source])
        else:
            kept.append(options[name])
    return tuple(kept), tuple(watched) if any(s is not None for s in watched) else None


def operand(value: Any, declared: Op) -> Any:
    """An argument that is not a Tensor. Numbers stay numbers: NumPy then lets the other side's dtype win."""
    kind = value.__class__
    if kind is float or kind is int or kind is bool:
        return value
    if is_array(value) or isinstance(value, np.generic):
        value = cast(Array, value)
        if value.dtype.kind not in "fiub":
            raise DTypeError(
                f"{declared.name}: an argument has dtype {value.dtype}.", "tensors are of floats, integers or bools."
            )
        return value if value.ndim else value.item()
    if isinstance(value, list | tuple):
        refuse_tracked(value, declared)
        return Tensor(value).raw
    raise DTypeError(f"{declared.name}: an argument is a {kind.__name__}.", "pass a Tensor, an array or a number.")


def refuse_tracked(values: Any, declared: Op) -> None:
    """A list of Tensors as one argument would be taken for numbers, and lose their derivatives."""
    for value in values:
        if isinstance(value, Tensor):
            if value.node is not None:
                raise DTypeError(
                    f"{declared.name}: an argument is a {type(values).__name__} with Tensors that require gradients.",
                    "join them first: tt.stack([...]).",
                )
        elif isinstance(value, list | tuple):
            refuse_tracked(value, declared)


def own(value: Any) -> Any:
    """A user's array that the tape is to keep is copied: nobody can then write into it."""
    return value.copy() if is_array(value) else value


def fresh(out: Any, data: tuple[Any, ...]) -> Any:
    """The result as an array that is no other tensor's."""
    if isinstance(out, Tensor) and out.node is not None:
        raise DTypeError(
            "an op's function returned a Tensor that requires gradients: an option was one, or one from outside.",
            "only arguments are differentiated: pass option.item(), or write the formula with ops that take both.",
        )
    kind, out = type(out).__name__, np.asarray(out)
    if out.dtype.kind not in "fiub":
        raise DTypeError(f"an op's function returned a {kind}, not an array.", "return floats, integers or bools.")
    return out.view() if any(out is x for x in data) else out


def shape_of(value: Any) -> tuple[int, ...]:
    return getattr(value, "shape", ())


def result(out: Any, node: Node | None, data: tuple[Any, ...], storages: tuple[Storage | None, ...]) -> Tensor:
    return Tensor.of(out, node, None if out.base is None else shared(out, data, storages))


def shared(out: Any, data: tuple[Any, ...], storages: tuple[Storage | None, ...]) -> Storage | None:
    """The storage whose memory `out` is a view of."""
    for array, storage in zip(data, storages, strict=True):
        if storage is not None and np.may_share_memory(out, array):
            return storage
    return None


def apart(out: Any, data: tuple[Any, ...], storages: tuple[Storage | None, ...]) -> Any:
    """A result that the tape keeps, not in memory that a leaf owns: that may be written."""
    return out if shared(out, data, storages) is None else out.copy()


def settle(declared: Op, out: Any, data: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The floats that came in decide; without any, the default. NumPy makes float64 of int64, and float16 of int8."""
    if out.dtype.kind != "f" or not declared.promotes:
        return data, out
    floats = [x.dtype for x in data if is_array(x) and x.dtype.kind == "f"]
    target = max(floats, key=_size_of) if floats else default_dtype()
    if target == out.dtype:
        return data, out
    data = tuple([x.astype(target) if is_array(x) and x.dtype != target else x for x in data])
    return data, np.asarray(declared.forward(*data, **options)).astype(target, copy=False)


def _size_of(dtype: np.dtype[Any]) -> int:
    return dtype.itemsize


NUMPYS_ERRORS = (ValueError, TypeError, IndexError, ArithmeticError, MemoryError)
"""What NumPy raises where arguments do not fit. Anything else comes from a user's own function, and is his."""


def explain(declared: Op, error: Exception, data: tuple[Any, ...]) -> Exception:
    """NumPy's error as one of ours, with the shapes and dtypes that met."""
    names = declared.arguments * len(data) if declared.variadic else declared.arguments
    found = ", ".join(
        f"{name}: {x.dtype}{list(x.shape)}" if is_array(x) else f"{name}: {x!r}"
        for name, x in zip(names, data, strict=False)
    )
    what = f"{declared.name}({found}): {error}"
    if isinstance(error, MemoryError):
        return MemoryError(what)
    if isinstance(error, TypeError):
        return DTypeError(what, "check the arguments' kinds and dtypes.")
    if isinstance(error, ArithmeticError):
        return InputError(what, "check the arguments' values.")
    return ShapeError(what, "check the shapes and axes; reshape, expand_dims or transpose one of the arguments.")


# A loop over arguments costs 0.4 us a call, as much as the arithmetic of a small op. So, as dataclasses do for
# __init__, `call` is written out for each op with a fixed number of arguments: the same steps, without loops. Names
# of its own start with an underscore, so that an op may call its arguments and options what it likes.

_WRITTEN = """\
def _written({signature}):
{settled_options}{unwrap}
    _context = _here.context
    try:
        _out = _forward({data}{pass_options})
    except _TinytapeError:
        raise
    except _NUMPYS_ERRORS as _error:
        raise _explain(_op, _error, ({data},)) from _error
    {fresh}
    _dtype = _out.dtype
    if _dtype is not _float32:
        ({data},), _out = _settle(_op, _out, ({data},), {options})
        _dtype = _out.dtype
    if not _context.recording or ({untracked}) or (_dtype is not _float32 and _dtype.kind != "f"):
        _tensor = _result(_out, None, ({data},), ({storages},))
        if _context.tape is not None:
            _context.tape.note(_op, ({arguments},), {options}, _tensor)
        return _tensor
{own}
    _node = _new(_Node)  # field by field: 0.1 us less than a call
    _node.number = _take_number(); _node.op = _op; _node.parents = ({nodes},); _node.kept = ({kept})
    _node.shape = _out.shape; _node.dtype = _dtype; _node.watched = {watched}
    _node.step = _context.step; _node.hooks = None
    _tensor = _new(_Tensor)
    _tensor.raw = _out; _tensor.node = _node
    _tensor.storage = None if _out.base is None else _shared(_out, ({data},), ({storages},))
    if _context.tape is not None:
        _context.tape.append(_node, ({arguments},), {options}, _tensor)
    return _tensor
"""

_UNWRAP = """\
    if isinstance({a}, _Tensor):
        _{a}_data = {a}.raw; _{a}_node = {a}.node; _{a}_storage = {a}.storage
    else:{plain}
        _{a}_data = _operand({a}, _op); _{a}_node = _{a}_storage = None"""

_PLAIN = """
        if {a}.__class__ is list or {a}.__class__ is tuple: _refuse_tracked({a}, _op)
        if {others}: return _forward({arguments}{pass_options})"""


# Compiling one takes 0.3 ms, too much for the import of so many: until its first call a function is this.
_UNWRITTEN = compile(
    "def _written(*args, **options):\n    _write()\n    return _written(*args, **options)", "<call of an op>", "exec"
)


def unwritten(declared: Op) -> Any:
    """The function that users call, to be written out at its first call."""
    namespace = dict(_TOOLS, _op=declared, _forward=declared.forward)
    namespace.update({f"_default_{name}": value for name, value in declared.defaults.items()})
    exec(_UNWRITTEN, namespace)
    function = namespace["_written"]
    function.__name__ = function.__qualname__ = declared.name
    namespace["_write"] = partial(_write, declared, function)
    return function


def _write(declared: Op, function: Any) -> None:
    """Give the function its code. Others hold it by now, so it is changed in place."""
    a = declared.arguments
    each: Callable[[str], str] = lambda pattern: ", ".join(pattern.format(a=x) for x in a)  # noqa: E731
    pass_options = "".join(f", {o}={o}" for o in declared.options)
    others = " and ".join(f"not isinstance({x}, _Tensor)" for x in a[1:]) or "True"
    plain = _PLAIN.format(a=a[0], others=others, arguments=each("{a}"), pass_options=pass_options)
    kept = [x for x in declared.needs if x in a]
    expressions = {x: f"_{x}_data" for x in a} | {f"{x}_shape": f"_shape_of(_{x}_data)" for x in a}
    expressions["out"] = "_out"
    if not isinstance(declared.forward, np.ufunc):
        expressions["out"] = (
            f"_out if _out.base is None else _apart(_out, ({each('_{a}_data')},), ({each('_{a}_storage')},))"
        )
    expressions["wants"] = f"({each('_{a}_node is not None')},)"
    watched = " is ".join(f"_{x}_storage" for x in kept)
    same = "" if isinstance(declared.forward, np.ufunc) else "".join(f" or _out is _{x}_data" for x in a)
    text = _WRITTEN.format(
        signature=", ".join(
            [each("{a}") + (", /" if declared.options else "")]
            + [f"{o}=_default_{o}" if o in declared.defaults else o for o in declared.options]
        ),
        # A list could be changed before the walk.
        settled_options="".join(f"    if {o}.__class__ is list: {o} = tuple({o})\n" for o in declared.options),
        unwrap="\n".join(_UNWRAP.format(a=x, plain=plain if i == 0 else "") for i, x in enumerate(a)),
        arguments=each("{a}"),
        data=each("_{a}_data"),
        nodes=each("_{a}_node"),
        storages=each("_{a}_storage"),
        pass_options=pass_options,
        options="{" + ", ".join(f"{o!r}: {o}" for o in declared.options) + "}",
        fresh=f"if _out.__class__ is not _ndarray{same}: _out = _fresh(_out, ({each('_{a}_data')},))",
        untracked="True" if declared.kind == "constant" else " and ".join(f"_{x}_node is None" for x in a),
        own="\n".join(f"    if _{x}_data is {x}: _{x}_data = _own({x})" for x in kept),
        kept="".join(f"{expressions.get(name, name)}, " for name in declared.needs),
        watched=f"None if {watched} is None else ({''.join(f'_{x}_storage, ' for x in kept)})" if kept else "None",
    )
    namespace = function.__globals__
    exec(compile(text, f"<call of {declared.name}>", "exec"), namespace)
    written, namespace["_written"] = namespace["_written"], function
    function.__defaults__, function.__code__ = written.__defaults__, written.__code__


def _settled(options: dict[str, Any]) -> dict[str, Any]:
    return {o: tuple(cast("list[Any]", value)) if isinstance(value, list) else value for o, value in options.items()}


def bind_options(declared: Op) -> Any:
    """The function that users call, for an op with any number of arguments or several results."""
    signature = declared.signature

    def function(*args: Any, **options: Any) -> Any:
        if declared.variadic:
            return call(declared, args, _settled(declared.defaults | options))
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        values = bound.arguments
        settled = _settled({o: values[o] for o in declared.options})
        return call(declared, tuple(values[a] for a in declared.arguments), settled)

    function.__name__ = function.__qualname__ = declared.name
    return function


_TOOLS: dict[str, Any] = {
    "__name__": __name__, "_Tensor": Tensor, "_new": object.__new__, "_Node": Node, "_take_number": take_number,
    "_here": here, "_ndarray": np.ndarray, "_float32": np.dtype(np.float32), "_NUMPYS_ERRORS": NUMPYS_ERRORS,
    "_operand": operand, "_own": own, "_refuse_tracked": refuse_tracked, "_explain": explain, "_fresh": fresh,
    "_settle": settle, "_shape_of": shape_of, "_shared": shared, "_apart": apart, "_result": result,
    "_TinytapeError": TinytapeError,
}  # fmt: skip
