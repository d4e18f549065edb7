"""Functions of functions against closed forms, finite differences, each other and, where installed, torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt


def cubic(x: Any) -> Any:
    """A function with known derivatives: sum of a_i x_i^3, and a coupling x_0 x_1."""
    return tt.sum(x**3 * np.array([1.0, 2.0, 3.0])) + x[0] * x[1]


X = np.array([0.5, -1.0, 2.0])
GRADIENT = 3 * X**2 * np.array([1.0, 2.0, 3.0]) + np.array([-1.0, 0.5, 0.0])
HESSIAN = np.diag(6 * X * np.array([1.0, 2.0, 3.0])) + np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]])


def network(params: dict[str, Any], x: Any) -> Any:
    """A small recurrent network with a bit of everything: products, splits, reductions, broadcasting."""
    h: Any = np.zeros((x.shape[1], params["u"].shape[0]))
    for t in range(x.shape[0]):
        z = tt.dot(x[t], params["w"]) + tt.dot(h, params["u"]) + params["b"]
        a, b = tt.split(z, 2, axis=-1)
        gate = tt.sigmoid(a)
        h = gate * tt.tanh(b) + (1.0 - gate) * h
    return tt.logsumexp(h, axis=-1).sum()


def drawn_network(seed: int, steps: int = 3, batch: int = 2, width: int = 3) -> tuple[dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.normal(size=(2, 2 * width)),
        "u": rng.normal(size=(width, 2 * width)) * 0.5,
        "b": rng.normal(size=2 * width),
    }
    return params, rng.normal(size=(steps, batch, 2))


def test_grad_of_a_known_function() -> None:
    np.testing.assert_allclose(tt.grad(cubic)(X), GRADIENT, rtol=1e-14)
    value, gradient = tt.value_and_grad(cubic)(X)
    np.testing.assert_allclose(value, np.sum(X**3 * [1, 2, 3]) + X[0] * X[1])
    assert isinstance(value, np.ndarray) and isinstance(gradient, np.ndarray)


def test_hessian_both_jacobians_and_hvp_of_a_known_function() -> None:
    v = np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(tt.hessian(cubic)(X), HESSIAN, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(tt.jacfwd(tt.grad(cubic))(X), HESSIAN, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(tt.jacrev(tt.grad(cubic))(X), HESSIAN, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(tt.hvp(cubic, (X,), (v,)), HESSIAN @ v, rtol=1e-13)


def test_third_derivative() -> None:
    third = tt.grad(tt.grad(tt.grad(tt.sin)))(0.3)
    np.testing.assert_allclose(third, -np.cos(np.float32(0.3)), rtol=1e-6)
    third = tt.jacfwd(tt.jacfwd(tt.jacfwd(tt.sin)))(np.array(0.3))
    np.testing.assert_allclose(third, -np.cos(0.3), rtol=1e-14)


@given(seed=st.integers(0, 2**31))
def test_forward_and_reverse_mode_are_adjoint(seed: int) -> None:
    params, x = drawn_network(seed)
    rng = np.random.default_rng(seed + 1)
    tangents = {name: rng.normal(size=p.shape) for name, p in params.items()}
    _, tangent = tt.jvp(lambda p: network(p, x), (params,), (tangents,))
    gradients = tt.grad(lambda p: network(p, x))(params)
    assert list(gradients) == list(params)
    np.testing.assert_allclose(tangent, sum(np.sum(gradients[k] * tangents[k]) for k in params), rtol=1e-10)


@given(seed=st.integers(0, 2**31))
def test_network_against_differences_second_order(seed: int) -> None:
    params, x = drawn_network(seed)
    tt.check_grads(lambda w, u, b, x: network({"w": w, "u": u, "b": b}, x), [*params.values(), x], order=2)


def test_perturbations_are_not_confused() -> None:
    # d/dx (x * d/dy (x + y)) = 1: the classic that fails when levels of differentiation share a tag.
    inner = lambda x: tt.jvp(lambda y: x + y, (np.array(1.0),), (np.array(1.0),))[1]  # noqa: E731
    np.testing.assert_allclose(tt.jvp(lambda x: x * inner(x), (np.array(1.0),), (np.array(1.0),))[1], 1.0)
    np.testing.assert_allclose(tt.grad(lambda x: x * tt.grad(lambda y: x * y)(x))(3.0), 6.0)
    np.testing.assert_allclose(tt.grad(lambda x: x * tt.grad(lambda y: x * y)(np.float32(2.0)))(3.0), 6.0)


def test_gradients_on_tensors_can_be_trained_through() -> None:
    w = tt.tensor([2.0], requires_grad=True)
    x = tt.tensor([3.0])
    slope = tt.grad(lambda x: (w * x * x).sum())(x)  # 2 w x
    assert isinstance(slope, tt.Tensor)
    (slope * slope).sum().backward()  # d/dw (2 w x)^2 = 8 w x^2
    assert w.grad is not None
    np.testing.assert_allclose(w.grad.numpy(), [8 * 2.0 * 9.0])


def test_arrays_come_back_as_arrays_beside_parameters() -> None:
    w = tt.tensor([2.0], requires_grad=True)
    slope = tt.grad(lambda x: (w * x * x).sum())(np.array([3.0], np.float32))
    assert isinstance(slope, np.ndarray) and slope.dtype == np.float32
    assert w.grad is None


def test_argnums_aux_and_keyword_arguments() -> None:
    def f(x: Any, y: Any, scale: float = 1.0) -> Any:
        return (x * y).sum() * scale, {"sum": x + y}

    (gx, gy), aux = tt.grad(f, argnums=(0, 1), has_aux=True)(np.ones(2), np.full(2, 3.0), scale=2.0)
    np.testing.assert_allclose(gx, [6, 6])
    np.testing.assert_allclose(gy, [2, 2])
    assert isinstance(aux["sum"], np.ndarray)
    (value, _), gradient = tt.value_and_grad(f, argnums=-1, has_aux=True)(np.ones(2), np.full(2, 3.0))
    np.testing.assert_allclose(gradient, [1, 1])
    np.testing.assert_allclose(value, 6)


def test_vjp_of_several_results_and_an_unused_argument() -> None:
    value, pullback = tt.vjp(lambda x, y: {"a": x * 2.0, "b": (x.sum(), x)}, np.ones(3), np.ones(2))
    np.testing.assert_allclose(value["b"][0], 3)
    for _ in range(2):  # any number of times
        gx, gy = pullback({"a": np.ones(3), "b": (np.ones(()), np.zeros(3))})
        np.testing.assert_allclose(gx, [3, 3, 3])
        np.testing.assert_allclose(gy, [0, 0])


def test_works_inside_no_grad() -> None:
    with tt.no_grad():
        np.testing.assert_allclose(tt.grad(cubic)(X), GRADIENT)
        np.testing.assert_allclose(tt.hessian(cubic)(X), HESSIAN)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tt.grad(lambda x: x)(np.ones(3)), tt.ShapeError, "(3,)"),
        (lambda: tt.grad(cubic, argnums=2)(X), tt.InputError, "argnums"),
        (lambda: tt.grad(lambda x: x.sum())(np.arange(3)), tt.DTypeError, "int64"),
        (lambda: tt.jvp(cubic, (X,), (np.ones(2),)), tt.ShapeError, "(2,)"),
        (lambda: tt.jvp(cubic, (X,), ()), tt.ShapeError, "0 tangents for 1"),
        (lambda: tt.vjp(lambda x: x, X)[1](np.ones(2)), tt.ShapeError, "(2,)"),
        (lambda: tt.grad(cubic, has_aux=True)(X), tt.InputError, "pair"),
        (lambda: tt.jacrev(lambda x: [x, x])(X), tt.InputError, "list"),
        (lambda: tt.check_grads(cubic, [X.astype("float32")]), tt.DTypeError, "float32"),
        (lambda: tt.grad(cubic, argnums="0")(X), tt.DTypeError, "argnums has '0'"),
        (lambda: tt.grad(lambda x, y: tt.sum(x * y), argnums=(0, -2))(X, X), tt.InputError, "twice"),
        (lambda: tt.grad(lambda x: None)(X), tt.InputError, "None"),
        (lambda: tt.jvp(cubic, X, X), tt.DTypeError, "primals is a ndarray"),
        (lambda: tt.hvp(cubic, (X,), X), tt.DTypeError, "tangents is a ndarray"),
        (lambda: tt.jacrev(lambda p: p["x"] * 2.0)({"x": X}), tt.DTypeError, "dict"),
        (lambda: tt.jacfwd(lambda p: p["x"] * 2.0)({"x": X}), tt.DTypeError, "dict"),
        (lambda: tt.check_grads(cubic, X), tt.DTypeError, "args is a ndarray"),
        (lambda: tt.check_grads(cubic, [X], order=0), tt.InputError, "order"),
        (lambda: tt.check_grads(cubic, [X], modes=["sideways"]), tt.InputError, "sideways"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value) and "help:" in str(caught.value)


# ---- check_grads --------------------------------------------------------------------------------------------------


def test_check_grads_finds_a_wrong_rule_and_names_the_worst_entry() -> None:
    @tt.op
    def doubled(x: Any) -> Any:
        return 2.0 * x

    @doubled.vjp
    def _(g: Any) -> Any:
        return g * np.array([2.0, 2.5, 2.0])

    with pytest.raises(tt.TapeError, match=r"argument 0, entry \(1\)"):
        tt.check_grads(doubled, [np.ones(3)], modes=["rev"])


def test_check_grads_finds_a_wrong_second_derivative() -> None:
    # The gradient is right, but a part of it is hidden from the tape.
    @tt.op
    def square(x: Any) -> Any:
        return x * x

    @square.vjp
    def _(g: Any, x_shape: tuple[int, ...], x: Any) -> Any:
        hidden = x.detach() if isinstance(x, tt.Tensor) else x
        return g * 2.0 * hidden

    tt.check_grads(square, [np.array([1.0, 2.0])], order=1, modes=["rev"])
    with pytest.raises(tt.TapeError, match="the gradient of f"):
        tt.check_grads(square, [np.array([1.0, 2.0])], order=2, modes=["rev"])


def test_check_grads_names_a_kink() -> None:
    with pytest.raises(tt.TapeError, match="kink"):
        tt.check_grads(tt.abs, [np.array([1.0, 0.0])])


# ---- checkpoint ---------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31))
def test_checkpoint_gives_the_same_gradients(seed: int) -> None:
    params, x = drawn_network(seed)
    w = {name: tt.tensor(p, requires_grad=True) for name, p in params.items()}

    def loss(run: Any) -> Any:
        inputs = tt.tensor(x, requires_grad=True)
        total = run(inputs * 1.0) * 2.0
        total.backward()
        found = [inputs.grad.numpy(), *(p.grad.numpy() for p in w.values())]  # type: ignore[union-attr]
        for p in w.values():
            p.grad = None
        return total.item(), found

    plain, gradients = loss(lambda x: network(w, x))
    again, found = loss(tt.checkpoint(lambda x: network(w, x)))
    assert plain == again
    for a, b in zip(gradients, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_checkpoint_keeps_only_its_arguments() -> None:
    x = tt.tensor(np.ones((100, 100)), requires_grad=True)
    with tt.Tape() as plain:
        _ = tt.sin(tt.cos(tt.sin(x)))
    with tt.Tape() as tape:
        _ = tt.checkpoint(lambda x: tt.sin(tt.cos(tt.sin(x))))(x)
    assert len(plain) == 3 and len(tape) == 1


def test_checkpoint_runs_the_function_twice_and_repeats_its_draws() -> None:
    generator = tt.Generator(0)
    calls: list[np.ndarray] = []
    x = tt.tensor(np.ones(5), requires_grad=True)

    def noisy(x: Any) -> Any:
        mask = generator.bernoulli((5,), 0.5)
        calls.append(mask)
        return x * mask.astype(np.float64)

    y = tt.checkpoint(noisy)(x)
    following = generator.copy().bernoulli((5,), 0.5)
    y.sum().backward()
    assert len(calls) == 2
    np.testing.assert_array_equal(calls[0], calls[1])
    np.testing.assert_array_equal(x.grad.numpy(), calls[0].astype(float))  # type: ignore[union-attr]
    np.testing.assert_array_equal(generator.bernoulli((5,), 0.5), following)  # the walk moved no generator


def test_checkpoint_can_be_nested_and_differentiated_twice() -> None:
    f = tt.checkpoint(lambda x: tt.sin(tt.checkpoint(lambda x: x * x)(x)))
    x = np.array([0.3, 0.7])
    np.testing.assert_allclose(tt.grad(lambda x: f(x).sum())(x), 2 * x * np.cos(x * x), rtol=1e-14)
    second = 2 * np.cos(x * x) - 4 * x * x * np.sin(x * x)
    np.testing.assert_allclose(np.diag(tt.hessian(lambda x: f(x).sum())(x)), second, rtol=1e-13)


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_in_a_loop_over_time(nested: bool) -> None:
    rng = np.random.default_rng(0)
    w, x = tt.tensor(rng.normal(size=(3, 3)), requires_grad=True), rng.normal(size=3)

    def product(h: Any) -> Any:
        return w @ h

    inner = tt.checkpoint(product) if nested else product

    def step(h: Any) -> Any:
        return tt.tanh(inner(h))

    def derivatives(step: Any) -> tuple[Any, Any]:
        h = tt.tensor(x)
        for _ in range(4):
            h = step(h)
        loss = tt.sum(h)
        (first,) = tt.gradient(loss, [w], retain_graph=True)
        (again,) = tt.gradient(loss, [w], create_graph=True)
        np.testing.assert_array_equal(first.numpy(), again.numpy())
        (second,) = tt.gradient(tt.sum(again * again), [w])
        return first.numpy(), second.numpy()

    for plain, replayed in zip(
        derivatives(lambda h: tt.tanh(product(h))), derivatives(tt.checkpoint(step)), strict=True
    ):
        np.testing.assert_allclose(replayed, plain, rtol=1e-12)


def test_checkpoint_leaves_hooks_to_the_outer_walk() -> None:
    w = tt.tensor([2.0], requires_grad=True)
    w.register_hook(lambda g: g * 10.0)
    tt.checkpoint(lambda v: tt.sum(w * v))(tt.tensor([3.0])).backward()
    assert w.grad is not None and w.grad.item() == 30.0


def test_checkpoint_in_forward_mode() -> None:
    f = tt.checkpoint(lambda x: tt.sin(x) * x)
    x, v = np.array([0.3, 0.7]), np.array([1.0, -2.0])
    slope, curvature = np.cos(x) * x + np.sin(x), 2 * np.cos(x) - x * np.sin(x)
    np.testing.assert_allclose(tt.jvp(f, (x,), (v,))[1], slope * v, rtol=1e-14)
    np.testing.assert_allclose(tt.jacfwd(f)(x), np.diag(slope), rtol=1e-14)
    np.testing.assert_allclose(tt.hvp(lambda x: tt.sum(f(x)), (x,), (v,)), curvature * v, rtol=1e-14)


def test_checkpoint_notices_that_an_argument_was_written() -> None:
    w, constant, array = tt.tensor([2.0], requires_grad=True), tt.tensor([3.0]), np.array([3.0], np.float32)
    f = tt.checkpoint(lambda x, y: tt.sum(x * y))
    loss = f(w, array)
    array[:] = 100.0  # a copy is kept
    loss.backward()
    assert w.grad is not None and w.grad.item() == 3.0
    loss = f(w, constant)
    constant.copy_(100.0)
    with pytest.raises(tt.TapeError, match="written in place"):
        loss.backward()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: np.sum(np.asarray(x)),
        lambda x: np.array([x[0], x[1]]).sum(),
        lambda x: tt.sum(x) + np.ones(3).dot(x),
    ],
)
def test_bare_numpy_on_what_is_being_differentiated_is_refused(f: Any) -> None:
    for transformed in (tt.grad(f), lambda x: tt.jvp(f, (x,), (x,))):
        with pytest.raises((tt.TapeError, ValueError), match="drop the derivative"):
            transformed(X)
    np.asarray(tt.tensor(X, requires_grad=True))  # to print or draw it, outside of one, is fine
