"""Checks of derivatives: against finite differences, and of all ways to compute a gradient against each other."""

from .agreement import Agreement, Pair, agree
from .gradients import check_grads

__all__ = ["Agreement", "Pair", "agree", "check_grads"]
