"""A hash of the source that makes a number: changed code invalidates the cells that ran it, and no others."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

OURS = ("linbench.mechanisms", "linbench.inputs", "linbench.measure", "linbench_kernels")
"""Packages of ours whose code makes numbers. The contracts (cell, record) are versioned by the schema instead."""


def source_hash(modules: Iterable[str]) -> str:
    """Hash of modules and of everything in their own packages that they import, without comments and docstrings."""
    seen: set[str] = set()
    for module in modules:
        _collect(module, seen)
    parts = [f"{module}:{_module_hash(path)}" for module in sorted(seen) if (path := _path(module))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _collect(module: str, seen: set[str]) -> None:
    path = _path(module)
    if module in seen or path is None:
        return
    seen.add(module)
    for imported in _imports(path, module):
        if _belongs(imported, module):
            _collect(imported, seen)


def _belongs(imported: str, importer: str) -> bool:
    top = importer.partition(".")[0]
    if imported.partition(".")[0] == "linbench":
        return imported.startswith(OURS)
    return imported.partition(".")[0] == top or imported.startswith(OURS)


@lru_cache(maxsize=1024)
def _path(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@lru_cache(maxsize=1024)
def _imports(path: Path, module: str) -> tuple[str, ...]:
    """Names that may be modules: ``from a import b`` gives both ``a`` and ``a.b``."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            names.extend([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return tuple(dict.fromkeys(names))


@lru_cache(maxsize=1024)
def _module_hash(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_docstring(part)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
