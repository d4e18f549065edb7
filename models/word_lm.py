"""A word language model as in Zaremba, Sutskever & Vinyals 2014, beside a Kneser-Ney 5-gram.

python -m models.word_lm                                               on the help texts that come with Python
python -m models.word_lm --train FILE --valid FILE --test FILE         on a corpus: words with spaces between them
python -m models.word_lm prepare TEXT FOLDER                           make such a corpus of a running text
python -m models.word_lm --resume FOLDER                               go on, bit for bit as if never stopped
python -m models.word_lm score FOLDER FILE                             the perplexity of a file
python -m models.word_lm sample FOLDER --prompt "the old man" --top-p 0.9
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinytape as tt
from models import command
from models.command import number
from models.language import LanguageModel, detached, draw_curves, sampling, trained, written

# As in the authors' code: the rate is kept for so many epochs, and then divided by `decay` after each.
PRESETS = {
    "small": {
        "hidden": 200, "window": 20, "dropout": 0.0, "bound": 0.1, "clip": 5.0, "kept": 5, "decay": 2.0, "epochs": 13,
    },
    "medium": {
        "hidden": 650, "window": 35, "dropout": 0.5, "bound": 0.05, "clip": 5.0, "kept": 7, "decay": 1.2, "epochs": 39,
    },
    "large": {
        "hidden": 1500, "window": 35, "dropout": 0.65, "bound": 0.04, "clip": 10.0, "kept": 15, "decay": 1.15,
        "epochs": 55,
    },
}  # fmt: skip
SHARED = {"layers": 2, "batch": 20, "lr": 1.0, "vocabulary": 10_000, "seed": 1}
FILES = ("train", "valid", "test")
OUT = "runs/word_lm"


class Corpus(NamedTuple):
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: tt.data.WordVocabulary


def cut(text: str) -> list[str]:
    """A prepared text in three: 80, 10 and 10 in a hundred of its words, cut at the end of a line."""
    lines = text.splitlines(keepends=True)
    ends = np.cumsum([len(line.split()) + 1 for line in lines])
    first, second = (int(np.searchsorted(ends, part * ends[-1:].sum(), side="right")) for part in (0.8, 0.9))
    parts = lines[:first], lines[first:second], lines[second:]
    if not all(parts):
        raise tt.InputError(f"text: {len(lines)} lines with words are too few to cut.", "give more, or shorter ones.")
    return ["".join(part) for part in parts]


def corpus(options: dict, cache: Path) -> Corpus:
    """The words of the three files, mapped in the folder `cache`; or of Python's help texts."""
    if options["train"]:
        lines = tt.data.read_lines(options["train"])
        vocabulary = tt.data.WordVocabulary.of(tt.data.words(lines), options["vocabulary"])
        parts = [tt.data.map_tokens(options[name], vocabulary, cache) for name in FILES]
    else:
        texts = [part.splitlines() for part in cut(tt.data.split_words(tt.data.default_text()))]
        vocabulary = tt.data.WordVocabulary.of(tt.data.words(texts[0]), options["vocabulary"])
        parts = [vocabulary.encode(tt.data.words(lines)) for lines in texts]
    if len(vocabulary) < 4:  # <unk>, <eos> and one word
        raise tt.InputError("--train: it has but one word.", "give a text, and a --vocabulary of 4 or more.")
    for name, part in zip(FILES, parts, strict=True):
        if len(part) <= options["batch"]:
            raise tt.InputError(f"--{name}: {len(part)} words.", f"more than {options['batch']} are needed.")
    return Corpus(*parts, vocabulary)


def build(options: dict, symbols: int) -> LanguageModel:
    hidden, generator = options["hidden"], tt.Generator(options["seed"])
    model = LanguageModel(symbols, hidden, hidden, options["layers"], options["dropout"], generator=generator)
    for parameter in model.parameters():
        tt.nn.init.uniform_(parameter, -options["bound"], options["bound"], generator)
    return model


