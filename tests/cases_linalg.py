"""Rows for the ops of `tinytape/ops/linalg.py`."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytape as tt
from cases import Case, shapes, unary, values

make = values()
MATMUL = hnp.mutually_broadcastable_shapes(signature=np.matmul.signature, max_dims=2, min_side=0, max_side=4)


@st.composite
def products(draw):
    """Every pair of shapes that matmul takes: vectors, matrices, stacks that broadcast."""
    return tuple(draw(make(s)) for s in draw(MATMUL).input_shapes), {}


@st.composite
def layers(draw):
    """A stack of matrices with one matrix: the hot path of a layer over a sequence."""
    *lead, k, m = draw(shapes(min_dims=3, max_dims=5))
    return (draw(make((*lead, k))), draw(make((k, m)))), {}


@st.composite
def dots(draw):
    k = draw(st.integers(0, 4))
    first = draw(st.sampled_from([None, (), (2,), (0,), (2, 3)]))
    second = draw(st.sampled_from([None, (), (3,), (2, 1), (1, 0)]))
    a = () if first is None else (*first, k)
    b = () if second is None else (k,) if not second else (*second[:-1], k, second[-1])
    return (draw(make(a)), draw(make(b))), {}


@st.composite
def tensordots(draw):
    """Shapes with some axes in common, in any order, and the axes as a number or as two lists."""
    common = draw(shapes(max_dims=2))
    free = draw(shapes(max_dims=2)), draw(shapes(max_dims=2))
    n = len(common)
    if draw(st.booleans()):
        return (draw(make(free[0] + common)), draw(make(common + free[1]))), {"axes": n}
    arrays, axes = [], []
    for rest in free:
        sides = [*common, *rest]
        order = draw(st.permutations(range(len(sides))))
        arrays.append(draw(make(tuple(sides[i] for i in order))))
        axes.append([order.index(i) - draw(st.sampled_from([0, len(sides)])) for i in range(n)])
    return tuple(arrays), {"axes": (axes[0], axes[1])}


LENGTHS = dict(b=2, i=3, j=4, k=2, l=1)

EINSUMS = [
    "ij,jk->ik", "ij,jk", "ji,jk->ki", "bij,bjk->bik", "bij,kj->bik", "i,i->", "i,i", "i,j->ij", "ij->ji", "ij->",
    "ij->j", "ij,j->i", "i,ij,j->", "bi,ij,bj->b", "ij,ij->ij", "ij,ij,ij->i", "ij,k->ik", "ij,k->",
    "ij,l->i", "bi, ij -> bj", "ij,jl,lb->ib", "bijk,bj->ki",
]  # fmt: skip

DIAGONALS = ["ii->i", "ii", "ii->", "iij->ij", "iji->j", "ii,ij->j", "iii->i", "ii,jj->ij"]

DOTS = ["...ij,...jk->...ik", "...i,...i", "i...->...", "...i->i...", "...,...->...", "b...,...->b...", "...ij->...ji"]


@st.composite
def contractions(draw, subscripts):
    chosen = draw(st.sampled_from(subscripts))
    lengths = LENGTHS | {draw(st.sampled_from("bijkl")): draw(st.integers(0, 2))}
    arrays = []
    for letters in chosen.replace(" ", "").partition("->")[0].split(","):
        before, dots, after = letters.partition("...")
        extra = draw(st.sampled_from([(), (3,), (1,), (2, 3), (2, 1)])) if dots else ()
        arrays.append(draw(make((*(lengths[c] for c in before), *extra, *(lengths[c] for c in after)))))
    return tuple(arrays), {"subscripts": chosen}


@st.composite
def ones_that_broadcast(draw):
    """A letter of length 1 in one operand and more in another, as NumPy and torch allow."""
    a = draw(make((3, draw(st.sampled_from([1, 4])))))
    b = draw(make((draw(st.sampled_from([1, 4])), 2)))
    return (a, b), {"subscripts": draw(st.sampled_from(["ij,jk->ik", "ij,jk->jk", "ij,jk->ijk", "ij,jk->"]))}


def einsum(*operands, subscripts):
    return tt.einsum(subscripts, *operands)


def einsum_reference(*operands, subscripts):
    return np.einsum(subscripts, *operands)


def einsum_torch(t, *operands, subscripts):
    return t.einsum(subscripts, *operands)


def einsum_case(inputs):
    return Case("einsum", inputs, call=einsum, numpy=einsum_reference, torch=einsum_torch)


@st.composite
def traces(draw):
    x = draw(make(draw(shapes(min_dims=2))))
    one, two = draw(st.permutations(range(x.ndim)))[:2]
    return (x,), {"offset": draw(st.integers(-2, 2)), "axis1": one, "axis2": two - x.ndim}


CASES = [
    Case("matmul", products(), numpy=np.matmul, torch=lambda t, a, b: t.matmul(a, b)),
    Case("matmul", layers(), numpy=np.matmul, torch=lambda t, a, b: t.matmul(a, b)),
    Case("matmul", products(), call=lambda a, b: a @ b),
    Case("matmul", unary(min_dims=2, max_dims=2), call=lambda x: x @ x.T, torch=lambda t, x: x @ x.T),
    Case("dot", dots(), numpy=np.dot),
    Case("dot", products(), call=lambda a, b: tt.dot(a, b) if a.ndim < 3 > b.ndim else a @ b),
    Case(
        "outer",
        st.tuples(shapes(max_dims=2).flatmap(make), shapes(max_dims=2).flatmap(make)).map(lambda xs: (xs, {})),
        numpy=np.outer,
        torch=lambda t, a, b: t.outer(a.reshape(-1), b.reshape(-1)),
    ),
    Case(
        "tensordot",
        tensordots(),
        numpy=np.tensordot,
        torch=lambda t, a, b, axes: t.tensordot(a, b, dims=axes),
    ),
    einsum_case(contractions(EINSUMS)),
    einsum_case(contractions(DIAGONALS)),
    einsum_case(contractions(DOTS)),
    einsum_case(ones_that_broadcast()),
    Case(
        "einsum",
        unary(min_dims=2, max_dims=2),
        call=lambda x: tt.einsum("ij,kj->ik", x, x),
        torch=lambda t, x: t.einsum("ij,kj->ik", x, x),
    ),
    Case("trace", traces(), numpy=np.trace),
    Case("trace", unary(min_dims=2, max_dims=2, min_side=1), numpy=np.trace, torch=lambda t, x: x.diagonal().sum()),
]
