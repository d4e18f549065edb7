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
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeAlias, get_args, overload

import numpy as np

from .call import ALL_ARGUMENTS, NOT_A_VALUE, OUT, bind_options, unwritten
from .errors import DTypeError, InputError, TapeError
from .tape import Node, Storage, here
from .tensor import Tensor

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
    takes_none : bool
        Of an op with several results: whether its rule takes None for one that nothing depends on, and not zeros.
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
        self.takes_none = False
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
    function = bind_options(declared) if declared.variadic or several else unwritten(declared)
    code = function.__code__

    def vjp(rule: Callable[..., Any]) -> Callable[..., Any]:
        declared.set_rule(rule)
        if isinstance(forward, np.ufunc):
            function.__module__ = rule.__module__  # where it can be found again, by pickle for one
        function.__code__ = code  # what is kept is part of the text: write it again
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
