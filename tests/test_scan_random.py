"""Random cells: `scan` against the loop that it means, compiled against eager, and the strategy itself."""

import re
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

import tinytape as tt
from random_cells import FEATURES, assert_agree, cells, is_steady, run_and_grad
from random_lines import BINARY, UNARY
from tinytape.compile import attempt
from tinytape.engine.tree import flatten, map_leaves, unflatten
from tinytape.kernels.compiler import usable

programs = settings(suppress_health_check=list(HealthCheck))  # large programs are the point


def loop(f, init, xs, length, reverse):
    """What a scan means, with indexing and concatenation in place of `unstack` and `stack`."""
    carry = map_leaves(lambda x: x if isinstance(x, tt.Tensor) else tt.tensor(x), init)
    steps = len(flatten(xs)[0]) if flatten(xs) else length
    outputs = {}
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        carry, y = f(carry, map_leaves(lambda x: x[t], xs))  # noqa: B023
        outputs[t] = [leaf if isinstance(leaf, tt.Tensor) else tt.tensor(leaf) for leaf in flatten(y)]
    columns = zip(*(outputs[t] for t in range(steps)), strict=True)
    return carry, unflatten(y, [tt.concatenate([tt.expand_dims(x, 0) for x in column]) for column in columns])


@programs
@given(cell=cells())
def test_a_scan_is_the_loop(cell):
    assert_agree(run_and_grad(cell, compiled=False), run_and_grad(cell, scan=loop), 1e-12)


@programs
@given(cell=cells(dtypes=("float32",)))
def test_a_steady_cell_in_float32_is_near_itself_in_float64(cell):
    assume(is_steady(cell))
    found = run_and_grad(cell)
    exact = run_and_grad(cell.again("float64"))
    assert all(found[name].dtype == (np.float32 if x.dtype.kind == "f" else x.dtype) for name, x in exact.items())
    assert_agree({n: a.astype(exact[n].dtype) for n, a in found.items()}, exact, 1e-4)


@programs
@given(cell=cells())
def test_values_and_gradients_stay_sane(cell):
    for name, a in run_and_grad(cell).items():
        assert np.all(np.isfinite(a)), name
        assert np.abs(a).max(initial=0) < (1e6 if "gradient" in name else 100), name
    text = repr(cell)
    assert "def f(carry, x):" in text and all(f"\n{name} = " in text for name in cell.captured)


COMPILED = FEATURES - {"counter"}  # an integer in the carry is refused


def assert_compiled_agrees(cell):
    tolerance = 1e-10 if cell.dtype == "float64" else 1e-5
    try:
        assert_agree(run_and_grad(cell, compiled=True), run_and_grad(cell, compiled=False), tolerance)
    finally:
        attempt._plans.clear()


def seldom(share):
    """Settings with fewer examples: a kernel takes seconds to compile."""
    return settings(max_examples=max(1, settings.default.max_examples // share), parent=programs)


@settings(max_examples=8 * settings.default.max_examples, parent=programs)
@given(cell=cells(features=COMPILED))
def test_emitted_numpy_agrees_with_eager(cell):
    with mock.patch.object(attempt, "usable", lambda: False):
        assert_compiled_agrees(cell)


@programs
@given(cell=cells(features=COMPILED, dtypes=("float32",)))
def test_emitted_numpy_agrees_with_eager_in_float32(cell):
    assume(is_steady(cell))
    with mock.patch.object(attempt, "usable", lambda: False):
        assert_compiled_agrees(cell)


@seldom(5)
@given(cell=cells(features=COMPILED))
def test_kernels_agree_with_eager(cell):
    assert_compiled_agrees(cell)


@seldom(10)
@given(cell=cells(features=COMPILED, dtypes=("float32",)))
def test_kernels_agree_with_eager_in_float32(cell):
    assume(is_steady(cell))
    assert_compiled_agrees(cell)


@pytest.mark.slow
@pytest.mark.skipif(not usable(), reason="needs Numba")
@settings(max_examples=5 * settings.default.max_examples, parent=programs)
@given(cell=cells(features=COMPILED, dtypes=("float64", "float32")))
def test_many_kernels_agree_with_eager(cell):
    assume(cell.dtype == "float64" or is_steady(cell))
    assert_compiled_agrees(cell)


@programs
@given(cell=cells(features=COMPILED))
def test_rows_are_told_apart(cell):
    """Taking the whole batch for one long row is right, and slow: it is for steps in which rows meet."""
    with mock.patch.object(attempt, "usable", lambda: False):
        found = tt.scan.explain(cell.f, cell.init, cell.xs, cell.length)
    attempt._plans.clear()
    assert found.plan is not None and found.plan.program.batched, found.reason


def test_a_drawn_program_is_found_wrong_where_it_is():
    """The comparison that the tests above rely on sees a wrong gradient and a wrong value."""
    right = {"carry": np.ones(3), "gradient of init": np.ones(3)}
    for name in right:
        wrong = right | {name: np.array([1.0, 1.0, 1.001])}
        with pytest.raises(AssertionError, match=name):
            assert_agree(wrong, right, 1e-5)
    with pytest.raises(AssertionError):
        assert_agree({"carry": np.ones(3)}, right, 1e-5)
    with pytest.raises(AssertionError):
        assert_agree(right | {"carry": np.ones(3, np.float32)}, right, 1e-5)


def test_the_strategy_draws_all_that_it_names():
    drawn = []

    @settings(max_examples=500, database=None, derandomize=True, phases=[Phase.generate], parent=programs)
    @given(cell=cells())
    def collect(cell):
        drawn.append(cell)

    collect()
    assert set().union(*(cell.features for cell in drawn)) == FEATURES
    text = "".join(cell.source for cell in drawn)
    functions = set(re.findall(r"tt\.(\w+)\(", "".join([*UNARY, *BINARY])))
    missing = {name for name in functions if f"tt.{name}(" not in text}
    assert len(missing) < len(functions) / 10, missing
    for part in [
        r"tt\.(where|split|concatenate|stack|unstack|softmax|log_softmax|matmul|reshape|swapaxes|transpose|take)\(",
        r"layer_norm\(", r"keepdims=True", r"\.T\b", r"^D\d+ = ", r"reverse = .*True", r"xs = None",
        r"return .*, None$", r"rng\.random", r"\[::-1\]|, ::-1\]", r"init = {", r"init = \[", r"init = \(",
        r"tt\.max\(", r"tt\.var\(",
    ]:  # fmt: skip
        assert re.search(part, text, re.MULTILINE), part
    used = [name for cell in drawn for name in cell.captured if len(re.findall(rf"\b{name}\b", cell.source)) > 2]
    assert used, "no weight is used twice"
    steps = {len(flatten(cell.xs)[0]) if flatten(cell.xs) else cell.length for cell in drawn}
    assert steps == set(range(1, 7))
