"""What a plug-in's source declares of itself, read without running it.

A listing, or the answer to a request that cannot be met, needs a plug-in's name and metadata alone. Importing the file
for that would import torch first.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Declaration:
    """A decorator's keyword arguments, and the first line of the docstring of the class below it."""

    arguments: Mapping[str, Any]
    summary: str


class _NotConstantError(Exception):
    """An argument says more than a reader of the source can know."""


def read_declaration(module: str, decorator: str, name: str) -> Declaration | None:
    """What the class that `@decorator("name", ...)` registers in this module says; None if only running it would tell.

    Constants may stand in the module itself, or in one that it imports them from.
    """
    tree = _tree(module)
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if not isinstance(call, ast.Call) or _last_name(call.func) != decorator or not call.args:
                continue
            try:
                if _constant(call.args[0], module) != name:
                    continue
                arguments = {k.arg: _constant(k.value, module) for k in call.keywords if k.arg}
            except _NotConstantError:
                return None
            return Declaration(arguments, summary(ast.get_docstring(node)))
    return None


def summary(docstring: str | None) -> str:
    """The first line of a docstring."""
    return (docstring or "").strip().split("\n")[0]


def _tree(module: str) -> ast.Module | None:
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            return None
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError):
        return None  # whoever imports it learns what is wrong


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _constant(node: ast.expr, module: str) -> Any:
    """The value of a literal, of a name bound to one, of float("inf"), or of a display of such."""
    if isinstance(node, ast.Name):
        return _named(node.id, module)
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        kind = {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)]
        return kind(_constant(item, module) for item in node.elts)
    if isinstance(node, ast.Call) and _last_name(node.func) == "float" and len(node.args) == 1:
        return float(_constant(node.args[0], module))
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise _NotConstantError from error


def _named(name: str, module: str) -> Any:
    tree = _tree(module)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _constant(node.value, module)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _named(alias.name, node.module)
    raise _NotConstantError
