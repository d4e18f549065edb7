"""Optimisers with PyTorch's signatures and numerics, clipping that cannot be misplaced, and schedules."""

from . import schedule
from .adam import Adam, AdamW
from .clip import clip_grad_norm_, clip_grad_value_
from .optimizer import Optimizer
from .rmsprop import Adagrad, RMSprop
from .schedule import Scheduler
from .sgd import SGD
from .spike import Replay, Spike
from .telemetry import ClipHistory, ClipMonitor, ClipWarning

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "ClipHistory",
    "ClipMonitor",
    "ClipWarning",
    "Optimizer",
    "RMSprop",
    "Replay",
    "Scheduler",
    "Spike",
    "clip_grad_norm_",
    "clip_grad_value_",
    "schedule",
]
