"""Rows for the ops of `tinytape/ops/softmax.py`; options, masks and errors are in `test_cross_entropy.py`."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

import tinytape as tt
from cases import Case, shapes, values

small, large = values(), values(-60.0, 60.0)


@st.composite
def rows(draw, maker):
    side = draw(shapes())
    return (draw(maker(side)),), {"axis": draw(st.integers(-len(side), len(side) - 1)) if side else -1}


def softmax_reference(x, axis):
    if not x.ndim:
        return np.ones(())
    e = np.exp(x - x.max(axis, keepdims=True, initial=-np.inf))
    return e / e.sum(axis, keepdims=True)


def log_softmax_reference(x, axis):
    if not x.ndim:
        return np.zeros(())
    shifted = x - x.max(axis, keepdims=True, initial=-np.inf)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


@st.composite
def classified(draw, maker, options):
    """Logits with class numbers, some of them ignored, and options."""
    side = draw(shapes(max_dims=2))
    classes = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    target = rng.integers(0, classes, side)
    chosen = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if "weight" in options:
        chosen["weight"] = rng.uniform(0.1, 2.0, classes)
    if "ignore_index" in options:
        chosen["ignore_index"] = draw(st.sampled_from([-100, -1, 0, classes - 1]))
        target = np.where(rng.random(side) < 0.3, chosen["ignore_index"], target)
    if "label_smoothing" in options:
        chosen["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    return (draw(maker((*side, classes))),), {"target": target, **chosen}


@st.composite
def mixtures(draw, weighted):
    """Logits with probabilities, which are differentiated too."""
    side = (*draw(shapes(max_dims=2)), draw(st.integers(1, 4)))
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.2]))
    if weighted:
        options["weight"] = np.random.default_rng(0).uniform(0.1, 2.0, side[-1])
    return (draw(small(side)), draw(values(0.0, 1.0)(side))), options


def counted(target, weight, ignore_index):
    weights = np.ones(1000) if weight is None else weight
    valid = target != ignore_index
    return np.where(valid, weights[np.where(valid, target, 0)], 0.0)


def reference(logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """Straight from the definition: minus the sum of the target's distribution times the log-probabilities."""
    classes = logits.shape[-1]
    log_p = log_softmax_reference(logits, -1)
    weights = np.ones(classes) if weight is None else weight
    if target.dtype.kind == "f":
        target = target * (1 - label_smoothing) + label_smoothing / classes
        losses, total = -(target * weights * log_p).sum(-1), target[..., 0].size
    else:
        valid = target != ignore_index
        hot = np.eye(classes)[np.where(valid, target, 0)] * (1 - label_smoothing) + label_smoothing / classes
        losses = np.where(valid, -(hot * weights * log_p).sum(-1), 0.0)
        total = counted(target, weight, ignore_index).sum()
    if reduction == "none":
        return losses
    return losses.sum() / (total or 1.0) if reduction == "mean" else losses.sum()


def torch_cross_entropy(t, logits, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    """torch has the classes second, and NaN for a mean of nothing."""
    options = {"weight": None if weight is None else t.tensor(weight), "label_smoothing": label_smoothing}
    flat = logits.reshape(-1, logits.shape[-1])
    if isinstance(target, t.Tensor):
        shape, total, target = target.shape[:-1], target[..., 0].numel(), target.reshape(flat.shape)
    else:
        shape, total = target.shape, counted(target, weight, ignore_index).sum()
        target, options["ignore_index"] = t.tensor(target).reshape(-1), ignore_index
    if reduction == "mean" and not total:
        reduction = "sum"
    losses = t.nn.functional.cross_entropy(flat, target, reduction=reduction, **options)
    return losses.reshape(shape) if reduction == "none" else losses


def case(inputs):
    return Case("cross_entropy", inputs, numpy=reference, torch=torch_cross_entropy)


CASES = [
    *(
        Case("softmax", rows(maker), numpy=softmax_reference, torch=lambda t, x, axis: t.softmax(x, axis))
        for maker in (small, large)
    ),
    *(
        Case("log_softmax", rows(maker), numpy=log_softmax_reference, torch=lambda t, x, axis: t.log_softmax(x, axis))
        for maker in (small, large)
    ),
    Case("softmax", rows(small), call=lambda x, axis: getattr(x, "softmax", lambda axis: tt.softmax(x, axis))(axis)),
    case(classified(small, ())),
    case(classified(large, ())),
    case(classified(small, ("weight", "ignore_index"))),
    case(classified(small, ("label_smoothing", "ignore_index"))),
    case(classified(large, ("label_smoothing", "ignore_index", "weight"))),
    case(mixtures(False)),
    case(mixtures(True)),
]
