"""Table of the decoder families of transformers that were tried."""

from __future__ import annotations

import re
from collections import defaultdict

from gpt2.report.table import Table

WORKS = {"direct-capable": "works; its attention can be replaced", "reconstruct-only": "works; its attention can't"}
SHORT = {"direct-capable": "codes read directly", "reconstruct-only": "by reconstruction"}
MODES = [*WORKS, "refused", "not tried", "failed"]
KINDS = {
    "full_attention": "full attention", "sliding_attention": "sliding window", "indexed_attention": "sparse, indexer",
    "linear_attention": "recurrent", "hybrid": "full and recurrent in one", "hybrid_sliding":
    "window and recurrent in one", "dummy": "nothing kept", "unused": "unused by text",
}  # fmt: skip


def architectures(record: dict, words: list[str]) -> Table:
    """Decoder families by result: a row per working mode, and a row per reason for families that don't work.

    words: `layers` for the families that work, by the kinds of layers in their caches; `families` for a row per family.
    """
    make = {"layers": _by_layers, "families": _each}.get(words[0]) if words else _by_result
    works = [row for row in record["rows"] if row["mode"] in WORKS]
    direct = sum(row["mode"] == "direct-capable" for row in works)
    note = (
        f"{len(record['rows'])} families of transformers {record['versions']['transformers']}, each tried as a small "
        f"random model of its default config: {len(works)} work, {direct} of them by reading codes directly."
    )
    return Table(*make(record["rows"]), note)


def _by_result(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    groups: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: MODES.index(row["mode"])):
        label = WORKS.get(row["mode"]) or f"{row['mode']}: {_reason(row)}"
        groups.setdefault(label, []).append(row["model_type"])
    return ["what happens", "families", "which"], [
        [x, str(len(names)), ", ".join(names)] for x, names in groups.items()
    ]


def _by_layers(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: {mode: [] for mode in WORKS})
    for row in rows:
        if row["mode"] in WORKS:
            groups[" + ".join(_kinds(row))][row["mode"]].append(row["model_type"])
    largest = sorted(groups.items(), key=lambda item: -sum(map(len, item[1].values())))
    lines = [[layers, *(f"{len(x)}: {', '.join(x)}" if x else "–" for x in own.values())] for layers, own in largest]
    return ["layers of its cache", *SHORT.values()], lines


def _each(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    lines = [
        [row["model_type"], ", ".join(f"{count} {kind}" for kind, count in _kinds(row).items()) or "–",
         SHORT.get(row["mode"], row["mode"]), _reason(row)]
        for row in rows
    ]  # fmt: skip
    return ["family", "layers of the model tried", "what happens", "reason"], lines


def _kinds(row: dict) -> dict[str, int]:
    """Layers by kind, in words; a latent is cached by full attention or by a sparse one."""
    found = {}
    for kind, word in KINDS.items():
        if count := row.get("layers", {}).get(kind):
            latent = row.get("latent") and kind in ("full_attention", "indexed_attention")
            found["latent" + (", indexer" if kind == "indexed_attention" else "") if latent else word] = count
    return found


def _reason(row: dict) -> str:
    """Why a family doesn't work, or isn't read directly: a failure in full, other reasons without details."""
    reason = row["reason"] or ""
    return reason if row["mode"] == "failed" else re.sub(r": .*| \(.*", "", reason)
