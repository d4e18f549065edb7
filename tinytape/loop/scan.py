"""`scan`: a function of a carry and an input, taken over time.

`eager` is the definition of right: an ordinary loop, recorded op by op, so that every kind of derivative follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any, Literal, cast

import numpy as np

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tape import here, no_grad
from ..engine.tensor import Tensor
from ..engine.tree import flatten, map_leaves, unflatten
from ..ops.shape import stack, unstack
from ..recompute import keeps_calls
from .budget import Plan, as_plan, check_checkpoint, plan
from .checkpointed import Checkpointed, Inputs
from .probes import probed, watching
from .switch import may_compile

__all__ = ["Loop", "eager", "leaf_names", "scan"]

Function = Callable[[Any, Any], Any]


def scan(
    f: Function,
    init: Any,
    xs: Any,
    length: int | None = None,
    reverse: bool = False,
    *,
    checkpoint: int | str | Plan | None = None,
    lookback: int | None = None,
    compiled: bool | Literal["auto"] = "auto",
) -> tuple[Any, Any]:
    """Take `f` over the leading axis of `xs`, carrying a state along.

    With one array each for carry, xs and ys it means::

        def scan(f, init, xs):
            carry, ys = init, []
            for x in xs:
                carry, y = f(carry, x)
                ys.append(y)
            return carry, tt.stack(ys)

    and all three may be nests of dicts, lists and tuples, in which None is an empty nest.

    Parameters
    ----------
    f : callable
        ``f(carry, x) -> (carry, y)``, of Tensors. It returns a carry of the structure, shapes and dtypes that it
        was given. What else it needs, such as weights, it takes from outside.
    init : nest of Tensors, arrays or numbers
        The carry before the first step. A Python float becomes a 0-d tensor of the default dtype, an int one of
        int64. Integers and bools may be carried; they have no gradient.
    xs : nest of Tensors or arrays, or None
        Step t sees ``x[t]`` of every array x in it. None: there are no inputs, and `length` says how many steps.
    length : int, optional
        The number of steps, where xs does not tell; where both do, they must agree.
    reverse : bool
        Go from the last step to the first. ys are in the order of xs all the same. Default False.
    checkpoint : int, str or Plan, optional
        What to keep for the backward walk; the rest is computed again from there. A size such as "64 MB": as much
        as fits, with the fewest steps run again. "sqrt": the least with which no step is run more than twice.
        "auto": everything, if it fits in a quarter of the machine's memory. n: the carry of every n steps. A plan
        made by `tt.loop.plan`. Default None: everything. f must compute the same thing every time; draws of
        `tinytape.random` are repeated.
    lookback : int, optional
        Let gradients flow back through so many steps only: y of a step, and the last carry, depend differentiably on
        the last `lookback` inputs, their own included, and on what the steps in between take from outside. The carry
        before those is a constant, unless it is `init` itself. This is exact and plain: each y is computed from the
        carry `lookback` steps before, so f is called about ``steps * lookback`` times; it must compute the same
        thing every time (take random masks from xs). Values are the same as without.
    compiled : {"auto", True, False}
        Whether the loop may run as a kernel. Default "auto": where it can be one, and no `no_compile` is around.

    Returns
    -------
    carry : nest of Tensors
        After the last step.
    ys : nest of Tensors
        What f put out, stacked along a new leading axis; None where it put out None.

    Raises
    ------
    ShapeError, DTypeError, InputError
        If arguments do not fit each other, or f changes the shape, the dtype or the structure of the carry or of y.
        The message names the leaf, as in ``carry['h']``, and the step.
    TapeError
        If a walk that is itself differentiated has to run f again, and f has changed since.

    Notes
    -----
    As kernels the loop is one record on the tape. Then its results are tensors of their own, also where f hands one
    through; if one of them requires gradients, all floats do; and what the loss does not use has a gradient of zeros.
    So a weight that the loss does not reach gets zeros and not None, and an unused result with an infinite slope, as
    ``sqrt`` has at 0, makes NaN of them, as in JAX. ``compiled=False`` tells such things apart.

    Examples
    --------
    >>> def step(h, x):
    ...     h = tt.tanh(x @ W + h @ U)
    ...     return h, h
    >>> h, hs = tt.scan(step, np.zeros((B, H), np.float32), xs)  # xs (T, B, I), hs (T, B, H)
    """
    _check_options(f, checkpoint, lookback, compiled)
    carries, inputs = _tensors("init", init), _tensors("xs", xs)
    steps = _steps(xs, inputs, length)
    if watching() is not None and lookback is None:
        f, xs = _watched(f, unflatten(init, carries), unflatten(xs, inputs), steps, reverse)
        inputs = flatten(xs)
    if lookback is None and compiled is not False:
        found = by_kernels(f, init, xs, carries, inputs, steps, reverse, compiled, checkpoint)
        if found is not None:
            return found
    init, xs = unflatten(init, carries), unflatten(xs, inputs)
    if checkpoint is not None:
        return _checkpointed(f, init, xs, steps, reverse, checkpoint)
    return eager(f, init, xs, steps, reverse, lookback)


def _watched(f: Function, init: Any, xs: Any, steps: int, reverse: bool) -> tuple[Function, Any]:
    """The step and the inputs of a scan that somebody watches."""
    watch, name = watching(), getattr(f, "__name__", type(f).__name__)
    assert watch is not None
    own = getattr(f, "has_probes", False)  # a layer's step, which knows better where they belong
    probes = None if own else watch.probes(f, name, leaf_names("carry", init), init, steps, reverse)
    if probes is None:
        return watch.step(f) or f, xs

    def step(carry: Any, given: Any) -> Any:
        x, these = given
        pair = f(carry, x)
        if not (isinstance(pair, tuple | list) and len(cast(Any, pair)) == 2):
            return cast(Any, pair)  # the loop refuses it, and says why
        after, y = cast(Any, pair)
        return probed(after, y, these)

    step.__name__ = name
    return step, (xs, probes)


@cache
def _compiler():
    """What makes kernels. It brings Numba, which is slow to import."""
    from ..compile import attempt

    return attempt


def by_kernels(
    f: Function,
    init: Any,
    xs: Any,
    carries: list[Tensor],
    inputs: list[Tensor],
    steps: int,
    reverse: bool,
    compiled: bool | Literal["auto"] = "auto",
    checkpoint: int | str | Plan | None = None,
) -> tuple[Any, Any] | None:
    """A scan as kernels, or None where it has to be taken step by step.

    `carries` and `inputs` fit: they are the leaves of init and xs, of which the structure is looked at.
    """
    if compiled == "auto" and not may_compile():
        return None
    attempt = _compiler()
    found = attempt.attempt(f, init, xs, carries, inputs, steps, reverse, eager, checkpoint)
    if isinstance(found, attempt.NotLowerable):
        if compiled is True:
            if found.raised:  # a fault of the step itself is shown as the loop shows it
                _try_a_step(f, init, xs, carries, inputs, -1 if reverse else 0)
            attempt.refuse(f, found)
        attempt.tell(f, found)
        return None
    return found


def _try_a_step(f: Function, init: Any, xs: Any, carries: list[Tensor], inputs: list[Tensor], t: int) -> None:
    """Run one step as it is defined, for what it raises, and leave nothing of it."""
    carry = unflatten(init, [Tensor(x) for x in carries])
    with no_grad():
        Loop(f, carry, xs, [tuple([Tensor(x.raw[t]) for x in inputs])]).take(carry, 0)


def _explain(f: Function, init: Any, xs: Any, length: int | None = None) -> Any:
    """What `scan` runs for a step: its loops and products, what is kept and what is computed again, bytes and flops.

    Parameters are those of `scan`. The result is an `Explanation`, to be printed; where the step cannot be compiled,
    its ``reason`` names the op and the line. Nothing is run but one trace of f, and nothing is compiled.
    """
    _check_options(f, None, None, "auto")
    carries, inputs = _tensors("init", init), _tensors("xs", xs)
    _steps(xs, inputs, length)
    return _compiler().explain(f, init, xs, carries, inputs)


scan.explain = _explain  # pyright: ignore[reportFunctionMemberAccess]


def _plan(f: Function, init: Any, xs: Any, length: int | None = None, budget: int | str = "auto") -> Plan:
    """What `scan` would keep, and run again, within a budget: a `Plan`, to be printed, or passed as ``checkpoint=``.

    Nothing is run but a trace of f, or, where f cannot be compiled, two of its steps. Parameters are those of `scan`
    and of `tt.loop.plan`.
    """
    _check_options(f, None, None, "auto")
    carries, inputs = _tensors("init", init), _tensors("xs", xs)
    steps = _steps(xs, inputs, length)
    if may_compile():
        priced = _compiler().price(f, init, xs, carries, inputs, steps, budget)
        if priced is not None:
            return priced
    init, xs = unflatten(init, carries), unflatten(xs, inputs)
    run = Checkpointed(Loop(f, init, xs, Inputs(flatten(xs), steps)), flatten(init), range(steps), lambda: (init, xs))
    return plan(steps, run.step_bytes(), run.carry_bytes(), budget)


scan.plan = _plan  # pyright: ignore[reportFunctionMemberAccess]


def eager(
    f: Function,
    init: Any,
    xs: Any,
    steps: int,
    reverse: bool = False,
    lookback: int | None = None,
) -> tuple[Any, Any]:
    """What `scan` means, step by step; init and xs are nests of Tensors that fit."""
    columns = [unstack(x, axis=0) for x in flatten(xs)]
    inputs = list(zip(*columns, strict=True)) if columns else [()] * steps
    order = range(steps)[:: -1 if reverse else 1]
    loop = Loop(f, init, xs, inputs)
    carry, outputs = loop.steps(init, order) if lookback is None else _looking_back(loop, init, order, lookback)
    if reverse:
        outputs.reverse()
    form = cast(_Form, loop.y)
    return carry, unflatten(form.tree, [stack(column) for column in zip(*outputs, strict=True)])


class Loop:
    """Some steps of a scan, checked."""

    def __init__(self, f: Function, init: Any, xs: Any, inputs: Sequence[tuple[Any, ...]]) -> None:
        self.f, self.xs, self.inputs = f, xs, inputs
        self.carry = _Form("carry", init, "in init")
        self.y: _Form | None = None

    def steps(self, carry: Any, order: Iterable[int]) -> tuple[Any, list[list[Tensor]]]:
        """The carry after the steps in `order`, and each step's outputs, leaf by leaf."""
        outputs: list[list[Tensor]] = []
        context = here.context
        outer = context.step
        try:
            for t in order:
                context.step = t
                carry, y = self.take(carry, t)
                outputs.append(y)
        finally:
            context.step = outer
        return carry, outputs

    def take(self, carry: Any, t: int) -> tuple[Any, list[Tensor]]:
        pair = self.f(carry, unflatten(self.xs, self.inputs[t]))
        if not (isinstance(pair, tuple | list) and len(cast(Any, pair)) == 2):
            raise InputError(
                f"scan: f returned {_kind(pair)} at step {t}, not a pair (carry, y).",
                "return carry, y; where there is no y, return carry, None.",
            )
        after, y = cast(Any, pair)
        carried = unflatten(self.carry.tree, self.carry.leaves_of(after, t))
        if self.y is None:
            self.y = _Form("y", unflatten(y, _tensors("y", y)), f"after step {t}")
        return carried, self.y.leaves_of(y, t)


