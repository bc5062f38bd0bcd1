"""The source keeps its bounds: line, function and file lengths, no dead files, no loose ends."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.source_tree import FOLDERS, ROOT, modules, python_files, reachable, relative, tree

LINE_CHARACTERS_MAX = 110
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 400

# Modules that something else than an import statement starts.
ENTRY_POINTS = (
    "tierstore.cli",
    "tierstore.testing.crashes.__main__",
    "tierbench.cli",
    "tierbench.__main__",
)
LOADED_BY_NAME = (
    "tierstore.commands.",
    "tierbench.commands.",
    "tierbench.gpu.sections.",
    "tierstore.kernels.optimizers.",
)

TEXT_FOLDERS = (*FOLDERS, "docs", "proto", ".ci")
TEXT_SUFFIXES = frozenset({".py", ".pyi", ".proto", ".md", ".toml", ".txt", ".json", ""})
MARKS = ("to-do", "fix-me", "x-x-x", "ha-ck")  # spelled so that this file does not hold them
UNFINISHED = re.compile(rf"\b(?:{'|'.join(m.replace('-', '').upper() for m in MARKS)})\b")
PRAGMA = re.compile(r"\s*# (?:type: ignore|noqa).*$")  # cannot be broken, so it does not count
OWN_MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|workspace|mnt|srv)/")
PACKAGE_INDEX = re.compile(r"(?:index-url|find-links|INDEX_URL|FIND_LINKS)\W{1,3}(?:https?|file):")


def text_files() -> list[Path]:
    """Every text file of ours, code or not."""
    inside = [p for folder in TEXT_FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    top = [ROOT / n for n in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt")]
    return [p for p in [*top, *inside] if p.suffix in TEXT_SUFFIXES and "__pycache__" not in p.parts]


def matches(pattern: re.Pattern[str], files: list[Path], advice: str) -> list[str]:
    return [
        f"{relative(path)}:{number}: {found[0]!r}; {advice}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (found := pattern.search(line))
    ]


def test_lines_are_short() -> None:
    problems = [
        f"{relative(path)}:{number}: {len(line)} characters, at most {LINE_CHARACTERS_MAX}; break the line"
        for path in python_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(PRAGMA.sub("", line)) > LINE_CHARACTERS_MAX
    ]
    assert not problems, "\n".join(problems)


def test_functions_are_short() -> None:
    problems = []
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    problems.append(
                        f"{relative(path)}:{node.lineno}: {node.name} has {lines} lines, "
                        f"at most {FUNCTION_LINES_MAX}; give its parts names of their own"
                    )
    assert not problems, "\n".join(problems)


def test_files_are_short() -> None:
    problems = []
    for path in python_files():
        lines = len(path.read_text().splitlines())
        if lines > FILE_LINES_MAX:
            problems.append(f"{relative(path)}:{lines}: at most {FILE_LINES_MAX} lines; split it by idea")
    assert not problems, "\n".join(problems)


def is_compiled(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d) in ("kernel", "inline_kernel") for d in function.decorator_list)


def addresses_that_outlive(function: ast.FunctionDef) -> Iterator[ast.Attribute]:
    """Where, outside of loops, the address of an array is taken that this function has made."""
    looped = {
        id(n) for loop in ast.walk(function) if isinstance(loop, ast.For | ast.While) for n in ast.walk(loop)
    }
    made = {
        name.id
        for assignment in ast.walk(function)
        if isinstance(assignment, ast.Assign) and re.search(r"\bnp\.", ast.unparse(assignment.value))
        for target in assignment.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and id(node) not in looped:
            array, _, attribute = ast.unparse(node).partition(".")
            if array in made and attribute == "ctypes.data":
                yield node


def test_kernels_keep_the_arrays_whose_addresses_they_use() -> None:
    """numba frees an array after the last mention of its name; an address from before a loop dangles."""
    problems = [
        f"{relative(path)}:{address.lineno}: {ast.unparse(address)}; take the address where it is used, and "
        "mention the array again behind that"
        for path in python_files()
        if not relative(path).startswith("tests") and {"kernels", "arena"}.intersection(path.parts)
        for function in ast.walk(tree(path))
        if isinstance(function, ast.FunctionDef) and is_compiled(function)
        for address in addresses_that_outlive(function)
    ]
    assert not problems, "\n".join(problems)


def test_every_module_says_what_it_is() -> None:
    problems = [
        f"{relative(path)}:1: no docstring; say in one line what this module is"
        for path in python_files()
        if tree(path).body and not ast.get_docstring(tree(path))
    ]
    assert not problems, "\n".join(problems)


def test_no_file_is_dead() -> None:
    starts = [
        name
        for name, path in modules().items()
        if name in ENTRY_POINTS
        or name.startswith(LOADED_BY_NAME)
        or path.name.startswith(("test_", "conftest"))
    ]
    dead = sorted(set(modules()) - reachable(starts))
    problems = [
        f"{relative(modules()[name])}:1: nothing imports {name}; use it or delete it" for name in dead
    ]
    assert not problems, "\n".join(problems)


def test_nothing_is_left_unfinished() -> None:
    problems = matches(UNFINISHED, python_files(), "finish it, or file an issue and remove the mark")
    assert not problems, "\n".join(problems)


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    problems = matches(OWN_MACHINE, text_files(), "a path of somebody's machine; make it a parameter")
    problems += matches(PACKAGE_INDEX, text_files(), "a package index; say what to set, not which host")
    assert not problems, "\n".join(problems)
