"""Recurrent layers as kernels: against themselves step by step, and in the company of threads, forks and writes."""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn, optim

ROOT = Path(__file__).resolve().parent.parent
I, H = 3, 5


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def run(layer, x, seed=1, **options):
    """Outputs, last states, and the gradients of a number on which every entry of these bears differently."""
    layer.zero_grad()
    tt.manual_seed(seed)
    x = tt.tensor(x, requires_grad=True)
    y, state = layer(x, **options)
    rng = np.random.default_rng(seed)
    loss = sum((a * rng.normal(size=a.shape).astype(a.dtype)).sum() for a in [y, *parts(state)])
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    values = {f"state {i}": part.numpy() for i, part in enumerate(parts(state))}
    return {"y": y.numpy(), "loss": loss.numpy(), "x": x.grad.numpy(), **values, **gradients}


def assert_agree(found, expected, tolerance):
    """In norm, array by array."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        error = np.linalg.norm((found[name] - value).astype(np.float64))
        assert error <= tolerance * max(1.0, np.linalg.norm(value.astype(np.float64))), (name, error)


def assert_equal(found, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def ops_of(layer, *args, **options):
    with tt.Tape() as tape:
        layer(*args, **options)
    return [record.node.name for record in tape.records]


# ---- every form, against the definition -----------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(6, 4, I))
RESET = np.random.default_rng(1).random((6, 4)) < 0.3
MARKS = dict(lengths=[6, 0, 3, 5], reset=RESET)


def layers(kind, **options):
    return lambda dtype: seeded(lambda: getattr(nn, kind)(I, H, **options, dtype=dtype))


def cells(kind, *sizes, **options):
    return lambda dtype: nn.Recurrent(seeded(lambda: getattr(nn, kind)(I, H, *sizes, dtype=dtype)), **options)


def seeded(make):
    """With the default generator, from which zones and dropout masks come too."""
    tt.manual_seed(0)
    return make()


EVERYTHING = dict(num_layers=2, bidirectional=True, proj_size=2, learn_initial_state=True)
FORMS = {
    "LSTM": (layers("LSTM"), {}),
    "LSTM, marked": (layers("LSTM"), MARKS),
    "GRU": (layers("GRU"), {}),
    "RNN": (layers("RNN"), {}),
    "zoneout": (cells("ZoneoutLSTMCell"), {}),
    "minimal, backwards": (cells("MinimalGatedUnitCell", reverse=True), {}),
}
LONG_TAIL = {
    "LSTM, lengths": (layers("LSTM"), dict(lengths=[6, 0, 3, 5])),
    "LSTM, resets": (layers("LSTM", num_layers=2, bidirectional=True), dict(reset=RESET)),
    "LSTM, everything": (layers("LSTM", **EVERYTHING), MARKS),
    "LSTM without bias": (layers("LSTM", bias=False, num_layers=2), {}),
    "GRU, both ways": (layers("GRU", num_layers=2, bidirectional=True, dropout=0.5), MARKS),
    "GRU without bias": (layers("GRU", bias=False), {}),
    "GRU before": (layers("GRU", reset_after=False), {}),
    "GRU before, marked": (layers("GRU", reset_after=False), MARKS),
    "RNN, marked": (layers("RNN"), MARKS),
    "RNN, relu": (layers("RNN", nonlinearity="relu", bidirectional=True), MARKS),
    "LSTM cell": (cells("LSTMCell"), MARKS),
    "peephole": (cells("PeepholeLSTMCell"), MARKS),
    "coupled": (cells("CoupledLSTMCell"), MARKS),
    "layer norm": (cells("LayerNormLSTMCell"), MARKS),
    "zoneout, marked": (cells("ZoneoutLSTMCell", reverse=True), MARKS),
    "minimal, marked": (cells("MinimalGatedUnitCell"), MARKS),
    "memory": (cells("MemoryAttentionCell", 4, 2), MARKS),
}
forms = pytest.mark.parametrize(
    "form", [*FORMS, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG_TAIL)], ids=str
)
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-5), pytest.param(np.float64, 1e-10, marks=pytest.mark.slow)], ids=str
)


@dtypes
@forms
def test_kernels_agree_with_the_definition(form, dtype, tolerance):
    make, options = (FORMS | LONG_TAIL)[form]
    layer, x = make(dtype), X.astype(dtype)
    found = run(layer, x, **options)
    ops = ops_of(layer, x, **options)
    with tt.no_compile():
        assert_agree(found, run(layer, x, **options), tolerance)
        assert not any(name.startswith("scan(") for name in ops_of(layer, x, **options))
    assert any(name.startswith("scan(") for name in ops)


def test_layouts():
    layer = nn.LSTM(I, H, batch_first=True, generator=tt.Generator(0))
    x = X.astype(np.float32)
    y, (h, c) = layer(x.swapaxes(0, 1))
    single, (h1, c1) = layer(x[:, 2])
    layer.batch_first = False
    expected, (h2, c2) = layer(x)
    np.testing.assert_array_equal(y.numpy().swapaxes(0, 1), expected.numpy())
    for a, b, one in [(h, h2, h1), (c, c2, c1)]:
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        np.testing.assert_allclose(one.numpy(), a.numpy()[:, 2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(single.numpy(), expected.numpy()[:, 2], rtol=0, atol=1e-6)


def test_windows_with_a_carried_state_are_one_run():
    layer, x = nn.LSTM(I, H, generator=tt.Generator(0)), X.astype(np.float32)
    whole, last = layer(x)
    with tt.no_grad():
        pieces, state = [], None
        for t in range(len(x)):
            y, state = layer(x[t : t + 1], state)
            pieces.append(y.numpy())
    np.testing.assert_allclose(np.concatenate(pieces), whole.numpy(), rtol=0, atol=1e-6)
    for a, b in zip(state, last, strict=True):
        assert not a.requires_grad
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-6)


def test_what_stands_in_masked_steps_reaches_nothing():
    layer, x = nn.LSTM(I, H, generator=tt.Generator(0)), X.astype(np.float32)
    clean = run(layer, x, **MARKS)
    for b, n in enumerate(MARKS["lengths"]):
        x[n:, b] = np.nan
    assert_equal(run(layer, x, **MARKS), clean)
    assert not clean["y"][3:, 2].any() and not clean["x"][3:, 2].any()


def test_nan_passes_through_its_own_row():
    layer, x = nn.LSTM(I, H, generator=tt.Generator(0)), X.astype(np.float32)
    x[2, 1] = np.nan
    y = layer(x)[0].numpy()
    assert np.isnan(y[2:, 1]).all() and np.isfinite(y[:2]).all() and np.isfinite(y[:, [0, 2, 3]]).all()


# ---- what is compiled -----------------------------------------------------------------------------------------------


def test_no_size_compiles_anew():
    from tinytape.compile.cache import compilations

    def compare(steps, rows, features, width):
        x = np.random.default_rng(0).normal(size=(steps, rows, features)).astype(np.float32)
        layer = nn.LSTM(features, width, generator=tt.Generator(0))
        found = run(layer, x)
        with tt.no_compile():
            assert_agree(found, run(layer, x), 1e-5)

    compare(6, 4, I, H)
    compare(50, 2, 20, 77)  # enough work for threads, which have a kernel of their own
    before = compilations()
    for sizes in [
        (1, 4, I, H), (6, 1, I, H), (1, 1, I, H), (7, 33, I, H), (6, 4, 1, H), (6, 4, I, 1), (6, 4, 10, 50),
        (6, 4, 5, 5), (5, 5, 5, 5), (6, 4, 16, 32), (6, 4, 20, 5), (3, 20, 5, 20), (49, 3, 21, 78),
    ]:  # fmt: skip
        compare(*sizes)
    assert compilations() == before


FACTOR = 2.0


class Elman(nn.Module):
    """A cell whose equation lies in several places."""

    slope = 1.0

    def __init__(self, activation):
        self.weight, self.activation = nn.Parameter(np.eye(I, dtype=np.float32)), activation

    def forward(self, x, h):
        return self.activation(x + self.product(h)) * self.slope

    def product(self, h):
        return h @ self.scaled

    @property
    def scaled(self):
        return self.weight * FACTOR


@pytest.mark.parametrize("what", ["an op", "a global", "an attribute", "the class's", "a method"])
def test_a_cell_is_known_by_all_that_it_reaches(what, monkeypatch):
    from tinytape.compile.captures import look_through

    cell = Elman(tt.tanh)
    before, again = look_through(cell), look_through(Elman(tt.tanh))
    assert before.complete and before.key == again.key
    if what == "an op":
        cell.activation = tt.sin
    elif what == "an attribute":
        cell.weight = nn.Parameter(np.eye(I))
    elif what == "a global":
        monkeypatch.setitem(globals(), "FACTOR", 3.0)
    elif what == "the class's":
        monkeypatch.setattr(Elman, "slope", 2.0)
    else:
        monkeypatch.setattr(Elman, "product", lambda self, h: h)
    assert look_through(cell).key != before.key


@pytest.mark.parametrize("reverse", [False, True])
def test_a_cell_that_cannot_be_compiled_runs_step_by_step(reverse, caplog):
    class Halves(nn.Module):
        """Branches on values."""

        def forward(self, x, h):
            return h * 0.5 + x if float(x.sum()) > 0 else h - x

    x = X.astype(np.float32)
    layer = nn.Recurrent(Halves(), reverse=reverse)
    for _ in range(2):
        y, _ = layer(x, np.zeros((4, I), np.float32))
    h = np.zeros((4, I), np.float32)
    for t in range(6)[:: -1 if reverse else 1]:
        h = h * 0.5 + x[t] if x[t].sum() > 0 else h - x[t]
        np.testing.assert_allclose(y[t].numpy(), h, rtol=0, atol=1e-6)
    said = [record.getMessage() for record in caplog.records if "step by step" in record.getMessage()]
    assert len(said) <= 1 and all("Halves" in line for line in said)
    assert not any(name.startswith("scan(") for name in ops_of(layer, x, np.zeros((4, I), np.float32)))


def test_a_cell_that_draws_draws_what_it_would_have_drawn():
    class Noisy(nn.Module):
        def forward(self, x, h):
            return h + nn.functional.dropout(x, 0.5)

    x, found = X.astype(np.float32), []
    for context in (contextlib.nullcontext(), contextlib.nullcontext(), tt.no_compile()):
        tt.manual_seed(3)
        with context:
            found.append(nn.Recurrent(Noisy())(x, np.zeros((4, I), np.float32))[0].numpy())
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])


def test_no_compile_is_the_threads_own():
    layer, x = nn.LSTM(I, H), X.astype(np.float32)
    found = []
    with tt.no_compile():
        with tt.no_compile():
            assert "scan(LSTM)" not in ops_of(layer, x)
        assert "scan(LSTM)" not in ops_of(layer, x)
        thread = threading.Thread(target=lambda: found.extend(ops_of(layer, x)))
        thread.start()
        thread.join()
    assert "scan(LSTM)" in found and "scan(LSTM)" in ops_of(layer, x)
    with contextlib.suppress(ZeroDivisionError), tt.no_compile():
        raise ZeroDivisionError
    assert "scan(LSTM)" in ops_of(layer, x)


# ---- derivatives of derivatives -------------------------------------------------------------------------------------

SMALL = {
    "LSTM": lambda: nn.LSTM(2, 2, dtype=np.float64),
    "GRU": lambda: nn.GRU(2, 2, dtype=np.float64),
    "GRU before": lambda: nn.GRU(2, 2, reset_after=False, dtype=np.float64),
    "RNN": lambda: nn.RNN(2, 2, dtype=np.float64),
    "zoneout": lambda: nn.Recurrent(nn.ZoneoutLSTMCell(2, 2, dtype=np.float64)),
    "layer norm": lambda: nn.Recurrent(nn.LayerNormLSTMCell(2, 2, dtype=np.float64)),
    "memory": lambda: nn.Recurrent(nn.MemoryAttentionCell(2, 2, 2, 2, dtype=np.float64)),
}


class Small:
    """A layer as a function of its input, and a weight."""

    def __init__(self, kind):
        tt.manual_seed(0)
        self.layer, rng = SMALL[kind](), np.random.default_rng(0)
        self.name, self.weight = next((n, p) for n, p in self.layer.named_parameters() if "weight_hh" in n)
        self.x, self.dx = rng.normal(size=(2, 3, 2, 2))
        self.dw = rng.normal(size=self.weight.shape)
        count = 3 if kind in ("LSTM", "zoneout", "layer norm", "memory") else 2
        self.weights = [rng.normal(size=16) for _ in range(count)]

    def loss(self, x, w):
        tt.manual_seed(1)  # the zones
        y, state = nn.functional_call(self.layer, {self.name: w}, x)
        return sum((tt.ravel(a) * v[: a.size]).sum() for a, v in zip([y, *parts(state)], self.weights, strict=True))

    def difference(self, f, h=1e-5):
        """The central difference of f along (dx, dw)."""
        w = self.weight.numpy()
        after, before = (f(self.x + s * self.dx, w + s * self.dw) for s in (h, -h))
        return [(a - b) / (2 * h) for a, b in zip(after, before, strict=True)]


smalls = pytest.mark.parametrize("kind", SMALL)


@smalls
def test_forward_mode(kind):
    s = Small(kind)
    value, tangent = tt.jvp(s.loss, (s.x, s.weight.numpy()), (s.dx, s.dw))
    with tt.no_compile():
        expected = s.difference(lambda x, w: [s.loss(x, w).item()])
        np.testing.assert_allclose(value.item(), s.loss(s.x, s.weight.numpy()).item(), rtol=1e-10)
    np.testing.assert_allclose(tangent.item(), expected[0], rtol=1e-6, atol=1e-8)


@smalls
def test_hessian(kind):
    s, size = Small(kind), Small(kind).weight.size
    s.dx = np.zeros_like(s.dx)
    with tt.no_compile():
        found = tt.hessian(lambda w: s.loss(s.x, w))(s.weight.numpy()).reshape(size, size)
        slope = s.difference(lambda x, w: [tt.grad(lambda w: s.loss(x, w))(w).ravel()])[0]
    np.testing.assert_allclose(found, found.T, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found @ s.dw.ravel(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "kind",
    ["LSTM", "zoneout", *(pytest.param(k, marks=pytest.mark.slow) for k in SMALL if k not in ("LSTM", "zoneout"))],
)
def test_gradients_of_gradients_of_what_kernels_ran(kind):
    s = Small(kind)

    def gradients():
        x, w = (tt.tensor(a, requires_grad=True) for a in (s.x, s.weight.numpy()))
        with tt.Tape() as tape:
            loss = s.loss(x, w)
            ran = any(record.node.name.startswith("scan(") for record in tape.records)
            first = tape.gradient(loss, [x, w], create_graph=True)
            penalty = sum((g**2).sum() for g in first)
        return ran, [*first, *tape.gradient(penalty, [x, w])]

    ran, found = gradients()
    with tt.no_compile():
        also, expected = gradients()
    assert ran and not also
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-11)


# ---- weights that change --------------------------------------------------------------------------------------------


def writes():
    """Ways to change a layer's weights: each a function of the layer."""
    other = nn.LSTM(I, H, generator=tt.Generator(7))

    def in_place(layer):
        with tt.no_grad():
            layer.weight_hh_l0.copy_(layer.weight_hh_l0.numpy() * 2)
            layer.bias_ih_l0.copy_(layer.bias_ih_l0.numpy() + 1)

    def one_entry(layer):
        with tt.no_grad():
            layer.weight_hh_l0[2, 1] += 1.0

    def optimiser(layer):
        y, _ = layer(X.astype(np.float32))
        (y**2).sum().backward()
        optim.SGD(layer.parameters(), lr=0.5).step()

    def replaced(layer):
        layer.weight_ih_l0 = nn.Parameter(layer.weight_ih_l0.numpy() * 2)

    return {
        "load_state_dict": lambda layer: layer.load_state_dict(other.state_dict()),
        "copy_": in_place, "an entry": one_entry, "an optimiser's step": optimiser, "another parameter": replaced,
    }  # fmt: skip