def _checkpointed(f: Function, init: Any, xs: Any, steps: int, reverse: bool, checkpoint: int | str | Plan) -> Any:
    """A scan that keeps less than everything."""
    definition = partial(eager, f, init, xs, steps, reverse)
    context = here.context
    if not context.recording or keeps_calls(context.tape):
        return definition()
    loop = Loop(f, init, xs, Inputs(flatten(xs), steps))
    run = Checkpointed(loop, flatten(init), range(steps)[:: -1 if reverse else 1], definition)
    priced = (run.step_bytes(), run.carry_bytes()) if isinstance(checkpoint, str) else (0, 0)
    chosen = as_plan(checkpoint, steps, *priced)
    return run.run(chosen) if chosen.slots else definition()


def _looking_back(loop: Loop, init: Any, order: Sequence[int], lookback: int) -> tuple[Any, list[list[Tensor]]]:
    """Every step's outputs from the carry `lookback` steps before, which is cut off from what made it."""
    carry, outputs = init, list[list[Tensor]]()
    starts = deque([init], maxlen=lookback)  # the carries before the last steps
    for i in range(len(order)):
        carry, put_out = loop.steps(starts[0], islice(order, i + 1 - len(starts), i + 1))
        outputs.append(put_out[-1])
        starts.append(map_leaves(Tensor.detach, carry))
    return carry, outputs


