"""Optimisers: trajectories against plain Python and against PyTorch, state, refusals, and no trace on the tape."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinytape as tt
from tinytape import io, optim

STEPS = 20


# ---- the definitions, one number at a time --------------------------------------------------------------------------


def sgd(w, g, s, t, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    g += weight_decay * w
    if momentum:
        s["b"] = g if t == 1 else momentum * s["b"] + (1 - dampening) * g
        g = g + momentum * s["b"] if nesterov else s["b"]
    return w - lr * g


def adam(w, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
    return adamw(w, g + weight_decay * w, s, t, lr, betas, eps, 0.0, amsgrad)


def adamw(w, g, s, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
    w -= lr * weight_decay * w
    s["m"] = betas[0] * s.get("m", 0.0) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", 0.0) + (1 - betas[1]) * g * g
    s["top"] = max(s["v"], s.get("top", 0.0))
    m, v = s["m"] / (1 - betas[0] ** t), (s["top"] if amsgrad else s["v"]) / (1 - betas[1] ** t)
    return w - lr * m / (math.sqrt(v) + eps)


def rmsprop(w, g, s, t, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    g += weight_decay * w
    s["v"] = alpha * s.get("v", 0.0) + (1 - alpha) * g * g
    s["mean"] = alpha * s.get("mean", 0.0) + (1 - alpha) * g
    variance = s["v"] - s["mean"] ** 2 if centered else s["v"]
    s["b"] = momentum * s.get("b", 0.0) + g / (math.sqrt(variance) + eps)
    return w - lr * s["b"]


def adagrad(w, g, s, t, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    g += weight_decay * w
    s["sum"] = s.get("sum", initial_accumulator_value) + g * g
    return w - lr / (1 + (t - 1) * lr_decay) * g / (math.sqrt(s["sum"]) + eps)


rate = st.floats(1e-4, 0.5)
decay = st.sampled_from([0.0, 0.1])
beta = st.floats(0.0, 0.999)
OPTIONS = {
    "SGD": (
        sgd,
        st.one_of(
            st.fixed_dictionaries(dict(lr=rate, momentum=st.just(0.9), dampening=beta, weight_decay=decay)),
            st.fixed_dictionaries(dict(lr=rate, momentum=st.just(0.8), nesterov=st.just(True), weight_decay=decay)),
            st.fixed_dictionaries(dict(lr=rate, weight_decay=decay)),
        ),
    ),
    "Adam": (
        adam,
        st.fixed_dictionaries(
            dict(lr=rate, betas=st.tuples(beta, beta), weight_decay=decay, amsgrad=st.booleans()),
            optional=dict(eps=st.floats(1e-8, 1e-2)),
        ),
    ),
    "RMSprop": (
        rmsprop,
        st.fixed_dictionaries(
            dict(
                lr=rate, alpha=st.floats(0.1, 0.99), weight_decay=decay, momentum=st.sampled_from([0.0, 0.8]),
                centered=st.booleans(),
            ),
            optional=dict(eps=st.floats(1e-8, 1e-2)),
        ),
    ),
    "Adagrad": (
        adagrad,
        st.fixed_dictionaries(
            dict(lr=rate, lr_decay=decay, weight_decay=decay, initial_accumulator_value=st.sampled_from([0.0, 0.5])),
            optional=dict(eps=st.floats(1e-10, 1e-2)),
        ),
    ),
}  # fmt: skip
OPTIONS["AdamW"] = (adamw, OPTIONS["Adam"][1])
NAMES = sorted(OPTIONS)

runs = st.fixed_dictionaries(
    dict(
        maximize=st.booleans(),
        clip=st.sampled_from([{}, {"clip_norm": 1.0}, {"clip_norm": 1e6}, {"clip_value": 0.3}]),
        seed=st.integers(0, 2**31),
    )
)
SHAPES = [(3,), (2, 2), ()]


def gradients(seed):
    """For each step, the gradients of the parameters: some are missing now and then."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        yield [None if rng.random() < 0.1 else np.asarray(rng.normal(size=shape)) for shape in SHAPES]


