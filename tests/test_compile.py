"""Compiled scans: what steps may consist of, and what is refused and why.

Most of it runs by the emitted NumPy source, which needs no compiler. It and the Numba source come from one program.
"""

import gc
import random
import weakref
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from random_lines import BINARY, UNARY
from scanning import Leaves, assert_like_eager, by_numpy, needs_numba
from tinytape import nn
from tinytape.compile import attempt, trace
from tinytape.engine.tree import flatten

T, B, I, H = 6, 4, 3, 5  # steps, batch rows, input and hidden width

# ---- what a step may be ---------------------------------------------------------------------------------------------

FORMS = {}


def form(build):
    FORMS[build.__name__] = build
    return build


@form
def weights_in_every_way(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)

    def f(h, x):
        joined = tt.concatenate([w[:, :2], w[:, 2:] * 0.5], axis=1)
        h = tt.tanh(x @ joined + h @ u.T + (h * x[:, :1]) @ u + h @ tt.stack([b] * H) + b)
        return h, h

    return f, leaf(B, H), leaf(T, B, I)


@form
def numbers_and_arrays_as_outputs(leaf):
    w = leaf(I, H)
    return lambda h, x: (tt.tanh(x @ w + h), (1.0, 2, h, np.arange(3.0), w)), leaf(B, H), leaf(T, B, I)


@form
def no_batch(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)
    return lambda h, x: (tt.tanh(x @ w + h @ u + b), h), leaf(H), leaf(T, I)


@form
def no_batch_and_width_1(leaf):
    w, u = leaf(I, 1), leaf(1, 1)
    return lambda h, x: (tt.tanh(x @ w + h @ u), h), leaf(1), leaf(T, I)


@form
def single_numbers(leaf):
    w = leaf(H)
    return lambda h, x: (tt.sin(h * x) + (w * h).sum() * 0.5, h), leaf(), leaf(T)


@form
def a_number_a_row(leaf):
    return lambda h, x: (tt.sin(h * x) + 0.5 * h, h), leaf(B), leaf(T, B)


@form
def a_carry_that_all_rows_share(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)

    def f(carry, x):
        h, scale, shift = carry
        h = tt.tanh(x @ w + h @ u + shift) * scale
        return (h, 0.9 * scale, tt.tanh(shift * b)), (h.sum(axis=-1), scale)

    return f, (leaf(B, H), leaf(), leaf(H)), leaf(T, B, I)


