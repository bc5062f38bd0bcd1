"""What a section's figures are held to."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HOLDS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
NOT_JUDGED = "not judged on a CPU"


@dataclass(frozen=True)
class Bar:
    """`what` in words; `path` finds the figure in the results, keys with dots between them."""

    what: str
    path: str
    sign: str
    bound: float | str

    def judge(self, results: Mapping[str, Any], on_gpu: bool) -> dict[str, Any]:
        """The bar, the figure, and "met", "missed", or why neither."""
        found: Any = results
        for key in self.path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is None:
            verdict = f"missed: there is no {self.path} in the results"
        elif not on_gpu:
            verdict = NOT_JUDGED
        else:
            verdict = "met" if _HOLDS[self.sign](found, self.bound) else "missed"
        return {"what": self.what, "bar": f"{self.sign} {self.bound}", "figure": found, "verdict": verdict}
