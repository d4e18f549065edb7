"""Loops over time, and what to keep of them for the way back."""

from .budget import Plan, plan

__all__ = ["Plan", "plan"]