@form
def inputs_that_all_rows_share(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(1, H)

    def f(h, x):
        time, vector, row = x
        return tt.tanh((row * time) @ w + vector @ u + h * vector + b * time), h

    return f, leaf(B, H), (leaf(T), leaf(T, H), leaf(T, B, I))


@form
def a_shared_input_as_long_as_the_batch(leaf):
    w, u = leaf(I, H), leaf(H, H)
    return lambda h, x: (tt.tanh(x @ w + h @ u), h), leaf(I, H), leaf(T, I)


@form
def rows_from_outside(leaf):
    w, u, e, memory = leaf(I, H), leaf(H, H), leaf(B, H), leaf(B, 7, H)

    def f(h, x):
        a = tt.softmax((memory * h.expand_dims(1)).sum(axis=-1))
        read = (a.expand_dims(-1) * memory).sum(axis=1)
        return tt.tanh(x @ w + h * e + (0.5 * e) @ u + read), a

    return f, leaf(B, H), leaf(T, B, I)


@form
def batch_statistics(leaf):
    w, u = leaf(I, H), leaf(H, H)
    return lambda h, x: (tt.tanh(x @ w + (h - h.mean(axis=0)) @ u), h), leaf(B, H), leaf(T, B, I)


@form
def einsum_and_tensordot(leaf):
    a, u, w = leaf(H, I, H), leaf(H, H), leaf(I, H)

    def f(h, x):
        bilinear = tt.einsum("bg,gih,bi->bh", h, a, x)
        return tt.tanh(bilinear + tt.einsum("bh,gh->bg", h, u) + tt.tensordot(x, w, ((1,), (0,)))), h

    return f, leaf(B, H), leaf(T, B, I)


@form
def moving_elements(leaf):
    w = leaf(I, H)

    def f(h, x):
        a = tt.roll(h, 2, axis=-1) + tt.tile(h[:, :1], (1, H)) + tt.repeat(x, 2, axis=1)[:, :H]
        a = a + h[:, [0, 1, 1, 0, 4]] + h[..., np.array([True, False, True, True, True])].sum(axis=-1, keepdims=True)
        return tt.tanh(
            0.1 * (a + tt.cumsum(h, axis=-1) + tt.cumsum(h[:, :, None] * h[:, None], axis=1)[:, 2]) + x @ w
        ), a

    return f, leaf(B, H), leaf(T, B, I)


@form
def every_elementwise_function(leaf):
    formulas = [formula.replace("{}", "h") for formula in (*UNARY, *BINARY)]
    total = eval("lambda h: " + " + ".join(formulas), {"tt": tt})
    return lambda h, x: (tt.tanh(0.1 * total(h) + x), h), leaf(B, H), leaf(T, B, H)


@form
def elements_over_merged_axes(leaf):
    q = leaf(H, H)

    def f(m, x):
        flat = tt.tanh(tt.reshape(m, (-1, H)) @ q + q[0])
        return tt.reshape(flat, m.shape) * x[:, None], m.max(axis=1)

    return f, leaf(B, 3, H), leaf(T, B, H)


@form
def flags(leaf):
    w = leaf(I, H)

    def f(carry, x):
        h, seen = carry
        value, mask = x
        seen = tt.logical_xor(seen, value.sum(axis=-1) > 0)
        return (tt.where(mask, tt.tanh(value @ w), h) * seen[:, None], seen), (seen, mask)

    rng = leaf.rng
    return f, (leaf(B, H), rng.random(B) < 0.5), (leaf(T, B, I), rng.random((T, B, 1)) < 0.5)


@form
def a_carry_that_is_replaced(leaf):
    return lambda h, x: (x.detach(), tt.swapaxes(tt.reshape(h, (B, 2, 3)), 1, 2)), leaf(B, 6), leaf(T, B, 6)


@form
def in_place_on_results(leaf):
    w = leaf(I, H)

    def f(h, x):
        h = h * 1.0
        h += x @ w
        h *= 0.5
        return h, h

    return f, leaf(B, H), leaf(T, B, I)


@form
def one_row_that_loses_its_axis(leaf):
    w, u = leaf(I, H), leaf(H, H)
    return lambda h, x: (tt.tanh(x @ w + h @ u), (tt.squeeze(h), h[0])), leaf(1, H), leaf(T, 1, I)


@form
def as_many_rows_as_features(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)
    return lambda h, x: (tt.tanh(x @ w + h @ u + b * u), h * b), leaf(H, H), leaf(T, H, I)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_step_may_be(name, reverse):
    leaf = Leaves()
    with by_numpy():
        assert_like_eager(*FORMS[name](leaf), leaf.made, reverse=reverse)


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_compiled_step_may_be(name):
    leaf = Leaves()
    assert_like_eager(*FORMS[name](leaf), leaf.made)


# ---- NaN and infinities ---------------------------------------------------------------------------------------------

ODD = {
    "max": lambda x, h: tt.max(x, axis=-1, keepdims=True) + 0.5 * h,
    "min": lambda x, h: tt.min(x, axis=-1, keepdims=True) + 0.5 * h,
    "sum": lambda x, h: tt.sum(x, axis=-1, keepdims=True) + 0.5 * h,
    "softmax": lambda x, h: tt.softmax(x, axis=-1) + 0.5 * h,
    "logsumexp": lambda x, h: tt.logsumexp(x, axis=-1, keepdims=True) + 0.5 * h,
    "cumsum": lambda x, h: tt.cumsum(x, axis=-1) + 0.5 * h,
    "maximum": lambda x, h: tt.maximum(x, h),
    "minimum": lambda x, h: tt.minimum(x, h),
    "clip": lambda x, h: tt.clip(x, -1, 1) + 0.5 * h,
    "relu": lambda x, h: tt.relu(x) + 0.5 * h,
    "elu": lambda x, h: tt.elu(x) + 0.5 * h,
    "gelu": lambda x, h: tt.gelu(x) + 0.5 * h,
    "softplus": lambda x, h: tt.softplus(x) + 0.5 * h,
    "sigmoid": lambda x, h: tt.sigmoid(x) * h,
    "tanh": lambda x, h: tt.tanh(x) + 0.5 * h,
    "sign": lambda x, h: tt.sign(x) * h,
    "abs": lambda x, h: tt.abs(x) + 0.5 * h,
    "where": lambda x, h: tt.where(x > 0, tt.sqrt(tt.abs(x)), h),
    "comparison": lambda x, h: (x < 0.5) * h + tt.where(tt.logical_not(x >= h), 0.5 * h, x),
}


def odd_numbers():
    x = np.random.default_rng(3).normal(size=(T, B, H))
    x[2, 1, 3], x[3, 2, 0], x[4, 3, 1] = np.nan, np.inf, -np.inf
    return tt.tensor(x, requires_grad=True)


@pytest.mark.parametrize("name", ODD)
def test_odd_numbers_come_out_as_in_eager(name):
    with by_numpy():
        assert_like_eager(lambda h, x: (ODD[name](x, h), h), Leaves()(B, H), odd_numbers())


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_numbers_come_out_of_kernels_as_in_eager(name):
    assert_like_eager(lambda h, x: (ODD[name](x, h), h), Leaves()(B, H), odd_numbers())


ENDS = np.array([0, 1e-37, 1e-19, 1, 2, 1e19, 3e38, np.inf, np.nan], np.float32)  # and two between


def divided_by_roots(compiled):
    numerators, squares = np.meshgrid(np.concatenate([ENDS, -ENDS]), ENDS)
    x = np.broadcast_to(numerators[..., None], (*numerators.shape, H)).astype(np.float32)
    squares = squares[..., None].astype(np.float32)  # one for each row
    zeros = np.zeros(x.shape[1:], np.float32)
    return tt.scan(lambda h, xs: (h, xs[0] / tt.sqrt(xs[1])), zeros, (x, squares), compiled=compiled)[1].numpy()


def assert_roots_divide():
    """By a product with the reciprocal: it must not leave the range anywhere."""
    found, expected = divided_by_roots(True), divided_by_roots(False)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1.2e-38)  # where kernels have 0