# ---- nests ----------------------------------------------------------------------------------------------------------


def leaf_names(name: str, tree: Any) -> list[str]:
    """Where each leaf is, in the order of `flatten`: ``carry['h']``, ``xs[0]``, or `name` for a leaf by itself."""
    count = len(flatten(tree))
    names = [""] * count

    def visit(path: str, branch: Any) -> None:
        if isinstance(branch, dict):
            for key, child in cast(dict[Any, Any], branch).items():
                visit(f"{path}[{key!r}]", child)
        elif isinstance(branch, list | tuple):
            fields: Any = getattr(cast(Any, branch), "_fields", None)
            for i, child in enumerate(cast("Sequence[Any]", branch)):
                visit(f"{path}.{fields[i]}" if fields else f"{path}[{i}]", child)
        elif branch is not None:
            names[branch] = path

    visit(name, unflatten(tree, range(count)))
    return names


def _tensors(name: str, tree: Any, dtypes: Sequence[Any] | None = None) -> list[Tensor]:
    """The leaves as Tensors. A number becomes one of its place in `dtypes` where it can, as it does in arithmetic."""
    leaves = flatten(tree)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            continue
        if not isinstance(leaf, np.ndarray | np.generic | int | float):
            raise DTypeError(
                f"scan: {leaf_names(name, tree)[i]} is {_kind(leaf)}.",
                "leaves are Tensors, arrays or numbers; nests are dicts, lists and tuples.",
            )
        made = leaves[i] = Tensor(leaf)
        if dtypes and not isinstance(leaf, np.ndarray) and np.can_cast(made.dtype, dtypes[i], "same_kind"):
            leaves[i] = made.astype(dtypes[i])
    return leaves


