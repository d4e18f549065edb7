"""Data for recurrent networks: text, series, made-up tasks, padding; and the baselines to compare a network with."""

from .accuracy import coverage, mase, pinball, rmse, smape
from .baselines import LinearAR, drift, error_quantiles, naive, seasonal_naive
from .held_out import HeldOut, split_held_out
from .leaks import Leak, LeakReport, audit_leaks
from .ngram import NgramResult, Ngrams, Smoothing, best_ngrams
from .padding import bucket_batches, length_mask, pad_sequences
from .scaling import Scaler
from .series import Series, Split, fill_gaps, read_series, split_in_time
from .series_windows import SeriesWindows, WindowBatch
from .stamps import Grid, calendar_features, find_grid, parse_stamps
from .synthetic import REBER_SYMBOLS, adding, copy_memory, reber, reber_allowed, temporal_order
from .text import Vocabulary, default_text, read_text, streams, windows
from .token_file import map_tokens, read_lines
from .words import WordVocabulary, split_words, words

__all__ = [
    "REBER_SYMBOLS",
    "Grid",
    "HeldOut",
    "Leak",
    "LeakReport",
    "LinearAR",
    "NgramResult",
    "Ngrams",
    "Scaler",
    "Series",
    "SeriesWindows",
    "Smoothing",
    "Split",
    "Vocabulary",
    "WindowBatch",
    "WordVocabulary",
    "adding",
    "audit_leaks",
    "best_ngrams",
    "bucket_batches",
    "calendar_features",
    "copy_memory",
    "coverage",
    "default_text",
    "drift",
    "error_quantiles",
    "fill_gaps",
    "find_grid",
    "length_mask",
    "map_tokens",
    "mase",
    "naive",
    "pad_sequences",
    "parse_stamps",
    "pinball",
    "read_lines",
    "read_series",
    "read_text",
    "reber",
    "reber_allowed",
    "rmse",
    "seasonal_naive",
    "smape",
    "split_held_out",
    "split_in_time",
    "split_words",
    "streams",
    "temporal_order",
    "windows",
    "words",
]