def test_roots_divide_over_the_whole_range():
    with by_numpy():
        assert_roots_divide()


@needs_numba
@pytest.mark.slow
def test_roots_divide_over_the_whole_range_in_kernels():
    assert_roots_divide()


def test_nothing_is_added_to_a_product_by_adding_zero():
    w = tt.tensor(np.ones((H, H)), requires_grad=True)
    h, x = np.zeros((B, H)), np.ones((T, B, H))
    found, plain = (tt.scan.explain(f, h, x) for f in (lambda h, x: (0.0 + x @ w, None), lambda h, x: (x @ w, None)))
    assert found.numpy == plain.numpy
    assert "+ 0" in tt.scan.explain(lambda h, x: (0.0 + x, None), h, x).numpy.replace(".0", "")  # -0 becomes 0


# ---- what is refused ------------------------------------------------------------------------------------------------

table = tt.tensor(np.zeros(H))


def looks_at_data(h, x):
    return h * float(h.data.mean()), h


def looks_at_a_comparison(h, x):
    return h * (h > 0).data.mean(), h


def looks_at_a_weight(h, x):
    return h * table[0].item(), h


def branches(h, x):
    return (h if h.sum() > 0 else -h), h


def branches_on_a_constant(h, x):
    return (h if table.sum() > 0 else -h), h


def copies(h, x):
    return h.copy(), h


def makes_a_tensor_of_one(h, x):
    return tt.tensor(h), h


def writes(h, x):
    table[0] = 1.0
    return h * table, h


def adds_in_place_to_a_weight(h, x):
    global table
    table += 1.0
    return h * table, h


def makes_a_leaf(h, x):
    return h, tt.tensor(np.ones(H), requires_grad=True)


def counts(h, x):
    return h * tt.argmax(h, axis=-1, keepdims=True), h


