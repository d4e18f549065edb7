"""What clipping does over a run, against plain NumPy; spikes that are taken again, bit for bit."""

import copy
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn, optim
from tinytape.optim import ClipMonitor, ClipWarning, Spike
from tinytape.optim.listening import listeners

SHAPES = {"a": (3, 4), "b": (0, 2), "c": (), "d": (5,)}


def leaves(dtype=np.float64):
    return {name: tt.tensor(np.ones(shape, dtype), requires_grad=True) for name, shape in SHAPES.items()}


def put_gradients(params, rng, scale):
    for p in params.values():
        p.grad = (scale * rng.normal(size=p.shape)).astype(p.dtype)


def norms_of(params, order):
    return [np.linalg.norm(p.grad.numpy().ravel(), order) if p.size else 0.0 for p in params.values()]


orders = st.sampled_from([1.0, 2.0, 3.0, math.inf])
scales = st.lists(st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e4]), min_size=1, max_size=40)


# ---- figures --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), scales=scales, order=orders, window=st.integers(1, 9))
def test_figures_of_clip_grad_norm_are_numpys(seed, scales, order, window):
    params, rng = leaves(), np.random.default_rng(seed)
    monitor = ClipMonitor(params, keep=0, window=window)
    expected, shares = [], []
    with warnings.catch_warnings(action="ignore"):
        for scale in scales:
            put_gradients(params, rng, scale)
            each = norms_of(params, order)
            with monitor.step():
                norm = optim.clip_grad_norm_(params, 2.0, order)
            expected.append((np.linalg.norm(each, order), np.linalg.norm(norms_of(params, order), order)))
            assert norm == monitor.history.norm[-1]
            shares.append([(x / norm) ** order for x in each])
    history = monitor.history
    np.testing.assert_allclose(np.stack([history.norm, history.after], axis=1), expected, rtol=1e-6)
    np.testing.assert_array_equal(history.step, np.arange(len(scales)))
    np.testing.assert_array_equal(history.clipped, [before > 2.0 for before, _ in expected])
    means = dict(zip(params, np.mean(shares[-window:], axis=0), strict=True))
    found = list(monitor.shares.values())
    assert monitor.shares == pytest.approx(means) and found == sorted(found, reverse=True)
    assert monitor.steps == len(scales)


