"""Products: sums over axes that two views share. Everything from a dot product to einsum is one of them."""

from __future__ import annotations

from typing import Any

from .build import Builder
from .program import Value
from .views import View, merged, whole

__all__ = ["matmul_labels", "product"]

Labels = tuple[Any, ...]


def matmul_labels(a: View, b: View) -> tuple[Labels, Labels, Labels]:
    """Of ``a @ b``: the labels of each argument's axes and of the result's. Leading axes broadcast."""
    count_a, count_b = len(a.shape) - 2, len(b.shape) - 2
    lead = tuple(range(max(count_a, count_b, 0)))
    one = ("k",) if count_a < 0 else (*lead[len(lead) - count_a :], "m", "k")
    two = ("k",) if count_b < 0 else (*lead[len(lead) - count_b :], "k", "n")
    return one, two, (*lead, *one[-2:-1], *(two[-1:] if count_b >= 0 else ()))


def product(low: Builder, a: View, b: View, one: Labels, two: Labels, out: Labels) -> Any:
    """The sum of ``a * b`` over all axes whose labels are not in `out`.

    It is a product with a constant matrix, or one over the batch, if it has the form; else it is done element by
    element.
    """
    counts = {labels[x.batch or 0]: x.merged for x, labels in ((a, one), (b, two)) if x.merged}
    if counts:
        return _apart(low, a, b, one, two, out, counts)
    for x, y, labels, others in ((a, b, one, two), (b, a, two, one)):
        summed = [label for label in others if label in labels and label not in out]
        free = [label for label in others if label not in labels and label in out]
        if _is_matrix(y) and len(summed) == 1 == len(free) and x.value.kind != "invariant":
            kept = [label for label in labels if label != summed[0]]
            of_batch = None if x.batch is None else labels[x.batch]
            if of_batch != summed[0] and all(label in out for label in kept):
                return _times_matrix(low, x, y, labels, others, out, summed[0], free[0])
    of_batch = None if a.batch is None or b.batch is None else one[a.batch]
    if of_batch is not None and of_batch == two[b.batch or 0] and of_batch not in out and low.adjoint:
        found = _over_batch(low, a, b, one, two, out)
        if found is not None:
            return found
    order = (*out, *dict.fromkeys(label for label in (*one, *two) if label not in out))
    products = low.map("multiply", _spread(a, one, order), _spread(b, two, order))
    return low.reduce("sum", products, range(len(out), len(order)))


def _spread(view: View, labels: Labels, order: Labels) -> View:
    return view.with_axes([labels.index(label) if label in labels else -1 for label in order])


def _apart(low: Builder, a: View, b: View, one: Labels, two: Labels, out: Labels, counts: dict[Any, int]) -> Any:
    """With axes that are merged with the batch: each by itself, and merged again in the result."""
    (label, count), *others = counts.items()
    parts = tuple((label, i) for i in range(count + 1))

    def separate(view: View, labels: Labels) -> tuple[View, Labels]:
        if label not in labels:
            return view, labels
        if view.merged != count or others:
            raise low.cannot("a product of axes that are merged with the batch, and of others")
        rest = [i for i in range(len(labels)) if i != view.batch]
        return low.unmerge(view.with_axes((view.batch or 0, *rest))), (*parts, *(labels[i] for i in rest))

    (a, one), (b, two) = separate(a, one), separate(b, two)
    wide = tuple(part for name in out for part in (parts if name == label else (name,)))
    result = product(low, a, b, one, two, wide)
    if label not in out:
        return result
    if not isinstance(result, View) or result != whole(result.value, result.shape, 0):
        raise low.cannot("a product of axes that are merged with the batch, in another order")
    return merged(result, count)


def _is_matrix(view: View) -> bool:
    """Whether it is an invariant matrix as it is, or transposed."""
    return (
        len(view.shape) == 2 and view.value.kind == "invariant" and (view.is_whole or view.with_axes((1, 0)).is_whole)
    )


def _times_matrix(
    low: Builder, a: View, b: View, one: Labels, two: Labels, out: Labels, summed: Any, free: Any
) -> View:
    front = [] if a.batch is None else [one[a.batch]]
    order = [*front, *(label for label in out if label in one and label not in front), summed]
    value = low.realise(_spread(a, one, tuple(order)))
    matrix = b.value if (two[0] == summed) is b.is_whole else low.transposed(b.value)
    made = low.make("product", (*value.shape[:-1], matrix.shape[1]), (value, matrix))
    shape = tuple(a.shape[one.index(label)] for label in order[:-1])
    result = whole(made, (*shape, matrix.shape[1]), 0 if front else None)
    return _spread(result, (*order[:-1], free), out)


def _over_batch(low: Builder, a: View, b: View, one: Labels, two: Labels, out: Labels) -> Value | None:
    """The sum over rows of products of vectors; None if each has not just one axis of its own."""
    of_batch = one[a.batch or 0]
    both = [label for label in one if label in two and label != of_batch]
    free = [[label for label in labels if label not in (of_batch, *both)] for labels in (one, two)]
    if any(len(own) != 1 for own in free) or set(out) != {free[0][0], free[1][0]}:
        return None
    values = [
        low.realise(_spread(view, labels, (of_batch, *both, *own)))
        for view, labels, own in ((a, one, free[0]), (b, two, free[1]))
    ]
    if values[0].shape[:-1] != values[1].shape[:-1]:
        return None
    if out[0] != free[0][0]:
        values.reverse()
    return low.make("outer", (values[0].shape[-1], values[1].shape[-1]), tuple(values))
