"""A preset's calibration: where its file is, whether it is the right one, and how it is made again."""

from __future__ import annotations

import functools
import os
import re
import shlex
from pathlib import Path

from gpt2.common.errors import BadArtefact, CalibrationNotFound, brief
from gpt2.compression.calibration.file import calibration_folders, load_calibration
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.codecs import takes_gradients
from gpt2.compression.presets.schema import Preset
from gpt2.models.loading import LoadedModel

# Words alone, nothing that a shell would take apart, and written only where calibrations are
COMMAND = r"python scripts/(calibrate_kv_lowrank|make_presets)\.py"
COMMAND += r"(?= |$)(?: (?!--(?:output|study)\b)[\w./:,+=~'-]+)*(?: --output results/calibrations/[\w.-]+)?"
LONGEST_COMMAND = 1000


def calibration_of(preset: Preset, model: LoadedModel | None = None) -> Calibration:
    """A preset's calibration, found and checked against the preset and the model."""
    path = find_calibration(preset)
    stat = path.stat()
    calibration = read_calibration(path.resolve(), stat.st_mtime_ns, stat.st_size)
    check_calibration(calibration, preset, path, model)
    return calibration


@functools.lru_cache(maxsize=2)
def read_calibration(path: Path, changed_ns: int, size: int) -> Calibration:
    """A calibration file, read once as long as it is the same."""
    return load_calibration(path)


def made_by(meta: dict, calibration_file: str) -> str:
    """The command that makes a calibration again from its metadata."""
    words = {"model": meta["model"], "rank": meta["rank"], "samples": meta["samples"], "seq-len": meta["seq_len"]}
    words |= {"seed": meta["seed"], "sink-tokens": meta["sink_tokens"], "text": meta["text_spec"]}
    metric = meta.get("metric")
    if metric and takes_gradients(metric):  # codecs may need them beside the file's own, which may not
        words["metric"] = metric
    output = calibration_folders()[0] / Path(calibration_file).name
    flags = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in words.items())
    return f"python scripts/calibrate_kv_lowrank.py {flags} --output {shlex.quote(str(output))}"


def check_calibration(calibration: Calibration, preset: Preset, path: Path, model: LoadedModel | None) -> None:
    """Raise BadArtefact where a calibration isn't of the preset's model, or of the model that is about to run."""
    for key in ("head_dim", "num_layers"):
        if calibration.meta[key] != getattr(preset, key):
            raise BadArtefact(
                f"{path}: field 'meta.{key}': the preset for {preset.model} expects {getattr(preset, key)}, "
                f"found {calibration.meta[key]}: calibrate that model"
            )
    _check_layers(calibration, preset, path)
    for key, value in preset.record.get("calibrated_with", {}).items():
        if calibration.meta.get(key) != value:
            raise BadArtefact(
                f"{path}: field 'meta.{key}': the preset was measured with {brief(value)}, found "
                f"{brief(calibration.meta.get(key))}: the file was made anew; make it as it was: {_remedy(preset)}"
            )
    if model is not None:
        calibration.check_model(model, str(path))


def _check_layers(calibration: Calibration, preset: Preset, path: Path) -> None:
    """Raise BadArtefact, naming the first, where a calibration's layers differ from those that a preset says."""
    if preset.says_layers and (difference := preset.geometry.difference(calibration.geometry)):
        raise BadArtefact(f"{path}: {difference}, by the preset for {preset.model}: calibrate that model")


def find_calibration(preset: Preset) -> Path:
    """A preset's calibration file: as given, beside the preset, in results/calibrations.

    Raises CalibrationNotFound with the places tried and the command that makes it.
    """
    try:
        given = Path(preset.calibration_file).expanduser()
    except RuntimeError:  # of ~NAME, where no such user exists
        given = Path(preset.calibration_file)
    beside = [] if preset.folder is None else [Path(preset.folder) / given, Path(preset.folder) / given.name]
    places = [given, *beside]
    places += [folder / given.name for folder in calibration_folders()]
    for place in dict.fromkeys(places):
        if _is_file(place):
            return place
    raise CalibrationNotFound(
        f"Calibration file not found: {given}. Looked at: {', '.join(str(place) for place in dict.fromkeys(places))}. "
        f"Give its full path as preset['calibration_file'], or make it: {_remedy(preset)}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file's
        return False


def _remedy(preset: Preset) -> str:
    """The command that makes a preset's calibration; people run what is printed, so one of ours and nothing else."""
    made_by, codec = str(preset.record.get("made_by")), preset.record["codec"]
    if len(made_by) < LONGEST_COMMAND and re.fullmatch(COMMAND, made_by):
        return preset.record["made_by"]
    words = ["--model", preset.model, "--rank", str(preset.record["rank"])]
    words += [] if codec == "pca" else ["--codec", codec]
    output = calibration_folders()[0] / Path(preset.calibration_file).name
    return f"python scripts/calibrate_kv_lowrank.py {shlex.join([*words, '--output', str(output)])}"


def reference_to(calibration: Path, preset_path: Path) -> str:
    """How a preset names its calibration so that the look-up finds it, also after both folders move together."""
    if calibration.resolve().parent in [folder.resolve() for folder in calibration_folders()]:
        return calibration.name
    return os.path.relpath(calibration.resolve(), preset_path.resolve().parent)
