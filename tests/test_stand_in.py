"""What runs a second time finds the tensors that stood in the module's place the first time."""

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn
from tinytape.engine.stand_in import stand_ins, standing_in


class Again(nn.Module):
    """Runs its layer again in the backward walk."""

    def __init__(self, how):
        self.layer, self.how = nn.RNN(3, 2, dtype=np.float64, generator=tt.Generator(0)), how

    def forward(self, x):
        if self.how == "checkpoint":
            return tt.checkpoint(lambda x: self.layer(x)[0])(x)
        cell = lambda h, x: (tt.tanh(x @ self.layer.weight_ih_l0.T + h @ self.layer.weight_hh_l0.T),) * 2  # noqa: E731
        return tt.scan(cell, np.zeros((2, 2)), x, **self.how)[1]


@pytest.mark.parametrize("how", ["checkpoint", {"checkpoint": 2}, {"compiled": True}], ids=str)
def test_gradients_reach_what_stood_in(how):
    model, x = Again(how), np.random.default_rng(0).normal(size=(4, 2, 3))
    w = model.layer.weight_hh_l0.numpy()

    def loss(w):
        return (nn.functional_call(model, {"layer.weight_hh_l0": w}, x) ** 2).sum()

    tt.check_grads(loss, [w], order=2)
    assert np.abs(tt.grad(loss)(w)).max() > 0 and np.abs(tt.hessian(loss)(w)).max() > 0
    assert model.layer.weight_hh_l0.grad is None


def test_what_was_there_returns():
    members = {"a": 1, "b": 2}
    with pytest.raises(ZeroDivisionError), standing_in([(members, "a", 3)]):
        assert members == {"a": 3, "b": 2} and stand_ins() == ((members, "a", 3),)
        with standing_in([(members, "a", 4), (members, "b", 5)]):
            assert members == {"a": 4, "b": 5} and len(stand_ins()) == 3
        assert members == {"a": 3, "b": 2}
        raise ZeroDivisionError
    assert members == {"a": 1, "b": 2} and stand_ins() == ()