def starts(seed):
    rng = np.random.default_rng(seed + 1)
    return [np.asarray(rng.normal(size=shape)) for shape in SHAPES]


def trajectory(make, run, dtype="float64"):
    """The parameters after each step of one of our optimisers."""
    params = [tt.tensor(x.astype(dtype), requires_grad=True) for x in starts(run["seed"])]
    optimizer = make(params)
    for grads in gradients(run["seed"]):
        optimizer.zero_grad()
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.astype(dtype)
        optimizer.step()
        yield [p.numpy() for p in params]


def clipped(given, clip_norm=None, clip_value=None):
    numbers = [x for g in given if g is not None for x in g.ravel()]
    scale = 1.0
    if clip_norm is not None:
        scale = min(1.0, clip_norm / (math.sqrt(sum(x * x for x in numbers)) + 1e-6))
    bound = math.inf if clip_value is None else clip_value
    return [None if g is None else [max(-bound, min(bound, x)) * scale for x in g.ravel()] for g in given]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), run=runs)
def test_trajectory_is_that_of_the_definition(name, data, run):
    definition, options = OPTIONS[name]
    options = data.draw(options)
    ours = trajectory(lambda p: getattr(optim, name)(p, maximize=run["maximize"], **options, **run["clip"]), run)
    weights = [list(x.ravel()) for x in starts(run["seed"])]
    states = [[{} for _ in w] for w in weights]
    steps = [0] * len(weights)
    sign = -1 if run["maximize"] else 1
    for grads, found in zip(gradients(run["seed"]), ours, strict=True):
        for k, g in enumerate(clipped(grads, **run["clip"])):
            if g is not None:
                steps[k] += 1
                for i, x in enumerate(g):
                    weights[k][i] = definition(weights[k][i], sign * x, states[k][i], steps[k], **options)
        for w, x in zip(weights, found, strict=True):
            np.testing.assert_allclose(x.ravel(), w, rtol=1e-9, atol=1e-9)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), run=runs)
