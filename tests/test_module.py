"""Module: what it finds, saves, loads, casts, copies and prints."""

import copy
import pickle
import re

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn


class Tied(nn.Module):
    """Two names for one matrix, a buffer, a list and a module shared by two names."""

    def __init__(self, size=3):
        self.scale = nn.Parameter(np.ones(2, np.float32))
        self.inner = nn.Linear(size, size)
        self.layers = nn.ModuleList([nn.Linear(size, 2), self.inner])
        self.register_buffer("mean", np.zeros(size, np.float32))
        self.register_buffer("count", np.array(3))
        self.extra = nn.Linear(size, size, bias=False)
        self.extra.weight = self.inner.weight
        self.plain = 7

    def forward(self, x):
        return self.layers[0](self.extra(self.inner(x - self.mean))) * self.scale


NAMES = ["scale", "inner.weight", "inner.bias", "layers.0.weight", "layers.0.bias"]


def test_what_is_found_and_in_what_order():
    model = Tied()
    assert [name for name, _ in model.named_parameters()] == NAMES
    assert [p.shape for p in model.parameters()] == [(2,), (3, 3), (3,), (2, 3), (2,)]
    assert dict(model.named_buffers()).keys() == {"mean", "count"} and len(list(model.buffers())) == 2
    assert [name for name, _ in model.named_modules()] == ["", "inner", "layers", "layers.0", "extra"]
    assert [name for name, _ in model.named_children()] == ["inner", "layers", "extra"]
    assert len(list(model.modules())) == 5 and len(list(model.children())) == 3


def test_assigning_and_deleting():
    model = Tied()
    model.other = nn.Parameter(np.zeros(4, np.float32))
    assert "other" in dict(model.named_parameters())
    del model.other
    assert "other" not in dict(model.named_parameters()) and not hasattr(model, "other")
    model.inner.bias = None
    assert "inner.bias" not in model.state_dict()
    model.mean = np.ones(3, np.float32)  # a buffer stays one
    assert isinstance(model.mean, nn.Buffer)
    model.mean = model.mean * 2
    assert isinstance(model.mean, nn.Buffer) and model.state_dict()["mean"].tolist() == [2, 2, 2]


def test_parameters_are_leaves_that_require_gradients():
    p = nn.Parameter([1.0, 2.0])
    assert p.requires_grad and p.is_leaf and p.dtype == np.float32 and isinstance(p, tt.Tensor)
    assert not nn.Parameter(np.ones(2), requires_grad=False).requires_grad
    assert type(p * 2) is tt.Tensor
    with pytest.raises(tt.DTypeError):
        nn.Parameter(np.arange(3))


@pytest.mark.parametrize("value", [np.zeros((2, 3), np.float32), 1.0], ids=["array", "number"])
def test_a_parameter_is_not_replaced_by_a_constant(value):
    layer = nn.Linear(3, 2)
    before = layer.weight
    with pytest.raises(tt.DTypeError, match=r"Linear\.weight is a Parameter"):
        layer.weight = value
    assert layer.weight is before


def test_a_plain_list_or_dict_does_not_hide_modules():
    model = Tied()
    with pytest.raises(tt.InputError, match="ModuleList"):
        model.hidden = [nn.Linear(2, 2)]
    with pytest.raises(tt.InputError, match="ModuleList"):
        model.hidden = (nn.Parameter([1.0]),)
    with pytest.raises(tt.InputError, match="ModuleDict"):
        model.hidden = {"a": nn.Linear(2, 2)}
    model.shortcut = [model.inner, model.extra]  # both are known by names of their own
    model.sizes = [1, 2]
    model.options = {"p": 0.5}
    assert [name for name, _ in model.named_parameters()] == NAMES