@pytest.mark.parametrize("how", [dict(clip_norm=2.0), dict(clip_value=0.5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_figures_of_an_optimiser_and_the_same_updates_with_and_without(how, dtype):
    runs = []
    for monitored in (False, True):
        params, rng = leaves(dtype), np.random.default_rng(1)
        optimizer = optim.Adam(params, **how)
        monitor = ClipMonitor(optimizer)
        for scale in (0.1, 5.0, 1.0):
            put_gradients(params, rng, scale)
            if monitored:
                with monitor.step():
                    norm = optimizer.step()
                assert norm == monitor.history.norm[-1]
                arrays = [p.grad.numpy().ravel() for p in params.values()]
                after = np.concatenate([np.clip(g, -0.5, 0.5) if "clip_value" in how else g for g in arrays])
                size = np.linalg.norm(after.astype(np.float64))
                assert monitor.history.after[-1] == pytest.approx(min(size, how.get("clip_norm", math.inf)), rel=1e-5)
            else:
                optimizer.step()
        runs.append([p.numpy() for p in params.values()])
        assert monitor.steps == (3 if monitored else 0) and not listeners()
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_clip_grad_value_and_another_optimisers_clips():
    mine, other = leaves(), leaves()
    monitor, both = ClipMonitor(mine), ClipMonitor(optim.SGD([*mine.values(), *other.values()]))
    for params in (mine, other):
        put_gradients(params, np.random.default_rng(0), 10.0)
    with both.step(), monitor.step():
        optim.clip_grad_value_(mine, 1.0)
        optim.clip_grad_norm_(other, 1.0)
    assert len(monitor.history.norm) == 1 and len(both.history.norm) == 2
    assert monitor.history.after[0] == pytest.approx(np.linalg.norm(norms_of(mine, 2)))
    assert next(iter(both.shares)) == "0" and set(monitor.shares) == set(mine)
    with monitor.step():
        pass
    assert monitor.steps == 2 and len(monitor.history.norm) == 1
    assert "2 steps, 1 clipped" in str(monitor)


# ---- spikes ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, checkpoint=False, seed=0):
        generator = tt.Generator(seed)
        self.lstm = nn.LSTM(3, 4, 2, dropout=0.4, generator=generator)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(4, 1, generator=generator)
        self.scale = nn.Buffer(np.float32(2.0))
        self.checkpoint = checkpoint

    def forward(self, x):
        y = (tt.checkpoint(self.lstm) if self.checkpoint else self.lstm)(x)[0]
        return self.out(self.drop(y)) * self.scale


class Run:
    """A training run with a spike in it."""

    def __init__(self, spike_at=30, bad=1e3, clip=1.0, **options):
        tt.manual_seed(5)
        self.model = Net(**options)
        self.optimizer = optim.Adam(self.model, lr=0.01, clip_norm=clip)
        self.monitor = ClipMonitor(self.optimizer, self.model)
        self.spike_at, self.bad = spike_at, bad
        self.rng = np.random.default_rng(0)

    def train(self, batch, scale):
        self.optimizer.zero_grad()
        loss = (self.model(batch["x"]) - batch["y"]).square().mean() * scale
        loss.backward()
        self.optimizer.step()
        return loss

    def go(self, steps):
        losses = []
        for _ in range(steps):
            y = self.bad if self.monitor.steps == self.spike_at else 1.0
            x = self.rng.normal(size=(5, 2, 3)).astype(np.float32)
            batch = {"x": x, "y": tt.tensor(np.full((5, 2, 1), y, np.float32))}
            with self.monitor.step(batch, 0.5):
                losses.append(self.train(batch, 0.5).item())
            x[...] = 0  # a loader that uses its memory again
        return losses


def everything(run):
    grads = {name: None if p.grad is None else p.grad.numpy() for name, p in run.model.named_parameters()}
    return copy.deepcopy((run.model.state_dict(), grads, run.optimizer.state_dict(), tt.default_generator.state(),
                          run.model.lstm.generator.state()))  # fmt: skip


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_spike_replays_bit_for_bit_and_leaves_no_trace(checkpoint):
    run = Run(checkpoint=checkpoint)
    run.go(40)
    (spike,) = run.monitor.spikes
    assert spike.step == 30 and spike.norm == run.monitor.history.norm[30]
    assert spike.median == np.median(run.monitor.history.norm[:30])
    before = everything(run)
    replay = spike.replay(run.train)
    assert replay.same and replay.norm == spike.norm and replay.norms == spike.norms and "bit for bit" in str(replay)
    np.testing.assert_equal(everything(run), before)
    without = spike.replay(
        lambda batch, scale: ((run.model(batch["x"]) - batch["y"]).square().mean() * scale).backward()
    )
    assert without.norms == pytest.approx(spike.norms, rel=1e-6) and without.norm == pytest.approx(spike.norm, rel=1e-6)
    assert run.monitor.steps == 40
    np.testing.assert_equal(everything(run), before)
    again = spike.replay(lambda *batch: run.go(1))  # a monitored step in a replay is not counted
    assert run.monitor.steps == 40 and again.norm is not None


def test_restored_training_goes_on_as_it_did():
    run = Run()
    run.go(30)
    state = run.rng.bit_generator.state
    losses = run.go(8)
    run.monitor.spikes[0].restore()
    run.rng.bit_generator.state, run.monitor.steps = state, 30
    assert run.go(8) == losses


def test_replay_in_float64():
    run = Run()
    run.go(33)
    spike = run.monitor.spikes[0]
    replay = spike.replay(run.train, dtype="float64")
    assert replay.value.dtype == np.float64 and not replay.same
    assert replay.norm == pytest.approx(spike.norm, rel=1e-4)
    spike.restore()
    run.model.double()  # the same by hand
    batch, scale = spike.batch
    (run.model(batch["x"].astype(np.float64)) - batch["y"].astype("float64")).square().mean().backward(scale)
    norms = {name: np.linalg.norm(p.grad.data) for name, p in run.model.named_parameters()}
    assert replay.norms == pytest.approx(norms, rel=1e-9)
    with pytest.raises(tt.DTypeError, match="int32, not a float"):
        spike.replay(run.train, "int32")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_spike_from_a_file(tmp_path, checkpoint):
    run = Run(checkpoint=checkpoint)
    run.go(35)
    kept = run.monitor.spikes[0]
    tt.io.save_state(tmp_path / "spike.safetensors", kept.state_dict())
    other = Run(checkpoint=checkpoint, seed=1)
    tt.manual_seed(99)
    saved = tt.io.load_state(tmp_path / "spike.safetensors")
    spike = Spike.from_state_dict(saved, other.optimizer, other.model)
    assert isinstance(spike.batch[0]["y"], tt.Tensor) and isinstance(spike.batch[0]["x"], np.ndarray)
    if checkpoint:
        with pytest.raises(tt.InputError, match="random states were used"):
            spike.replay(other.train)
    else:
        assert spike.replay(other.train).norm == kept.norm
    with pytest.raises(tt.InputError, match="draws from 2 generators, of which 0 are known"):
        spike.restore()
    generators = [other.model.lstm.generator, tt.default_generator]
    spike = Spike.from_state_dict(saved, other.optimizer, other.model, generators)
    assert spike.replay(other.train).norm == kept.norm
    spike.restore()
    np.testing.assert_equal(other.model.state_dict(), spike.weights)
    with pytest.raises(tt.InputError, match="weights missing"):
        Spike.from_state_dict({k: v for k, v in saved.items() if k != "weights"}, other.optimizer)
    with pytest.raises(tt.InputError, match="scale are missing, not known here"):
        Spike.from_state_dict(saved, other.optimizer)


def test_gradients_that_are_not_finite_are_a_spike():
    run = Run(spike_at=3, bad=np.inf)
    with pytest.raises(tt.InputError, match="not finite"):
        run.go(10)
    (spike,) = run.monitor.spikes
    assert spike.step == 3 and not math.isfinite(spike.norm) and run.monitor.steps == 4
    assert str(spike) == f"step 3: norm {spike.norm:g}"
    replay = spike.replay(run.train)
    assert replay.same and isinstance(replay.value, tt.InputError)

    def look(batch, scale):
        return tt.inspect.first_nonfinite(lambda b: (run.model(b["x"]) - b["y"]).square().mean(), batch)

    finding = spike.replay(look).value
    assert (finding.kind, finding.name) == ("input", "args[0]['y']")
    run.optimizer.zero_grad()
    run.go(2)  # the run goes on, and its figures pass over it
    assert "not finite: 1" in str(run.monitor) and len(run.monitor.history.norm) == 6


@given(norms=st.lists(st.sampled_from([0.5, 1.0, 1.5, 20.0, 30.0, 40.0, 50.0]), min_size=25, max_size=60))
def test_the_largest_spikes_are_kept(norms):
    p = tt.tensor([1.0, 0.0], requires_grad=True)
    monitor = ClipMonitor({"p": p}, spike=8.0, keep=2, window=30)
    expected = []
    with warnings.catch_warnings(action="ignore"):
        for t, norm in enumerate(norms):
            p.grad = np.array([norm, 0.0], np.float32)
            recent = norms[max(0, t - 30) : t]
            if len(recent) >= 20 and norm > 8 * np.median(recent):
                expected.append((norm / np.median(recent), t))
            with monitor.step(t):
                optim.clip_grad_norm_([p], 10.0)
    assert monitor.spikes_seen == len(expected)
    largest = sorted(expected, key=lambda pair: (-pair[0], pair[1]))[:2]
    assert sorted((spike.norm / spike.median, spike.batch[0]) for spike in monitor.spikes) == sorted(largest)


# ---- warnings -------------------------------------------------------------------------------------------------------


def clip_often(norms, max_norm, window=10):
    p = tt.tensor([1.0], requires_grad=True)
    monitor = ClipMonitor([p], window=window, keep=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for norm in norms:
            p.grad = np.array([norm], np.float32)
            with monitor.step():
                optim.clip_grad_norm_([p], max_norm)
    assert all(w.category is ClipWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_clipping_that_never_or_always_acts_is_told_once():
    (never,) = clip_often([1.0] * 40, 5.0)
    assert "did nothing in 10 steps; the largest norm was 1." in never
    (always,) = clip_often([7.0] * 40, 5.0)
    assert "acted in each of 10 steps; the median norm was 7." in always and "say to 7," in always
    assert len(clip_often([1.0] * 20 + [7.0] * 20 + [1.0] * 20, 5.0)) == 2
    assert not clip_often([1.0] * 9, 5.0)
    assert not clip_often([1.0] * 9 + [7.0] + [1.0] * 9 + [7.0], 5.0)
    assert not clip_often([1.0] * 40, math.inf)  # which only measures


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_printed_and_drawn(tmp_path):
    assert str(ClipMonitor(leaves())) == "ClipMonitor: 0 steps, none of them clipped"
    run = Run()
    run.go(40)
    text = str(run.monitor)
    for part in (
        "40 steps, ",
        "to a norm of at most 1",
        "norm before",
        "norm after",
        "out.",
        "5 more",
        "step 30: norm",
    ):
        assert part in text
    pytest.importorskip("matplotlib")
    figure = run.monitor.plot()
    (axes,) = figure.axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), run.monitor.history.norm)
    assert run.monitor.plot(tmp_path / "clips.png", axes) is figure and len(axes.lines) == 6
    assert (tmp_path / "clips.png").read_bytes()[:4] == b"\x89PNG"


def test_steps_are_left_as_they_were_found():
    run = Run()
    run.go(1)
    with pytest.raises(tt.TapeError, match="inside another step"), run.monitor.step(), run.monitor.step():
        pass
    assert not listeners()
    with pytest.raises(ZeroDivisionError), run.monitor.step():
        raise ZeroDivisionError
    assert run.monitor.steps == 3 and not listeners()


@pytest.mark.parametrize(
    ("options", "match"),
    [(dict(spike=1.0), "spike is 1.0"), (dict(keep=-1), "keep is -1"), (dict(window=0), "window is 0")],
)
def test_bad_input(options, match):
    with pytest.raises(tt.InputError, match=match):
        ClipMonitor(leaves(), **options)
    with pytest.raises(tt.DTypeError, match="params is a int"):
        ClipMonitor(3)
