"""What every op must satisfy, made from the table of cases (see `cases.py`)."""

from __future__ import annotations

import importlib
from inspect import isfunction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from cases import Case

TABLES = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
CASES: list[Case] = [case for table in TABLES for case in importlib.import_module(table).CASES]
DIFFERENTIABLE = [case for case in CASES if case.differentiable]
WITH_TORCH = [case for case in CASES if case.torch is not None]

every = pytest.mark.parametrize("case", CASES, ids=str)
every_differentiable = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)


def results_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def is_float(x: Any) -> bool:
    return np.asarray(x).dtype.kind == "f"


def weighted(case: Case, options: dict[str, Any], seed: int = 0) -> Any:
    """The op as a scalar function: the sum of its float results, each entry with a weight of its own."""

    def f(*xs: Any) -> Any:
        total: Any = 0.0
        rng = np.random.default_rng(seed)
        for y in results_of(case.function(*xs, **options)):
            if y.dtype.kind == "f":
                total = total + tt.sum(y * rng.normal(size=y.shape).astype(y.dtype))
        return total

    return f


@every
@given(data=st.data())
def test_value_on_tensors_equals_numpy(case: Case, data: st.DataObject) -> None:
    args, options = data.draw(case.inputs)
    reference = (case.numpy or case.function)(*args, **options)
    found = case.function(*[tt.tensor(x, requires_grad=is_float(x) and case.differentiable) for x in args], **options)
    assert len(results_of(found)) == len(results_of(reference))
    for ours, theirs in zip(results_of(found), results_of(reference), strict=True):
        assert isinstance(ours, tt.Tensor)
        assert ours.shape == np.shape(theirs)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-12, atol=1e-12)


@every_differentiable
@given(data=st.data())
def test_derivatives_agree_with_finite_differences_in_both_modes(case: Case, data: st.DataObject) -> None:
    args, options = data.draw(case.inputs)
    tt.check_grads(lambda *xs: case.function(*xs, **options), args, order=case.order)


@every_differentiable
@given(data=st.data())
def test_gradients_do_not_depend_on_memory_layout(case: Case, data: st.DataObject) -> None:
    args, options = data.draw(case.inputs)
    plain = [tt.tensor(x, requires_grad=True) for x in args]
    weighted(case, options)(*plain).backward()
    # The same values as views with negative strides.
    leaves = [tt.tensor(np.flip(x), requires_grad=True) for x in args]
    views = [tt.flip(x) if x.ndim else x for x in leaves]
    weighted(case, options)(*views).backward()
    for x, y in zip(plain, leaves, strict=True):
        expected = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        found = np.zeros(y.shape) if y.grad is None else y.grad.numpy()
        np.testing.assert_allclose(np.flip(found), expected, rtol=1e-10, atol=1e-12)


@every
@given(data=st.data())
def test_float32_stays_float32(case: Case, data: st.DataObject) -> None:
    args, options = data.draw(case.inputs)
    tensors = [
        tt.tensor(x.astype(np.float32) if is_float(x) else x, requires_grad=is_float(x) and case.differentiable)
        for x in args
    ]
    for y in results_of(case.function(*tensors, **options)):
        assert y.dtype.kind != "f" or y.dtype == np.float32, y.dtype
    if case.differentiable:
        total = weighted(case, options)(*tensors)
        if isinstance(total, tt.Tensor) and total.requires_grad:
            total.backward()
            assert all(x.grad is None or x.grad.dtype == np.float32 for x in tensors)


@every
@given(data=st.data())
def test_arguments_are_left_as_they_were(case: Case, data: st.DataObject) -> None:
    args, options = data.draw(case.inputs)
    before = [x.copy() for x in args]
    for x in args:
        x.flags.writeable = False
    value = case.function(*[tt.tensor(x, requires_grad=is_float(x) and case.differentiable) for x in args], **options)
    case.function(*args, **options)
    for x, y in zip(args, before, strict=True):
        np.testing.assert_array_equal(x, y)
    assert results_of(value)


@pytest.mark.peer
@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
@given(data=st.data())
def test_equals_torch(case: Case, data: st.DataObject) -> None:
    import torch

    args, options = data.draw(case.inputs)
    ours = [tt.tensor(x, requires_grad=is_float(x) and case.differentiable) for x in args]
    theirs = [torch.tensor(np.array(x), requires_grad=is_float(x) and case.differentiable) for x in args]
    values = results_of(case.function(*ours, **options))
    references = results_of(case.torch(torch, *theirs, **options))  # type: ignore[misc]
    rng = np.random.default_rng(0)
    total: Any = 0.0
    reference: Any = torch.zeros((), dtype=torch.float64)
    for y, r in zip(values, references, strict=True):
        assert y.shape == tuple(r.shape)
        np.testing.assert_allclose(y.numpy(), r.detach().numpy(), rtol=1e-6, atol=1e-6)
        if y.dtype.kind == "f":
            weights = rng.normal(size=y.shape)
            total = total + tt.sum(y * weights)
            reference = reference + (r * torch.from_numpy(weights)).sum()
    if not case.differentiable or not isinstance(total, tt.Tensor) or not total.requires_grad:
        return
    total.backward(create_graph=True)
    firsts = torch.autograd.grad(reference, theirs, create_graph=True, allow_unused=True)
    second: Any = 0.0
    second_reference: Any = torch.zeros((), dtype=torch.float64)
    for x, r in zip(ours, firsts, strict=True):
        g = tt.zeros(x.shape, dtype="float64") if x.grad is None else x.grad
        expected = np.zeros(x.shape) if r is None else r.detach().numpy()
        np.testing.assert_allclose(g.numpy(), expected, rtol=1e-6, atol=1e-6)
        weights = rng.normal(size=x.shape)
        second = second + tt.sum(g * weights)
        if r is not None:
            second_reference = second_reference + (r * torch.from_numpy(weights)).sum()
    if case.order < 2 or not second.requires_grad or not second_reference.requires_grad:
        return
    seconds = torch.autograd.grad(second_reference, theirs, allow_unused=True)
    for x, found, r in zip(ours, tt.gradient(second, ours), seconds, strict=True):
        expected = np.zeros(x.shape) if r is None else r.numpy()
        result = np.zeros(x.shape) if found is None else found.numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_every_op_has_a_row() -> None:
    named = {case.name for case in CASES}
    public = {name: getattr(tt, name) for name in dir(tt)}
    ops = {name for name, f in public.items() if isfunction(f) and hasattr(f, "op")} | set(_wrapped_ops())
    assert ops - named == set(), "ops without a row in the table of cases"


def _wrapped_ops() -> list[str]:
    """Public functions that the op modules export, whether they are ops themselves or wrap one."""
    modules = ("activation", "elementwise", "reduce", "shape", "index", "order", "linalg", "softmax")
    return [name for m in modules for name in importlib.import_module(f"tinytape.ops.{m}").__all__]
