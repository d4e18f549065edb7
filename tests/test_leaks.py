"""Nothing is kept: graphs go by reference count alone, training does not grow, and a failure leaves nothing behind."""

import gc
import tracemalloc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn, optim
from tinytape.engine.tape import Leaf, Node


def live(kind=Node):
    """How many objects of a kind there are."""
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


@contextmanager
def no_garbage(*kinds):
    """Whatever is made inside must be gone at the end, without the help of the garbage collector."""
    gc.collect()
    gc.disable()
    before = [live(kind) for kind in kinds or (Node, tt.Tensor)]
    try:
        yield
        assert [live(kind) for kind in kinds or (Node, tt.Tensor)] == before
    finally:
        gc.enable()


def leaf(values=(1.0, 2.0, 3.0)):
    return tt.tensor(np.array(values), requires_grad=True)


def forward(x):
    parts = tt.split(tt.tanh(x * x) + x, 3)
    return (tt.concatenate(parts[:2]) * parts[2]).sum()


def only_forward(x):
    forward(x)


def backward(x):
    forward(x).backward()


def retained(x):
    loss = forward(x)
    loss.backward(retain_graph=True)
    loss.backward()


def create_graph(x):
    forward(x).backward(create_graph=True)
    g, x.grad = x.grad, None
    g.sum().backward()


def second_order_never_walked(x):
    forward(x).backward(create_graph=True)
    x.grad = None


def on_a_tape(x):
    with tt.Tape(keep_calls=True) as tape:
        loss = forward(x)
    tape.gradient(loss, [x], create_graph=True)
    str(tape)


def hooks(x):
    y = x * x
    y.register_hook(lambda g: g * 2.0)
    remove = x.register_hook(lambda g: None)
    y.sum().backward()
    remove()


def a_hook_that_is_never_removed(x):
    y = x * x
    y.register_hook(lambda g: None)


def transforms(x):
    f = lambda v: forward(v)  # noqa: E731
    tt.grad(f)(x)
    tt.value_and_grad(f)(x.data)
    tt.hvp(f, (x.data,), (np.ones(3),))
    tt.jvp(f, (x.data,), (np.ones(3),))
    tt.hessian(f)(x.data)
    tt.jacrev(lambda v: v * v)(x.data)
    tt.checkpoint(f)(x).backward()


def a_layer(x):
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    y, (h, c) = lstm(x.astype("float32").reshape(1, 1, 3))
    (y.sum() + h.sum() + c.sum()).backward()


def scanned(x):
    w = tt.tensor(np.eye(3), requires_grad=True)  # what kernels make of it goes with it
    for _ in range(2):
        last, ys = tt.scan(lambda h, x: (tt.tanh(h @ w + x), h), x.reshape(1, 3), np.ones((4, 1, 3)))
        (last.sum() + ys.sum()).backward()


def optimised(x):
    optimizer = optim.Adam([x], clip_norm=1.0)
    forward(x).backward()
    optimizer.step()
    forward(x)
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "use",
    [
        only_forward, backward, retained, create_graph, second_order_never_walked, on_a_tape, hooks,
        a_hook_that_is_never_removed, transforms, a_layer, scanned, optimised,
    ],
)  # fmt: skip
def test_a_graph_goes_by_reference_count(use):
    use(leaf())  # fills whatever is made once
    with no_garbage():
        use(leaf())


@tt.op
def failing_rule(x):
    return x * 1.0


@failing_rule.vjp
def _(g):
    raise ZeroDivisionError


@tt.op
def failing_forward(x):
    raise tt.InputError("no.")


def refuse(gradient):
    raise ZeroDivisionError


def shapes_that_do_not_fit(x):
    return forward(x) + tt.tanh(x) @ np.ones((2, 2))


def own_error(x):
    return failing_forward(tt.tanh(x))


def wrong_rule(x):
    failing_rule(tt.tanh(x)).sum().backward()


def wrong_rule_on_tensors(x):
    failing_rule(tt.tanh(x)).sum().backward(create_graph=True)


def wrong_hook(x):
    y = tt.tanh(x)
    y.register_hook(refuse)
    y.sum().backward()


def second_backward(x):
    loss = forward(x)
    loss.backward()
    loss.backward()


def not_a_scalar(x):
    tt.tanh(x).backward()


def written(x):
    loss = forward(x)
    with tt.no_grad():
        x.copy_(0.0)
    loss.backward()


def bad_step(x):
    forward(x * np.inf).backward()
    optim.SGD([x], clip_norm=1.0).step()


def inside_functions(x):
    tt.checkpoint(tt.grad(lambda v: failing_rule(forward(v))))(x)


@pytest.mark.parametrize(
    "use",
    [
        shapes_that_do_not_fit, own_error, wrong_rule, wrong_rule_on_tensors, wrong_hook, second_backward, not_a_scalar,
        written, bad_step, inside_functions,
    ],
)  # fmt: skip
def test_a_failure_leaves_nothing_behind(use):
    def attempt():
        try:
            use(leaf())
        except (tt.TinytapeError, ZeroDivisionError):
            return
        raise AssertionError("should have failed")

    attempt()
    with no_garbage():
        attempt()


