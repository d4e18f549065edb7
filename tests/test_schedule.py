"""Learning rate schedules: by hand, against PyTorch, and what they refuse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import optim
from tinytape.optim import schedule

rates = st.floats(0.0, 1.0)
counts = st.integers(1, 30)


def optimizer(groups=1):
    return optim.SGD([{"params": [tt.tensor(0.0, requires_grad=True)]} for _ in range(groups)])


def values(fn, n=45):
    return [fn(step) for step in range(n)]


@given(start=rates, end=rates, steps=counts)
def test_start_middle_and_end(start, end, steps):
    for make in (schedule.linear, schedule.cosine):
        fn = make(start, end, steps)
        assert fn(0) == pytest.approx(start) and fn(steps) == fn(steps + 100) == pytest.approx(end)
        if steps % 2 == 0:
            assert fn(steps // 2) == pytest.approx((start + end) / 2)
        assert np.all(np.diff(values(fn)) * np.sign(end - start) >= -1e-12)


def test_by_hand():
    assert values(schedule.constant(0.5), 3) == [0.5] * 3
    assert values(schedule.linear(1.0, 0.0, 4), 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    np.testing.assert_allclose(values(schedule.cosine(1.0, 0.0, 3), 5), [1.0, 0.75, 0.25, 0.0, 0.0], atol=1e-15)
    assert values(schedule.exponential(1.0, 0.5), 3) == [1.0, 0.5, 0.25]
    assert values(schedule.step_decay(1.0, 0.1, 2), 5) == [1.0, 1.0, 0.1, 0.1, 0.1**2]
    assert values(schedule.linear(1.0, 0.0, 2, warmup=3), 7) == [0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0]
    np.testing.assert_allclose(
        values(schedule.one_cycle(1.0, 5, rise=0.6, start=0.0, end=0.5), 6), [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    )


@given(warmup=st.integers(1, 10))
def test_warmup_comes_before_and_shifts_the_rest(warmup):
    for make in (
        lambda n: schedule.constant(0.3, n),
        lambda n: schedule.linear(0.3, 0.1, 7, n),
        lambda n: schedule.cosine(0.3, 0.1, 7, n),
        lambda n: schedule.exponential(0.3, 0.9, n),
        lambda n: schedule.step_decay(0.3, 0.5, 3, n),
    ):
        warm, cold = make(warmup), make(0)
        np.testing.assert_allclose(values(warm, warmup), [0.3 * (i + 1) / (warmup + 1) for i in range(warmup)])
        assert [warm(warmup + i) for i in range(20)] == values(cold, 20)


@pytest.mark.peer
@given(start=st.floats(0.01, 1.0), end=st.floats(0.001, 1.0), steps=st.integers(2, 30), gamma=st.floats(0.5, 0.99))
def test_they_are_pytorchs(start, end, steps, gamma):
    torch = pytest.importorskip("torch")
    lrs = torch.optim.lr_scheduler
    for ours, theirs in (
        (schedule.linear(start, start * gamma, steps), lambda o: lrs.LinearLR(o, 1.0, gamma, steps)),
        (schedule.cosine(start, end, steps), lambda o: lrs.CosineAnnealingLR(o, steps, end)),
        (schedule.exponential(start, gamma), lambda o: lrs.ExponentialLR(o, gamma)),
        (schedule.step_decay(start, gamma, steps), lambda o: lrs.StepLR(o, steps, gamma)),
        (schedule.one_cycle(start, steps + 3), lambda o: lrs.OneCycleLR(o, start, total_steps=steps + 3)),
    ):
        other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=start)
        scheduler = theirs(other)
        for step in range(steps):
            assert ours(step) == pytest.approx(other.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
            other.step()
            scheduler.step()


def test_the_scheduler_sets_the_rate():
    o = optimizer(2)
    scheduler = optim.Scheduler(o, lambda step: 1.0 / (step + 1))
    assert scheduler.get_last_lr() == [1.0, 1.0]
    scheduler.step()
    scheduler.step()
    assert [group["lr"] for group in o.param_groups] == scheduler.get_last_lr() == [1 / 3] * 2 and scheduler.count == 2
    optim.Scheduler(o, [schedule.constant(0.1), schedule.constant(0.2)])
    assert [group["lr"] for group in o.param_groups] == [0.1, 0.2]


def test_the_rate_is_used_by_the_next_step():
    w = tt.tensor(0.0, requires_grad=True)
    o = optim.SGD([w], lr=99.0)
    scheduler = optim.Scheduler(o, schedule.step_decay(1.0, 0.5, 1))
    for _ in range(3):
        w.grad = -1.0
        o.step()
        scheduler.step()
    assert w.item() == 1.75


def test_going_on_from_a_saved_count():
    o = optimizer()
    first = optim.Scheduler(o, schedule.cosine(1.0, 0.0, 10, warmup=2))
    for _ in range(7):
        first.step()
    saved = first.state_dict()
    second = optim.Scheduler(optimizer(), schedule.cosine(1.0, 0.0, 10, warmup=2))
    second.load_state_dict(saved)
    assert second.get_last_lr() == first.get_last_lr() and saved == {"count": 7}


@pytest.mark.parametrize(
    "bad", [{}, {"count": -1}, {"count": 1.5}, {"count": True}, {"count": None}, {"count": 1, "x": 2}, {"step": 1}]
)
def test_states_that_do_not_fit(bad):
    scheduler = optim.Scheduler(optimizer(), schedule.constant(0.5))
    with pytest.raises(tt.InputError, match=r"Scheduler.load_state_dict"):
        scheduler.load_state_dict(bad)
    assert scheduler.count == 0


@pytest.mark.parametrize("rise", [0.1, 0.05])
def test_one_cycle_with_a_rise_of_one_step_or_less_starts_at_the_peak(rise):
    lr = schedule.one_cycle(1.0, 10, rise=rise, end=0.5)
    rates = [lr(step) for step in range(10)]
    assert rates[0] == 1.0 and rates[-1] == 0.5 and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: schedule.constant(-0.1), tt.InputError, "lr is -0.1"),
        (lambda: schedule.constant("fast"), tt.DTypeError, "lr is 'fast'"),
        (lambda: schedule.linear(0.1, -1.0, 5), tt.InputError, "end is -1.0"),
        (lambda: schedule.linear(math.nan, 0.0, 5), tt.InputError, "start is nan"),
        (lambda: schedule.cosine(0.1, 0.0, 0), tt.InputError, "steps is 0; at least 1"),
        (lambda: schedule.cosine(0.1, 0.0, 2.5), tt.DTypeError, "steps is 2.5, not an int"),
        (lambda: schedule.cosine(0.1, 0.0, 5, warmup=-1), tt.InputError, "warmup is -1; at least"),
        (lambda: schedule.constant(0.1, warmup=1.5), tt.DTypeError, "warmup is 1.5, not an int"),
        (lambda: schedule.exponential(0.1, 0.0), tt.InputError, "gamma is 0.0"),
        (lambda: schedule.step_decay(0.1, 0.5, 0), tt.InputError, "every is 0; at least 1"),
        (lambda: schedule.one_cycle(1.0, 1), tt.InputError, "steps is 1; at least 2"),
        (lambda: schedule.one_cycle(1.0, 9, rise=1.0), tt.InputError, "rise is 1.0"),
        (lambda: optim.Scheduler(optimizer(2), [schedule.constant(1.0)]), tt.InputError, "1 schedules for 2 groups"),
        (lambda: optim.Scheduler(optimizer(), 0.1), tt.DTypeError, "fn is 0.1, not a function"),
        (lambda: optim.Scheduler(optimizer(), lambda step: -1.0), tt.InputError, "step 0 is -1.0"),
        (lambda: optim.Scheduler(optimizer(), lambda step: math.inf), tt.InputError, "step 0 is inf"),
        (lambda: optim.Scheduler(optimizer(), lambda step: None), tt.DTypeError, "step 0 is None"),
    ],
)
def test_refusals(make, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make()
    assert "help:" in str(caught.value)


def test_a_group_added_later_is_refused():
    o = optimizer()
    scheduler = optim.Scheduler(o, lambda step: 0.5 - step / 10)
    o.add_param_group({"params": [tt.tensor([1.0], requires_grad=True)], "lr": 3.0})
    with pytest.raises(tt.InputError, match=r"made for 1 groups.*now there are 2"):
        scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 3.0] and scheduler.count == 0


def test_a_refused_rate_changes_nothing():
    o = optimizer(2)
    scheduler = optim.Scheduler(o, [schedule.constant(0.5), lambda step: 0.5 - step])
    with pytest.raises(tt.InputError, match=r"step 1 is -0.5"):
        scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 0.5] and scheduler.count == 0
