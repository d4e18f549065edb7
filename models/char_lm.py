"""A character language model: train an LSTM on a text, set it beside n-grams, and let it write.

python -m models.char_lm                                      train on the help texts that come with Python
python -m models.char_lm --text FILE --preset shakespeare     train on a text of your own
python -m models.char_lm --resume FOLDER                      go on, bit for bit as if never stopped
python -m models.char_lm score FOLDER FILE                    bits a character and perplexity of a file
python -m models.char_lm sample FOLDER --prompt "The " --temperature 0.7 --top-p 0.9
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinytape as tt
from models import command
from models.command import number
from models.language import LanguageModel, detached, draw_curves, sampling, trained, written

MANUAL = {
    "layers": 1, "hidden": 256, "embedding": 128, "tied": 0, "dropout": 0.1, "dropout_in": 0.05, "weight_drop": 0.0,
    "per": "element", "batch": 32, "window": 32, "epochs": 9, "lr": 6e-3, "schedule": "cosine", "beta1": 0.5,
    "beta2": 0.99, "weight_decay": 0.1, "clip": 0.3, "average": 0.0, "split": "blocks", "seed": 1,
}  # fmt: skip
SHAKESPEARE = MANUAL | {
    "layers": 2, "hidden": 128, "embedding": 64, "dropout": 0.1, "dropout_in": 0.0, "batch": 50, "window": 50,
    "epochs": 50, "lr": 2e-3, "schedule": "0.97 after 10", "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0,
    "clip": 5.0, "split": "tail",
}  # fmt: skip
REGULARISED = SHAKESPEARE | {
    "hidden": 256, "dropout": 0.3, "dropout_in": 0.1, "weight_drop": 0.2, "epochs": 30, "lr": 3e-3,
    "schedule": "cosine", "beta2": 0.99, "weight_decay": 0.01, "clip": 1.0, "average": 0.998,
}  # fmt: skip
PRESETS = {"manual": MANUAL, "shakespeare": SHAKESPEARE, "regularised": REGULARISED}
CHOICES = {"per": ("element", "sequence"), "schedule": ("cosine", "0.97 after 10"), "split": ("blocks", "tail")}
OUT = "runs/char_lm"


class Corpus(NamedTuple):
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: tt.data.Vocabulary
    note: str


def corpus(options: dict) -> Corpus:
    """A text in parts: every eighth block for choosing and testing, or the last 10% in two halves."""
    text = tt.data.read_text(options["text"], 16_000) if options["text"] else tt.data.default_text()
    vocabulary = tt.data.Vocabulary.of(text)
    if len(vocabulary) < 2:
        raise tt.InputError(f"--text: all {len(text):,} characters are {text[0]!r}.", "give a text with 2 or more.")
    if options["split"] == "blocks":
        train, held_out, removed = tt.data.split_held_out(text)
        parts, note = (train, held_out, held_out), f"{removed:,} characters that repeat training text were left out"
    else:
        first, second = len(text) * 90 // 100, len(text) * 95 // 100
        parts, note = (text[:first], text[first:second], text[second:]), "the text's last 5%"
    return Corpus(*(vocabulary.encode(part) for part in parts), vocabulary, note)


def build(options: dict, symbols: int, generator: tt.Generator) -> LanguageModel:
    sizes = {name: options[name] for name in ("embedding", "hidden", "layers", "dropout", "dropout_in", "weight_drop")}
    model = LanguageModel(symbols, **sizes, per=options["per"], tied=bool(options["tied"]), generator=generator)
    init = tt.nn.init
    for lstm in model.layers:
        init.xavier_uniform_(lstm.weight_ih_l0, generator=generator)
        init.orthogonal_(lstm.weight_hh_l0, gates=4, generator=generator)
        init.zeros_(lstm.bias_ih_l0)
        init.zeros_(lstm.bias_hh_l0)
        init.forget_gate_bias_(lstm, 1.0)
    init.zeros_(model.head.bias)
    if options["tied"]:  # logits of unit variance
        init.normal_(model.embedding.weight, std=options["hidden"] ** -0.5, generator=generator)
    return model


def schedule(options: dict, steps: int) -> Any:
    """The rate at each step; an epoch has so many."""
    if options["schedule"] == "cosine":
        total = options["epochs"] * steps
        return tt.optim.schedule.cosine(options["lr"], 0.0, total, warmup=total // 50)
    return lambda step: options["lr"] * 0.97 ** max(0, step // steps - 9)


def optimizer_of(model: LanguageModel, options: dict) -> tt.optim.AdamW:
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    biases = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    groups = [{"params": matrices, "weight_decay": options["weight_decay"]}, {"params": biases, "weight_decay": 0.0}]
    return tt.optim.AdamW(
        groups, lr=options["lr"], betas=(options["beta1"], options["beta2"]), clip_norm=options["clip"]
    )


def train(options: dict, given: argparse.Namespace) -> None:
    data = corpus(options)
    generator = tt.Generator(options["seed"])
    model = build(options, len(data.vocabulary), generator)
    optimizer = optimizer_of(model, options)
    steps = math.ceil((len(tt.data.streams(data.train, options["batch"])) - 1) / options["window"])
    scheduler = tt.optim.Scheduler(optimizer, schedule(options, steps))
    average = tt.train.Average(model, options["average"]) if options["average"] else None
    digest = hashlib.sha256(b"".join(part.tobytes() for part in data[:3])).hexdigest()
    about = {"kind": "char_lm", "options": options, "symbols": data.vocabulary.symbols, "text": digest}
    parts = {"average": average} if average else {}
    folder, resume = given.resume, given.resume is not None
    if not resume:  # now that all else is seen to fit
        folder = command.free_folder("--out", given.out, OUT)
    picture = Path(folder) / "curves.png"
    print(
        f"{len(data.train):,} characters to train on, {len(data.valid):,} held out, {len(data.vocabulary)} symbols; "
        f"{sum(p.size for p in model.parameters()):,} parameters",
        flush=True,
    )

    def score() -> dict[str, float]:
        return {"bits": tt.generate.nats(model, data.valid, 32) / math.log(2)}

    with tt.train.Run(folder, model, optimizer, scheduler, parts=parts, about=about, resume=resume) as run:
        for _ in run.epochs(options["epochs"]):
            run.carried = None
            start = generator.integers(0, len(data.train))  # each pass cuts the text into other streams and windows
            columns = tt.data.streams(np.roll(data.train, -start), options["batch"])
            for inputs, targets in run.batches(list(tt.data.windows(columns, options["window"]))):
                logits, state = model(inputs, run.carried)
                run.carried = detached(state)  # carried to the next window; gradients stop here
                run.step(tt.nn.functional.cross_entropy(logits, targets))
                if average:
                    average.update()
            with average.applied() if average else contextlib.nullcontext():
                run.validate(score)
        run.load_best()
        print(f"saved: {folder}\n\n{table(model, data, run)}")
        nats, bits = run.history("loss"), run.history("bits")
        draw_curves(picture, (nats[0], nats[1] / math.log(2)), bits, "bits a character")
    print(f"\nA sample at temperature {given.temperature}:\n\n{sample(model, data.vocabulary, '', 400, given)}")
    print(f"\ncurves: {picture}")


def table(model: LanguageModel, data: Corpus, run: tt.train.Run) -> str:
    """The model beside baselines, all scored on the text for testing, read as one stream."""
    size = len(data.vocabulary)
    rows = [("uniform", math.log2(size), "")]
    for result in tt.data.best_ngrams(data.train, data.test, size):
        rows.append((f"{result.order}-gram", result.bits, result.smoothing.name))
    bits = tt.generate.nats(model, data.test) / math.log(2)
    rows.append(("LSTM", bits, f"best of the run, epoch {run.best.epoch + 1}"))
    if not np.array_equal(data.valid, data.test):
        bits = tt.generate.nats(model, data.valid) / math.log(2)
        rows.append(("  chosen on", bits, "the 5% before"))
    lines = [f"{name:11} {value:6.3f} {value * math.log(2):6.3f}  {note}" for name, value, note in rows]
    head = f"{'model':11} {'bits':>6} {'nats':>6} a character, on {len(data.test):,} held-out characters"
    return "\n".join([head, *lines, f"({data.note}; {run.seconds:,.0f} s of training)"])


def sample(model: LanguageModel, vocabulary, prompt: str, length: int, given: argparse.Namespace) -> str:
    start = "\n" if "\n" in vocabulary.symbols else vocabulary.symbols[0]
    tokens = vocabulary.encode(prompt or start, getattr(given, "instead", None))
    found = written(model, tokens, length, given)
    return vocabulary.decode([*(tokens if prompt else []), *found])


def train_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m models.char_lm", usage="%(prog)s [options]", description="Train a character language model."
    )
    parser.add_argument("--resume", metavar="FOLDER", help="go on with a run")
    parser.add_argument("--out", metavar="FOLDER", help=f"a new one; default {OUT}")
    parser.add_argument("--text", metavar="FILE", help="a text in UTF-8; default: the help texts of Python itself")
    parser.add_argument("--preset", choices=PRESETS, help="default manual")
    sampling(parser)
    settings = {name: value for name, value in MANUAL.items() if name != "seed"}  # which sampling has
    command.add_settings(parser, settings, {"tied": 0, "clip": 1e-9}, CHOICES)
    given = parser.parse_args(arguments)
    changed = {name: value for name, value in vars(given).items() if value is not None and name in MANUAL}
    if given.resume is not None:
        if changed.keys() - {"seed"} or given.preset or given.out or given.text:
            raise tt.InputError("--resume: a run goes on as it was started.", "leave the other options out.")
        options = trained(given.resume, "char_lm")["about"]["options"]
    else:
        options = {"text": given.text and str(Path(given.text).resolve())} | PRESETS[given.preset or "manual"] | changed
    train(options, given)


def load(folder: str) -> tuple[LanguageModel, tt.data.Vocabulary]:
    saved = trained(folder, "char_lm")
    vocabulary = tt.data.Vocabulary(saved["about"]["symbols"])
    model = build(saved["about"]["options"], len(vocabulary), tt.Generator(0))
    model.load_state_dict(saved["model"])
    return model, vocabulary


def trained_command(arguments: Sequence[str], kind: str) -> None:
    parser = argparse.ArgumentParser(f"python -m models.char_lm {kind}")
    parser.add_argument("folder", help="what training made")
    if kind == "score":
        parser.add_argument("file", help="a text in UTF-8")
    else:
        parser.add_argument("--prompt", default="", help="what it goes on from")
        parser.add_argument("--length", type=number(int, 0), default=500, help="characters to write, default 500")
        sampling(parser)
    parser.add_argument("--instead", metavar="C", help="stands for characters the model does not know; '' drops them")
    given = parser.parse_args(arguments)
    model, vocabulary = load(given.folder)
    if kind == "sample":
        print(sample(model, vocabulary, given.prompt, given.length, given))
    else:
        tokens = vocabulary.encode(tt.data.read_text(given.file, 2), given.instead)
        nats = tt.generate.nats(model, tokens)
        print(f"{nats / math.log(2):.3f} bits a character, perplexity {math.exp(nats):.3f}, {len(tokens):,} characters")


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] in (["sample"], ["score"]):
        command.run(lambda rest: trained_command(rest, arguments[0]), arguments[1:])
    else:
        command.run(train_command, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
