"""Which way imports go: down the list of packages, never up, and never in a circle; read off the sources."""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from graphlib import TopologicalSorter

import pytest

from gpt2.common import files

# A package may import from itself and from those before it; docs/architecture.md says what each is for
ORDER = (
    "common", "models", "text", "compression.codecs", "compression.kernels", "compression.calibration",
    "compression.settings", "compression.cache", "compression.presets", "compression.compressed_cache",
    "compression.attention", "compression.kv_policies", "compression.named_caches", "evaluation", "experiments",
    "tuning", "report", "runs", "cli",
)  # fmt: skip


def imported(source: str, known: set[str]) -> set[str]:
    """Modules of the package that a source imports anywhere: deferred and type-checking imports count."""
    found, nodes = set(), [ast.parse(source)]
    for node in nodes:  # which grows; no expression has an import in it
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
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


@pytest.fixture
def graph() -> dict[str, set[str]]:
    """Every module of the package by its dotted name, with those that it imports."""
    sources = {}
    for path in sorted((files.ROOT / "gpt2").rglob("*.py")):
        name = ".".join(path.relative_to(files.ROOT).with_suffix("").parts).removesuffix(".__init__")
        sources[name] = path.read_text(encoding="utf-8")
    return {name: imported(source, set(sources)) for name, source in sources.items()}


def test_every_module_has_a_place_and_imports_go_down_and_never_in_a_circle(graph):
    assert {name for name in graph if place(name) is None} == {"gpt2", "gpt2.compression"}
    assert graph["gpt2"] == {"gpt2.common.interrupts"} and not graph["gpt2.compression"]
    assert not upward(graph), "\n".join(upward(graph))
    TopologicalSorter(graph).prepare()  # names a circle


def test_an_upward_import_is_named():
    """Also where it is deferred into a function, or for type checkers alone."""
    deferred = "def f():\n    try:\n        pass\n    except Error:\n        from gpt2.report import table\n"
    for source in (deferred, "if TYPE_CHECKING:\n    import gpt2.report.table\n"):
        graph = {"gpt2.common.errors": imported(source, {"gpt2.report.table"})}
        assert upward(graph) == ["gpt2.common.errors imports gpt2.report.table, which comes after it"]


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
    made, names = importlib.import_module(module), PUBLIC[module].split()
    assert set(names) <= set(made.__all__) and all(callable(getattr(made, name)) for name in names)


def loaded_by(module: str) -> list[str]:
    """Modules of the package that an import loads where none of them is loaded yet."""
    for name in [name for name in sys.modules if name.split(".")[0] == "gpt2"]:
        del sys.modules[name]
    importlib.import_module(module)
    return [name for name in sys.modules if name.startswith("gpt2")]


def test_the_cache_loads_only_what_it_needs():
    """No calibration, no text, no evaluation: in a fork, as this process has loaded more."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fork:
        loaded = fork.submit(loaded_by, "gpt2.compression.compressed_cache").result()
    packages = {ORDER[i] for name in loaded if (i := place(name)) is not None}
    assert packages <= {"common", "models", "compression.codecs", "compression.kernels", "compression.cache",
                        "compression.compressed_cache"}  # fmt: skip
