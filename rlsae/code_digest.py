"""Digest of the code that a stage runs, so that a change of code reruns that stage and no other.

Snakemake does not follow imports: each rule passes this digest as a parameter. It covers the stage's module and
everything inside rlsae that it imports, directly or not, and ignores comments, docstrings and layout. Modules that shape
no number are left out: a better message or description must not cost anybody a day of training.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

from rlsae.errors import RlsaeError

PACKAGE = Path(__file__).parent
NEUTRAL = {"config", "expand.py", "errors.py", "progress.py", "artifacts.py", "resumable.py", "layout.py"}
NEUTRAL |= {"sae/figures.py", "sae/hub.py"}
"""Settings reach a stage as parameters of their own; how a stage saves and publishes does not change what it makes; the look
of a figure is not worth training again, and an export is part of no stage."""


def code_digest(*modules: str) -> str:
    """Digest of the import closure of some modules of rlsae.

    Args:
        modules: dotted names relative to the package, `tuning.ppo`; a package stands for all its modules.
    """
    closure: set[Path] = set()
    queue = []
    for module in modules:
        files = _files(module.split("."))
        if not files:
            raise RlsaeError(f"rlsae has no module {module}")
        queue += files
    while queue:
        path = queue.pop()
        if path not in closure and not _is_neutral(path.relative_to(PACKAGE)):
            closure.add(path)
            queue += _parse(path)[1]
    lines = [f"{path.relative_to(PACKAGE).as_posix()} {_parse(path)[0]}" for path in sorted(closure)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _is_neutral(path: Path) -> bool:
    return bool({path.as_posix(), path.parts[0]} & NEUTRAL)


@cache
def _parse(path: Path) -> tuple[str, tuple[Path, ...]]:
    """Digest of one file's code, and the files of the package that it imports."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest(), ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: list[Path] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                imported += _files(name.name.split(".")[1:]) if name.name.startswith("rlsae.") else []
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlsae":
            base = (node.module or "").split(".")[1:]
            for name in node.names:
                imported += _files([*base, name.name]) or _files(base)
    _strip_docstrings(tree)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(imported)


def _files(parts: list[str]) -> list[Path]:
    """The files of a dotted name inside the package: one module, or all of a subpackage with its templates."""
    path = PACKAGE.joinpath(*parts)
    if parts and path.with_suffix(".py").is_file():
        return [path.with_suffix(".py")]
    if parts and path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return []


def _strip_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and _is_text(s.value))]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
