"""Bad input: an error of ours, with both numbers, the argument's name and a line of advice, and nothing changed."""

import math
import re

import numpy as np
import pytest

import tinytape as tt
from tinytape import io, optim


class World:
    """Things to go wrong with, and a record of how they were."""

    def __init__(self, folder):
        self.x = tt.tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
        self.w = tt.tensor(np.ones((3, 4)), requires_grad=True)
        self.n = tt.tensor([0, 1, 2])
        self.c = tt.tensor(np.ones(3))
        self.loss = (self.x @ self.w).sum()
        self.p = tt.tensor(np.ones(3), requires_grad=True)
        self.p.grad = np.array([1.0, np.nan, np.inf])
        self.optimizer = optim.Adam({"cell.weight": self.p})
        self.clipping = optim.SGD({"cell.weight": self.p}, momentum=0.9, clip_norm=1.0)
        self.path = folder / "run.safetensors"
        io.save_state(self.path, {"step": 7})
        self.bad = folder / "bad.safetensors"

    def wreck(self, content):
        self.bad.write_bytes(content)
        return self.bad

    def once_walked(self):
        with tt.time_step(5):
            h = tt.tanh(self.x)
        h.sum().backward()
        self.x.grad = None
        return h

    def everything(self):
        tensors = [self.x, self.w, self.n, self.c, self.p]
        return repr(
            [
                [t.tolist() for t in tensors],
                [t.grad for t in tensors],
                [t.requires_grad for t in tensors],
                [o.state_dict() for o in (self.optimizer, self.clipping)],
                self.path.read_bytes(),
                sorted(path.name for path in self.path.parent.iterdir() if path != self.bad),
            ]
        )


def saved(w, **changes):
    return w.optimizer.state_dict() | changes


SHAPE, DTYPE, INPUT, TAPE = tt.ShapeError, tt.DTypeError, tt.InputError, tt.TapeError