def takes_triangles(h, x):
    return tt.tril(h[:, :, None] * h[:, None]).sum(axis=-1), h


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (looks_at_data, "data: on a Tensor"),
        (looks_at_a_comparison, "data: on a Tensor"),
        (looks_at_a_weight, r"item\(\): on a Tensor"),
        (branches, r"bool\(\): on a Tensor"),
        (branches_on_a_constant, r"bool\(\): on a Tensor"),
        (copies, r"copy\(\): on a Tensor"),
        (makes_a_leaf, "requires_grad: on a Tensor"),
        (makes_a_tensor_of_one, r"tensor\(\): on a Tensor"),
        (writes, r"x\[index\] = values: on a Tensor"),
        (adds_in_place_to_a_weight, r"x \+= y: on a Tensor"),
        (counts, "argmax"),
        (takes_triangles, "there is no rule for tril"),
    ],
)
def test_refused_with_the_line(f, reason, caplog):
    init, xs = np.ones((B, H)), np.ones((T, B, H))
    line = f.__code__.co_firstlineno + 1 + (f is adds_in_place_to_a_weight)
    with pytest.raises(tt.InputError, match=rf"{f.__name__} cannot be compiled: .*{reason}.*test_compile.py:{line}"):
        tt.scan(f, init, xs, compiled=True)
    table.copy_(np.ones(H))
    expected = tt.scan(f, init, xs, compiled=False)
    table.copy_(np.ones(H))
    attempt._told.clear()
    found = tt.scan(f, init, xs)
    assert "runs step by step" in caplog.text and f"test_compile.py:{line}" in caplog.text
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize(
    ("f", "init", "reason"),
    [
        (lambda n, x: (n + 1, None), 0, "the carry is of int64"),
        (lambda c, x: (c, None), (np.zeros((B, H)), 0), "the carry is of float64, int64"),
        (lambda c, x: (c, None), (np.zeros((B, H)), np.zeros((B, H), np.float32)), "float64, float32"),
        (lambda h, x: (nn.functional.dropout(h, 0.5), None), np.zeros((B, H)), "draws random numbers"),
    ],
)
def test_refused(f, init, reason):
    with pytest.raises(tt.InputError, match=f"cannot be compiled: .*{reason}"):
        tt.scan(f, init, np.ones((T, B, H)), compiled=True)


@pytest.mark.parametrize("compiled", [True, "auto", False])
@pytest.mark.parametrize(
    ("f", "error", "reason"),
    [
        (lambda h, x: (h[:, :2], None), tt.ShapeError, r"carry has shape \(4, 5\) in init and \(4, 2\) after step 0"),
        (lambda h, x: (h.astype("float32"), None), tt.DTypeError, "carry is float64 in init and float32 after step 0"),
        (lambda h, x: ({"h": h}, None), tt.InputError, "scan: carry is"),
        (lambda h, x: h, tt.InputError, "scan: f returned a Tensor at step 0"),
        (lambda h, x: {}["missing"], KeyError, "missing"),
        (lambda h, x: (h @ np.ones((3, 3)), None), tt.ShapeError, "matmul"),
    ],
)
def test_a_fault_of_the_step_itself_is_shown_as_it_is(f, error, reason, compiled, caplog):
    attempt._told.clear()
    with pytest.raises(error, match=reason) as raised:
        tt.scan(f, np.zeros((B, H)), np.ones((T, B, H)), compiled=compiled)
    assert "cannot be compiled" not in str(raised.value)
    if issubclass(error, tt.TinytapeError):
        assert "runs step by step" not in caplog.text


OURS, PYTHONS = np.random.default_rng(3), random.Random(3)
STATE = OURS.bit_generator.state


def drawing_by(draw):
    return lambda h, x: (h, x * 0 + draw())


@pytest.mark.parametrize(
    ("f", "seed"),
    [
        (drawing_by(lambda: np.random.rand(H)), lambda: np.random.seed(3)),
        (drawing_by(random.random), lambda: random.seed(3)),
        (drawing_by(lambda: OURS.random(H)), lambda: setattr(OURS.bit_generator, "state", STATE)),
        (drawing_by(lambda: PYTHONS.random()), lambda: PYTHONS.seed(3)),
    ],
    ids=["numpy", "python", "generator", "random"],
)
def test_random_numbers_of_others_are_drawn_in_each_step(f, seed):
    def run(**options):
        seed()
        return tt.scan(f, np.zeros((B, H)), np.ones((T, B, H)), **options)[1].numpy()

    plain = run(compiled=False)
    assert len({y.tobytes() for y in plain}) == T
    np.testing.assert_array_equal(run(), plain)
    np.testing.assert_array_equal(run(), plain)
    with pytest.raises(tt.InputError, match="draws random numbers"):
        run(compiled=True)


