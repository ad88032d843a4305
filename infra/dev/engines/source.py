"""Reads tables and functions in the source of an engine, from a wheel or an installed package, without importing it."""

from __future__ import annotations

import ast
import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Source:
    """The files of a package. `place`: a wheel, or the folder in which the package's folder is."""

    place: Path
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The version that a wheel's name or the folder beside the package says; empty if nothing does."""
        if self.place.is_file():
            return self.place.name.split("-")[1]
        return ""

    def tree(self, file: str) -> ast.Module | None:
        """Parse a file of the package, as `sglang/srt/server.py`; None if it is not there."""
        if file not in self._trees:
            text = self._read(file)
            self._trees[file] = None if text is None else ast.parse(text)
        return self._trees[file]

    def _read(self, file: str) -> str | None:
        if self.place.is_dir():
            path = self.place / file
            return path.read_text(encoding="utf-8") if path.is_file() else None
        with zipfile.ZipFile(self.place) as wheel:
            try:
                return wheel.read(file).decode("utf-8")
            except KeyError:
                return None

    def table(self, file: str, name: str, where: str = "") -> frozenset[str] | None:
        """Return the entries of a table: keys of a dict, elements of a set, list, tuple or Literal, as expressions.

        `name`: a name of the module, or `Class.NAME`. What `NAME.update({...})` adds counts where the condition calls
        the function `where`, as is_cuda. None if there is no such table.
        """
        tree = self.tree(file)
        parent, _, own = name.rpartition(".")
        scope = tree if not parent or tree is None else _definition(tree.body, parent.split("."))
        if scope is None:
            return None
        found: frozenset[str] | None = None
        for node in scope.body:
            for value in _assigned(node, own):
                found = (found or frozenset()) | _entries(value)
            if found is not None and isinstance(node, ast.If) and f"{where}()" in ast.unparse(node.test) and where:
                found |= {entry for value in _updates(node, own) for entry in _entries(value)}
        return found

    def digest(self, file: str, name: str) -> str | None:
        """Return a digest of a function's or class's code without comments and docstrings; None if it is not there.

        `name` empty: of the whole file.
        """
        tree = self.tree(file)
        found = tree if tree is None or not name else _definition(tree.body, name.split("."))
        if found is None:
            return None
        for node in ast.walk(found):
            if isinstance(node, Definition | ast.Module) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        return hashlib.sha256(ast.dump(found).encode()).hexdigest()[:16]


def _definition(body: list[ast.stmt], path: list[str]) -> Definition | None:
    """Return the function or class at a path of names, as ["Config", "read"]."""
    for node in body:
        if isinstance(node, Definition) and node.name == path[0]:
            return node if len(path) == 1 else _definition(node.body, path[1:])
    return None


def _assigned(node: ast.stmt, name: str) -> Iterator[ast.expr]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if any(isinstance(target, ast.Name) and target.id == name for target in targets):
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        if node.value is not None:
            yield node.value


def _updates(node: ast.If, name: str) -> Iterator[ast.expr]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and ast.unparse(inner.func) == f"{name}.update":
            yield from inner.args


def _entries(value: ast.expr) -> frozenset[str]:
    """Return the entries of a display, as their source says them. A name in a dict's `**` is kept as `**NAME`."""
    if isinstance(value, ast.Dict):
        pairs = zip(value.keys, value.values, strict=True)
        return frozenset(f"**{ast.unparse(v)}" if key is None else ast.unparse(key) for key, v in pairs)
    if isinstance(value, ast.Subscript):  # Literal[...]
        inner = value.slice
        return frozenset(map(ast.unparse, inner.elts if isinstance(inner, ast.Tuple) else [inner]))
    if isinstance(value, ast.Call) and len(value.args) == 1:  # frozenset({...})
        return _entries(value.args[0])
    return frozenset(map(ast.unparse, value.elts)) if isinstance(value, ast.Set | ast.List | ast.Tuple) else frozenset()