@pytest.mark.parametrize("how", writes())
def test_written_weights_are_seen(how):
    layer, x = nn.LSTM(I, H, generator=tt.Generator(0)), X.astype(np.float32)
    before = run(layer, x)
    writes()[how](layer)
    after = run(layer, x)
    assert np.abs(after["y"] - before["y"]).max() > 1e-3
    with tt.no_compile():
        assert_agree(after, run(layer, x), 1e-5)


@pytest.mark.parametrize("what", ["weight_hh_l0", "weight_ih_l0", "bias_hh_l0", "x", "h", "c"])
def test_a_write_between_forward_and_backward_is_an_error(what):
    layer = nn.LSTM(I, H, generator=tt.Generator(0))
    given = {"x": tt.tensor(X.astype(np.float32)), "h": tt.tensor(np.ones((1, 4, H), np.float32)),
             "c": tt.tensor(np.ones((1, 4, H), np.float32))}  # fmt: skip
    y, _ = layer(given["x"], (given["h"], given["c"]))
    target = given.get(what, getattr(layer, what, None))
    with tt.no_grad():
        target.copy_(target.numpy() * 2)
    with pytest.raises(tt.TapeError, match=r"scan\(LSTM\).*written in place"):
        y.sum().backward()


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_array_that_was_passed_in_may_be_written(batch_first):
    layer, x = nn.LSTM(I, H, batch_first=batch_first, generator=tt.Generator(0)), X.astype(np.float32)

    def gradients(write):
        mine = x.copy()
        layer.zero_grad()
        y, _ = layer(mine)
        if write:
            mine[:] = np.nan
        (y**2).sum().backward()
        return {name: p.grad.numpy() for name, p in layer.named_parameters()}

    assert_equal(gradients(write=True), gradients(write=False))


