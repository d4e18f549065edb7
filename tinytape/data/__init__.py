"""Data for recurrent networks: text as characters, and the n-gram models to compare a network with."""

from .held_out import HeldOut, split_held_out
from .ngram import NgramResult, Ngrams, Smoothing, best_ngrams
from .text import Vocabulary, default_text, read_text, streams, windows

__all__ = [
    "HeldOut",
    "NgramResult",
    "Ngrams",
    "Smoothing",
    "Vocabulary",
    "best_ngrams",
    "default_text",
    "read_text",
    "split_held_out",
    "streams",
    "windows",
]
