"""Rows for the ops of `tinytape/ops/index.py`; edge cases and errors are in `test_indexing.py`."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytape as tt
from cases import Case, shapes, values

make = values()
distinct = values(apart=0.1)


def seeded(draw):
    return np.random.default_rng(draw(st.integers(0, 2**31)))


@st.composite
def basic(draw):
    side = draw(shapes())
    return (draw(make(side)),), {"index": draw(hnp.basic_indices(side, allow_newaxis=True, allow_ellipsis=True))}


@st.composite
def integers(draw):
    """Integer arrays for the leading axes, with repeats and negative ones."""
    side = draw(shapes(min_dims=1, min_side=1))
    index = draw(hnp.integer_array_indices(side[: draw(st.integers(1, len(side)))], dtype=np.dtype("int64")))
    return (draw(make(side)),), {"index": index}


@st.composite
def masks(draw):
    side = draw(shapes())
    rng = seeded(draw)
    mask = np.asarray(rng.random(side[: draw(st.integers(0, len(side)))]) < 0.5)
    return (draw(make(side)),), {"index": mask}


MIXED = [
    lambda rng, a, b, c: (slice(None), rng.integers(-b, b, 5)),
    lambda rng, a, b, c: (Ellipsis, rng.integers(-c, c, (2, 3))),
    lambda rng, a, b, c: (slice(None), rng.integers(0, b, (3, 1)), rng.integers(0, c, 4)),
    lambda rng, a, b, c: (rng.integers(-a, a, 4), slice(None, None, -1), rng.integers(0, c, 4)),
    lambda rng, a, b, c: (rng.integers(0, a, 3), 0),
    lambda rng, a, b, c: (0, slice(None), rng.integers(0, c, 3)),
    lambda rng, a, b, c: (None, rng.integers(0, a, 3), Ellipsis, slice(0, 1)),
    lambda rng, a, b, c: (rng.random(a) < 0.6, slice(1, None)),
    lambda rng, a, b, c: (slice(None), rng.random((b, c)) < 0.5),
    lambda rng, a, b, c: (rng.permutation(a) < 1, rng.integers(0, b, 6)),
    lambda rng, a, b, c: (rng.integers(0, a, ()), Ellipsis, rng.permutation(c) < 1),
    lambda rng, a, b, c: [0, -1, 0],
    lambda rng, a, b, c: ([0, a - 1], [[0], [-1]]),
    lambda rng, a, b, c: rng.integers(0, a, (2, 2)).astype("uint8"),
    lambda rng, a, b, c: np.zeros((0, 2), int),
    lambda rng, a, b, c: [],
]


ALL_MIXED = tuple(range(len(MIXED)))
AS_IN_TORCH = (0, 1, 2, 4, 6, 7, 8, 9, *ALL_MIXED[11:])  # no negative steps; other shapes for x[0, :, array]


@st.composite
def mixed(draw, kinds=ALL_MIXED):
    side = draw(shapes(min_dims=3, max_dims=3, min_side=1))
    return (draw(make(side)),), {"index": MIXED[draw(st.sampled_from(kinds))](seeded(draw), *side)}


def as_torch(t, index):
    if isinstance(index, tuple):
        return tuple(as_torch(t, i) for i in index)
    if isinstance(index, list):
        return t.tensor(index, dtype=t.int64)
    if isinstance(index, np.ndarray):
        return t.tensor(index.astype("int64") if index.dtype == "uint8" else index)
    return index


def any_index():
    return basic() | integers() | masks() | mixed()


@st.composite
def written(draw, inputs):
    """An array, an index, and values that broadcast to what it takes."""
    (x,), options = draw(inputs)
    taken = x[options["index"]].shape
    forms = [taken, taken[-1:] if draw(st.booleans()) else (), (1,) * len(taken)]
    return (x, draw(make(draw(st.sampled_from(forms))))), options


def add_reference(x, values, index):
    out = x.copy()
    # Given values of fewer axes than the index, np.add.at (2.4) reads past their end.
    np.add.at(out, index, np.array(np.broadcast_to(values, out[index].shape)))
    return out


def put_reference(x, values, index):
    """One at a time, so that the last one stays."""
    out = x.copy()
    places = np.arange(x.size).reshape(x.shape)[index]
    for place, value in zip(places.ravel(), np.broadcast_to(values, places.shape).ravel(), strict=True):
        out.reshape(-1)[place] = value
    return out


@st.composite
def taken(draw):
    side = draw(shapes(min_dims=1, min_side=1))
    axis = draw(st.none() | st.integers(-len(side), len(side) - 1))
    n = int(np.prod(side)) if axis is None else side[axis]
    indices = seeded(draw).integers(-n, n, draw(shapes(max_dims=2)))
    return (draw(make(side)),), {"indices": indices, "axis": axis}


@st.composite
def along(draw):
    """Indices along one axis; where x or the indices have length 1 elsewhere, they broadcast."""
    side = draw(shapes(min_dims=1, min_side=1))
    axis = draw(st.integers(-len(side), len(side) - 1))
    others = [draw(st.sampled_from([n, 1])) for n in side]
    others[axis] = draw(st.integers(0, 4))
    x_side = tuple(draw(st.sampled_from([n, 1])) if i != axis % len(side) else n for i, n in enumerate(side))
    indices = seeded(draw).integers(-x_side[axis], x_side[axis], others)
    return (draw(make(x_side)),), {"indices": indices, "axis": axis}


@st.composite
def gathered(draw):
    """What torch's gather takes: non-negative indices of equal lengths elsewhere."""
    side = draw(shapes(min_dims=1, min_side=1))
    axis = draw(st.integers(-len(side), len(side) - 1))
    lengths = list(side)
    lengths[axis] = draw(st.integers(0, 4))
    return (draw(make(side)),), {"indices": seeded(draw).integers(0, side[axis], lengths), "axis": axis}