class _Form:
    """A nest's structure, and its leaves' shapes and dtypes, to which later ones are held."""

    def __init__(self, name: str, tree: Any, seen: str) -> None:
        # Detached, or a loop that a checkpoint keeps for its second run would keep what the first one recorded.
        self.name, self.tree, self.seen = name, map_leaves(Tensor.detach, tree), seen
        leaves: list[Tensor] = flatten(tree)
        self.shapes, self.dtypes = [x.shape for x in leaves], [x.dtype for x in leaves]

    def leaves_of(self, found: Any, t: int) -> list[Tensor]:
        """The leaves of what step t returned, which must fit."""
        if not _alike(self.tree, found):
            raise InputError(
                f"scan: {self.name} is {_outline(self.tree)} {self.seen} and {_outline(found)} after step {t}.",
                "f returns the same structure at every step" + (", that of init." if self.name == "carry" else "."),
            )
        leaves = _tensors(self.name, found, self.dtypes)
        for i, (x, shape, dtype) in enumerate(zip(leaves, self.shapes, self.dtypes, strict=True)):
            if x.raw.shape != shape or x.raw.dtype != dtype:
                self.refuse(leaf_names(self.name, found)[i], x, shape, dtype, t)
        return leaves

    def refuse(self, leaf: str, x: Tensor, shape: tuple[int, ...], dtype: np.dtype[Any], t: int) -> None:
        if x.shape != shape:
            raise ShapeError(
                f"scan: {leaf} has shape {shape} {self.seen} and {x.shape} after step {t}.",
                "f returns the same shapes at every step" + (", those of init." if self.name == "carry" else "."),
            )
        raise DTypeError(
            f"scan: {leaf} is {dtype} {self.seen} and {x.dtype} after step {t}.",
            f"cast it with astype({str(dtype)!r})"
            + (f", or start from an init of {x.dtype}." if self.name == "carry" else "."),
        )


