"""Hypothesis profiles, the skipping of peer tests, and a guard against leaked global state."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

quiet = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=15, **quiet)
settings.register_profile("ci", max_examples=50, derandomize=True, print_blob=True, **quiet)
settings.register_profile("deep", max_examples=2000, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("peer") and find_spec("torch") is None:
        pytest.skip("peer test: torch is not installed")


def global_state():
    """What a test must leave as it found it."""
    from tinytape.engine.tape import here
    from tinytape.engine.tensor import default_dtype

    context = here.context
    return {
        "default dtype": default_dtype(),
        "np.geterr()": np.geterr(),
        **{f"context.{name}": getattr(context, name) for name in type(context).__slots__},
    }


@pytest.fixture(autouse=True)
def no_leak_of_global_state():
    before = global_state()
    yield
    after = global_state()
    assert after == before, {name: after[name] for name in after if after[name] != before[name]}
