"""The compiled updates against the NumPy updates, bit for bit, and the norms that clip."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from test_optim import NAMES, OPTIONS
from tinytape import optim
from tinytape.kernels import compiler, threads
from tinytape.optim import fused

pytestmark = pytest.mark.skipif(not compiler.usable(), reason="kernels are not compiled here")

SHAPES = [(37,), (5, 13), (), (0, 3), (130,)]


@pytest.fixture(params=["numpy", "kernel"])
def path(request, monkeypatch):
    choose(monkeypatch, request.param)


def choose(patch, path, share=1):
    patch.setattr(fused, "_pays", lambda arrays: path == "kernel")
    patch.setattr(fused, "SHARE", share)


def trained(make, path, dtypes, seed, steps=4, bad=None):
    """Parameters and saved state after some steps."""
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, path)
        params = [
            tt.tensor(np.asarray(rng.normal(size=shape), dtype), requires_grad=True)
            for shape, dtype in zip(SHAPES, dtypes, strict=True)
        ]
        optimizer = make(params)
        for step in range(steps):
            for p in params:
                g = np.asarray(rng.normal(size=p.shape))
                p.grad = None if rng.random() < 0.1 else g.astype(p.dtype)
            if bad is not None and step == 1:
                params[0].grad = np.full(SHAPES[0], bad, dtypes[0])
            optimizer.step()
    return [p.numpy() for p in params], optimizer.state_dict()["state"]


def assert_same(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    assert found[1].keys() == expected[1].keys()
    for name, state in expected[1].items():
        for slot, value in state.items():
            assert np.array_equal(found[1][name][slot], value, equal_nan=True), (name, slot)


dtypes = st.lists(st.sampled_from(["float32", "float64"]), min_size=len(SHAPES), max_size=len(SHAPES))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), dtypes=dtypes, maximize=st.booleans(), seed=st.integers(0, 2**31))
def test_same_bits_as_numpy(name, data, dtypes, maximize, seed):
    options = data.draw(OPTIONS[name][1])
    options |= data.draw(st.sampled_from([{}, {"clip_value": 0.3}]))

    def make(params):
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
        return getattr(optim, name)(groups, maximize=maximize, **options)

    found, expected = (trained(make, path, dtypes, seed) for path in ("kernel", "numpy"))
    assert_same(found, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_same_bits_where_gradients_are_not_finite(name, bad):
    def make(params):
        return getattr(optim, name)(params, weight_decay=0.1)

    found, expected = (trained(make, path, ["float32"] * len(SHAPES), 0, bad=bad) for path in ("kernel", "numpy"))
    assert not np.isfinite(found[0][0]).all()
    assert_same(found, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipping_by_norm_follows_numpy_within_rounding(name, dtype):
    def make(params):
        return getattr(optim, name)(params, clip_norm=0.5)

    found, expected = (trained(make, path, [dtype] * len(SHAPES), 0)[0] for path in ("kernel", "numpy"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5 if dtype == "float32" else 1e-13, atol=1e-7)


@given(
    sizes=st.lists(st.integers(0, 3 * 4096), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "float64"]),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
    seed=st.integers(0, 2**31),
)
def test_the_norm_is_right_whatever_the_sizes(sizes, dtype, scale, seed):
    rng = np.random.default_rng(seed)
    arrays = [(rng.normal(size=n) * scale).astype(dtype) for n in sizes]
    with pytest.MonkeyPatch.context() as patch:
        choose(patch, "kernel")
        found = fused.sum_of_squares(arrays)
    expected = math.fsum(float(x) * float(x) for a in arrays for x in a)
    assert found == pytest.approx(expected, rel=1e-13, abs=0.0)


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_norms_whose_squares_leave_the_floats(scale, monkeypatch):
    choose(monkeypatch, "kernel")
    p = tt.tensor(np.zeros(2), requires_grad=True)
    p.grad = np.array([3.0, 4.0]) * scale
    assert optim.SGD([p], clip_norm=1.0).step() == pytest.approx(5 * scale, rel=1e-14)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    rng = np.random.default_rng(0)
    values = [rng.normal(size=n).astype(np.float32) for n in (50_000, 3, 20_001)]
    before, found = threads.get_num_threads(), []
    choose(monkeypatch, "kernel")
    try:
        for count in (1, 2, 3, 5):
            threads.set_num_threads(count)
            params = [tt.tensor(x, requires_grad=True) for x in values]
            optimizer = optim.Adam(params, clip_norm=1.0, weight_decay=0.1)
            for p, x in zip(params, values, strict=True):
                p.grad = x[::-1]
            norms = [optimizer.step() for _ in range(3)]
            found.append((norms, [p.numpy() for p in params]))
    finally:
        threads.set_num_threads(before)
    for norms, arrays in found[1:]:
        assert norms == found[0][0]
        assert all(np.array_equal(a, b) for a, b in zip(arrays, found[0][1], strict=True))


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=6),
    grain=st.sampled_from([1, 64]),
    count=st.integers(1, 5),
)
def test_shares_cover_everything_once(sizes, grain, count):
    shares = fused._shares(sizes, grain, count)
    pieces = sorted(piece for share in shares for piece in share)
    assert len(shares) == count
    for i, size in enumerate(sizes):
        cuts = [(start, stop) for j, start, stop in pieces if j == i]
        assert [x for cut in cuts for x in range(*cut)] == list(range(size))
        assert all(start % grain == 0 for start, _ in cuts)
    lengths = [sum(stop - start for _, start, stop in share) for share in shares]
    assert max(lengths) <= -(-sum(sizes) // count) + count * grain


def test_a_step_marks_what_it_writes(path):
    w = tt.tensor(np.ones(3), requires_grad=True)
    loss = tt.sum(w * w)
    w.grad = np.ones(3)
    optim.SGD([w], lr=0.1).step()
    with pytest.raises(tt.TapeError, match="written in place"):
        loss.backward()


def test_memory_that_is_not_in_c_order_is_updated_too(path):
    x = tt.tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    x.raw = np.asfortranarray(x.raw)
    x.grad = np.arange(6.0).reshape(2, 3)
    optim.SGD([x], lr=0.5, momentum=0.9).step()
    assert np.array_equal(x.data, np.arange(6.0).reshape(2, 3) / 2)


def test_state_in_fortran_order_is_taken_over(path):
    w = tt.tensor(np.ones((2, 3)), requires_grad=True)
    optimizer = optim.SGD([w], lr=0.5, momentum=0.5)
    w.grad = np.ones((2, 3))
    optimizer.step()
    state = optimizer.state_dict()
    state["state"]["0"]["momentum_buffer"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    optimizer.load_state_dict(state)
    w.grad = np.zeros((2, 3))
    optimizer.step()
    assert np.array_equal(optimizer.state_dict()["state"]["0"]["momentum_buffer"], np.arange(6.0).reshape(2, 3) / 2)


def test_a_subclass_with_an_update_of_its_own_does_not_get_its_parents_kernel(path):
    class Sign(optim.SGD):
        def update(self, w, g, s, t, options, step):
            w -= float(options["lr"]) * np.sign(g)

    class Renamed(optim.SGD):
        pass

    assert Sign.kernel == () and Renamed.kernel == optim.SGD.kernel
    w = tt.tensor(np.zeros(3), requires_grad=True)
    w.grad = np.array([5.0, -7.0, 0.0])
    Sign([w], lr=1.0).step()
    assert w.tolist() == [-1.0, 1.0, 0.0]


def test_centered_rmsprop_survives_rounding(path):
    """The variance of a constant gradient is 0, and rounding makes it negative."""
    w = tt.tensor(np.zeros(50), requires_grad=True)
    optimizer = optim.RMSprop([w], centered=True, alpha=0.5)
    for _ in range(100):
        w.grad = np.linspace(0.1, 3.3, 50)
        optimizer.step()
    assert np.isfinite(w.data).all()


def test_half_precision_goes_by_numpy():
    assert not fused._pays([np.zeros(fused.LEAST, np.float16)])
    assert fused._pays([np.zeros(fused.LEAST, np.float32)])
