"""Which version of the code made a result: a digest of what a script reaches by import, without comments."""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import re
import subprocess
import tarfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

# What only parses flags, draws, writes or collects: it changes no figure, and neither it nor its imports count
PRESENTING = (
    *("gpt2/cli.py", "gpt2/results.py", "gpt2/code_version.py", "gpt2/tabular.py"),
    *("gpt2/plots*.py", "gpt2/tables*.py", "gpt2/report*.py", "gpt2/reproduce/*"),
)
FOLDERS = ("gpt2", "scripts")
KERNELS = (".c", ".cpp", ".cu", ".h")  # compiled at run time by the modules beside them

Sources = Mapping[str, bytes]  # path from the checkout to contents


def digest(sources: Sources, script: str) -> str:
    """One name for the code that a script runs, the same where only comments, docstrings and layout differ."""
    files = module_digests(sources, script)
    return hashlib.sha256("".join(f"{path} {files[path]}\n" for path in sorted(files)).encode()).hexdigest()[:16]


def module_digests(sources: Sources, script: str) -> dict[str, str]:
    """Path to digest of every file behind a script such as `scripts/x.py`, itself included."""
    found, waiting = {}, [script]
    while waiting:
        path = waiting.pop()
        if path in found or path not in sources or any(fnmatch(path, pattern) for pattern in PRESENTING):
            continue
        if path.endswith(KERNELS):
            found[path] = hashlib.sha256(sources[path]).hexdigest()
            continue
        found[path], imported = _parsed(sources[path])
        for name in imported:
            waiting += [f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"]
        folder = PurePosixPath(path).parent
        waiting += [other for other in sources if other.endswith(KERNELS) and PurePosixPath(other).parent == folder]
    return found


@functools.lru_cache(maxsize=4096)
def _parsed(source: bytes) -> tuple[str, frozenset[str]]:
    """Digest of a module without docstrings and comments, and the names that may be modules which it imports."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    packages = {str(parent).replace("/", ".") for name in imported
                for parent in PurePosixPath(name.replace(".", "/")).parents}  # fmt: skip
    ours = {name for name in imported | packages if name.split(".")[0] in FOLDERS}
    # Not ast.dump: what it writes changes with Python's version
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), frozenset(ours)


def working_tree(checkout: Path) -> Sources:
    """The sources as they lie in a checkout now."""
    files = (path for folder in FOLDERS for path in (checkout / folder).rglob("*"))
    return {path.relative_to(checkout).as_posix(): path.read_bytes() for path in files if _is_source(path)}


@functools.lru_cache(maxsize=64)
def committed(checkout: Path, commit: str) -> Sources | None:
    """The sources of a commit by its hash; None where the repository doesn't have it.

    A results file names it, and may be a stranger's: anything else, such as a branch or a flag of git, isn't looked up.
    """
    if not re.fullmatch("[0-9a-f]{4,64}", commit):
        return None
    shown = subprocess.run(("git", "-C", str(checkout), "archive", commit, *FOLDERS), capture_output=True)
    if shown.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(shown.stdout)) as archive:
        members = [member for member in archive if member.isfile() and _is_source(Path(member.name))]
        return {member.name: archive.extractfile(member).read() for member in members}


def _is_source(path: Path) -> bool:
    return path.suffix == ".py" or path.suffix in KERNELS