def rate(options: dict, step: int, windows: int) -> float:
    """The learning rate of a step; an epoch has so many windows."""
    return options["lr"] / options["decay"] ** max(0, step // windows + 1 - options["kept"])


def train(options: dict, out: str | None, resume: bool) -> None:
    data = corpus(options, Path(OUT if out is None else out).parent / "tokens")
    model = build(options, len(data.vocabulary))
    columns = tt.data.streams(data.train, options["batch"])
    windows = math.ceil((len(columns) - 1) / options["window"])
    optimizer = tt.optim.SGD(model, options["lr"], clip_norm=options["clip"])
    scheduler = tt.optim.Scheduler(optimizer, lambda step: rate(options, step, windows))
    hashes = [hashlib.sha256(np.ascontiguousarray(part)).hexdigest() for part in data[:3]]
    about = {"kind": "word_lm", "options": options, "words": data.vocabulary.words, "hashes": hashes}
    parameters = sum(p.size for p in model.parameters())
    folder = out if resume else command.free_folder("--out", out, OUT)  # now that all else is seen to fit
    print(
        f"{len(data.train):,} words to train on, {len(data.valid):,} to choose by, {len(data.test):,} to test; "
        f"{len(data.vocabulary):,} different; {parameters:,} parameters",
        flush=True,
    )
    picture = Path(folder) / "curves.png"
    with tt.train.Run(folder, model, optimizer, scheduler, about=about, resume=resume) as run:
        for _ in run.epochs(options["epochs"]):
            run.carried = None
            for inputs, targets in run.batches(list(tt.data.windows(columns, options["window"]))):
                logits, state = model(inputs, run.carried)
                run.carried = detached(state)
                loss = tt.nn.functional.cross_entropy(logits, targets)
                run.step(loss * len(inputs), nats=loss.item())  # summed over the window, averaged over the rows
            run.validate(lambda: math.exp(tt.generate.nats(model, data.valid, options["batch"], options["window"])))
        run.load_best()
        print(table(model, data, run))
        steps, nats = run.history("nats")
        draw_curves(picture, (steps, np.exp(nats)), run.history("valid"), "perplexity", "log")
    print(f"curves: {picture}")


def table(model: LanguageModel, data: Corpus, run: tt.train.Run) -> str:
    rows = [("uniform", math.log(len(data.vocabulary)), math.log(len(data.vocabulary)))]
    ngrams = tt.data.Ngrams(data.train, 5, len(data.vocabulary))
    first = tt.data.Smoothing("modified Kneser-Ney", np.tile([0.5, 1.0, 1.5, 0.5, 0.0], (5, 1)))
    tuned = ngrams.tune(data.valid, first)
    kneser_ney = -np.log(ngrams.probabilities(data.test, tuned.smoothing)[1:]).mean()
    rows.append(("Kneser-Ney 5-gram", tuned.bits * math.log(2), kneser_ney))
    for which in ("best", "last"):
        model.load_state_dict(tt.train.load(run.folder, which)["model"])
        name = f"LSTM, epoch {run.best.epoch + 1 if which == 'best' else run.epoch}"
        rows.append((name, tt.generate.nats(model, data.valid), tt.generate.nats(model, data.test)))
    lines = [f"{name:20}{math.exp(valid):9.2f} {math.exp(test):9.2f}" for name, valid, test in rows]
    return "\n".join(["perplexity, one stream     valid      test", *lines, f"{run.seconds:,.0f} s of training"])


def train_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m models.word_lm", description="Train a word language model.")
    for name in FILES:
        parser.add_argument(f"--{name}", metavar="FILE", help="all three, or Python's help texts")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default small")
    parser.add_argument("--out", metavar="FOLDER", help=f"a new one; default {OUT}")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with a run")
    command.add_settings(parser, SHARED | PRESETS["small"], {"vocabulary": 4, "decay": 1e-3, "clip": 1e-9})
    given = vars(parser.parse_args(arguments))
    changed = {name: value for name, value in given.items() if value is not None and name not in ("out", "resume")}
    if given["resume"] is not None:
        if changed != {"preset": "small"}:
            raise tt.InputError("--resume: a run goes on as it was started.", "leave the other options out.")
        options = trained(given["resume"], "word_lm")["about"]["options"]
    else:
        options = dict.fromkeys(FILES) | SHARED | PRESETS[given["preset"]] | changed
        if 0 < sum(options[name] is not None for name in FILES) < 3:
            raise tt.InputError("--train, --valid, --test: not all are given.", "give three files, or none.")
        for name in FILES:
            options[name] = options[name] and str(Path(options[name]).resolve())
    resume = given["resume"] is not None
    train(options, given["resume"] if resume else given["out"], resume)


def prepare_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m models.word_lm prepare", description="Make a corpus of a text.")
    parser.add_argument("text", help="in UTF-8")
    parser.add_argument("folder", help="gets train.txt, valid.txt and test.txt")
    given = parser.parse_args(arguments)
    parts = cut(tt.data.split_words(tt.data.read_text(given.text)))
    folder = Path(command.free_folder("folder", given.folder, ""))
    for name, part in zip(FILES, parts, strict=True):
        place = folder / f"{name}.txt"
        place.write_text(part, "utf-8")
        print(f"{place}: {sum(1 for _ in tt.data.words(part.splitlines())):,} words")


def load(folder: str) -> tuple[LanguageModel, tt.data.WordVocabulary]:
    saved = trained(folder, "word_lm")
    vocabulary = tt.data.WordVocabulary(saved["about"]["words"])
    model = build(saved["about"]["options"], len(vocabulary))
    model.load_state_dict(saved["model"])
    return model, vocabulary


def score_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m models.word_lm score", description="The perplexity of a file.")
    parser.add_argument("folder", help="what training made")
    parser.add_argument("file", help="words with spaces between them")
    given = parser.parse_args(arguments)
    model, vocabulary = load(given.folder)
    tokens = vocabulary.encode(tt.data.words(tt.data.read_lines(given.file)))
    if len(tokens) < 2:
        raise tt.InputError(f"file: {given.file!r} has {len(tokens)} words.", "at least 2 are needed.")
    perplexity, unknown = math.exp(tt.generate.nats(model, tokens)), tokens == vocabulary.encode(["<unk>"])[0]
    print(f"perplexity {perplexity:.2f} on {len(tokens):,} words, {unknown.mean():.1%} of them unknown")


def sample_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m models.word_lm sample", description="Let a trained model write.")
    parser.add_argument("folder", help="what training made")
    parser.add_argument("--prompt", default="", help="what it goes on from; unknown words are mapped to <unk>")
    parser.add_argument("--length", type=number(int, 0), default=100, help="in words; default %(default)s")
    sampling(parser)
    given = parser.parse_args(arguments)
    model, vocabulary = load(given.folder)
    prompt = ["<eos>", *given.prompt.split()]
    tokens = written(model, vocabulary.encode(prompt), given.length, given)
    print(" ".join(chain(prompt[1:], vocabulary.decode(tokens))).replace(" <eos>", "\n").replace("<eos>", ""))


def main(arguments: Sequence[str]) -> None:
    commands: dict[str, Any] = {"prepare": prepare_command, "score": score_command, "sample": sample_command}
    chosen = commands.get(arguments[0]) if arguments else None
    if chosen is None:
        command.run(train_command, arguments)
    else:
        command.run(chosen, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
