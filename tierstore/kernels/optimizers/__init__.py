"""Optimizers, one a file; all there are, by name."""

from __future__ import annotations

import importlib
import pkgutil

from tierstore.kernels.optimizer import Optimizer


def _found() -> dict[str, Optimizer]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.OPTIMIZER.name: module.OPTIMIZER for module in modules}


OPTIMIZERS: dict[str, Optimizer] = _found()