@st.composite
def flattened(draw):
    x = draw(make(draw(shapes(min_side=1))))
    return (x,), {"indices": seeded(draw).integers(0, x.size, 5), "axis": None}


@st.composite
def tokens(draw):
    rows, width = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    found = seeded(draw).integers(0, rows, draw(shapes(max_dims=2)))
    return (draw(make((rows, width))),), {"tokens": found.astype(draw(st.sampled_from(["int64", "int32", "uint8"])))}


@st.composite
def to_sort(draw):
    side = draw(shapes(min_dims=1))
    return (draw(distinct(side)),), {"axis": draw(st.integers(-len(side), len(side) - 1))}


@st.composite
def flat_to_sort(draw):
    return (draw(distinct(draw(shapes()))),), {"axis": None}


@st.composite
def largest(draw):
    (x,), options = draw(to_sort())
    return (x,), options | {"k": draw(st.integers(0, x.shape[options["axis"]]))}


def topk_reference(x, k, axis):
    indices = np.flip(np.argsort(x, axis), axis).take(range(k), axis) if k else np.argsort(x, axis).take([0][:0], axis)
    return np.take_along_axis(x, indices, axis), indices


def getitem(x, index):
    return x[index]


def torch_getitem(t, x, index):
    return x[as_torch(t, index)]


def torch_put(t, x, values, index):
    out = x.clone()
    out[t.tensor(index)] = values
    return out


CASES = [
    *(Case("getitem", inputs, call=getitem) for inputs in (basic(), mixed())),
    *(
        Case("getitem", inputs, call=getitem, torch=torch_getitem)
        for inputs in (integers(), masks(), mixed(AS_IN_TORCH))
    ),
    Case(
        "getitem",
        integers(),
        call=lambda x, index: x[tuple(tt.tensor(i) for i in index) if isinstance(x, tt.Tensor) else index],
    ),
    Case(
        "scatter_add",
        written(any_index()),
        call=lambda x, values, index: tt.scatter_add(x, index, values),
        numpy=add_reference,
    ),
    Case(
        "scatter_add",
        written(integers()),
        call=lambda x, values, index: tt.scatter_add(x, index, values),
        numpy=add_reference,
        torch=lambda t, x, values, index: t.index_put(x, as_torch(t, index), values, accumulate=True),
    ),
    Case(
        "index_put",
        written(any_index()),
        call=lambda x, values, index: tt.index_put(x, index, values),
        numpy=put_reference,
    ),
    Case(
        "index_put",
        written(masks()),
        call=lambda x, values, index: tt.index_put(x, index, values),
        numpy=put_reference,
        torch=torch_put,
    ),
    Case("take", taken(), numpy=np.take),
    Case("take", taken(), call=lambda x, **options: x.take(**options), numpy=np.take),
    Case("take_along_axis", along(), numpy=np.take_along_axis),
    Case("take_along_axis", flattened(), numpy=np.take_along_axis),
    Case(
        "take_along_axis",
        gathered(),
        numpy=np.take_along_axis,
        torch=lambda t, x, indices, axis: t.gather(x, axis, t.tensor(indices)),
    ),
    Case(
        "embedding",
        tokens(),
        numpy=lambda weight, tokens: weight[tokens],
        torch=lambda t, weight, tokens: t.nn.functional.embedding(t.tensor(tokens.astype("int64")), weight),
    ),
    Case("sort", to_sort(), numpy=np.sort, torch=lambda t, x, axis: t.sort(x, axis).values),
    Case("sort", flat_to_sort(), numpy=np.sort),
    Case("argsort", to_sort(), numpy=np.argsort, torch=lambda t, x, axis: t.argsort(x, axis), differentiable=False),
    Case("argsort", flat_to_sort(), numpy=np.argsort, differentiable=False),
    Case("topk", largest(), numpy=topk_reference, torch=lambda t, x, k, axis: tuple(t.topk(x, k, axis))),
]
