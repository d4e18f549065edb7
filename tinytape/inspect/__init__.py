"""Looking into a run: where gradients go, what a truncation loses, what first left the finite numbers."""

from .finding import Finding
from .flow import Flow, flow
from .jacobians import Jacobians, jacobians, lyapunov
from .lags import LagMatrix
from .nonfinite import first_nonfinite
from .shares import Shares, shares
from .truncation_meter import Truncation, truncation

__all__ = [
    "Finding",
    "Flow",
    "Jacobians",
    "LagMatrix",
    "Shares",
    "Truncation",
    "first_nonfinite",
    "flow",
    "jacobians",
    "lyapunov",
    "shares",
    "truncation",
]
