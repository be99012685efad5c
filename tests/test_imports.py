"""Which way imports go: down the list of packages, never up, and never in a circle; read off the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2.common import files

# A package may import from itself and from those before it; docs/architecture.md says what each is for
ORDER = (
    "common", "models", "text", "compression.codecs", "compression.kernels", "compression.calibration",
    "compression.settings", "compression.cache", "compression.presets", "compression.compressed_cache",
    "compression.attention", "compression.kv_policies", "compression.named_caches", "evaluation", "experiments",
    "tuning", "report", "runs", "cli",
)  # fmt: skip
# What the package itself needs as soon as any of it is imported
ROOT_NEEDS = {"gpt2.common.interrupts"}


def modules(checkout: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((checkout / "gpt2").rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: set[str]) -> set[str]:
    """Modules of the package that a source imports anywhere: deferred and type-checking imports count."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports aren't read here: write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {whole} if whole in known else {node.module} & known
    return found


def place(module: str) -> int | None:
    """Where in ORDER a module's package is; None for the empty packages around them."""
    name = module.removeprefix("gpt2.")
    return next((i for i, package in enumerate(ORDER) if f"{name}.".startswith(f"{package}.")), None)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a later package, each as a line."""
    return [
        f"{module} imports {other}, which comes after it"
        for module, others in graph.items()
        for other in sorted(others)
        if place(module) is not None and (place(other) is None or place(other) > place(module))
    ]


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of each that a depth-first search meets, as `a -> b -> a`."""
    found, done = [], set()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph[module]):
                visit(other, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


@pytest.fixture(scope="module")
def graph():
    found = modules(files.ROOT)
    return {name: imported(path.read_text(encoding="utf-8"), set(found)) for name, path in found.items()}


def test_every_module_has_a_place(graph):
    allowed = {"gpt2", "gpt2.compression"}
    assert {name for name in graph if place(name) is None} == allowed
    assert graph["gpt2"] == ROOT_NEEDS and not graph["gpt2.compression"]


def test_imports_go_down(graph):
    assert not upward(graph), "\n".join(upward(graph))


def test_there_are_no_cycles(graph):
    assert not cycles(graph), "\n".join(cycles(graph))


def test_an_upward_import_and_a_cycle_are_named():
    """Also where they are deferred into a function, or for type checkers alone."""
    known = {"gpt2.common.errors", "gpt2.common.files", "gpt2.report.table", "gpt2.cli"}
    deferred = "def f():\n    from gpt2.report import table\n"
    typed = "if TYPE_CHECKING:\n    from gpt2.common.errors import PluginError\n"
    graph = {
        "gpt2.common.errors": imported(deferred + "import gpt2.common.files", known),
        "gpt2.common.files": imported(typed, known),
        "gpt2.report.table": set(),
        "gpt2.cli": imported("from gpt2.report.table import Table", known),
    }
    assert upward(graph) == ["gpt2.common.errors imports gpt2.report.table, which comes after it"]
    assert cycles(graph) == ["gpt2.common.errors -> gpt2.common.files -> gpt2.common.errors"]


def test_documents_have_the_same_order():
    """README's tree and the table of docs/architecture.md, read line by line: names without their folders."""
    readme, architecture = (
        (files.ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/architecture.md")
    )
    tree = re.search(r"^gpt2/.*\n((?:  .*\n)+)", readme, re.MULTILINE)[1].splitlines()
    in_tree = [name for line in tree for name in re.findall(r"(\w+)(?:/|\.py)", line.strip().split("  ")[0])]
    rows = re.findall(r"^\| (`.+?`) \|", architecture.split("| package in `gpt2/` |")[1].split("\n\n")[0], re.MULTILINE)
    in_table = [name.split("/")[-1] for row in rows for name in re.findall("`(.+?)`", row)]
    packages = [package.split(".")[-1] for package in ORDER]
    assert [name for name in in_tree if name != "compression"] == in_table == packages


PUBLIC = {
    "gpt2.compression.compressed_cache": "CompressedDynamicCache IdentityCompressor load_calibrated_compressors",
    "gpt2.compression.presets": "get_preset_info create_cache_from_preset",
    "gpt2.compression.kv_policies": "KVPolicyName choose_policy_for_run build_compressor_config_for_policy",
    "gpt2.compression.attention": "enable_compressed_attention disable_compressed_attention",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay(module):
    names = PUBLIC[module].split()
    made = __import__(module, fromlist=names)
    assert set(names) <= set(made.__all__) and all(callable(getattr(made, name)) for name in names)


def test_the_cache_loads_only_what_it_needs():
    """No calibration, no text, no evaluation: in a process of its own, as this one has loaded more."""
    code = "import sys, gpt2.compression.compressed_cache; print(*(m for m in sys.modules if m.startswith('gpt2')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=files.ROOT)
    packages = {ORDER[i] for name in loaded.stdout.split() if (i := place(name)) is not None}
    assert packages <= {"common", "models", "compression.codecs", "compression.kernels", "compression.cache",
                        "compression.compressed_cache"}  # fmt: skip
