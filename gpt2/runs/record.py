"""Results files for runs whose scripts write a calibration or a preset instead of a results file."""

from __future__ import annotations

import json

from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.calibration.file import load_calibration
from gpt2.runs.config import Run
from gpt2.runs.up_to_date import Matcher


def write_record(matcher: Matcher, run: Run) -> None:
    """Write runs/NAME.json with the product's sha256 for a run whose product is another file; else do nothing.

    For a preset it has the preset's keys and its provenance, for a calibration the calibration's metadata. Raises
    PluginError if the product is neither.
    """
    product, path = matcher.product(run.name), matcher.record_path(run.name)
    if product == path or not product.is_file():
        return
    if product.suffix == ".json":
        record = json.loads(product.read_text(encoding="utf-8"))
        if "provenance" not in record:
            raise PluginError(f"{files.shown(product)} has no `provenance`: a run must write a preset or a calibration")
        record |= record.pop("provenance")
    else:
        meta = load_calibration(product).meta
        record = provenance.provenance(
            matcher.parsed(run), text=meta["text"], text_sha256={"calibration": meta["text_sha256"]}, calibration=meta,
        )  # fmt: skip
    files.write_json(path, record | {"sha256": files.file_sha256(product)})