def test_a_mask_that_was_passed_in_may_be_written():
    layer, x = nn.LSTM(I, H, generator=tt.Generator(0)), X.astype(np.float32)

    def gradient(write):
        mask, reset = np.arange(6)[:, None] < np.array([6, 0, 3, 5]), RESET.copy()
        leaf = tt.tensor(x, requires_grad=True)
        y, _ = layer(leaf, mask=mask, reset=reset)
        if write:
            mask[:] = reset[:] = True
        (y**2).sum().backward()
        return {"x": leaf.grad.numpy()}

    assert_equal(gradient(write=True), gradient(write=False))


# ---- threads and forks ----------------------------------------------------------------------------------------------

WIDE = (16, 8, 16, 32)  # steps, rows, features, width: enough work to be shared by threads


def wide(kind, seed=0):
    steps, rows, features, width = WIDE
    layer = getattr(nn, kind)(features, width, generator=tt.Generator(seed))
    return layer, np.random.default_rng(seed).normal(size=(steps, rows, features)).astype(np.float32)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = tt.get_num_threads()
    tt.set_num_threads(request.param)
    yield request.param
    tt.set_num_threads(before)


def test_ten_runs_are_equal_to_the_last_bit(threads):
    layer, x = wide("LSTM")
    first = run(layer, x)
    for _ in range(9):
        assert_equal(run(layer, x), first)
    with tt.no_compile():
        assert_agree(first, run(layer, x), 1e-5)


def train(kind, seed, losses):
    layer, x = wide(kind, seed)
    optimiser = optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(12):
        optimiser.zero_grad()
        loss = (layer(x)[0] ** 2).sum()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())


def test_two_threads_train_two_models_as_they_would_alone(threads):
    jobs = [("LSTM", 0), ("GRU", 1)]
    alone, together = [[], []], [[], []]
    for job, losses in zip(jobs, alone, strict=True):
        train(*job, losses)
    running = [threading.Thread(target=train, args=(*job, losses)) for job, losses in zip(jobs, together, strict=True)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert together == alone and all(losses[-1] < losses[0] for losses in alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_as_its_parent():
    program = """
        import os, sys
        import numpy as np
        import tinytape as tt
        from test_layers_compiled import assert_equal, run, wide

        tt.set_num_threads(2)
        layer, x = wide("LSTM")
        expected = run(layer, x)
        child = os.fork()
        if child == 0:
            assert_equal(run(layer, x), expected)
            os._exit(0)
        assert_equal(run(layer, x), expected)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(program)]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