def test_random_numbers_that_another_thread_draws_are_its_own():
    """As if it drew while the step is traced for the first time."""
    plain, first = trace._results, iter([True])

    def meanwhile(*args):
        if next(first, False):
            np.random.rand()
        return plain(*args)

    with mock.patch.object(trace, "_results", meanwhile):
        h, _ = tt.scan(lambda h, x: (2.0 * h, None), np.ones((B, H)), np.ones((3, B, H)), compiled=True)
    assert next(first, None) is None
    np.testing.assert_array_equal(h.numpy(), 8.0)


def test_a_step_that_counts_runs_step_by_step():
    count = [0]

    def f(h, x):
        count[0] += 1
        return h + count[0], h

    with pytest.raises(tt.InputError, match="changes what it takes from outside"):
        tt.scan(f, np.zeros((B, H)), np.ones((T, B, H)), compiled=True)
    y = tt.scan(f, np.zeros((B, H)), np.ones((T, B, H)))[1].numpy()
    np.testing.assert_array_equal(np.diff(y, n=2, axis=0), 1.0)  # each step adds one more than the one before


def test_a_step_that_fills_in_what_it_looks_up_later_is_compiled():
    known = {}

    def f(h, x):
        scale = known.setdefault("scale", 2.0)
        return scale * h, h

    h, _ = tt.scan(f, np.ones((B, H)), np.ones((3, B, H)), compiled=True)
    np.testing.assert_array_equal(h.numpy(), 8.0)


def test_rows_that_meet_are_not_taken_for_one_sequence():
    w = tt.tensor(np.eye(128), requires_grad=True)

    def f(h, x):
        z = h @ w + x
        return tt.tanh(z - z.mean(axis=0)), None

    with pytest.raises(tt.InputError, match="mixes the rows"):
        tt.scan(f, np.zeros((64, 128)), np.ones((3, 64, 128)), compiled=True)


def test_a_trace_leaves_no_traces():
    """Neither a refused nor a successful one changes what the thread is doing, or a tensor."""
    w = tt.tensor(np.ones((H, H)), requires_grad=True)
    storage, values = w.storage, w.numpy()
    for f in (branches, lambda h, x: (h @ w, h)):
        with tt.Tape() as tape, by_numpy():
            tt.scan(f, np.ones((B, H)), np.ones((T, B, H)))
            assert tt.engine.tape.here.context.tape is tape and tt.engine.tape.here.context.traced is None
    assert w.storage is storage and w.grad is None
    np.testing.assert_array_equal(w.data, values)


def test_a_step_is_traced_once_for_all_runs():
    w = tt.tensor(np.ones((H, H)), requires_grad=True)

    def f(h, x):
        return tt.tanh(h @ w + x), h

    with by_numpy(), mock.patch.object(attempt, "trace", wraps=attempt.trace) as traced:
        for _ in range(3):
            tt.scan(f, np.ones((B, H)), np.ones((T, B, H)), compiled=True)
    assert traced.call_count == 1


def test_a_step_that_draws_is_traced_once():
    def f(h, x):
        return nn.functional.dropout(h, 0.5), None

    attempt._plans.clear()
    with mock.patch.object(attempt, "trace", wraps=attempt.trace) as traced:
        for _ in range(3):
            tt.scan(f, np.ones((B, H)), np.ones((T, B, H)))
    assert traced.call_count == 1


def test_a_changed_number_from_outside_is_seen():
    w, scale = tt.tensor(np.eye(H), requires_grad=True), 2.0

    def f(h, x):
        return scale * (h @ w), h

    with by_numpy():
        once, _ = tt.scan(f, np.ones((1, H)), np.ones((2, 1, 1)), compiled=True)
        scale = 3.0
        w.detach().copy_(2 * np.eye(H))
        again, _ = tt.scan(f, np.ones((1, H)), np.ones((2, 1, 1)), compiled=True)
    np.testing.assert_allclose((once.data, again.data), (np.full((1, H), 4.0), np.full((1, H), 36.0)))


