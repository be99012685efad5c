"""Results files of runs whose scripts write something else: a calibration, or a preset."""

from __future__ import annotations

import json

from gpt2 import results
from gpt2.compression.calibration_file import load_calibration
from gpt2.errors import PluginError
from gpt2.reproduce.config import Run
from gpt2.reproduce.match import Matcher


def write_record(matcher: Matcher, run: Run) -> None:
    """Write runs/NAME.json of a run whose product is another file, with the product's sha256; nothing where it isn't.

    Of a preset it is what the preset says, its provenance at the top; of a calibration its metadata.
    """
    product, path = matcher.product(run.name), matcher.record_path(run.name)
    if product == path or not product.is_file():
        return
    if product.suffix == ".json":
        record = json.loads(product.read_text(encoding="utf-8"))
        if "provenance" not in record:
            raise PluginError(
                f"{results.shown(product)} doesn't say what it was made from: give the run another output"
            )
        record |= record.pop("provenance")
    else:
        meta = load_calibration(product).meta
        script = matcher.setting.checkout / "scripts" / f"{run.script}.py"
        record = results.provenance(
            matcher.parsed(run), code_sha256=results.code_sha256(script), text=meta["text"],
            text_sha256={"calibration": meta["text_sha256"]}, calibration=meta,
        )  # fmt: skip
    results.write_json(path, record | {"sha256": results.file_sha256(product)})
