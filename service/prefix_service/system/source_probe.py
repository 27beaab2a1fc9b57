"""Finds out whether another package still has the private parts that this project builds on.

The package's source is read, not imported: nothing of it starts, and a module that vanished is reported like a method.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Members = Mapping[str, tuple[str, ...]]
"""By name: fields, and methods with the parameters that they must have."""

Touched = Mapping[str, Mapping[str, Members]]
"""By file and class: the members that are used."""


def missing(name: str, package: Path, touched: Touched) -> list[str]:
    """Returns the parts that the package `name` in this folder lacks, described for people."""
    return [
        part for file, classes in touched.items() for part in _missing_in(package / file, f"{name}/{file}", classes)
    ]


def _missing_in(path: Path, file: str, classes: Mapping[str, Members]) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        yield file
        return
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, members in classes.items():
        if name not in found:
            yield f"{name} ({file})"
            continue
        has = _members(found[name])
        for member, parameters in members.items():
            if member not in has:
                yield f"{name}.{member} ({file})"
            for parameter in parameters:
                if member in has and parameter not in has[member]:
                    yield f"the parameter {parameter} of {name}.{member} ({file})"


def _members(found: ast.ClassDef) -> dict[str, set[str]]:
    """Returns the fields, and the methods with their parameters, that a class has itself."""
    has: dict[str, set[str]] = {}
    for node in ast.walk(found):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            has.setdefault(node.name, set()).update(one.arg for one in named)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
                if isinstance(target, ast.Name | ast.Attribute):
                    has.setdefault(target.id if isinstance(target, ast.Name) else target.attr, set())
    return has