def test_changed_positions_and_arrays_from_outside_are_seen():
    positions, array = tt.tensor([0, 1, 2, 3, 4]), np.ones(H)

    def f(h, x):
        return h[:, positions] * np.sqrt(array), h

    with by_numpy():
        for order in ([4, 3, 2, 1, 0], [0, 0, 1, 1, 2]):
            positions.copy_(order)
            array += 3.0
            assert_like_eager(f, Leaves()(B, H), np.ones((2, B, 1)))


@needs_numba
@pytest.mark.parametrize("axes", [None, (1, 0), (-1, 0), (0, 1), (-2, -1)])
def test_a_matrix_and_its_transpose_are_told_apart(axes):
    """What is packed of a weight stays with it, for this step and for others."""
    leaf = Leaves()
    w = leaf(H, H)
    for step in (
        lambda h, x: (tt.tanh(x + h @ tt.transpose(w, axes)), h),
        lambda h, x: (tt.tanh(x + h @ w.T), h),
        lambda h, x: (tt.tanh(x @ w + h @ tt.transpose(w, axes)), h),
        lambda h, x: (tt.tanh(x @ w.T + h @ tt.transpose(tt.transpose(w, axes))), h),
    ):
        assert_like_eager(step, leaf(B, H), leaf(T, B, H), (w,))


def test_weights_that_share_memory_are_told_apart():
    rng, H = np.random.default_rng(0), 6
    both = tt.tensor(rng.standard_normal((H, 2 * H)))
    here, there = both[:, :H], both[:, H:]

    def step(h, x):
        h = tt.tanh(x @ here + h @ there)
        return h, h

    xs = rng.standard_normal((4, 2, H))
    found = tt.scan(step, np.zeros((2, H)), xs, compiled=True)[1]
    np.testing.assert_allclose(found.data, tt.scan(step, np.zeros((2, H)), xs, compiled=False)[1].data, rtol=1e-12)


# ---- runs of one step -----------------------------------------------------------------------------------------------

LIES = {
    "in C order": lambda x: x,
    "batch first": lambda x: tt.transpose(tt.transpose(x, (1, 0, 2)).copy(), (1, 0, 2)),
    "features first": lambda x: tt.transpose(tt.transpose(x, (2, 1, 0)).copy(), (2, 1, 0)),
    "backwards": lambda x: x[::-1],
    "every second row": lambda x: tt.repeat(x, 2, axis=1)[:, ::2],
}
A_RUN = st.tuples(st.sampled_from(sorted(LIES)), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans())


@needs_numba
@given(runs=st.lists(A_RUN, min_size=2, max_size=5), seed=st.integers(0, 9))
def test_each_run_of_a_step_is_like_eager_whatever_ran_before(runs, seed):
    leaf = Leaves(seed)
    w, u = leaf(I, H), leaf(H, H)

    def step(carry, x):
        h, c = carry
        h = tt.tanh(x @ w + h @ u)
        return (h, 0.5 * c + h), (h, c)

    for lie, steps, rows, reverse, tracked in runs:
        x = LIES[lie](tt.tensor(leaf.rng.normal(size=(steps, rows, I)), requires_grad=tracked))
        init = (leaf(rows, H), leaf(rows, H)) if tracked else (np.zeros((rows, H)),) * 2
        assert_like_eager(step, init, x, (w, u), reverse=reverse)


