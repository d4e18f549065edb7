"""Search for the settings of a small character model: several processes, one file that survives them all.

python -m models.tune                            two minutes on two cores; again, to go on with the same study
python -m models.tune --trials 200 --workers 4   until the study has 200 trials
python -m models.tune --lr 1e-3 1e-2 --study runs/narrow.db
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tinytape as tt
from models import command
from models.command import number
from models.language import LanguageModel, detached

from .shared_study import Pulse, SQLAlchemyError, TrialState, fail, finished, optuna, prepare_study, search

RANGES = {"lr": (5e-4, 1e-1), "hidden": (32, 256), "window": (8, 128), "dropout": (0.0, 0.5), "clip": (0.05, 5.0)}
START = {"lr": 2e-3, "hidden": 128, "window": 50, "dropout": 0.1, "clip": 5.0}  # the first trial: a usual choice
BATCH, STAGES = 32, 5
SCORED = 20_000  # characters at most to choose on, and as many to test on: scoring must stay cheaper than training
OUT = "runs/tune.db"


class Corpus(NamedTuple):
    train: np.ndarray
    choosing: np.ndarray
    test: np.ndarray
    symbols: int
    digest: str

    @classmethod
    def of(cls, text: str) -> Corpus:
        vocabulary = tt.data.Vocabulary.of(text)
        if len(vocabulary) < 2:
            raise tt.InputError(f"--text: one symbol only, {text[0]!r}: nothing to learn.", "give another text.")
        parts = tt.data.split_held_out(text)
        train, held_out = vocabulary.encode(parts.train), vocabulary.encode(parts.held_out)
        half = len(held_out) // 2
        if half < 2 * BATCH:
            raise tt.InputError(f"--text: {2 * half} characters to score on are too few.", "give a longer text.")
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(train, held_out[:half][:SCORED], held_out[half:][:SCORED], len(vocabulary), digest)


def network(symbols: int, hidden: int, dropout: float, generator: tt.Generator) -> LanguageModel:
    return LanguageModel(symbols, 32, hidden, dropout=dropout, dropout_in=0.0, generator=generator)


def bits_per_character(model: LanguageModel, tokens: np.ndarray, symbols: int) -> float:
    """Never worse than guessing evenly, so that a run that diverged, even to NaN, has an ordinary score."""
    bits, guessing = tt.generate.nats(model, tokens, BATCH) / math.log(2), math.log2(symbols)
    return bits if bits < guessing else guessing


class Training:
    """One model under given settings, to be trained a step at a time. All start from the same seed."""

    def __init__(self, corpus: Corpus, settings: dict) -> None:
        self.model = network(corpus.symbols, settings["hidden"], settings["dropout"], tt.Generator(1))
        self.optimizer = tt.optim.Adam(self.model.parameters(), lr=settings["lr"], clip_norm=settings["clip"])
        self.columns, self.window = tt.data.streams(corpus.train, BATCH), settings["window"]
        self.windows, self.state = iter(()), None

    def step(self) -> None:
        pair = next(self.windows, None)
        if pair is None:  # a new pass over the text
            self.windows, self.state = tt.data.windows(self.columns, self.window), None
            pair = next(self.windows)
        logits, state = self.model(pair[0], self.state)
        loss = tt.nn.functional.cross_entropy(logits, pair[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.state = detached(state)


class Objective:
    """Bits a character after some seconds of training under the settings of a trial."""

    def __init__(self, corpus: Corpus, ranges: dict, seconds: float) -> None:
        self.corpus, self.ranges, self.seconds = corpus, ranges, seconds

    def prepare(self) -> None:
        Training(self.corpus, START).step()  # compiles the kernels

    def draw(self, trial: optuna.Trial) -> dict:
        settings = {}
        for name, (low, high) in self.ranges.items():
            suggest = trial.suggest_int if isinstance(START[name], int) else trial.suggest_float
            settings[name] = suggest(name, low, high, log=name != "dropout")
        return settings

    def __call__(self, trial: optuna.Trial) -> float:
        """Score after each stage, and stop early where it is hopeless. The rate falls to zero over all stages."""
        settings, corpus, pulse = self.draw(trial), self.corpus, Pulse(trial)
        training, slot = Training(corpus, settings), self.seconds / STAGES
        training.step()  # not on the clock: new widths are traced in it
        for stage in range(STAGES):
            began = time.process_time()  # of the processor: what else the machine does takes nothing away
            while (used := time.process_time() - began) < slot:
                pulse.beat()
                training.optimizer.param_groups[0]["lr"] = settings["lr"] * (1 - (stage + used / slot) / STAGES)
                try:
                    training.step()
                except tt.InputError:  # of the optimiser: gradients are no longer finite
                    trial.report(math.log2(corpus.symbols), stage)
                    raise optuna.TrialPruned from None
            bits = bits_per_character(training.model, corpus.choosing, corpus.symbols)
            trial.report(bits, stage)
            if stage < STAGES - 1 and trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr("test", bits_per_character(training.model, corpus.test, corpus.symbols))
        return bits


def at_the_end(trials: list[optuna.trial.FrozenTrial]) -> dict[int, float]:
    """Bits of each trial by its number; of one stopped early, what it would have come to with the median's gains.

    Left out, settings that are always stopped early would seem not to matter.
    """
    whole = [t for t in trials if t.state == TrialState.COMPLETE]
    gains = [float(np.median([t.intermediate_values[s] - t.value for t in whole])) for s in range(STAGES)]
    early = TrialState.PRUNED
    return {t.number: t.value - gains[t.last_step] if t.state == early else t.value for t in trials}


def importances(trials: list[optuna.trial.FrozenTrial], ranges: dict) -> dict[str, float]:
    """The share of each setting in the variance of the bits (fANOVA), over all trials; {} if there are too few."""
    if sum(t.state == TrialState.COMPLETE for t in trials) < 5 or len({t.value for t in trials}) < 10:
        return {}
    scale = {name: float if name == "dropout" else math.log for name in ranges}  # as they were drawn
    spans = {name: optuna.distributions.FloatDistribution(*map(scale[name], ranges[name])) for name in ranges}
    ends, copy = at_the_end(trials), optuna.create_study()
    for trial in trials:
        settings = {name: scale[name](value) for name, value in trial.params.items()}
        copy.add_trial(optuna.create_trial(params=settings, distributions=spans, value=ends[trial.number]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(copy, evaluator=evaluator)


def table(trials: list[optuna.trial.FrozenTrial], shares: dict, corpus: Corpus, ranges: dict, rows: int = 8) -> str:
    """The best trials, the start, and what takes no network, scored on what was chosen on and on what was not."""
    whole = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    lines = [
        f"{len(trials)} trials, {len(trials) - len(whole)} of them stopped early. Bits a character on "
        f"{len(corpus.choosing):,} characters chosen on and {len(corpus.test):,} others",
        f"{'trial':>12} {'chosen on':>9} {'others':>7}  " + " ".join(f"{name:>8}" for name in ranges),
    ]
    for rank, trial in enumerate(whole):
        if rank < rows or trial.user_attrs.get("start"):
            name = f"start, {trial.number}" if trial.user_attrs.get("start") else trial.number
            settings = " ".join(f"{trial.params[name]:8.3g}" for name in ranges)
            lines.append(f"{name:>12} {trial.value:9.3f} {trial.user_attrs['test']:7.3f}  {settings}")
    counts = np.bincount(corpus.train, minlength=corpus.symbols) + 1
    bits = -np.log2(counts / counts.sum())
    lines.append(f"{'frequencies':>12} {bits[corpus.choosing].mean():9.3f} {bits[corpus.test].mean():7.3f}")
    mattered = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return "\n".join([*lines, f"what mattered: {mattered or 'too few trials to say'}"])


def draw(trials: list[optuna.trial.FrozenTrial], shares: dict, ranges: dict, path: Path) -> None:
    figure, ((first, *rest), last) = command.figure(2, 3, (10, 6))
    first.barh(list(shares)[::-1], list(shares.values())[::-1])
    first.set(xlabel="share of the variance (fANOVA)", title="what mattered")
    hollow = {"facecolors": "none", "edgecolors": "gray"}
    looks = ((TrialState.COMPLETE, "trained to the end", {}), (TrialState.PRUNED, "stopped early", hollow))
    for axes, name in zip([*rest, *last], ranges, strict=True):
        for state, label, look in looks:
            some = [t for t in trials if t.state == state]
            axes.scatter([t.params[name] for t in some], [t.value for t in some], s=18, label=label, **look)
        even = name == "dropout"
        axes.set(xlabel=name, xscale="linear" if even else "log", ylabel="bits a character")
        ticks = (np.linspace if even else np.geomspace)(*ranges[name], 4)
        axes.set_xticks(ticks, [f"{tick:.2g}" if tick < 10 else f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    rest[0].legend()
    figure.savefig(path, dpi=90)


def tune(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m models.tune", usage="%(prog)s [options]", description="Tune a character model."
    )
    for name, (low, high) in RANGES.items():
        kind = number(type(low), {"hidden": 1, "window": 1, "dropout": 0}.get(name, 1e-9))
        parser.add_argument(
            f"--{name}", nargs=2, type=kind, metavar=("LOW", "HIGH"), default=(low, high), help=f"default {low} {high}"
        )
    parser.add_argument("--text", metavar="FILE", help="a text in UTF-8; default: the help texts of Python itself")
    parser.add_argument("--study", metavar="FILE", default=OUT, help="made, or gone on with; default %(default)s")
    parser.add_argument("--seconds", type=number(float, 0.1), default=4.0, help="of training a trial; default 4")
    parser.add_argument(
        "--minutes", type=number(float, 0), help="time for the search; default 2, or none with --trials"
    )
    parser.add_argument("--trials", type=number(int, 1), help="end when the study has so many")
    parser.add_argument("--workers", type=number(int, 1), default=2, help="processes, one thread each; default 2")
    given = parser.parse_args(arguments)
    ranges = {name: list(getattr(given, name)) for name in RANGES}
    for name, (low, high) in ranges.items():
        if low > high or (name == "dropout" and high >= 1):
            raise tt.InputError(
                f"--{name}: {low} to {high} is no range of it.", "give the lower end first, and dropout below 1."
            )
    minutes = given.minutes if given.minutes is not None else math.inf if given.trials else 2.0
    corpus = Corpus.of(tt.data.read_text(given.text, 16_000) if given.text else tt.data.default_text())
    made_with = {f"--{name}": " ".join(map(str, ends)) for name, ends in ranges.items()}
    made_with |= {"--seconds": str(given.seconds), "--text": f"a text of SHA-256 {corpus.digest[:16]}"}
    start = {name: min(max(START[name], low), high) for name, (low, high) in ranges.items()}
    study = prepare_study(given.study, start, made_with)
    print(
        f"{given.study}: {len(finished(study))} trials so far; {given.workers} processes, "
        f"{given.seconds:g} s of training a trial"
    )
    objective, limit = Objective(corpus, ranges, given.seconds), given.trials or math.inf
    early = search(given.study, study, objective, given.workers, limit, time.time() + 60 * minutes)
    trials, picture = finished(study), Path(given.study).with_suffix(".png")
    shares = importances(trials, ranges)
    print(f"\n{table(trials, shares, corpus, ranges)}")
    if trials:
        draw(trials, shares, ranges, picture)
        print(f"picture: {picture}")
    if early:
        again = shlex.join(["python", "-m", "models.tune", *arguments])
        print(f"{early}; the study is kept. Go on with: {again}", file=sys.stderr)
        raise SystemExit(1 if early == "stopped" else 2)


def main(arguments: list[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        tune(arguments)
    except (tt.TinytapeError, OSError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit("stopped.") from None


if __name__ == "__main__":
    main(sys.argv[1:])
