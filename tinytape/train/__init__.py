"""Training loops that can be killed at any moment and go on: see `Run`.

::

    model = Net(generator=tt.Generator(1))
    optimizer = tt.optim.Adam(model, lr=1e-3, clip_norm=1.0)

    with tt.train.Run("runs/net", model, optimizer, resume=True, patience=5) as run:
        for epoch in run.epochs(20):
            run.carried = None
            for x, y in run.batches(tt.data.windows(columns, 50)):
                logits, state = model(x, run.carried)
                run.carried = [s.detach() for s in state]
                run.step(F.cross_entropy(logits, y))
            run.validate(lambda: score(model, held_out))
        run.load_best()
"""

from .average import Average
from .checkpoint import Best, load
from .journal import read_log
from .run import Run
from .signals import Stopped

__all__ = ["Average", "Best", "Run", "Stopped", "load", "read_log"]
