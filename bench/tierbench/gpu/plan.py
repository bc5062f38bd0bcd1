"""Which sections there are, in which order and part, and how long each may take; imports none of them."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from engram_client.errors import BadRequest

FOLDER = Path(__file__).parent / "sections"
FIRST = "copy"  # the device's own bandwidth, which stands in every record
PARTS = {
    1: (FIRST, "hits", "hits_90", "hashing", "ids_to_rows", "storage"),
    2: (FIRST, "bus", "fused", "daemon_arena", "model_step"),
}
PART_LIMIT_S = 570
TIMEOUT_S = 60  # of a section that does not say


def section_files() -> dict[str, Path]:
    """Every section, in the order of the parts; one that no part names comes last."""
    found = {path.stem: path for path in sorted(FOLDER.glob("*.py")) if not path.name.startswith("_")}
    known = [name for names in PARTS.values() for name in names if name in found]
    return {name: found[name] for name in dict.fromkeys([*known, *found])}


def chosen(only: Iterable[str], part: int | None) -> list[str]:
    """Names of the sections to run, the bandwidth first. Raises BadRequest for one that is not there."""
    files = section_files()
    wanted = set(only) or (set(files) if part is None else set(files) - set(PARTS[3 - part]))
    if unknown := sorted(wanted - set(files)):
        raise BadRequest(f"--only: there is no section {unknown}; there are {', '.join(files)}")
    return [name for name in files if name in wanted or name == FIRST]


def timeout_of(name: str) -> float:
    """`TIMEOUT_S` of a section, read without importing it."""
    module = ast.parse(section_files()[name].read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(t) == "TIMEOUT_S" for t in node.targets):
            return float(ast.literal_eval(node.value))
    return TIMEOUT_S
