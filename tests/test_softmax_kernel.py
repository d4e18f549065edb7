"""The compiled cross-entropy against its definition in extended precision, and against the plain NumPy op."""

import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape.kernels import compiler, threads
from tinytape.ops import softmax as plain

needs_compiler = pytest.mark.skipif(not compiler.usable(), reason="kernels are not compiled here")
INF, NAN = np.inf, np.nan


@contextmanager
def from_size(least):
    """Use the kernels from so many logits on."""
    was, plain.LEAST = plain.LEAST, least
    try:
        yield
    finally:
        plain.LEAST = was


def both(f):
    """What `f` returns with NumPy and with the kernels."""
    with from_size(sys.maxsize):
        expected = f()
    with from_size(0):
        return expected, f()


def loss_and_gradient(x, target, g=None, **options):
    logits = tt.tensor(x, requires_grad=True)
    loss = tt.cross_entropy(logits, target, reduction="none", **options)
    loss.backward(np.ones(loss.shape) if g is None else g)
    return loss.numpy(), logits.grad.numpy()


def definition(x, target, weight, ignore_index, smoothing):
    """The losses and the gradient of their sum, in extended precision."""
    x = x.astype(np.longdouble)
    top = x.max(-1, keepdims=True)
    log_p = x - top - np.log(np.sum(np.exp(x - top), -1, keepdims=True))
    classes = x.shape[-1]
    counts = target != ignore_index
    wanted = np.full(x.shape, smoothing / classes) + (1 - smoothing) * np.eye(classes)[np.where(counts, target, 0)]
    wanted = wanted * (1.0 if weight is None else weight) * counts[:, None]
    return -np.sum(wanted * log_p, -1), np.exp(log_p) * wanted.sum(-1, keepdims=True) - wanted


@needs_compiler
@given(
    rows=st.integers(1, 9),
    classes=st.one_of(st.integers(1, 70), st.sampled_from([127, 256, 1000])),
    dtype=st.sampled_from(["float32", "float64"]),
    scale=st.sampled_from([0.1, 3.0, 40.0, 1e4]),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignore_index=st.sampled_from([-100, 0]),
    seed=st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_the_definition(
    rows, classes, dtype, scale, weighted, smoothing, ignore_index, seed
):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, classes)) * scale).astype(dtype)
    weight = rng.uniform(0.1, 2.0, classes).astype(dtype) if weighted else None
    target = rng.integers(0, classes, rows)
    target[rng.random(rows) < 0.2] = ignore_index
    options = dict(weight=weight, ignore_index=ignore_index, label_smoothing=smoothing)
    g = rng.uniform(-1, 1, rows).astype(dtype)
    with from_size(0):
        losses, gradient = loss_and_gradient(x, target, g, **options)
    expected, slope = definition(x, target, weight, ignore_index, smoothing)
    slope = slope * g[:, None]
    assert losses.dtype == gradient.dtype == dtype
    eps = np.finfo(dtype).eps
    assert (np.abs(losses - expected) <= 20 * eps * (1 + np.ptp(x, axis=-1))).all()
    assert (np.abs(gradient - slope) <= 20 * eps).all()


@needs_compiler
def test_small_probabilities_are_relatively_right():
    x = np.linspace(-80.0, 0.0, 33, dtype=np.float32)[None]
    with from_size(0):
        _, gradient = loss_and_gradient(x, np.array([32]))
    _, slope = definition(x, np.array([32]), None, -100, 0.0)
    np.testing.assert_allclose(gradient[:, :32], slope[:, :32].astype(np.float64), rtol=2e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("at", ["target", "largest"])
@pytest.mark.parametrize("classes", [2, 33, 1000])
def test_any_distance_between_the_target_and_the_largest_logit(dtype, at, classes):
    """Sums are taken relative to either, whichever is near enough, and both are as exact; either may be near 0."""
    rng = np.random.default_rng(classes)
    far = np.concatenate([np.arange(0.0, 40.0, 0.5), [80.0, 87.0, 88.0, 89.0, 104.0, 200.0, 700.0, 750.0, 1e4]])
    x = -np.abs(rng.normal(size=(len(far), classes))) * 5
    x[:, 0], x[:, 1] = 0, -far
    x = (x + (far[:, None] if at == "target" else 0)).astype(dtype)
    target = np.ones(len(far), np.int64)
    with from_size(0):
        losses, gradient = loss_and_gradient(x, target)
    expected, slope = definition(x, target, None, -100, 0.0)
    eps = np.finfo(dtype).eps
    assert (np.abs(losses - expected) <= 4 * eps * (1 + np.abs(expected))).all()
    large = np.abs(slope) > np.finfo(dtype).tiny * classes
    assert (
        np.abs(gradient - slope)[large] <= (8 * eps * (4 + np.ptp(x, axis=-1, keepdims=True)) * np.abs(slope))[large]
    ).all()


@needs_compiler
def test_rows_far_and_near_beside_each_other_with_weights_and_smoothing():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 50)).astype(np.float64)
    x[::2, 4] -= 60
    options = dict(weight=rng.uniform(0.1, 2.0, 50), ignore_index=-100, label_smoothing=0.1)
    target = np.full(6, 4)
    with from_size(0):
        found = loss_and_gradient(x, target, **options)
    expected = definition(x, target, options["weight"], -100, 0.1)
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, exact.astype(np.float64), rtol=1e-12, atol=1e-14)