@needs_numba
def test_what_was_made_of_weights_is_made_anew_once_they_are_written():
    leaf = Leaves()
    w, b = leaf(H, H), leaf(H)

    def one(h, x):
        return tt.tanh(h @ w + b * h + x), h

    def other(h, x):
        return tt.tanh(h @ w.T - b * h + x), h

    for step in (one, one, other, one, other, other):
        for _ in range(2):
            assert_like_eager(step, np.ones((B, H)), leaf.rng.normal(size=(T, B, H)), (w, b))
        with tt.no_grad():
            w.copy_(leaf.rng.normal(size=(H, H)))


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("before", [0, 1])
def test_a_constant_that_is_given_other_memory_before_the_walk_is_what_it_was(view, before):
    """`copy_` gives an op's result memory of its own; what the tape keeps is the old one."""

    def gradient(compiled):
        leaf = Leaves()
        w, u = leaf(H, H), leaf(H, H)
        with tt.no_grad():
            constant = u.T if view else u * 2.0

        def step(h, x):
            h = tt.tanh(x @ w + h @ constant)
            return h, h

        xs = leaf.rng.normal(size=(T, B, H))
        for _ in range(before + 1):  # what was made of it for one run is there for another
            _, ys = tt.scan(step, np.zeros((B, H)), xs, compiled=compiled)
        with tt.no_grad():
            constant.copy_(np.full((H, H), 0.1))
        (ys * ys).sum().backward()
        return w.grad.data

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-10)


def test_an_array_that_is_written_before_the_walk_is_what_it_was():
    def gradient(compiled):
        w, array = tt.tensor(np.full(H, 0.5), requires_grad=True), np.linspace(0.5, 1.0, H)
        _, ys = tt.scan(lambda h, x: (tt.tanh(h * w * array + x), h), np.ones((B, H)), np.ones((T, B, H)), None, False,
                        compiled=compiled)  # fmt: skip
        array[:] = 7.0
        ys.sum().backward()
        return w.grad.data

    np.testing.assert_allclose(gradient(True), gradient(False), rtol=1e-10)


@needs_numba
@pytest.mark.parametrize("lie", sorted(LIES))
def test_rows_from_outside_may_lie_in_any_way(lie):
    leaf = Leaves()
    rows = LIES[lie](leaf(T, B, H))[1].detach()
    rows.requires_grad = True

    def step(h, x):
        h = tt.tanh(h * rows + x)
        return h, h

    for x in (leaf(T, B, H), np.ones((T, B, H))):
        assert_like_eager(step, leaf(B, H), x, (rows,))
        assert_like_eager(step, leaf(B, H), x, (rows,), reverse=True, checkpoint=2)


@needs_numba
def test_rows_at_odd_bytes():
    """The rows of a structured array's field may lie apart by what is no whole number of elements."""
    rng = np.random.default_rng(0)
    fields = np.zeros((T, B), np.dtype([("x", "f8", (I,)), ("flag", "i1")]))
    fields["x"] = rng.normal(size=(T, B, I))
    w = tt.tensor(rng.normal(size=(I, I)))
    with tt.no_grad():
        odd, plain = (
            tt.scan(lambda h, x: (tt.tanh(h @ w + x), h), np.zeros((B, I)), tt.Tensor.of(x), compiled=True)[0]
            for x in (fields["x"], fields["x"].copy())
        )
    np.testing.assert_array_equal(odd.data, plain.data)


def test_a_large_tensor_from_outside_goes_when_the_user_lets_it_go():
    """Neither the plan, nor what is kept with a weight, holds on to it."""
    w = tt.tensor(np.eye(64), requires_grad=True)

    def scanned(factor):
        with tt.no_grad():
            inputs = tt.tensor(np.full((4, 64, 64), factor)) @ w
        tt.scan(lambda h, x: (tt.tanh(h @ w + inputs[:, 0] * x), h), np.ones((4, 64)), np.ones((T, 4, 64)))
        return weakref.ref(inputs.raw)

    held = [scanned(1.0), scanned(2.0)]
    gc.collect()
    assert [memory() is None for memory in held] == [True, True]


