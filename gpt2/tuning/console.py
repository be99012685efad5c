"""What the tuner says while it searches, and what it writes at the end, whichever search found the trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gpt2.common import files
from gpt2.compression.codecs import needs_calibration
from gpt2.compression.presets import build
from gpt2.tuning.grid_search import Trial, percent
from gpt2.tuning.measurement import Search


def print_progress(trials: Sequence[Trial], note: str) -> None:
    last = f"; last {trials[-1].cell}: {percent(trials[-1].ppl_delta)}" if trials else ""
    print(f"tuning: {len(trials)} measured{last}{'; ' + note if note else ''}", flush=True)


def print_refused(failed: Sequence[tuple[Trial, dict]]) -> None:
    for trial, record in failed:
        print(f"{trial.cell} holds on tuning text but not on evaluation text: {percent(record['ppl_delta'])}")


def new_preset(search: Search, best: Trial, calibration_file: str, measured: dict, **more) -> dict:
    """The preset of the best trial. calibration_file: named where its codec needs one. measured: on evaluation text."""
    keys = search.preset_keys(best.cell)
    calibrated = needs_calibration(keys["codec"])
    return build.new_preset(
        search.loaded, search.calibration if calibrated else None, calibration_file if calibrated else "",
        compression_ratio=best.compression_ratio, measured=measured, **keys, **more,
    )  # fmt: skip


def write(preset: dict, output: Path, draw: Callable[[], Figure]) -> None:
    """The preset and its frontier, and say so."""
    picture = files.picture_beside(output)
    files.write_run(output, preset, picture, draw)
    print(f"wrote {output} and {picture}")


def print_chosen(best: Trial, measured: dict) -> None:
    low, high = measured["ppl_delta_interval"]
    print(f"\nchosen: {best.cell}, {best.compression_ratio:.2f}x over the whole KV cache; on evaluation text "
          f"{measured['ppl_delta']:+.2%} perplexity [{low:+.2%}, {high:+.2%}]")  # fmt: skip
