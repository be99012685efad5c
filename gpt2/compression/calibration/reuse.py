"""Find a calibration that was made from the same model, text and settings, or make one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from gpt2.common import files, tensor_file
from gpt2.common.errors import BadArtefact
from gpt2.common.schema import Mismatch
from gpt2.compression.calibration.calibrate import calibrate, calibration_key
from gpt2.compression.calibration.file import (
    calibration_folder,
    calibration_folders,
    load_calibration,
    save_calibration,
)
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.codecs import takes_gradients
from gpt2.models.loading import LoadedModel
from gpt2.models.probe import ROTARY, rotary_difference
from gpt2.text.texts import Text


def obtain_calibration(
    loaded: LoadedModel,
    text: Text,
    *,
    given: Path | None,
    output: Path | None = None,
    rank: int,
    samples: int,
    seq_len: int,
    seed: int,
    sink_tokens: int,
    metric: str = "pca",
    checkpointing: bool = False,
    progress=iter,
) -> tuple[Calibration, Path]:
    """The calibration to work with and its file: the one given, else a matching one made before, else a new one.

    Matching is by model, text, samples, length, seed and sinks, and by having what `metric` needs; looked for in
    results/calibrations and the working folder. A new one is written to `output`, by default into results/calibrations
    of this checkout.
    """
    made_from = {"samples": samples, "seq_len": seq_len, "seed": seed, "sink_tokens": sink_tokens}
    needed = {"metric": metric} if takes_gradients(metric) else {}  # the others are always there
    path = given or find_reusable(
        calibration_key(loaded, text, **made_from) | needed, (*calibration_folders(), Path("."))
    )
    if path:
        print(f"calibration: using {files.shown(path)}", flush=True)
        try:
            calibration = load_calibration(path, loaded.spec)
        except BadArtefact as error:
            if given:
                raise
            raise BadArtefact(f"{error}; or move it away, and this command makes another") from error
        calibration.check_model(loaded, str(path))
        return calibration, path
    key = calibration_key(loaded, text, **made_from) | needed
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    path = output or calibration_folder() / f"kv_lowrank_calib_{loaded.slug}_{digest}.pt"
    files.check_writable(path)
    calibration = calibrate(
        loaded, text, rank=rank, metric=metric, checkpointing=checkpointing, progress=progress, **made_from
    )
    return calibration, save_calibration(calibration, path)


def find_reusable(key: dict, places: Iterable[Path]) -> Path | None:
    """The first calibration file in `places`, folders or files, whose metadata has what `key` has.

    Other files are passed over; so are compact ones unless the key asks for them, for they lack most of what is used.
    """
    for path in (path for place in places for path in (_tensor_files(place) if place.is_dir() else [place])):
        try:
            meta = tensor_file.read(path, only="meta")
        except BadArtefact:  # any foreign file may lie in a user's folder; whatever is wrong with it, it isn't ours
            continue
        if isinstance(meta, dict) and _matches(meta, key):
            return path
    return None


def _matches(meta: dict, key: dict) -> bool:
    """Whether a file's metadata have what `key` has; rotary positions only where the file says them, as newer ones do.

    A file from elsewhere may say anything.
    """
    wanted = {"compact": False} | key
    rotary = wanted.pop("rotary", {})
    try:
        different = rotary_difference(ROTARY.parse(meta.get("rotary", {}), ()), rotary)
    except Mismatch:
        return False
    return not different and wanted.items() <= ({"compact": False} | meta).items()


def _tensor_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in tensor_file.SUFFIXES)
