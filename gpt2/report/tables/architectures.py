"""Table of the decoder families of transformers that were tried."""

from __future__ import annotations

import re

from gpt2.report.table import Table

WORKS = {"direct-capable": "works; its attention can be replaced", "reconstruct-only": "works; its attention can't"}
MODES = [*WORKS, "refused", "not tried", "failed"]


def architectures(record: dict, _: list[str]) -> Table:
    """Decoder families by result: a row per working mode, and a row per reason for families that don't work."""
    groups: dict[str, list[str]] = {}
    for row in sorted(record["rows"], key=lambda row: MODES.index(row["mode"])):
        reason = row["reason"] or ""
        if row["mode"] != "failed":  # a failure is shown in full; of other reasons details are left out
            reason = re.sub(r": .*| \(.*", "", reason)
        groups.setdefault(WORKS.get(row["mode"]) or f"{row['mode']}: {reason}", []).append(row["model_type"])
    lines = [[label, str(len(names)), ", ".join(names)] for label, names in groups.items()]
    tried = f"{len(record['rows'])} families of transformers {record['versions']['transformers']}"
    note = f"{tried}, each tried as a small random model of its default config."
    return Table(["what happens", "families", "which"], lines, note)
