"""How an op and its derivative are declared.

An op is a NumPy function with a rule beside it::

    tanh = elementwise(np.tanh, lambda g, out: g - g * (out * out))

    @op
    def outer(a, b):
        return np.multiply.outer(a, b)

    @outer.vjp
    def _(g, a, b):
        return np.matmul(g, b), np.matmul(a, g)

The rule takes `g`, the gradient of the result, and then says by its argument names what the tape has to keep:
arguments of the op, `out`, `<argument>_shape`, the op's options, or `wants` (a tuple of bools: which gradients are
needed). It returns a gradient for each differentiable argument, None for what has none. Shapes that were broadcast
and dtypes are brought back by the walk, not by the rule.

A rule's text is NumPy and ops of ours. On arrays it runs at NumPy's speed; where the gradient is itself to be
differentiated, the same text runs on Tensors and is recorded. So a rule must not write into a buffer, use ``out=``
or ``+=``, branch on values, or look at a Tensor's ``.data``: on Tensors each of these raises.

Called on plain arrays, an op is just its NumPy function and returns an array.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeAlias, cast, get_args, overload

import numpy as np

from .errors import DTypeError, InputError, ShapeError, TapeError, TinytapeError
from .tape import Node, Part, Storage, here, take_number
from .tensor import Tensor, default_dtype
from .tree import Array, is_array

__all__ = ["Op", "OpFunction", "Operand", "elementwise", "op"]

Operand: TypeAlias = Any
"""Inside a forward function an array or a number; for the caller a Tensor too."""

# One type a number of arguments, and not Callable[..., Any]: so a type checker knows the arguments of a lambda.
Rule: TypeAlias = (
    Callable[[Any], Any]
    | Callable[[Any, Any], Any]
    | Callable[[Any, Any, Any], Any]
    | Callable[[Any, Any, Any, Any], Any]
    | Callable[[Any, Any, Any, Any, Any], Any]
)

P = ParamSpec("P")
Kind = Literal["elementwise", "linear", "multilinear", "general", "constant"]

OUT, NOT_A_VALUE, ALL_ARGUMENTS = -1, -2, -3  # see Op.sources


class OpFunction(Protocol, Generic[P]):
    """What `op` returns: a plain function that takes Tensors or arrays, with its declaration attached."""

    op: Op

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def vjp(self, rule: Callable[..., Any]) -> Callable[..., Any]: ...
    def jvp(self, rule: Callable[..., Any]) -> Callable[..., Any]: ...


class Op:
    """An op's declaration: its NumPy function, its rules, and what the rules keep.

    Attributes
    ----------
    name : str
    forward : callable
        Arrays in, array out.
    arguments : tuple of str
        The differentiable arguments: those before ``/`` in the function's signature; if there is no ``/``, all but
        those given by name alone.
    variadic : bool
        Whether the only differentiable argument is ``*name``.
    options : tuple of str
        The other arguments: axes, shapes, flags, indices. They are not differentiated.
    kind : str
        How forward mode is had: "elementwise" (the rule itself, on tangents), "linear" (the op itself, on all
        tangents at once), "multilinear" (the op once for each argument, that one replaced by its tangent),
        "general" (its own `jvp` rule if there is one, else the transpose of its vjp). "constant" has no derivative.
    sources : tuple of int
        Where each kept value comes from: an argument's position, or one of OUT, ALL_ARGUMENTS,
        NOT_A_VALUE.
    """

    def __init__(self, forward: Callable[..., Any], name: str, kind: Kind, several: bool, promotes: bool) -> None:
        self.forward = forward
        self.function: Callable[..., Any] = forward  # what users call, set by `op`
        self.name = name
        self.kind: Kind = kind
        self.several = several
        self.promotes = promotes
        self.rule: Callable[..., Any] = self._no_rule
        self.tangent_rule: Callable[..., Any] | None = None
        self.tangent_needs: tuple[str, ...] = ()
        self.needs: tuple[str, ...] = ()
        self.sources: tuple[int, ...] = ()
        self.signature = _signature_of(forward)
        self.arguments, self.variadic, self.options, self.defaults = _read_signature(self.signature)

    def _no_rule(self, *_: Any) -> Any:
        raise TapeError(f"{self.name} has no derivative rule.", f"declare one with @{self.name}.vjp.")

    def set_rule(self, rule: Callable[..., Any]) -> None:
        self.needs = self._needs_of(rule, skip=1)
        self.sources = tuple(self._source(name) for name in self.needs)
        self.rule = rule

    def set_tangent_rule(self, rule: Callable[..., Any]) -> None:
        self.tangent_needs = self._needs_of(rule, skip=len(self.arguments))
        self.tangent_rule = rule

    def _needs_of(self, rule: Callable[..., Any], skip: int) -> tuple[str, ...]:
        names = tuple(inspect.signature(rule).parameters)[skip:]
        known = (*self.arguments, *self.options, "out", "wants", *(f"{name}_shape" for name in self.arguments))
        for name in names:
            if name not in known or (name == "out" and self.several):
                raise TapeError(
                    f"a rule of {self.name} asks for {name!r}; {self.name} has {', '.join(map(repr, known))}.",
                    "name after g what the tape shall keep, by the op's own argument names.",
                )
        return names

    def _source(self, name: str) -> int:
        if name == "out":
            return OUT
        if name in self.arguments:
            return ALL_ARGUMENTS if self.variadic else self.arguments.index(name)
        return NOT_A_VALUE

    def differentiable_rule(self, node: Node, gradient: Any) -> tuple[Any, ...]:
        """Run the rule on Tensors that hang on the graph, so that what it computes is recorded."""
        parents = node.parents or ()
        kept: list[Any] = []
        watched = iter(node.watched or ())
        for source, value in zip(self.sources, node.kept, strict=True):
            if source == OUT:
                kept.append(attach(value, node))
            elif source == ALL_ARGUMENTS:
                kept.append(tuple(attach(v, p, next(watched, None)) for v, p in zip(value, parents, strict=True)))
            else:
                kept.append(attach(value, parents[source], next(watched, None)) if source >= 0 else value)
        context = here.context
        was, context.rule = context.rule, self.name
        results: Any
        try:
            results = self.rule(gradient, *kept)
        finally:
            context.rule = was
        if results.__class__ is not tuple:
            results = (results,)
        return tuple([r if r is None or isinstance(r, Tensor) else attach(r, None) for r in results])

    def __repr__(self) -> str:
        return f"<op {self.name}({', '.join(self.arguments)}) keeps ({', '.join(self.needs)})>"


def attach(value: Any, node: Node | None, storage: Storage | None = None) -> Any:
    """A kept array as the Tensor it was, or as a constant."""
    if node is None and isinstance(value, float | int):
        return value
    return Tensor.of(np.asarray(value), node, storage)


@overload
def op(forward: Callable[P, Any]) -> OpFunction[P]: ...
@overload
def op(
    *, name: str = ..., kind: Kind = ..., several: bool = ..., promotes: bool = ...
) -> Callable[[Callable[P, Any]], OpFunction[P]]: ...
def op(
    forward: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    kind: Kind = "general",
    several: bool = False,
    promotes: bool = True,
) -> Any:
    """Declare an op from its NumPy function.

    Parameters
    ----------
    forward : callable
        Takes arrays and returns an array. Arguments before ``/`` (all, if there is none) may be differentiated;
        those after it, and those that are given by name alone, are options.
    name : str, optional
        Default: the function's own name without underscores at the ends.
    kind : {"general", "elementwise", "linear", "multilinear", "constant"}
        What kind of function it is, see `Op`; it gives forward mode for free. "constant" declares an op without
        derivative (a comparison, argmax): its result is never tracked.
    several : bool
        The function returns a tuple of arrays; the rule's `g` is then a tuple of gradients.
    promotes : bool
        Whether tinytape's dtype rules apply to the result. False for ops whose result's dtype is an option.

    Returns
    -------
    function
        With attributes ``vjp`` and ``jvp`` (decorators for the rules) and ``op`` (this declaration).
    """
    if forward is None:
        return partial(_declare, name=name, kind=kind, several=several, promotes=promotes)
    return _declare(forward, name, kind, several, promotes)


def _declare(forward: Callable[..., Any], name: str | None, kind: Kind, several: bool, promotes: bool) -> Any:
    if not callable(forward):
        raise DTypeError(f"op: forward is a {type(forward).__name__}.", "pass a function of arrays.")
    if kind not in get_args(Kind):
        raise InputError(f"op: kind is {kind!r}.", f"use one of {', '.join(map(repr, get_args(Kind)))}.")
    own_name: str = getattr(forward, "__name__", type(forward).__name__)
    declared = Op(forward, name or own_name.strip("_"), kind, several, promotes)
    _check_signature(declared)
    function = _bind_options(declared) if declared.variadic or several else _unwritten(declared)
    unwritten = function.__code__

    def vjp(rule: Callable[..., Any]) -> Callable[..., Any]:
        declared.set_rule(rule)
        if isinstance(forward, np.ufunc):
            function.__module__ = rule.__module__  # where it can be found again, by pickle for one
        function.__code__ = unwritten  # what is kept is part of the text: write it again
        return rule

    def jvp(rule: Callable[..., Any]) -> Callable[..., Any]:
        declared.set_tangent_rule(rule)
        return rule

    declared.function = function
    function.op, function.vjp, function.jvp = declared, vjp, jvp
    function.__signature__ = declared.signature
    function.__doc__ = forward.__doc__
    if isinstance(forward, np.ufunc):  # its first sentence: what follows tells of options that an op does not have
        function.__doc__ = (forward.__doc__ or "").partition("\n\n")[2].partition("\n\n")[0]
    if not isinstance(forward, np.ufunc):
        function.__module__ = forward.__module__
    return function


def elementwise(forward: Callable[..., Any], rule: Rule, name: str | None = None) -> OpFunction[...]:
    """Declare an elementwise op in one line: its Jacobian is diagonal, so the rule serves both modes.

    Parameters
    ----------
    forward : callable
        A ufunc, or a function of arrays that treats every element alike.
    rule : callable
        ``rule(g, ...)``: `g` times the derivative; a tuple with one entry an argument if there are several.
    """
    function = _declare(forward, name, "elementwise", several=False, promotes=True)
    function.vjp(rule)
    return function


def _signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    if not isinstance(forward, np.ufunc):
        return inspect.signature(forward)
    names = ("x",) if forward.nin == 1 else ("a", "b")
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names])


def _read_signature(signature: inspect.Signature) -> tuple[tuple[str, ...], bool, tuple[str, ...], dict[str, Any]]:
    parameters = signature.parameters.values()
    variadic = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    only = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    arguments = variadic or only or [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = {p.name: p.default for p in parameters if p.name not in arguments}
    defaults = {name: default for name, default in options.items() if default is not inspect.Parameter.empty}
    return tuple(arguments), bool(variadic), tuple(options), defaults


def _check_signature(declared: Op) -> None:
    """Refuse what could not be called, and names that mean something else to a rule."""
    parameters = declared.signature.parameters
    reserved = {"out", "wants", *(f"{name}_shape" for name in declared.arguments)}
    wrong = ""
    if not declared.arguments:
        wrong = "it takes no arguments"
    for p in parameters.values():
        if p.kind is p.VAR_KEYWORD:
            wrong = f"it takes **{p.name}"
        elif declared.variadic and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            wrong = f"it takes {p.name!r} beside *{declared.arguments[0]}"
        elif p.name in declared.arguments and p.default is not p.empty:
            wrong = f"{p.name!r} is differentiable and has a default"
        elif p.name in reserved or p.name.startswith("_"):
            wrong = f"{p.name!r} is a name of tinytape's own"
    if wrong:
        raise TapeError(
            f"op: the signature of {declared.name} is {declared.signature}: {wrong}.",
            "write f(a, b, /, option, other=1) or f(*arrays, option): what is differentiated, then the options.",
        )


# ---- calling an op --------------------------------------------------------------------------------------------------


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
        return results if declared.several else results[0]
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
        if _dtype.kind != "f":
            return _result(_out, None, ({data},), ({storages},))
    if not _context.recording or ({untracked}):
        return _result(_out, None, ({data},), ({storages},))
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


def _unwritten(declared: Op) -> Any:
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


def _bind_options(declared: Op) -> Any:
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