def test_backward_frees_even_what_is_still_in_scope():
    x = leaf()
    h = tt.tanh(x)
    inner = weakref.ref(h.node)
    loss = (h * h).sum()
    loss.backward()
    del h
    assert inner() is None and loss.item() > 0  # the loss is alive, its graph is not


def test_what_lives_long_does_not_keep_what_hangs_on_it():
    """An embedding computed once and used by many losses; a state that is carried; a result kept for later."""
    x = leaf()
    shared = x * x
    with no_garbage(Node):
        losses = [weakref.ref((tt.tanh(shared) * float(i)).sum().node) for i in range(10)]
        assert all(loss() is None for loss in losses)
    side = tt.exp(shared)
    with no_garbage(Node):
        tt.sin(shared).sum().backward(retain_graph=True)
    side.sum().backward()
    assert x.grad is not None


def test_a_constant_keeps_no_graph():
    x = leaf()
    y = tt.tanh(x * x)
    node = weakref.ref(y.node)
    kept = [y.detach(), y.copy(), y.numpy(), y.data, y.sum().item(), y > 0]
    with tt.no_grad():
        kept.append(y * 2.0)
    del y
    assert node() is None and len(kept) == 7


# ---- training -------------------------------------------------------------------------------------------------------


class Trainer:
    """A recurrent network, by hand, on a stream: the state is carried from window to window and cut."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.rng = rng
        shapes = {"w": (3, 8), "u": (8, 8), "b": (8,), "v": (8, 1)}
        self.p = {k: tt.tensor(rng.normal(size=s) * 0.3, requires_grad=True) for k, s in shapes.items()}
        self.optimizer = optim.Adam(self.p, lr=1e-2, clip_norm=1.0)
        self.h = tt.tensor(np.zeros((4, 8)))
        self.old = []

    def loss(self, h, x, target):
        p, total = self.p, 0.0
        for t in range(3):
            with tt.time_step(t):
                h = tt.tanh(x[t] @ p["w"] + h @ p["u"] + p["b"])
                total = total + tt.square(h @ p["v"] - target).mean()
        return total, h

    def step(self):
        x, target = self.rng.normal(size=(3, 4, 3)), self.rng.normal(size=(4, 1))
        self.optimizer.zero_grad()
        total, h = self.loss(self.h, x, target)
        total.backward()
        self.optimizer.step()
        self.h = h.detach()
        return total


def plain(trainer):
    trainer.step()


def a_result_is_kept(trainer):
    trainer.old = [trainer.old[0] if trainer.old else None, trainer.step()]
    trainer.old[0] = trainer.old[0] or trainer.old[1]  # the first loss for ever, and the last one


def an_unwalked_graph_is_kept(trainer):
    if not trainer.old:
        trainer.old = [trainer.loss(trainer.h, np.ones((3, 4, 3)), 0.0)]
    trainer.step()


def with_a_tape_validation_and_a_schedule(trainer):
    if not trainer.old:
        trainer.old = [optim.Scheduler(trainer.optimizer, optim.schedule.cosine(1e-2, 0.0, 2000))]
    with tt.Tape():
        trainer.step()
    with tt.no_grad():
        trainer.loss(trainer.h, np.ones((3, 4, 3)), 0.0)
    trainer.old[0].step()
    trainer.optimizer.state_dict()


def steps_that_fail(trainer):
    trainer.step()
    loss, _ = trainer.loss(trainer.h, np.full((3, 4, 3), np.nan), 0.0)
    trainer.optimizer.zero_grad()
    loss.backward()
    with pytest.raises(tt.InputError):
        trainer.optimizer.step()


@pytest.mark.parametrize(
    "one",
    [plain, a_result_is_kept, an_unwalked_graph_is_kept, with_a_tape_validation_and_a_schedule],
)
def test_a_thousand_steps_do_not_grow(one):
    trainer = Trainer()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(30):
            one(trainer)
        nodes, tensors, objects = live(), live(tt.Tensor), len(gc.get_objects())
        memory = tracemalloc.get_traced_memory()[0]
        for _ in range(970):
            one(trainer)
        assert (live(), live(tt.Tensor)) == (nodes, tensors)
        assert abs(len(gc.get_objects()) - objects) < 20
        assert abs(tracemalloc.get_traced_memory()[0] - memory) < 20_000
    finally:
        tracemalloc.stop()
        gc.enable()


def test_failing_steps_do_not_grow_either():
    trainer = Trainer()
    for _ in range(5):
        steps_that_fail(trainer)
    with no_garbage():
        for _ in range(20):
            steps_that_fail(trainer)


def test_the_optimizer_is_not_on_the_tape():
    """Recorded updates would chain all steps together: then only the collector, or nothing, would free them."""
    trainer = Trainer()
    for _ in range(3):
        trainer.step()
    trainer.optimizer.zero_grad()
    assert all(type(p.node) is Leaf for p in trainer.p.values())
    assert all(p.node.parents == () for p in trainer.p.values())
    assert all(isinstance(v, np.ndarray | int) for s in trainer.optimizer.state.values() for v in s.values())
    gc.collect()
    with no_garbage(Node):
        trainer.step()
        trainer.optimizer.zero_grad()
