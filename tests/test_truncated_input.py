"""What `tt.truncated` and its streams refuse, and where they stand afterwards."""

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn

F32 = np.float32


@pytest.fixture(autouse=True)
def step_by_step():
    with tt.no_compile():
        yield


X = np.zeros((12, 4, 3), F32)
LSTM = nn.LSTM(3, 5)
NAN = X.copy()
NAN[7, 2, 1] = np.nan


def stream_of(steps=6, k1=3, k2=5, layer=LSTM):
    """A stream that carries something."""
    stream = tt.truncated(layer, k1, k2)
    list(stream(X[:steps]))
    return stream


def other_loop():
    stream = stream_of()
    one = stream(X)
    next(one)
    next(stream(X))
    next(one)


def a_part_of(**changes):
    return stream_of().load_state_dict({**stream_of().state_dict(), **changes})


BAD = {
    "k2 below k1": (lambda: tt.truncated(LSTM, 5, 4), tt.InputError, "k2 = 4 is less than k1 = 5"),
    "no steps a window": (lambda: tt.truncated(LSTM, 0), tt.InputError, "k1 is 0"),
    "k1 of a float": (lambda: tt.truncated(LSTM, 2.0), tt.InputError, "k1 is 2.0"),
    "k2 of a bool": (lambda: tt.truncated(LSTM, 1, True), tt.InputError, "k2 is True"),
    "jitter": (lambda: tt.truncated(LSTM, 3, jitter=-1), tt.InputError, "jitter is -1"),
    "no layer": (lambda: tt.truncated("lstm", 3), tt.DTypeError, "layer is a str"),
    "both directions": (lambda: tt.truncated(nn.GRU(3, 4, bidirectional=True), 3), tt.InputError, "GRU goes backwards"),
    "backwards": (
        lambda: tt.truncated(nn.Recurrent(nn.GRUCell(3, 4), reverse=True), 3), tt.InputError, "Recurrent goes backwards"
    ),
    "backwards inside": (
        lambda: tt.truncated(nn.Sequential(nn.GRU(3, 4, bidirectional=True)), 3), tt.InputError, "0, a GRU, goes backw"
    ),
    "no steps": (lambda: tt.truncated(LSTM, 3)(X[:0]), tt.ShapeError, r"\(0, 4, 3\), 0 steps"),
    "no steps in a chunk": (lambda: list(tt.truncated(LSTM, 3)([X, X[:0]])), tt.ShapeError, "0 steps"),
    "no chunk": (lambda: list(tt.truncated(LSTM, 3)(iter([]))), tt.InputError, "no chunk"),
    "a number": (lambda: tt.truncated(LSTM, 3)(1.0), tt.DTypeError, "x is a float"),
    "no axes": (lambda: tt.truncated(LSTM, 3)(np.array(1.0)), tt.ShapeError, "no axis of steps"),
    "a chunk of text": (lambda: list(tt.truncated(LSTM, 3)("ab")), tt.DTypeError, "x is a str"),
    "a chunk of four": (lambda: list(tt.truncated(LSTM, 3)([(X, X, None, X)])), tt.InputError, "tuple of 4"),
    "features": (lambda: list(tt.truncated(LSTM, 3)(X[..., :2])), tt.ShapeError, "input_size = 3, got 2"),
    "features later": (lambda: list(stream_of()(X[..., :2])), tt.ShapeError, r"step 6.*\[4, 2\] a step.*\[4, 3\]"),
    "dtype later": (lambda: stream_of()(X.astype(float)), tt.ShapeError, "float64.*float32"),
    "dtype": (lambda: list(tt.truncated(LSTM, 3)(X.astype(float))), tt.DTypeError, "x is float64"),
    "rows": (lambda: stream_of()(X[:, :3]), tt.ShapeError, "state is of 4 rows, x has 3 rows"),
    "rows of a chunk": (lambda: list(tt.truncated(LSTM, 3)([X, X[:, :1]])), tt.ShapeError, "of 4 rows, x has 1 rows"),
    "rows of plain chunks": (lambda: stream_of(k2=3)(X[:, :3]), tt.ShapeError, "state is of 4 rows, x has 3 rows"),
    "rows of a state": (
        lambda: list(stream_of()(X[:, :3], state=(np.zeros((1, 4, 5), F32),) * 2)),
        tt.ShapeError, "of 4 rows and x of 3",
    ),
    "gradients for x": (
        lambda: tt.truncated(LSTM, 3)(tt.tensor(X, requires_grad=True)), tt.InputError, "x requires gradients.*detach"
    ),
    "targets": (lambda: tt.truncated(LSTM, 3)(X, X[:5]), tt.ShapeError, r"targets has shape \(5, 4, 3\), x has 12"),
    "a list of targets": (lambda: tt.truncated(LSTM, 3)(X, [1.0]), tt.DTypeError, r"targets\[0\] is a float"),
    "targets of some": (lambda: list(tt.truncated(LSTM, 10)([(X[:6], X[:6]), X])), tt.InputError, "some have targets"),
    "targets beside chunks": (lambda: tt.truncated(LSTM, 3)([X], X), tt.InputError, "targets or reset are given"),
    "dtype of a reset": (lambda: tt.truncated(LSTM, 3)(X, reset=np.zeros((12, 4))), tt.DTypeError, "reset is float64"),
    "shape of a reset": (
        lambda: tt.truncated(LSTM, 3)(X, reset=np.zeros((4, 12), bool)), tt.ShapeError, r"\(4, 12\), x has \(12, 4\)"
    ),
    "a NaN": (lambda: list(tt.truncated(LSTM, 4)(NAN)), tt.InputError, r"state\[0\] is nan after step 7, in row 2"),
    "a NaN in a cell": (
        lambda: list(tt.truncated(nn.GRUCell(3, 5), 4)(NAN)), tt.InputError, "state is nan after step 7, in row 2"
    ),
    "an infinite state": (
        lambda: tt.truncated(LSTM, 4)(X, state=(np.zeros((1, 4, 5), F32), np.full((1, 4, 5), np.inf, F32))),
        tt.InputError, r"state\[1\] is inf given",
    ),
    "two loops": (other_loop, tt.InputError, "after a newer call"),
    "rows to be reset": (lambda: stream_of().reset_state([4]), tt.InputError, r"rows are \[4\]"),
    "rows of floats": (lambda: stream_of().reset_state([1.0]), tt.DTypeError, "float64"),
    "rows of bools": (lambda: stream_of().reset_state([True]), tt.ShapeError, r"shape \(1,\)"),
    "rows of nothing": (lambda: tt.truncated(LSTM, 3).reset_state([0]), tt.InputError, "no state yet"),
    "outputs": (lambda: list(tt.truncated(lambda x, s: (tt.tensor(x[0]), s), 3)(X)), tt.ShapeError, "y has shape"),
    "only outputs": (lambda: list(tt.truncated(lambda x, s: tt.tensor(x), 3)(X)), tt.InputError, "not a pair"),
    "a saved state": (lambda: stream_of().load_state_dict({"position": 3}), tt.InputError, "load_state_dict: keys"),
    "a saved position": (
        lambda: a_part_of(position=3),
        tt.InputError, r"starts are \[1, 4\], position 3, with 2 states and inputs to step 6",
    ),
    "saved starts": (lambda: a_part_of(starts=[4, 1]), tt.InputError, r"starts are \[4, 1\]"),
    "no saved starts": (lambda: a_part_of(starts=[], states=[]), tt.InputError, r"starts are \[\]"),
    "too few saved states": (lambda: a_part_of(states=[None]), tt.InputError, "with 1 states"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=r"(?s)" + words) as caught:
        call()
    assert "\n  help: " in str(caught.value)


def test_after_an_error_the_stream_stands_where_it_stood():
    stream = stream_of()
    before = stream.state_dict()
    with pytest.raises(tt.InputError, match="is nan"):
        list(stream(NAN[6:]))
    after = stream.state_dict()
    assert after["starts"] == before["starts"] == [1, 4]
    for ours, theirs in zip(after["states"], before["states"], strict=True):
        assert ours is theirs is None or all(map(np.array_equal, ours, theirs))
    assert stream.position == 6 and len(list(stream(X))) == 4


def test_what_the_next_window_starts_from_is_looked_at_too():
    """The NaN is behind a reset when the window ends, and would have spoiled the gradient all the same."""
    x, reset = X.copy(), np.zeros((12, 4), bool)
    x[1, 2], reset[3, 2] = np.nan, True
    with pytest.raises(tt.InputError, match="is nan after step 1, in row 2"):
        list(tt.truncated(LSTM, 4, 6)(x, reset=reset))


def test_what_a_last_window_of_few_steps_starts_from_is_looked_at_too():
    factor = [1.0]

    def layer(x, state):
        y = tt.tensor(x) * factor[0]
        return y, y[-1]

    stream = tt.truncated(layer, 3, 5)
    for window in stream(np.ones((10, 2), F32)):
        if window.stop == 9:
            factor[0] = np.nan
            break
    before = stream.state_dict()
    with pytest.raises(tt.InputError, match=r"(?s)is nan after step 4, .*from step 4 on"):
        list(stream(np.ones((1, 2), F32)))
    assert stream.position == 9 and stream.state_dict()["starts"] == before["starts"] == [4, 7]


def test_a_state_that_is_not_finite_is_carried_if_asked():
    stream = tt.truncated(LSTM, 4, check_state=False)
    windows = list(stream(NAN))
    assert np.isnan(windows[-1].y.data[:, 2]).all() and np.isfinite(windows[-1].y.data[:, [0, 1, 3]]).all()
    stream.reset_state([2])
    assert all(np.isfinite(w.y.data).all() for w in stream(X))