def test_a_nest_that_is_changed_after_the_scan_is_what_it_was():
    """The second derivative runs the step again, on the structure that it was given."""

    def cubed(change):
        h = tt.tensor(np.full((1, 2), 2.0), requires_grad=True)
        init, xs = [h, [h]], {"x": np.ones((2, 1, 2))}
        (last, _), ys = tt.scan(lambda c, x: ([c[0] * c[1][0] * x["x"], c[1]], c[0]), init, xs, compiled=True)
        if change:
            init.append(h)
            init[1].clear()
            xs.clear()
        last.sum().backward(create_graph=True)
        first, h.grad = h.grad, None
        first.sum().backward()
        return last.data, first.data, h.grad.data, ys.data

    for a, b in zip(cubed(True), cubed(False), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(cubed(True)[:3], [[[8.0, 8.0]], [[12.0, 12.0]], [[12.0, 12.0]]])


HANDED_THROUGH = {
    "a part of the carry": (lambda c, x, w: ([c[0] * c[1] * x, c[1]], c[0] * w), lambda h: [h, h]),
    "a carry that depends on nothing": (
        lambda c, x, w: ([c[0] * w, c[1] + 1.0], c[0]),
        lambda h: [h, np.zeros((1, 2))],
    ),
    "a weight": (lambda c, x, w: (c * x, w), lambda h: h),
    "everything": (lambda c, x, w: (c, (c, w, x * w, 1.0)), lambda h: h),
    "in turn": (lambda c, x, w: ((c[1], c[0]), c[0] * w), lambda h: (h, h * 2.0)),
}


@pytest.mark.parametrize("name", sorted(HANDED_THROUGH))
def test_second_derivatives_of_what_is_handed_through(name):
    f, start = HANDED_THROUGH[name]

    def derivatives(compiled):
        h, w = (tt.tensor(np.full(shape, 1.5), requires_grad=True) for shape in ((1, 2), (2,)))
        results = flatten(tt.scan(lambda c, x: f(c, x, w), start(h), np.ones((3, 1, 2)), compiled=compiled))
        sum((y * y * y).sum() for y in results if y.requires_grad).backward(create_graph=True)
        first = [h.grad, w.grad]
        h.grad = w.grad = None
        sum((g * g).sum() for g in first if g is not None).backward()
        return [None if g is None else g.data for g in (*first, h.grad, w.grad)]

    for a, b in zip(derivatives(True), derivatives(False), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-12)


def trained(cell, w):
    cell.train()


def with_another_number(cell, w):
    cell.scale = 3.0


def with_another_weight(cell, w):
    cell.weight = nn.Parameter(w.data * 2.0)


def in_another_dtype(cell, w):
    cell.to(np.float32)


def with_other_memory(cell, w):
    with tt.no_grad():
        cell.constant.copy_(np.zeros(H))


def frozen(cell, w):
    w.requires_grad = False


class Scaled(nn.Module):
    def __init__(self):
        self.weight, self.scale = nn.Parameter(np.linspace(0.1, 1.0, H), dtype=np.float64), 2.0
        with tt.no_grad():
            self.constant = tt.tensor(np.ones(H)) * 0.5

    def forward(self, x, h):
        return tt.tanh(h * self.weight * self.scale * (0.5 if self.training else 1.0) + x + self.constant)


@pytest.mark.parametrize(
    "change", [trained, with_another_number, with_another_weight, in_another_dtype, with_other_memory, frozen]
)
def test_a_step_that_changed_is_not_run_again_for_a_second_derivative(change):
    """A first derivative needs no second run."""
    cell = Scaled().eval()
    x = tt.tensor(np.linspace(-1.0, 1.0, H).reshape(1, 1, H), requires_grad=True)
    _, ys = tt.scan(lambda h, x: (cell(x, h), h), np.ones((1, H)), tt.concatenate([x] * T), compiled=True)
    loss = (ys * ys).sum()
    (expected,) = tt.gradient(loss, [x], retain_graph=True, create_graph=True)
    change(cell, cell.weight)
    (found,) = tt.gradient(loss, [x], retain_graph=True)
    np.testing.assert_allclose(found.data, expected.data, rtol=1e-10)
    with pytest.raises(tt.TapeError, match="is not what it was"):
        tt.gradient(loss, [x], create_graph=True)


@pytest.mark.parametrize(
    ("before", "after"),
    [(lambda m: m, lambda m: m.to(np.float32)), (lambda m: m.requires_grad_(False), lambda m: m.requires_grad_(True))],
)
def test_a_layer_that_changed_is_not_run_again_for_a_second_derivative(before, after):
    layer, x = before(nn.GRU(I, H, dtype=np.float64)), tt.tensor(np.ones((T, B, I)), requires_grad=True)
    loss = tt.sum(layer(x)[0])
    tt.gradient(loss, [x], retain_graph=True, create_graph=True)
    after(layer)
    with pytest.raises(tt.TapeError, match="is not what it was"):
        tt.gradient(loss, [x], create_graph=True)
