"""`tierbench record` knows each benchmark's options."""

from __future__ import annotations

import argparse
import importlib

import pytest
from tierbench.commands.record import BENCHMARKS, LARGE, quick_options


@pytest.mark.parametrize("name", [*BENCHMARKS, *LARGE])
def test_quick_options_are_the_benchmarks_own(name: str) -> None:
    module = importlib.import_module(f"tierbench.commands.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    _, unknown = parser.parse_known_args(["--dir", "x", "--record", "y", *quick_options(name)])
    assert unknown == []
    assert quick_options(name, False) == []
