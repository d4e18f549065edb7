"""A small training run with everything in it that has a state, for tests that stop it anywhere.

``python tests/killed_run.py FOLDER SECONDS`` goes on with the run in the folder, each step at least so long.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a program it is run from anywhere

import tinytape as tt

EPOCHS, BATCHES = 4, 7


class Net(tt.nn.Module):
    def __init__(self, generator):
        self.inner = tt.nn.Linear(3, 6, generator=generator)
        self.recur = tt.nn.Linear(6, 6, generator=generator)
        self.head = tt.nn.Linear(6, 1, generator=generator)
        self.drop = tt.nn.Dropout(0.3, generator=generator)

    def forward(self, x, h):
        h = tt.tanh(self.inner(x) + self.recur(h))
        return self.head(self.drop(h)), h


def data():
    x = np.random.default_rng(0).standard_normal((BATCHES, 5, 3)).astype(np.float32)
    return x, np.cumsum(x, 0)[..., :1]


def train(folder, in_step=lambda run: None, **options):
    """A whole run, or what is left of it; `in_step` is called in each step."""
    generator, order = tt.Generator(1), tt.Generator(2)
    net = Net(generator)
    optimizer = tt.optim.Adam(net, lr=0.05, clip_norm=1.0)
    scheduler = tt.optim.Scheduler(optimizer, lambda step: 0.05 * 0.98**step)
    average = tt.train.Average(net, 0.9)
    x, y = data()

    def score():
        generator.normal((3,))  # what a validation draws is of no consequence
        h = np.zeros((5, 6), np.float32)
        return {
            "valid": float(sum(tt.nn.functional.mse_loss(net(a, h)[0], b).item() for a, b in zip(x, y, strict=True)))
        }

    usual = {"save_every": 0, "log_every": 3, "progress": False, "resume": True, "patience": 3}
    parts = {"average": average, "order": order}
    with tt.train.Run(folder, net, optimizer, scheduler, parts=parts, about={"seed": 1}, **usual | options) as run:
        for epoch in run.epochs(EPOCHS):
            run.carried = tt.zeros((5, 6))
            run.notes["epochs"] = [*run.notes.get("epochs", []), epoch]
            for i in run.batches(order.permutation(BATCHES).tolist()):
                out, h = net(x[i], run.carried)
                run.carried = h.detach()
                run.step(tt.nn.functional.mse_loss(out, y[i]), noise=float(tt.default_generator.uniform()))
                average.update()
                in_step(run)
                run.validate(score, every=5)
            with average.applied():
                run.validate(score)
        return run


def outcome(folder):
    """All that a run left, but for times."""
    states = [tt.io.load_state(folder / name) for name in ("last.safetensors", "best.safetensors")]
    states[0].pop("seconds")
    length = states[0].pop("log")
    lines = tt.train.read_log(folder)
    for line in lines:
        line.pop("seconds")
    assert length == (folder / "log.jsonl").stat().st_size
    return [repr(tt.io.flatten_state(tree)[1]) for tree in states], [
        {name: array.tobytes() for name, array in tt.io.flatten_state(tree)[0].items()} for tree in states
    ], lines  # fmt: skip


if __name__ == "__main__":
    tt.manual_seed(3)
    pause = float(sys.argv[2])
    train(sys.argv[1], in_step=lambda run: time.sleep(pause))