def test_trajectory_is_pytorchs(name, data, run):
    torch = pytest.importorskip("torch")
    options = data.draw(OPTIONS[name][1])
    ours = trajectory(lambda p: getattr(optim, name)(p, maximize=run["maximize"], **options, **run["clip"]), run)
    params = [torch.tensor(x, requires_grad=True) for x in starts(run["seed"])]
    theirs = getattr(torch.optim, name)(params, maximize=run["maximize"], **options)
    for grads, found in zip(gradients(run["seed"]), ours, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        if "clip_norm" in run["clip"]:
            torch.nn.utils.clip_grad_norm_(params, run["clip"]["clip_norm"])
        elif "clip_value" in run["clip"] and any(g is not None for g in grads):
            torch.nn.utils.clip_grad_value_(params, run["clip"]["clip_value"])
        theirs.step()
        for p, x in zip(params, found, strict=True):
            np.testing.assert_allclose(x, p.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_pytorchs(name):
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.optim, name)([torch.zeros(1, requires_grad=True)]).defaults
    ours = getattr(optim, name)([tt.tensor(0.0, requires_grad=True)]).defaults
    assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_float32_and_follows_float64(name):
    run = dict(seed=3)
    options = dict(lr=np.float64(0.01), weight_decay=0.1, clip_norm=1.0)

    def make(params):
        made.append(getattr(optim, name)(params, **options))
        return made[-1]

    made = []
    *_, narrow = trajectory(make, run, "float32")
    *_, wide = trajectory(make, run, "float64")
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    arrays = [x for s in made[0].state.values() for key, x in s.items() if key != "step"]
    assert all(x.dtype == np.float32 for x in arrays)


@pytest.mark.parametrize("name", NAMES)
def test_large_parameters_are_updated_like_small_ones(name):
    """Several blocks, the last one short: every number follows the path it has alone."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(3, 2**14 + 5)), rng.normal(size=(3, 2**14 + 5))
    whole = tt.tensor(x, requires_grad=True)
    parts = [tt.tensor(row, requires_grad=True) for row in x]
    big, small = getattr(optim, name)([whole], weight_decay=0.1), getattr(optim, name)(parts, weight_decay=0.1)
    for _ in range(3):
        whole.grad = g
        for part, row in zip(parts, g, strict=True):
            part.grad = row
        big.step()
        small.step()
    assert np.array_equal(whole.data, np.stack([part.data for part in parts]))


def test_a_cast_module_takes_its_state_along():
    module = tt.nn.Linear(3, 2, dtype="float32")
    optimizer = optim.Adam(module)

    def step():
        (module(np.ones((1, 3), module.weight.dtype)) ** 2).sum().backward()
        optimizer.step()

    step()
    before = optimizer.state[module.weight]["exp_avg"].copy()
    module.double()
    step()
    after = optimizer.state[module.weight]
    assert after["step"] == 2 and {after[slot].dtype for slot in ("exp_avg", "exp_avg_sq")} == {np.dtype("float64")}
    np.testing.assert_allclose(after["exp_avg"], 0.9 * before + 0.1 * module.weight.grad.numpy(), rtol=1e-7)
    optim.Adam(module).load_state_dict(optimizer.state_dict())


def test_memory_that_is_not_in_c_order_is_updated_too():
    x = tt.tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    x.raw = np.asfortranarray(x.raw)
    x.grad = np.arange(6.0).reshape(2, 3)
    optim.SGD([x], lr=0.5).step()
    assert np.array_equal(x.data, np.arange(6.0).reshape(2, 3) / 2)


def test_centered_rmsprop_survives_rounding():
    """The variance of a constant gradient is 0, and rounding makes it negative."""
    w = tt.tensor(np.zeros(50), requires_grad=True)
    optimizer = optim.RMSprop([w], centered=True, alpha=0.5)
    for _ in range(100):
        w.grad = np.linspace(0.1, 3.3, 50)
        optimizer.step()
    assert np.isfinite(w.data).all()


# ---- what a step does, and does not do ------------------------------------------------------------------------------


def leaves(n=2):
    made = [tt.tensor(np.arange(3.0) + i, requires_grad=True) for i in range(n)]
    for i, p in enumerate(made):
        p.grad = np.full(3, float(i + 1))
    return made


def test_step_returns_the_norm_before_clipping_and_leaves_grad_alone():
    params = leaves()
    norm = math.sqrt(3 * 1 + 3 * 4)
    before = [p.grad for p in params]
    assert optim.SGD(params, lr=0.0).step() is None
    assert optim.SGD(params, lr=0.0, clip_norm=0.1).step() == pytest.approx(norm)
    assert optim.SGD(params, lr=0.0, clip_value=0.1).step() == pytest.approx(norm)
    assert all(p.grad is g for p, g in zip(params, before, strict=True))
    assert [p.grad.tolist() for p in params] == [[1.0] * 3, [2.0] * 3]


def test_the_clip_is_over_all_groups_and_before_weight_decay():
    a, b = leaves()
    optimizer = optim.SGD([{"params": [a]}, {"params": [b], "lr": 2.0}], lr=1.0, weight_decay=0.5, clip_norm=1.0)
    scale = 1.0 / (math.sqrt(15) + 1e-6)
    expected = [x.data - lr * (x.grad.data * scale + 0.5 * x.data) for x, lr in ((a, 1.0), (b, 2.0))]
    optimizer.step()
    np.testing.assert_allclose([a.data, b.data], expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("bad", "clip"), [(np.nan, "clip_norm"), (np.inf, "clip_norm"), (np.nan, "clip_value")])
def test_not_finite_gradients_change_nothing(name, bad, clip):
    params = leaves(3)
    optimizer = getattr(optim, name)(dict(zip(["encoder", "fine", "decoder"], params, strict=True)), **{clip: 1.0})
    optimizer.step()
    params[0].grad = np.array([1.0, bad, bad])
    params[2].grad = np.array([bad, 0.0, -np.inf])
    values, state = [p.numpy() for p in params], optimizer.state_dict()
    gradients = [p.grad.numpy() for p in params]
    with pytest.raises(tt.InputError) as caught:
        optimizer.step()
    text = str(caught.value)
    assert "encoder (shape (3,)) has " in text and "decoder" in text and "fine" not in text and "of 3 entries" in text
    assert ("2 NaN" in text) == math.isnan(bad) and "help:" in text
    for p, value, g in zip(params, values, gradients, strict=True):
        assert np.array_equal(p.data, value) and np.array_equal(p.grad.data, g, equal_nan=True)
    assert repr(optimizer.state_dict()) == repr(state)


def test_without_a_clip_nothing_is_checked():
    (p,) = leaves(1)
    p.grad = np.array([np.nan, np.inf, 1.0])
    optim.Adam([p]).step()
    assert np.isnan(p.data[:2]).all() and np.isfinite(p.data[2])


def test_clip_value_clips_infinity():
    (p,) = leaves(1)
    p.grad = np.array([np.inf, -np.inf, 0.25])
    assert optim.SGD([p], lr=1.0, clip_value=0.5).step() == math.inf
    assert p.tolist() == [-0.5, 1.5, 1.75]


def test_a_parameter_without_gradient_is_skipped():
    a, b = leaves()
    a.grad = None
    frozen = tt.tensor(np.ones(3))
    optimizer = optim.Adam([a, b, frozen], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert a.tolist() == [0, 1, 2] and frozen.tolist() == [1, 1, 1] and b.tolist() != [1, 2, 3]
    assert list(optimizer.state) == [b]
    assert optim.SGD([frozen], clip_norm=1.0).step() == 0.0


def test_zero_grad():
    a, b = leaves()
    optimizer = optim.SGD([a])
    optimizer.zero_grad(set_to_none=False)
    assert a.grad.tolist() == [0, 0, 0] and b.grad.tolist() == [2, 2, 2]
    optimizer.zero_grad()
    assert a.grad is None
    optimizer.zero_grad(set_to_none=False)
    assert a.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_not_recorded(name):
    w = tt.tensor(np.ones(3), requires_grad=True)
    optimizer = getattr(optim, name)([w], weight_decay=0.1, clip_norm=1.0)
    with tt.Tape() as tape:
        (w * w).sum().backward()
        recorded = len(tape)
        optimizer.step()
        optimizer.zero_grad()
    assert len(tape) == recorded
    assert w.is_leaf and w.requires_grad and w.grad is None
    assert tt.tensor(1.0, requires_grad=True).requires_grad  # recording is on again


def test_the_update_is_in_place_and_is_noticed():
    w = tt.tensor(np.ones(3), requires_grad=True)
    memory = w.raw
    loss = (w * w).sum()
    w.grad = np.ones(3)
    optim.SGD([w], lr=0.5).step()
    assert w.raw is memory and w.tolist() == [0.5] * 3
    with pytest.raises(tt.TapeError, match="optimiser's step"):
        loss.backward()


def test_options_may_be_changed_between_steps():
    (p,) = leaves(1)
    optimizer = optim.SGD([p], lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert p.tolist() == [-0.25, 0.75, 1.75]


# ---- groups and names -----------------------------------------------------------------------------------------------


class Pair:
    """As much of a Module as an optimiser wants."""

    def __init__(self):
        weight, bias = tt.tensor(np.ones(3), requires_grad=True), tt.tensor(0.5, requires_grad=True)
        self.parts = {"cell.weight": weight, "bias": bias}

    def named_parameters(self):
        yield from self.parts.items()

    def parameters(self):
        yield from self.parts.values()


def names(optimizer):
    return [group["params"] for group in optimizer.state_dict()["param_groups"]]


def test_how_parameters_may_be_given():
    model, other = Pair(), Pair()
    for params in (model, model.parts, list(model.named_parameters()), model.named_parameters()):
        assert names(optim.SGD(params)) == [["cell.weight", "bias"]]
    for params in (model.parameters(), list(model.parameters()), tuple(model.parameters())):
        assert names(optim.SGD(params)) == [["0", "1"]]
    groups = [{"params": model, "lr": 0.5}, {"params": other}, {"params": tt.tensor(1.0, requires_grad=True)}]
    optimizer = optim.SGD(groups, lr=0.1)
    assert names(optimizer) == [["cell.weight", "bias"], ["1.cell.weight", "1.bias"], ["4"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 0.1]
    pairs = [("w", p) for p in leaves(3)]
    assert names(optim.SGD(pairs)) == [["w", "0.w", "0.0.w"]]


def test_add_param_group():
    a, b, c = leaves(3)
    optimizer = optim.SGD([a], lr=1.0)
    optimizer.add_param_group({"params": [b, c], "lr": 0.5})
    optimizer.step()
    assert a.tolist() == [-1, 0, 1] and b.tolist() == [0, 1, 2] and c.tolist() == [0.5, 1.5, 2.5]
    assert names(optimizer) == [["0"], ["1", "2"]]


# ---- state ----------------------------------------------------------------------------------------------------------


def trained(name, steps=3, **options):
    params = leaves()
    optimizer = getattr(optim, name)(dict(zip("ab", params, strict=True)), **options)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


ALL = {
    "SGD": dict(momentum=0.9, nesterov=True),
    "Adam": dict(amsgrad=True, clip_norm=2.0),
    "AdamW": dict(betas=(0.5, 0.6)),
    "RMSprop": dict(momentum=0.5, centered=True),
    "Adagrad": dict(lr_decay=0.1, initial_accumulator_value=0.3),
}


@pytest.mark.parametrize("name", NAMES)
def test_going_on_from_a_saved_state_is_bit_for_bit(name, tmp_path):
    params, optimizer = trained(name, **ALL[name])
    io.save_state(tmp_path / "run", {"optimizer": optimizer.state_dict()})
    others = [tt.tensor(p.data, requires_grad=True) for p in params]
    resumed = getattr(optim, name)(dict(zip("ab", others, strict=True)))  # options come from the file too
    resumed.load_state_dict(io.load_state(tmp_path / "run")["optimizer"])
    assert repr(resumed.state_dict()) == repr(optimizer.state_dict())
    for p, other in zip(params, others, strict=True):
        p.grad = other.grad = np.array([0.1, -0.2, 7.0])
    for _ in range(3):
        assert optimizer.step() == resumed.step()
    assert all(np.array_equal(p.data, other.data) for p, other in zip(params, others, strict=True))


def test_numpys_numbers_as_options_are_saved_as_pythons(tmp_path):
    _, optimizer = trained("Adam", lr=np.float32(0.5), betas=np.array([0.5, 0.75]), clip_norm=np.int64(3))
    io.save_state(tmp_path / "x", optimizer.state_dict())
    optimizer.load_state_dict(io.load_state(tmp_path / "x"))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], optimizer.clip_norm) == (0.5, (0.5, 0.75), 3.0)


def test_a_state_before_the_first_step_loads_too():
    _, fresh = trained("Adam", steps=0)
    _, other = trained("Adam")
    other.load_state_dict(fresh.state_dict())
    assert other.state == {}


def test_saved_and_loaded_arrays_are_copies():
    params, optimizer = trained("Adam")
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    optimizer.step()
    assert repr(saved) == repr(kept)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert repr(saved) == repr(kept)
    assert optimizer.state[params[0]]["step"] == 4


def test_every_mismatch_is_listed_and_nothing_changed():
    _, optimizer = trained("Adam")
    wrong = optimizer.state_dict()
    wrong["state"]["a"]["exp_avg"] = np.zeros((2, 3))
    wrong["state"]["a"]["exp_avg_sq"] = np.zeros(3, np.float32)
    wrong["state"]["a"]["step"] = "three"
    del wrong["state"]["b"]["exp_avg"]
    wrong["state"]["b"]["momentum_buffer"] = np.zeros(3)
    wrong["state"]["c"] = {}
    wrong["param_groups"][0]["lr"] = -1.0
    wrong["param_groups"][0]["betas"] = [0.5, 1.0]
    wrong["clip_norm"] = 0.0
    before = repr(optimizer.state_dict())
    with pytest.raises(tt.InputError) as caught:
        optimizer.load_state_dict(wrong)
    for line in (
        "state/a/exp_avg: float64[2, 3], but float64[3] here",
        "state/a/exp_avg_sq: float32[3], but float64[3] here",
        "state/a/step: a str, but a number here",
        "state/b/exp_avg: missing",
        "state/b/momentum_buffer: not known here",
        "state/c: not known here",
        "lr is -1.0",
        "clip_norm is 0.0",
        "mismatches: 8",
        "help:",
    ):
        assert line in str(caught.value), line
    assert repr(optimizer.state_dict()) == before


def test_other_mismatches():
    _, optimizer = trained("Adam")
    good = optimizer.state_dict()
    before = repr(good)
    for change, message in (
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "a list of 2, but a list of 1 here"),
        (lambda s: s["param_groups"][0].pop("eps"), "param_groups/0/eps: missing"),
        (lambda s: s["param_groups"][0].update(momentum=0.9), "param_groups/0/momentum: not known here"),
        (lambda s: s["param_groups"][0].update(params=["a", "x"]), "param_groups/0/params/b: missing"),
        (lambda s: s["param_groups"][0].update(betas=[0.9]), "a list of 1, but a list of 2 here"),
        (lambda s: s["param_groups"][0].update(amsgrad=1), "a number, but a bool here"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "state/a/max_exp_avg_sq: missing"),
        (lambda s: s.update(state=[]), "state: a list of 0, but a dict here"),
        (lambda s: s.update(state={"a": 3}), "state/a: a number, but a dict here"),
        (lambda s: s.update(param_groups=None), "param_groups: a NoneType"),
        (lambda s: s.pop("state"), "state_dict/state: missing"),
        (lambda s: s.update(extra=1), "state_dict/extra: not known here"),
        (lambda s: s.update(clip_value="x"), "clip_value is 'x'"),
    ):
        wrong = copy.deepcopy(good)
        change(wrong)
        with pytest.raises(tt.InputError) as caught:
            optimizer.load_state_dict(wrong)
        assert message in str(caught.value)
        assert repr(optimizer.state_dict()) == before
    for wrong in (None, [], 3):
        with pytest.raises(tt.InputError, match=r"state_dict: a .* but a dict here"):
            optimizer.load_state_dict(wrong)


# ---- refusals -------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("SGD", dict(lr=-0.1)), ("SGD", dict(lr=math.nan)), ("SGD", dict(lr=math.inf)), ("SGD", dict(momentum=-0.5)),
    ("SGD", dict(weight_decay=-1.0)), ("SGD", dict(nesterov=True)), ("SGD", dict(dampening=math.nan)),
    ("SGD", dict(nesterov=True, momentum=0.9, dampening=0.1)),
    ("Adam", dict(lr=-1.0)), ("Adam", dict(eps=-1e-8)), ("Adam", dict(betas=(1.0, 0.9))),
    ("Adam", dict(betas=(0.9, 1.0))), ("Adam", dict(betas=(-0.1, 0.9))), ("Adam", dict(weight_decay=-1.0)),
    ("Adam", dict(betas=(0.9,))), ("AdamW", dict(weight_decay=-0.1)), ("AdamW", dict(betas=(0.9, -0.1))),
    ("RMSprop", dict(alpha=-0.1)), ("RMSprop", dict(alpha=1.1)), ("RMSprop", dict(eps=-1.0)),
    ("RMSprop", dict(momentum=-0.1)), ("Adagrad", dict(lr_decay=-0.1)), ("Adagrad", dict(eps=-1.0)),
    ("Adagrad", dict(initial_accumulator_value=-0.1)), ("Adagrad", dict(weight_decay=-0.1)),
    *[(name, dict(clip_norm=bad)) for name in NAMES for bad in (0.0, -1.0, math.nan)],
    *[(name, dict(clip_value=bad)) for name in NAMES for bad in (0, -1, math.nan)],
    *[(name, dict(clip_norm=1.0, clip_value=1.0)) for name in NAMES],
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), BAD_OPTIONS)
def test_options_out_of_range(name, options):
    with pytest.raises(tt.InputError) as caught:
        getattr(optim, name)(leaves(), **options)
    text = str(caught.value)
    assert name in text and "help:" in text
    for key, value in options.items():
        assert key in text and (value is True or any(str(v) in text for v in np.atleast_1d(value)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["lr", "weight_decay", "clip_norm"])
@pytest.mark.parametrize("value", ["1e-3", True, 1j, [0.1]])
def test_options_that_are_not_numbers(name, key, value):
    with pytest.raises(tt.DTypeError, match=rf"{key} is .*, a {type(value).__name__} and not a number"):
        getattr(optim, name)(leaves(), **{key: value})


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([], tt.InputError, "0 parameters"),
        (iter(()), tt.InputError, "0 parameters"),
        ([{"params": []}], tt.InputError, "group 0 has 0 parameters"),
        (lambda a: a, tt.DTypeError, "params is a Tensor"),
        (lambda a: {a}, tt.DTypeError, "params is a set"),
        (lambda a: [{"params": {a}}], tt.DTypeError, "params is a set"),
        (3, tt.DTypeError, "params is a int"),
        (None, tt.DTypeError, "params is a NoneType"),
        ("weights", tt.DTypeError, "params is a str"),
        (np.zeros(3), tt.DTypeError, r"params\[0\] is"),
        (lambda a: [a, np.zeros(3)], tt.DTypeError, r"params\[1\] is"),
        (lambda a: [("a", a, a)], tt.DTypeError, r"params\[0\] is"),
        (lambda a: [(1, a)], tt.DTypeError, r"params\[0\] is"),
        (lambda a: [a, a], tt.InputError, "parameter 1 is the same Tensor as parameter 0"),
        (lambda a: {"x": a, "y": a}, tt.InputError, "parameter y is the same Tensor as parameter x"),
        (lambda a: [{"params": [a]}, {"params": [a]}], tt.InputError, "group 1: parameter 0 is the same Tensor"),
        (lambda a: [a * 2.0], tt.TapeError, r"parameter 0 is the result of multiply \(record"),
        (lambda a: [{"params": [a], "weigth_decay": 0.1}], tt.InputError, "unknown options: weigth_decay"),
        (lambda a: [{"params": [a], "lr": -0.1}], tt.InputError, "lr is -0.1"),
        (lambda a: [{"lr": 0.1}], tt.InputError, "not a dict with 'params'"),
        (lambda a: [{"params": [a]}, a], tt.InputError, "group 1 is not a dict"),
    ],
)
def test_parameters_that_are_refused(given, kind, message):
    with pytest.raises(kind, match=message) as caught:
        optim.Adam(given(leaves(1)[0]) if callable(given) else given)
    assert "help:" in str(caught.value)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    a, b = leaves()
    optimizer = optim.SGD([a])
    with pytest.raises(tt.InputError):
        optimizer.add_param_group({"params": [b, a]})
    assert names(optimizer) == [["0"]]
    optimizer.add_param_group({"params": [b]})
    assert names(optimizer) == [["0"], ["1"]]


@settings(max_examples=5)
@given(seed=st.integers(0, 100))
def test_least_squares_is_solved(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, 3))
    w = tt.tensor(np.zeros(3), requires_grad=True)
    optimizer = optim.Adam([w], lr=0.05, clip_norm=10.0)
    for _ in range(300):
        optimizer.zero_grad()
        error = tt.tensor(x) @ w - x @ [1.0, -2.0, 0.5]
        (error * error).sum().backward()
        optimizer.step()
    np.testing.assert_allclose(w.data, [1.0, -2.0, 0.5], atol=0.02)
