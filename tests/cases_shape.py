"""Rows for the ops of `tinytape/ops/shape.py`."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

import tinytape as tt
from cases import Case, shapes, unary, values

make = values()


@st.composite
def with_options(draw, options, **shape):
    """One array, and options drawn for its shape: ``options(draw, shape) -> dict``."""
    side = draw(shapes(**shape))
    return (draw(make(side)),), options(draw, side)


def an_axis(draw, ndim):
    return draw(st.integers(-ndim, ndim - 1))


def several_axes(draw, ndim, least=0):
    chosen = draw(st.lists(st.integers(0, ndim - 1), unique=True, min_size=least, max_size=ndim)) if ndim else []
    return tuple(axis - draw(st.sampled_from([0, ndim])) for axis in chosen)


def an_axis_or_none(draw, side):
    return {"axis": draw(st.none() | st.integers(-len(side), len(side) - 1))}


def another_shape(draw, side):
    size = int(np.prod(side))
    found = [size, (size,), (1, size), (size, 1, 1)] + [(n, size // n) for n in (2, 3, 4) if size % n == 0]
    if size:
        found += [-1, (-1, 1)] + [(-1, n) for n in (2, 3) if size % n == 0]
    return {"shape": draw(st.sampled_from(found))}


def a_permutation(draw, side):
    order = draw(st.permutations(range(len(side))))
    return {"axes": draw(st.none() | st.just(tuple(i - draw(st.sampled_from([0, len(side)])) for i in order)))}


def moved(draw, side):
    source = several_axes(draw, len(side))
    order = draw(st.permutations(range(len(side))))[: len(source)]
    if len(source) == 1 and draw(st.booleans()):
        return {"source": source[0], "destination": order[0]}
    return {"source": source, "destination": tuple(order)}


def ones_to_squeeze(draw, side):
    ones = [i for i, n in enumerate(side) if n == 1]
    choices = [None, tuple(ones)] + [i - len(side) for i in ones]
    return {"axis": draw(st.sampled_from(choices))}


def new_axes(draw, side):
    return {"axis": draw(st.sampled_from([-len(side) - 1, 0, -1, (0, 1), (-1, 0), (0, -1)]))}


def wider(draw, side):
    grown = tuple(draw(st.integers(0, 3)) if n == 1 else n for n in side)
    return {"shape": draw(st.sampled_from([(), (2,), (0,), (2, 1)])) + grown}


def rolled(draw, side):
    axis = draw(st.sampled_from([None, 0, -1, (0, -1)] if side else [None]))
    shift = draw(st.integers(-5, 5))
    return {"shift": (shift, 2) if isinstance(axis, tuple) and draw(st.booleans()) else shift, "axis": axis}


def widths(draw, side):
    width = st.integers(0, 2)
    pairs = st.tuples(*[st.tuples(width, width) for _ in side])
    forms = [width, st.tuples(width, width)] + ([pairs] if side else [])
    return {"pad_width": draw(st.one_of(*forms)), "constant_values": draw(st.sampled_from([0, 1.5, -2]))}


def copies(draw, side):
    return {"reps": draw(st.integers(0, 3) | st.lists(st.integers(0, 2), max_size=4).map(tuple))}


def repeats(draw, side):
    axis = draw(st.none() | st.integers(-len(side), len(side) - 1))
    n = int(np.prod(side)) if axis is None else side[axis]
    each = st.lists(st.integers(0, 3), min_size=n, max_size=n)
    return {"repeats": draw(st.integers(0, 3) | each), "axis": axis}


def diagonals(draw, side):
    one, two = draw(st.permutations(range(len(side))))[:2]
    return {"offset": draw(st.integers(-3, 3)), "axis1": one, "axis2": two - len(side)}


def parts(draw, side):
    axis = an_axis(draw, len(side))
    n = side[axis]
    divisors = [d for d in range(1, 5) if n % d == 0]
    places = st.lists(st.integers(0, n + 1), max_size=3).map(sorted)
    return {"sections": draw(st.sampled_from(divisors) | places), "axis": axis}


@st.composite
def joined(draw, new_axis):
    """Arrays that fit together: of one shape, or different along one axis."""
    side = draw(shapes(min_dims=0 if new_axis else 1))
    axis = draw(st.integers(-len(side) - new_axis, len(side) - 1 + new_axis))
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    sides = [side if new_axis else (*side[: axis % len(side)], n, *side[axis % len(side) + 1 :]) for n in lengths]
    return tuple(draw(make(s)) for s in sides), {"axis": axis}


@st.composite
def unequal(draw):
    return tuple(draw(make(draw(shapes(min_dims=1)))) for _ in range(2)), {}


def torch_pad(t, x, pad_width, constant_values):
    pairs = np.broadcast_to(pad_width, (x.ndim, 2))[::-1].ravel().tolist()
    return t.nn.functional.pad(x, pairs, value=float(constant_values)) if x.ndim else x.clone()


def torch_split(t, x, sections, axis):
    if isinstance(sections, int):
        return t.split(x, x.shape[axis] // sections, axis) if x.shape[axis] else [x] * sections
    return t.tensor_split(x, sections, axis)


def torch_repeat(t, x, repeats, axis):
    return t.repeat_interleave(x, t.tensor(repeats, dtype=t.int64), axis)


CASES = [
    Case(
        "reshape",
        with_options(another_shape),
        numpy=lambda x, shape: np.reshape(x, shape),
        torch=lambda t, x, shape: x.reshape(shape),
    ),
    Case("reshape", with_options(another_shape), call=lambda x, shape: x.reshape(shape)),
    Case("ravel", unary(), numpy=np.ravel, torch=lambda t, x: x.ravel()),
    Case("flatten", unary(), numpy=lambda x: x.flatten(), torch=lambda t, x: x.flatten()),
    Case(
        "transpose",
        with_options(a_permutation),
        numpy=np.transpose,
        torch=lambda t, x, axes: x.permute(tuple(range(x.ndim))[::-1] if axes is None else axes),
    ),
    Case("transpose", unary(), call=lambda x: x.T, torch=lambda t, x: x.permute(tuple(range(x.ndim))[::-1])),
    Case("transpose", unary(min_dims=2), call=lambda x: x.mT, torch=lambda t, x: x.mT),
    Case("transpose", unary(min_dims=3, max_dims=3), call=lambda x: x.transpose(1, 2, 0)),
    Case(
        "swapaxes",
        with_options(lambda draw, side: {name: an_axis(draw, len(side)) for name in ("axis1", "axis2")}, min_dims=1),
        numpy=np.swapaxes,
        torch=lambda t, x, axis1, axis2: x.swapaxes(axis1, axis2),
    ),
    Case(
        "moveaxis",
        with_options(moved),
        numpy=np.moveaxis,
        torch=lambda t, x, source, destination: t.moveaxis(x, source, destination),
    ),
    Case("expand_dims", with_options(new_axes), numpy=np.expand_dims),
    Case(
        "squeeze",
        with_options(ones_to_squeeze, min_side=1, max_side=2),
        numpy=np.squeeze,
        torch=lambda t, x, axis: x.squeeze() if axis is None else x.squeeze(axis),
    ),
    Case(
        "broadcast_to",
        with_options(wider, max_dims=2),
        numpy=np.broadcast_to,
        torch=lambda t, x, shape: x.broadcast_to(shape),
    ),
    Case(
        "concatenate",
        joined(new_axis=False),
        call=lambda *xs, axis: tt.concatenate(xs, axis),
        numpy=lambda *xs, axis: np.concatenate(xs, axis),
        torch=lambda t, *xs, axis: t.cat(xs, axis),
    ),
    Case(
        "concatenate",
        unequal(),
        call=lambda *xs: tt.concatenate(xs, axis=None),
        numpy=lambda *xs: np.concatenate(xs, axis=None),
    ),
    Case("concatenate", unary(min_dims=1), call=lambda x: tt.concatenate([x, x]), torch=lambda t, x: t.cat([x, x])),
    Case(
        "stack",
        joined(new_axis=True),
        call=lambda *xs, axis: tt.stack(xs, axis),
        numpy=lambda *xs, axis: np.stack(xs, axis),
        torch=lambda t, *xs, axis: t.stack(xs, axis),
    ),
    Case("stack", unary(max_dims=0), call=lambda x: tt.stack([x, 2.0, x]), numpy=lambda x: np.stack([x, 2.0, x])),
    Case(
        "unstack",
        with_options(lambda draw, side: {"axis": an_axis(draw, len(side))}, min_dims=1, min_side=1),
        numpy=lambda x, axis: list(np.moveaxis(x, axis, 0)),
        torch=lambda t, x, axis: x.unbind(axis),
    ),
    Case(
        "split",
        with_options(parts, min_dims=1),
        numpy=lambda x, sections, axis: np.split(x, sections, axis),
        torch=torch_split,
    ),
    Case("split", with_options(parts, min_dims=1), call=lambda x, **options: tt.split(x, **options)[-1] * 2.0),
    Case(
        "flip",
        with_options(lambda draw, side: {"axis": draw(st.sampled_from([None, several_axes(draw, len(side))]))}),
        numpy=np.flip,
        torch=lambda t, x, axis: t.flip(x, tuple(range(x.ndim)) if axis is None else axis),
    ),
    Case("flip", with_options(lambda draw, side: {"axis": an_axis(draw, len(side))}, min_dims=1), numpy=np.flip),
    Case("roll", with_options(rolled, min_dims=0), numpy=np.roll),
    Case(
        "roll",
        with_options(lambda draw, side: {"shift": (1, -2), "axis": (0, 1)}, min_dims=2),
        numpy=np.roll,
        torch=lambda t, x, shift, axis: t.roll(x, shift, axis),
    ),
    Case("pad", with_options(widths), numpy=np.pad, torch=torch_pad),
    Case("tile", with_options(copies), numpy=np.tile, torch=lambda t, x, reps: t.tile(x, np.atleast_1d(reps).tolist())),
    Case("repeat", with_options(repeats, min_dims=1), numpy=np.repeat, torch=torch_repeat),
    Case("repeat", unary(max_dims=0), call=lambda x: tt.repeat(x, 3), numpy=lambda x: np.repeat(x, 3)),
    *(
        Case(
            name,
            with_options(lambda draw, side: {"k": draw(st.integers(-3, 3))}, min_dims=2),
            torch=lambda t, x, k, name=name: getattr(t, name)(x, k),
        )
        for name in ("tril", "triu")
    ),
    Case(
        "diagonal",
        with_options(diagonals, min_dims=2),
        numpy=np.diagonal,
        torch=lambda t, x, offset, axis1, axis2: t.diagonal(x, offset, axis1, axis2),
    ),
]
