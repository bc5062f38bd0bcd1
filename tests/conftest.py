"""Settings of the whole test suite."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.support.daemon import daemon  # noqa: F401
from tests.support.shared_memory import obedient, reattaching_at_once, roomy  # noqa: F401
from tests.support.stores import opened_store, packed  # noqa: F401

settings.register_profile(
    "ci",
    deadline=None,  # no assertion here is about time
    derandomize=True,  # the same examples on every run and machine
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_report_header() -> str:
    profile = settings.get_current_profile_name()
    return f"hypothesis profile: {profile}; HYPOTHESIS_PROFILE=explore searches at random and prints its seed"


@pytest.fixture(autouse=True)
def _no_configuration_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the person who runs the tests has configured is not what the tests are about."""
    for name in [n for n in os.environ if n.startswith("TIERSTORE_") and n != "TIERSTORE_KERNEL_CACHE"]:
        monkeypatch.delenv(name)
