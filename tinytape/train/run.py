"""`Run`: what a training loop needs beside the loop itself, which stays in the user's hands."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import numpy as np

from ..engine.errors import InputError
from ..engine.tensor import Tensor
from ..engine.tree import map_leaves
from ..nn.module import Module, evaluating
from ..optim import Optimizer, Scheduler
from .checkpoint import BEST, LAST, Best, Parts, open_folder, read, write
from .inputs import END, check_options, rest
from .journal import Journal, Means
from .progress import Progress
from .signals import Signals, Stopped

__all__ = ["Run"]

T = TypeVar("T")


class Run:
    """A training run in a folder: checkpoints, exact resume, log, progress, validation, early stopping.

    The loop is the user's own, and so is what happens in it::

        with tt.train.Run(folder, model, optimizer) as run:
            for epoch in run.epochs(10):
                for x, y in run.batches(data):
                    run.step(loss_of(model(x), y))
                run.validate(score)

    Without epochs, ``for x, y in run.batches(data)`` or ``for _ in run.steps(5000)`` stands alone.

    **Exact resume.** Between two batches everything that the next one depends on lies in one file, which is replaced
    whole: a run that is killed at any moment and started again with ``resume=True`` ends with the bits of one that
    was never stopped. It asks three things of the program:

    - Everything that changes from step to step is the model, the optimiser, the scheduler, one of `parts`,
      `carried` or `notes`. `tt.default_generator` and the generators of the model's modules are found by themselves.
    - What stands between the start of an epoch and its loop over batches is done again, and then the saved state
      replaces what it did. The batches must come out the same then: they depend on the epoch and on draws from the
      run's generators before the loop, such as a permutation. An iterator that draws *while* it is read needs a
      generator of its own that is not in `parts` and starts from the epoch.
    - The batches that were done are passed over: in a sequence by their number, else by reading them.

    Parameters
    ----------
    folder : path
        Holds ``last.safetensors``, ``best.safetensors``, ``log.jsonl`` and ``tensorboard/``; made if there is none.
    model : Module
    optimizer : Optimizer
    scheduler : Scheduler, optional
        Goes on by one in each `step`.
    parts : dict, optional
        More that has a state: generators, a `truncated` stream, an `Average`, anything with ``state_dict`` and
        ``load_state_dict``, or ``state`` and ``set_state``.
    about : dict, optional
        Plain values that say what is trained, such as sizes and seed. `load` gives them back, and a run with others
        is not resumed.
    resume : bool
        Go on with what is in the folder; where there is nothing yet, start. Default False: a folder with a run in it
        is refused.
    better : {"lower", "higher"}
        Which validation results are. Default "lower".
    patience : int, optional
        End the loops after so many validations in a row without a better result. Default: never.
    save_every : float
        Seconds between checkpoints; there is one at the start, at the end, and when a signal comes too. What is
        computed does not depend on it. Default 60.
    log_every : int
        Steps that a line of the log stands for: the mean of what `step` was told. Default 25.
    progress : bool
        Show a bar, in a terminal and in a notebook, or elsewhere now and then a line. Default True.
    tensorboard : bool
        Write all of the log for TensorBoard too, which needs ``tensorboardX``. Default False.

    Attributes
    ----------
    count : int
        Steps so far.
    epoch : int
        Epochs that are complete.
    carried : nest of Tensors, or None
        The recurrent state from batch to batch, detached; None at first. Saved, and Tensors again after a resume.
    notes : dict
        Plain values and arrays of the user's own, saved too. A resume puts new objects in it: keep none beside it.
    best : Best or None
        The best validation so far: its ``value``, and the ``count`` and ``epoch`` it was at.
    finished : bool
        Whether `patience` has run out. May be set: the loops then end after this batch.

    Raises
    ------
    InputError
        If the folder holds a run already, or one that does not fit, or cannot be written.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        model: Module,
        optimizer: Optimizer,
        scheduler: Scheduler | None = None,
        *,
        parts: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
        resume: bool = False,
        better: Literal["lower", "higher"] = "lower",
        patience: int | None = None,
        save_every: float = 60.0,
        log_every: int = 25,
        progress: bool = True,
        tensorboard: bool = False,
    ) -> None:
        check_options(better, patience, save_every, log_every)
        self.folder, self.model, self.optimizer, self.scheduler = Path(folder), model, optimizer, scheduler
        self.about = dict(about or {})
        self.better, self.patience, self.save_every, self.log_every = better, patience, save_every, log_every
        self.count = self.epoch = 0
        self.carried: Any = None
        self.notes: dict[str, Any] = {}
        self.best: Best | None = None
        self.finished = False
        self._worse = 0  # validations since the best one
        self._batch = 0  # batches done in this epoch
        self._means = Means()  # since the last line of the log
        self._seconds = 0.0  # of training before `_since`
        self._since = self._saved = time.perf_counter()
        self._signals = Signals()
        self._depth = 0  # loops that are running
        self._closed = True
        self._parts = Parts(model, optimizer, scheduler, parts or {})
        self._epoch_start = self._parts.generator_states()
        self._validated: tuple[int, float] | None = None
        self._pending = open_folder(self.folder, self.about, resume)
        # The kernels for products and updates count as loaded from here on, whatever ran before: their sums are others.
        importlib.import_module("tinytape.kernels.native")
        self._journal = Journal(self.folder, tensorboard)
        self._progress = Progress(progress)
        if self._pending is not None:
            self._restore(self._pending)
            self._parts.set_generator_states(self._epoch_start)
        elif resume:
            self._journal.rewind(0, 0)  # of a run that was killed before its first checkpoint

    # ---- the loops --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        self._closed, self._since = False, time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None and not self._closed:
                self._save()
        finally:
            self._close()
            self._signals.release()
            self._progress.end()
            self._journal.close()
        if kind is None:
            self._heed_signal()  # that came in a batch whose loop was left by break

    def _close(self) -> None:
        self._seconds, self._closed = self.seconds, True

    def epochs(self, count: int) -> Iterator[int]:
        """Epochs up to number ``count - 1``, from where the run stands; ends early when it is `finished`."""
        with self._looping(1):
            if self._pending is not None:
                self._restore(self._pending)
                if self._batch:  # in the midst of an epoch, whose start is done again first
                    self._parts.set_generator_states(self._epoch_start)
                else:
                    self._pending = None
            while self.epoch < count and (not self.finished or self._pending is not None):
                if self._pending is None:
                    self._epoch_start = self._parts.generator_states()
                self._progress.label = f"epoch {self.epoch + 1}/{count}"
                yield self.epoch
                self.epoch, self._batch, self._pending = self.epoch + 1, 0, None
                self._between()

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an epoch, from where the run stands: one loop for each epoch, or one in all.

        Parameters
        ----------
        batches : iterable
            The same each time; see the class. On a resume a sequence is not read from its beginning.
        """
        inside = self._depth == 1
        with self._looping(2 if inside else 1):
            if self._pending is None and self._batch:
                raise InputError("Run.batches: a second loop in one epoch.", "use run.epochs, one loop in each.")
            left = rest(batches, self._batch)
            if self._pending is not None:
                self._restore(self._pending)
                self._pending = None
            self._progress.begin(self._batch, len(cast(Any, batches)) if hasattr(batches, "__len__") else None)
            while not self.finished:
                batch = next(left, END)
                if batch is END:
                    break
                try:
                    yield cast(T, batch)
                finally:
                    self._batch += 1  # also where the loop is left by break
                del batch  # or it would outlive the making of the next
                self._progress.advance()
                self._between()
            self._progress.end()

    def steps(self, count: int) -> Iterator[int]:
        """``batches(range(count))``: for data that is drawn in the loop, from one of the run's generators."""
        return self.batches(range(count))

    @contextlib.contextmanager
    def _looping(self, depth: int) -> Generator[None]:
        """Around a loop: signals are noted in it, to be acted on between batches."""
        self._check_open("epochs, batches or steps")
        if self._depth != depth - 1:
            raise InputError("Run: a loop inside a loop of its kind.", "epochs are outside, batches inside.")
        if depth == 1:
            self._signals.catch()
        self._depth = depth
        try:
            if depth == 1:
                self._save()
            yield
            if depth == 1:
                self._save()
                self._heed_signal()  # that came since the last batch
        finally:
            self._depth = depth - 1
            if depth == 1:
                self._signals.release()

    def _between(self) -> None:
        """Between two batches, where the state is whole."""
        if self._signals.name or time.perf_counter() - self._saved >= self.save_every:
            self._save()
        self._heed_signal()

    def _heed_signal(self) -> None:
        if self._signals.name:
            raise Stopped(self._signals.name, self.count, self.folder)

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise InputError(f"Run: {what} outside of `with`, or after load_best.", "write `with Run(...) as run:`.")

    # ---- in the loop ------------------------------------------------------------------------------------------------

    def step(self, loss: Tensor, **told: float) -> float:
        """Go back from a loss and update the weights: ``zero_grad``, ``backward``, ``step``, and the scheduler's.

        Parameters
        ----------
        loss : scalar Tensor
        told : float
            More to be averaged, shown and logged beside the loss.

        Returns
        -------
        float
            The loss.

        Raises
        ------
        InputError
            If the loss is NaN or infinite. The weights, and the last checkpoint, are from before.
        """
        self._check_open("step")
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"Run.step: the loss is {value} at step {self.count}.",
                "lower the learning rate or clip_norm; tt.inspect finds the first value that is not finite.",
            )
        self.optimizer.zero_grad()
        loss.backward()
        rate = self.optimizer.param_groups[0]["lr"]
        norm = self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.count += 1
        self._means.add({"loss": value, **told} if norm is None else {"loss": value, **told, "norm": norm})
        if self.count % self.log_every == 0:
            means = self._means.take()
            self.log(**means, lr=rate)
            self._progress.told = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
        return value

    def log(self, **values: float | str | None) -> None:
        """Write a line to the log, with the step, the epoch and the seconds of training so far."""
        place = {"step": self.count, "epoch": self.epoch, "seconds": round(self.seconds, 3)}
        self._journal.write(place | values, self.count)

    @property
    def seconds(self) -> float:
        """How long the run has been at it, over all its parts, until it is over."""
        return self._seconds if self._closed else self._seconds + time.perf_counter() - self._since

    def say(self, line: str) -> None:
        """Print a line to stderr, above the bar."""
        self._progress.say(line)

    def history(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Steps and values of everything that the log has under a name."""
        return self._journal.history(name)

    # ---- validation -------------------------------------------------------------------------------------------------

    def validate(self, score: Callable[[], float | Mapping[str, float]], every: int | None = None) -> float | None:
        """Score the model without any trace in the training, and keep its weights if they are the best so far.

        Parameters
        ----------
        score : callable
            Called as in `evaluating`. Returns a number, or a dict of numbers of which the first decides.
        every : int, optional
            Do it only where `count` is a multiple. Default: now. Twice at one step is once, and what was done at the
            start of an epoch is not done again when a resumed run comes by there.

        Returns
        -------
        float or None
            The result that decides; None if it was not due. NaN is never the best.
        """
        if self._pending is not None and self._batch:  # at the start of an epoch that was begun: it was done then
            return None if self._validated is None else self._validated[1]
        if every is not None and self.count % every:
            return None
        if self._validated is not None and self._validated[0] == self.count:
            return self._validated[1]
        self._check_open("validate")
        with self.evaluating():
            found = score()
        values = found if isinstance(found, Mapping) else {"valid": found}
        value = float(next(iter(values.values())))
        improved = self._improves(value)
        if improved:
            self.best, self._worse = Best(value, self.count, self.epoch), 0
            write(self.folder / BEST, self._described() | {"model": self.model.state_dict()})
            self._saved = -math.inf  # the next checkpoint is due
        else:
            self._worse += 1
            self.finished = self.finished or (self.patience is not None and self._worse >= self.patience)
        self._validated = (self.count, value)
        self.log(**values)
        told = ", ".join(f"{key} {number:.5g}" for key, number in values.items())
        place = f"{self._progress.label}, " if self._depth else ""
        self.say(f"{place}step {self.count}: {told}{' (best)' if improved else ''}")
        return value

    def _improves(self, value: float) -> bool:
        before = self.best.value if self.best else math.inf if self.better == "lower" else -math.inf
        return value < before if self.better == "lower" else value > before

    @contextlib.contextmanager
    def evaluating(self) -> Generator[None]:
        """Inside, the model is in eval mode, nothing is recorded, and what is drawn is drawn again afterwards."""
        states = self._parts.generator_states()
        try:
            with evaluating(self.model):
                yield
        finally:
            self._parts.set_generator_states(states)

    def load_best(self) -> None:
        """Save, end the run, and give the model the weights of the best validation.

        Raises
        ------
        InputError
            If nothing was validated.
        """
        if self.best is None:
            raise InputError("Run.load_best: nothing was validated.", "call run.validate first.")
        if not self._closed:
            self._save()
            self._close()
        self.model.load_state_dict(read(self.folder / BEST)["model"])

    # ---- saving and going on ----------------------------------------------------------------------------------------

    def _described(self) -> dict[str, Any]:
        best = None if self.best is None else asdict(self.best)
        return {"about": self.about, "count": self.count, "epoch": self.epoch, "best": best}

    def _save(self) -> None:
        if self._pending is not None:
            return  # nothing has happened yet, and what was done at the epoch's start is to be done again
        position = self._journal.sync()
        tree = self._described() | {
            "parts": self._parts.states(),
            "generators": self._parts.generator_states(),
            "epoch_start": self._epoch_start,
            "batch": self._batch,
            "carried": self.carried,
            "notes": self.notes,
            "worse": self._worse,
            "finished": self.finished,
            "validated": self._validated,
            "sums": self._means.sums,
            "seconds": self.seconds,
            "log": position,
        }
        write(self.folder / LAST, tree)
        self._saved = time.perf_counter()

    def _restore(self, tree: dict[str, Any]) -> None:
        self._parts.load(tree["parts"])
        self._parts.set_generator_states(tree["generators"])
        self.best = None if tree["best"] is None else Best(**tree["best"])
        self.count, self.epoch, self._batch = tree["count"], tree["epoch"], tree["batch"]
        self.carried = map_leaves(Tensor, tree["carried"])
        self.notes, self._means.sums = deepcopy(tree["notes"]), deepcopy(tree["sums"])  # a tree may be loaded twice
        self.finished, self._worse = tree["finished"], tree["worse"]
        self._validated, self._epoch_start = tree["validated"], tree["epoch_start"]
        self._seconds, self._since = tree["seconds"], time.perf_counter()
        self._journal.rewind(tree["log"], self.count)