# What is done, the error, and what its text must have.
CASES = {
    # shapes, axes, dtypes
    "shapes that do not broadcast": (lambda w: w.x + w.c[:2], SHAPE, ["add(a: float64[2, 3], b: float64[2])"]),
    "matmul": (lambda w: w.x @ w.x, SHAPE, ["a has shape (2, 3)", "3", "2"]),
    "an axis": (lambda w: w.x.sum(axis=2), SHAPE, ["axis 2", "2"]),
    "a reshape": (lambda w: w.x.reshape(4, 2), SHAPE, ["[2, 3]", "(4,2)|(4, 2)"]),
    "an index": (lambda w: w.x[5], None, ["5", "2"]),
    "a string": (lambda w: w.x * "3", DTYPE, ["multiply", "a str"]),
    "None": (lambda w: w.x * None, DTYPE, ["multiply", "a NoneType"]),
    "complex": (lambda w: w.x * np.ones(3, complex), DTYPE, ["multiply", "complex128"]),
    "a ragged list": (lambda w: tt.tensor([[1.0], [1.0, 2.0]]), SHAPE, ["data", "equal length"]),
    "words": (lambda w: tt.tensor(["a"]), DTYPE, ["data", "<U1"]),
    "a default dtype": (lambda w: tt.set_default_dtype("int32"), DTYPE, ["dtype is int32", "float32"]),
    # which tensors have gradients
    "integers asked for gradients": (lambda w: tt.tensor([1, 2], requires_grad=True), DTYPE, ["int64", "astype"]),
    "bools asked for gradients": (lambda w: setattr(w.n > 1, "requires_grad", True), DTYPE, ["bool", "astype"]),
    "a result made a constant": (lambda w: setattr(w.x * 2, "requires_grad", False), TAPE, ["multiply", "detach()"]),
    "grad of another shape": (lambda w: setattr(w.x, "grad", np.ones(3)), SHAPE, ["float64[3]", "float64[2, 3]"]),
    "grad of no leaf": (lambda w: setattr(w.c, "grad", np.ones(3)), TAPE, ["grad", "requires_grad"]),
    # backward
    "backward of many numbers": (lambda w: (w.x * 2).backward(), SHAPE, ["shape (2, 3), so 6", "sum() or mean()"]),
    "backward of a constant": (lambda w: w.c.sum().backward(), TAPE, ["shape ()", "requires_grad=True", "no_grad"]),
    "backward of integers": (lambda w: w.n.sum().backward(), TAPE, ["int64", "requires_grad=True"]),
    "a gradient of another shape": (
        lambda w: (w.x * 2).backward(np.ones(3)), SHAPE, ["gradient has shape (3,)", "(2, 3)"],
    ),
    "a complex gradient": (lambda w: (w.x * 2).backward(np.ones((2, 3)) * 1j), DTYPE, ["complex", "real"]),
    "a second backward": (
        lambda w: w.once_walked().sum().backward(), TAPE,
        ["tanh (record", "shape (2, 3)", "time step 5", "h = h.detach()"],
    ),
    "gradient of something else": (lambda w: tt.Tape().gradient(3.0, w.x), DTYPE, ["target is a float", "loss"]),
    "gradient for a constant": (lambda w: tt.Tape().gradient(w.loss, [w.x, w.c]), TAPE, ["sources[1]", "shape (3,)"]),
    "gradient for an array": (lambda w: tt.Tape().gradient(w.loss, [np.ones(3)]), DTYPE, ["sources[0]", "ndarray"]),
    "a hook on a constant": (lambda w: w.c.register_hook(print), TAPE, ["register_hook", "requires_grad=True"]),
    # values
    "item of many": (lambda w: w.x.item(), SHAPE, ["shape (2, 3), so 6 values, not 1", "index"]),
    "truth of many": (lambda w: bool(w.x), SHAPE, ["shape (2, 3), so 6", "any() or all()"]),
    "length of a number": (lambda w: len(w.x.sum()), SHAPE, ["0-d", "item()"]),
    "a float as an index": (lambda w: [1, 2][w.x[0, 0]], DTYPE, ["float64", "int64"]),
    "a write to a leaf": (lambda w: w.x.copy_(0.0), TAPE, ["shape (2, 3)", "no_grad"]),
    "a write to a result": (lambda w: (w.x * 2).copy_(0.0), TAPE, ["multiply", "detach().copy()"]),
    "a write of another shape": (lambda w: w.c.copy_(np.ones(4)), SHAPE, ["(4,)", "float64[3]"]),
    "a write out of range": (lambda w: w.c.__setitem__(7, 0.0), INPUT, ["7", "3"]),
    "floats into integers": (lambda w: w.n.__iadd__(0.5), DTYPE, ["float32", "int64"]),
    # optimisers
    "a negative rate": (lambda w: optim.Adam([w.p], lr=-0.1), INPUT, ["lr is -0.1", "[0, inf)"]),
    "a beta of 1": (lambda w: optim.Adam([w.p], betas=(0.9, 1.0)), INPUT, ["betas[1] is 1.0", "[0, 1)"]),
    "no parameters": (lambda w: optim.SGD([]), INPUT, ["0 parameters", "1"]),
    "a parameter twice": (lambda w: optim.SGD([w.x, w.p, w.x]), INPUT, ["parameter 2", "parameter 0", "twice"]),
    "a parameter that is no leaf": (lambda w: optim.SGD([w.x * 2]), TAPE, ["parameter 0", "multiply", "detach"]),
    "one bare tensor": (lambda w: optim.SGD(w.p), DTYPE, ["params is a Tensor", "list"]),
    "NaN in a clipped norm": (
        lambda w: w.clipping.step(), INPUT, ["cell.weight", "1 NaN and 1 infinite of 3", "zero_grad"],
    ),
    "NaN in clip_grad_norm_": (lambda w: optim.clip_grad_norm_([w.p], 1.0), INPUT, ["1 NaN and 1 infinite of 3"]),
    "NaN in clip_grad_value_": (lambda w: optim.clip_grad_value_([w.p], 1.0), INPUT, ["1 NaN and 1 infinite of 3"]),
    "a bound of 0": (lambda w: optim.clip_grad_norm_([w.p], 0.0), INPUT, ["max_norm is 0.0", "(0, inf]"]),
    "a state with other names": (
        lambda w: w.optimizer.load_state_dict(saved(w, state={"a": {}, "b": {}})), INPUT,
        ["mismatches: 2", "state/a: not known here", "state/b: not known here", "same"],
    ),
    "a state of another shape": (
        lambda w: w.optimizer.load_state_dict(
            saved(w, state={"cell.weight": {"step": 1, "exp_avg": np.ones(4), "exp_avg_sq": np.ones(3, "f4")}})
        ),
        INPUT, ["exp_avg: float64[4], but float64[3] here", "exp_avg_sq: float32[3], but float64[3] here"],
    ),
    "a state of another optimiser": (
        lambda w: w.optimizer.load_state_dict(w.clipping.state_dict()), INPUT,
        ["betas: missing", "momentum: not known here", "eps: missing", "nesterov: not known here"],
    ),
    "a schedule below 0": (
        lambda w: optim.Scheduler(w.optimizer, lambda step: -1.0), INPUT, ["step 0 is -1.0", "[0, inf)"],
    ),
    "a schedule of no steps": (lambda w: optim.schedule.cosine(1.0, 0.0, 0), INPUT, ["steps is 0; at least 1"]),
    # files
    "no file": (lambda w: io.load_state(w.path.parent / "none"), INPUT, ["none", "no such file", "path"]),
    "an empty file": (lambda w: io.load_state(w.wreck(b"")), INPUT, ["0 bytes", "not a whole safetensors file"]),
    "a text": (lambda w: io.load_state(w.wreck(b"hello world " * 9)), INPUT, ["108 bytes", "not a whole"]),
    "a file cut short": (
        lambda w: io.load_state(w.wreck(w.path.read_bytes()[:-3])), INPUT, ["not a whole safetensors file", "copy"],
    ),
    "a flipped bit": (
        lambda w: io.load_state(w.wreck(w.path.read_bytes().replace(b"step", b"stop"))), INPUT, ["checksum", "damaged"],
    ),
    "a folder that is not there": (
        lambda w: io.save_state(w.path.parent / "a" / "b", {}), INPUT, ["b", "cannot be written", "folder"],
    ),
    "something that cannot be saved": (
        lambda w: io.save_state(w.path, {"model": {"f": print}}), DTYPE, ["model/f", "builtin_function"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path):
    do, kind, texts = CASES[name]
    world = World(tmp_path)
    before = world.everything()
    with pytest.raises(kind or tt.TinytapeError) as caught:
        do(world)
    what, advice = str(caught.value), caught.value.advice
    assert "\n  help: " in what and advice.endswith(".")
    for text in texts:
        assert any(part in what for part in text.split("|")), f"{text!r} is not in:\n{what}"
    assert world.everything() == before
    world.loss.backward()  # and what was going on goes on
    assert world.x.grad.tolist() == [[4.0] * 3] * 2


def test_a_full_disk(tmp_path, monkeypatch):
    world = World(tmp_path)
    before = world.everything()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(tt.InputError, match=r"run.safetensors' cannot be written \([\d,]+ bytes\)") as caught:
        io.save_state(world.path, {"w": np.ones(1000)})
    assert "No space left on device" in str(caught.value) and "bytes" in str(caught.value)
    assert world.everything() == before


def test_the_four_classes_and_their_base():
    kinds = {tt.ShapeError: ValueError, tt.DTypeError: TypeError, tt.InputError: ValueError, tt.TapeError: RuntimeError}
    for kind, builtin in kinds.items():
        assert issubclass(kind, tt.TinytapeError) and issubclass(kind, builtin)
    error = tt.InputError("x is 3, at most 2 is allowed.", "pass 2.")
    assert str(error) == "x is 3, at most 2 is allowed.\n  help: pass 2." and error.advice == "pass 2."
    assert str(tt.InputError("only this.")) == "only this."


def test_messages_hold_numbers_one_can_act_on():
    """No message repeats a whole tensor: a shape says more."""
    big = tt.tensor(np.ones((200, 300)), requires_grad=True)
    for do in (lambda: big + np.ones(7), lambda: big.backward(), lambda: big.copy_(0.0), lambda: optim.SGD(big)):
        with pytest.raises(tt.TinytapeError) as caught:
            do()
        assert len(str(caught.value)) < 500 and not re.search(r"1\.,? +1\.", str(caught.value))
    assert math.isfinite(big.sum().item())