def _alike(a: Any, b: Any) -> bool:
    """Whether two nests are of one structure."""
    if isinstance(a, dict):
        one, other = cast(dict[Any, Any], a), cast(dict[Any, Any], b)
        return isinstance(b, dict) and one.keys() == other.keys() and all(_alike(one[k], other[k]) for k in one)
    if isinstance(a, list | tuple):
        return type(cast(Any, a)) is type(b) and len(cast(Any, a)) == len(b) and all(map(_alike, cast(Any, a), b))
    return (a is None) is (b is None) and not isinstance(b, dict | list | tuple)


class _Star:
    def __repr__(self) -> str:
        return "*"


def _outline(tree: Any) -> str:
    """A nest's structure, a star for each leaf."""
    return repr(unflatten(tree, [_Star() for _ in flatten(tree)]))


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(cast(Any, value)).__name__} of {len(cast(Any, value))}"
    return "None" if value is None else f"a {type(value).__name__}"


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_options(f: Any, checkpoint: Any, lookback: Any, compiled: Any) -> None:
    if not callable(f):
        raise InputError(f"scan: f is {_kind(f)}.", "pass a function, f(carry, x) -> (carry, y).")
    if lookback is not None and not _is_count(lookback):
        raise InputError(f"scan: lookback is {lookback!r}.", "pass a number of steps, 1 or more, or None.")
    check_checkpoint("scan", checkpoint)
    if not (isinstance(compiled, bool) or (isinstance(compiled, str) and compiled == "auto")):
        raise InputError(f"scan: compiled is {compiled!r}.", "pass 'auto', True or False.")
    if checkpoint is not None and lookback is not None:
        raise InputError("scan: both checkpoint and lookback are given.", "pass one of them.")
    if compiled is True and lookback is not None:
        raise InputError("scan: compiled=True with lookback, which runs step by step.", "leave compiled at 'auto'.")


def _steps(xs: Any, leaves: list[Tensor], length: int | None) -> int:
    """How many steps xs, which has these leaves, and length ask for, if they agree."""
    if length is not None and not _is_count(length, least=0):
        raise InputError(f"scan: length is {length!r}.", "pass a number of steps, 1 or more, or None.")
    steps = len(leaves[0].raw) if leaves and leaves[0].raw.ndim else length
    for i, x in enumerate(leaves):
        if not x.raw.ndim:
            raise ShapeError(
                f"scan: {leaf_names('xs', xs)[i]} is a single number.",
                "inputs have a leading axis of steps: join a list of numbers by np.array; take constants from outside.",
            )
        if len(x.raw) != steps:
            names = leaf_names("xs", xs)
            raise ShapeError(
                f"scan: {names[0]} has {steps} steps and {names[i]} has {len(x)}.",
                "all inputs have the same leading axis.",
            )
    if steps is None:
        raise InputError("scan: there are no xs, and no length.", "pass length=, the number of steps.")
    first = leaf_names("xs", xs)[0] if leaves and (steps == 0 or length not in (None, steps)) else ""
    if length is not None and steps != length:
        raise ShapeError(f"scan: length is {length}, {first} has {steps} steps.", "leave out length.")
    if steps == 0:
        raise ShapeError(f"scan: {f'{first} has 0 steps' if leaves else 'length is 0'}.", "take at least one step.")
    return int(steps)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)