def test_containers():
    a, b, c = nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)
    chain = nn.Sequential(a, b)
    chain.append(c)
    assert len(chain) == 3 and chain[-1] is c and list(chain) == [a, b, c] and chain[:2] == [a, b]
    assert list(chain.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(chain(x).data, c(b(a(x))).data)
    del chain[1]
    chain.insert(0, b)
    chain[1] = nn.Linear(2, 3)
    assert list(chain.state_dict()) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    heads = nn.ModuleDict({"up": a})
    heads["down"] = c
    assert list(heads.state_dict()) == ["up.weight", "up.bias", "down.weight", "down.bias"]
    assert "up" in heads and len(heads) == 2 and list(heads) == list(heads.keys()) == ["up", "down"]
    assert heads["down"] is c and list(heads.values()) == [a, c] and dict(heads.items()) == {"up": a, "down": c}
    del heads["up"]
    assert list(heads) == ["down"]
    for refuse in (lambda: nn.ModuleList([3]), lambda: chain.append(tt.tanh), lambda: heads.__setitem__("x", 1)):
        with pytest.raises(tt.DTypeError, match="is not a Module"):
            refuse()


def test_train_and_eval_reach_every_module():
    model = nn.Sequential(nn.Dropout(), nn.ModuleList([nn.Dropout()]))
    assert all(m.training for m in model.modules())
    assert model.eval() is model and not any(m.training for m in model.modules())
    assert model.train() is model and all(m.training for m in model.modules())


def test_forward_is_to_be_written():
    with pytest.raises(NotImplementedError, match="Module has no forward"):
        nn.Module()(1)


# ---- state_dict -----------------------------------------------------------------------------------------------------


def test_state_dict_holds_copies_under_every_name():
    model = Tied()
    state = model.state_dict()
    shared = ["inner.weight", "layers.1.weight", "extra.weight"]
    assert list(state) == [
        "scale", "mean", "count", "inner.weight", "inner.bias", "layers.0.weight", "layers.0.bias", "layers.1.weight",
        "layers.1.bias", "extra.weight",
    ]  # fmt: skip
    for name in shared:
        state[name] += 1
    assert not np.array_equal(state["inner.weight"], model.inner.weight.data)


@pytest.mark.parametrize("make", [np.array, tt.tensor, np.ndarray.tolist], ids=["arrays", "Tensors", "lists"])
def test_load_state_dict(make):
    source, target = Tied(), Tied()
    parameters = list(target.parameters())
    state = {name: make(value) for name, value in source.double().state_dict().items()}
    assert target.double().load_state_dict(state) == ([], [])
    for name, value in source.state_dict().items():
        np.testing.assert_array_equal(target.state_dict()[name], value)
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    assert target.extra.weight is target.inner.weight


def test_a_shared_parameter_may_come_under_one_name():
    source, target = Tied(), Tied()
    state = {name: value for name, value in source.state_dict().items() if name in [*NAMES, "mean", "count"]}
    target.load_state_dict(state)
    np.testing.assert_array_equal(target.extra.weight.data, source.inner.weight.data)


def test_load_state_dict_lists_every_mismatch_at_once_and_changes_nothing():
    model = Tied()
    before = model.state_dict()
    bad = {name: value + 1 for name, value in before.items()}
    del bad["scale"], bad["layers.0.bias"]
    bad["inner.bias"] = np.zeros((4, 1), np.float32)
    bad["mean"] = np.zeros(3)
    bad["surprise"] = np.zeros(3)
    bad["extra.weight"] = bad["extra.weight"] + 1
    bad["count"] = object()
    with pytest.raises(tt.InputError) as caught:
        model.load_state_dict(bad)
    text = str(caught.value)
    for words in [
        "scale: missing, float32[2] expected",
        "layers.0.bias: missing, float32[2] expected",
        "surprise: unexpected",
        "inner.bias: float32[4, 1] given, float32[3] expected",
        "mean: float64[3] given, float32[3] expected",
        "extra.weight: shared with another name, under which the values differ",
        "count: ",
        "nothing was loaded",
    ]:
        assert words in text
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_load_state_dict_that_is_not_strict():
    model = Tied()
    state = model.state_dict()
    del state["scale"]
    state["surprise"] = np.zeros(3)
    state["inner.bias"] = state["layers.1.bias"] = np.full(3, 5, np.float32)
    assert model.load_state_dict(state, strict=False) == (["scale"], ["surprise"])
    assert model.inner.bias.tolist() == [5, 5, 5]
    state["inner.bias"] = np.zeros(4, np.float32)
    with pytest.raises(tt.InputError, match=r"inner\.bias"):
        model.load_state_dict(state, strict=False)


def test_load_state_dict_takes_a_mapping():
    with pytest.raises(tt.DTypeError, match="state_dict is a str"):
        nn.Linear(2, 2).load_state_dict("weights.safetensors")


def test_loading_between_forward_and_backward_is_caught():
    layer = nn.Linear(3, 2)
    x = tt.tensor(np.ones((4, 3), np.float32), requires_grad=True)
    y = layer(x).sum()
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(tt.TapeError, match="in place"):
        y.backward()


@pytest.mark.peer
def test_a_pytorch_state_dict_loads_as_it_is():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    ours = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    ours.load_state_dict(theirs.state_dict())
    ours.load_state_dict(dict(theirs.named_parameters()))  # also such as require gradients
    assert list(ours.state_dict()) == list(theirs.state_dict())
    tokens = np.array([[0, 4, 2]])
    np.testing.assert_allclose(ours(tokens).data, theirs(torch.from_numpy(tokens)).detach(), rtol=1e-5, atol=1e-6)
    half = {name: value.bfloat16() for name, value in theirs.state_dict().items()}
    with pytest.raises(tt.InputError, match=r"0\.weight: unreadable"):
        ours.load_state_dict(half)


# ---- casts, gradients, copies ---------------------------------------------------------------------------------------


def test_to_casts_in_place_and_drops_gradients():
    model = Tied()
    model(tt.ones((1, 3))).sum().backward()
    parameters, values = list(model.parameters()), model.state_dict()
    assert all(p.grad is not None for p in parameters)
    assert model.to("float32") is model and parameters[0].grad is not None  # nothing to change
    assert model.double() is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.dtype == np.float64 and p.grad is None for p in parameters)
    assert model.mean.dtype == np.float64 and model.count.dtype == np.int64
    assert model.extra.weight is model.inner.weight
    model(np.ones((1, 3))).sum().backward()
    assert all(p.grad.dtype == np.float64 for p in parameters)
    for name, value in model.float().state_dict().items():
        np.testing.assert_array_equal(value, values[name])
    with pytest.raises(tt.DTypeError, match="int64"):
        model.to(np.int64)