CORNERS = [
    [[0.0, -INF, 2.0], [1.0, -INF, -INF]],
    [[-INF, -INF, -INF], [0.0, 0.0, 0.0]],
    [[INF, 0.0, 0.0], [NAN, 0.0, 1.0]],
    [[1e30, -1e30, 0.0], [-1e38, -1e38, 1e38]],
]


@needs_compiler
@pytest.mark.parametrize("x", CORNERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("repeats", [1, 7, 40])
def test_infinities_and_nan_are_numpys(x, smoothing, repeats):
    """Also far from the row's start, and in its last, partial vector."""
    x = np.concatenate([np.full((2, repeats), -5.0), np.array(x)], axis=1)
    target = np.array([repeats, repeats + 2])
    expected, found = both(lambda: loss_and_gradient(x, target, label_smoothing=smoothing))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-300)


@needs_compiler
def test_ignored_rows_may_hold_anything():
    x = np.array([[1.0, 2.0], [NAN, INF], [-INF, -INF]])
    with from_size(0):
        losses, gradient = loss_and_gradient(x, np.array([1, -100, -100]), g=np.array([1.0, NAN, INF]))
    assert losses[0] > 0 and not losses[1:].any() and gradient[0].all() and not gradient[1:].any()


@needs_compiler
@pytest.mark.parametrize("view", [np.transpose, lambda x: x[:, ::2], lambda x: x[::-1], lambda x: x[2:, 3:]])
def test_rows_that_are_not_contiguous(view):
    base = np.random.default_rng(0).normal(size=(20, 20))
    target = np.arange(len(view(base))) % 7

    def results():
        leaf = tt.tensor(base, requires_grad=True)
        losses = tt.cross_entropy(view(leaf), target, reduction="none")
        losses.sum().backward()
        return losses.numpy(), leaf.grad.numpy()

    for a, b in zip(*both(results), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


@needs_compiler
def test_leading_axes():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(7, 4, 6))
    target, g = rng.integers(0, 7, (6, 4)), rng.normal(size=(6, 4))
    for x in (base.transpose(2, 1, 0), np.ascontiguousarray(base.transpose(2, 1, 0))):

        def losses_of_a_view(x=x):
            leaf = tt.tensor(base, requires_grad=True)
            losses = tt.cross_entropy(tt.transpose(leaf, (2, 1, 0)), target, reduction="none")
            losses.backward(g)
            return losses.numpy(), leaf.grad.numpy()

        for f in (lambda x=x: loss_and_gradient(x, target, g=g), losses_of_a_view):
            expected, found = both(f)
            for a, b in zip(expected, found, strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


@needs_compiler
@pytest.mark.parametrize("target", [[1, 0, 2], np.array([1, 0, 2], np.uint8), np.array([9, 9, 9])])
def test_kinds_of_target(target):
    x = np.random.default_rng(0).normal(size=(3, 5))
    expected, found = both(lambda: loss_and_gradient(x, target, ignore_index=9))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


@needs_compiler
def test_derivatives_of_the_gradient_and_forward_mode():
    rng = np.random.default_rng(1)
    x, v = rng.normal(size=(2, 3, 5))
    target = np.array([0, 4, -100])

    def loss(x):
        return tt.cross_entropy(x, target, label_smoothing=0.1, reduction="sum")

    def results():
        _, tangent = tt.jvp(loss, (tt.tensor(x),), (tt.tensor(v),))
        hessian = tt.grad(lambda x: tt.sum(tt.grad(loss)(x) ** 2))(tt.tensor(x))
        return np.asarray(tangent), np.asarray(hessian)

    for a, b in zip(*both(results), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-14)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_number_of_threads_changes_no_bit(dtype):
    rng = np.random.default_rng(2)
    x, target = rng.normal(size=(61, 5001)).astype(dtype), rng.integers(0, 5001, 61)
    before, found = threads.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            threads.set_num_threads(count)
            found.append(loss_and_gradient(x, target))
    finally:
        threads.set_num_threads(before)
    for losses, gradient in found[1:]:
        assert np.array_equal(losses, found[0][0]) and np.array_equal(gradient, found[0][1])


PROGRAM = """
import sys
import numpy as np, tinytape as tt
rng = np.random.default_rng(0)
rows = {rows}
logits = tt.tensor(rng.normal(size=(rows, 2048)).astype("float32"), requires_grad=True)
optimizer = tt.optim.Adam([logits], clip_norm=1.0)
loss = tt.cross_entropy(logits, rng.integers(0, 2048, rows))
loss.backward()
optimizer.step()
print("numba" in sys.modules, loss.item(), float(np.sum(logits.data)))
"""


def run(rows, before="", **environment):
    """Whether Numba was imported, and the numbers that came out."""
    command = [sys.executable, "-c", before + PROGRAM.format(rows=rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    imported, *numbers = done.stdout.split()
    return imported == "True", [float(x) for x in numbers]


def test_little_work_does_not_import_numba():
    assert run(10)[0] is False


def test_much_work_is_done_without_a_compiler_too():
    _, expected = run(300)
    _, switched_off = run(300, NUMBA_DISABLE_JIT="1")
    _, missing = run(300, before="import sys; sys.modules['numba'] = None")
    assert switched_off == pytest.approx(expected, rel=1e-5)
    assert missing == pytest.approx(expected, rel=1e-5)
