"""The project's own source as the tests about it see it: modules, imports, and who can be reached."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engram_client", "tierstore", "bench", "tests")
GENERATED = "_pb2.py"


@dataclass(frozen=True)
class Import:
    """One name that a module imports: `from a.b import c` gives "a.b.c" in line `line`."""

    name: str
    line: int
    for_types_only: bool  # under `if TYPE_CHECKING:`, so never executed


def python_files() -> list[Path]:
    """Every .py file of ours that a person wrote."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files, f"no source under {ROOT}"
    return [path for path in files if not path.name.endswith(GENERATED)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """engram_client/wire/__init__.py -> "engram_client.wire"; bench/ itself is no package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "bench" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in python_files()}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=relative(path))


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions too; relative ones are made absolute."""
    in_type_checks = set(_type_checking_nodes(tree(path)))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, node in in_type_checks)


def _type_checking_nodes(module: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(module):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                yield from ast.walk(statement)


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module_name(path).split(".")
    depth = node.level - (path.name == "__init__.py")
    base = package[: len(package) - depth]
    return ".".join([*base, node.module] if node.module else base)


def reachable(starts: Iterable[str]) -> set[str]:
    """Every module that the starts import, directly or not, or name in a string for importlib."""
    seen: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules():
            continue
        seen.add(name)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        waiting += _mentions(modules()[name])
    return seen


def _mentions(path: Path) -> Iterator[str]:
    for found in imports(path):
        yield found.name
        yield found.name.rpartition(".")[0]  # `from module import thing`
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition(":")[0]