def test_a_cast_keeps_what_an_older_graph_needs():
    layer = nn.Linear(2, 2)
    x = tt.tensor(np.ones((1, 2), np.float32), requires_grad=True)
    y = layer(x).sum()
    weight = layer.weight.numpy()
    layer.double()
    y.backward()
    np.testing.assert_array_equal(x.grad.data, weight.sum(0, keepdims=True))
    assert layer.weight.grad is None


def test_a_cast_keeps_hooks():
    layer, seen = nn.Linear(2, 2), []
    layer.weight.register_hook(lambda g: seen.append(g.dtype))
    layer.double()(np.ones((1, 2))).sum().backward()
    assert seen == [np.float64]


def test_zero_grad_and_requires_grad():
    model = Tied()
    model(tt.ones((1, 3))).sum().backward()
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert model.inner.requires_grad_(False) is model.inner
    model(tt.ones((1, 3))).sum().backward()
    assert model.scale.grad is not None and not model.extra.weight.requires_grad
    model.requires_grad_()
    assert all(p.requires_grad for p in model.parameters())


def test_deepcopy():
    model = Tied()
    model.inner.weight.requires_grad = False
    model(tt.ones((1, 3))).sum().backward()
    twin = copy.deepcopy(model)
    assert twin.inner.weight is twin.extra.weight is twin.layers[1].weight and twin.inner is twin.layers[1]
    assert not twin.inner.weight.requires_grad and isinstance(twin.scale, nn.Parameter)
    np.testing.assert_array_equal(twin.scale.grad.data, model.scale.grad.data)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert a is not b, name
        np.testing.assert_array_equal(a.data, b.data)
    with tt.no_grad():
        twin.scale.copy_(5.0)
    assert model.scale.tolist() == [1, 1]
    twin.mean = np.ones(3, np.float32)
    assert model.mean.tolist() == [0, 0, 0]


def test_deepcopy_of_recurrent_layers():
    layer = nn.GRU(2, 3, 2, bidirectional=True, dropout=0.5, generator=tt.Generator(1))
    twin, x = copy.deepcopy(layer), np.ones((4, 2, 2), np.float32)
    np.testing.assert_array_equal(layer(x)[0].data, twin(x)[0].data)  # the generator's state is copied too


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell, lambda i, h: Tied()])
def test_modules_can_be_pickled(make):
    layer = make(2, 3)
    twin = pickle.loads(pickle.dumps(layer))
    assert repr(twin) == repr(layer)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(twin.state_dict()[name], value)


def test_tape_gradient_takes_a_module():
    model = Tied()
    with tt.Tape() as tape:
        loss = model(tt.ones((1, 3))).sum()
    found = tape.gradient(loss, model)
    assert list(found) == NAMES and model.scale.grad is None


# ---- printing -------------------------------------------------------------------------------------------------------


def test_repr_shows_shapes_and_counts_shared_parameters_once():
    text = repr(Tied())
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert rows == [
        ["Tied", "22", "scale [2], mean [3], count []"],
        ["inner: Linear(3, 3)", "12", "weight [3, 3], bias [3]"],
        ["layers: ModuleList", "8"],
        ["0: Linear(3, 2)", "8", "weight [2, 3], bias [2]"],
        ["1: Linear(3, 3)", "0", "weight = inner.weight, bias = inner.bias"],
        ["extra: Linear(3, 3, bias=False)", "0", "weight = inner.weight"],
    ]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(2, 3), "Linear(2, 3)  9  weight [3, 2], bias [3]"),
        (nn.Embedding(9, 2, padding_idx=-1), "Embedding(9, 2, padding_idx=8)  18  weight [9, 2]"),
        (nn.LayerNorm((2, 3), bias=False), "LayerNorm(2, 3)  6  weight [2, 3]"),
        (nn.Dropout(0.1, per="sequence"), "Dropout(0.1, per='sequence')  0"),
        (nn.GRUCell(2, 1, bias=False), "GRUCell(2, 1, bias=False)  9  weight_ih [3, 2], weight_hh [3, 1]"),
        (nn.RNN(1, 2, bias=False), "RNN(1, 2, bias=False)  6  weight_ih_l0 [2, 1], weight_hh_l0 [2, 2]"),
        (nn.MSELoss(), "MSELoss  0"),
    ],
)
def test_repr(module, text):
    assert repr(module) == text
