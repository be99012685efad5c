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


def print_layers(rows: list[dict], path: Path, picture: Path) -> None:
    """The layers that lose most, and a picture of all."""
    print(f"\nlayer by layer, the most sensitive first ({files.shown(path)}, {files.shown(picture)}):")
    for row in sorted(rows, key=lambda row: -row["kl_nats"])[:10]:
        print(f"  layer {row['layer']:2d} {row['side'].upper()}, rank {row['rank']}, {row['bits']} bits: "
              f"KL {row['kl_nats']:.5f} nats, {row['ppl_delta']:+.2%} perplexity")  # fmt: skip


def print_progress(trials: Sequence[Trial], note: str) -> None:
    last = f"; last {trials[-1].cell}: {percent(trials[-1].ppl_delta)}" if trials else ""
    print(f"tuning: {len(trials)} measured{last}{'; ' + note if note else ''}", flush=True)


def print_table(trials: Sequence[Trial], budget: float) -> None:
    """All trials by compression."""
    width = max((len(str(trial.cell)) for trial in trials), default=0)
    width = max(20, width)
    print(f"\n{'configuration':<{width}} {'Δ PPL':>9}  {'95 % interval':>20} {'ratio':>6}  within {budget:+.1%}")
    for trial in sorted(trials, key=lambda t: t.compression_ratio):
        interval = trial.details["ppl_delta_interval"]
        spread = f"[{interval[0]:+8.2%}, {interval[1]:+8.2%}]" if interval else f"{'no finite loss':>20}"
        delta = f"{trial.ppl_delta:+9.2%}" if interval else f"{'':9}"
        inside = "yes" if trial.ppl_delta <= budget else "no"
        print(f"{str(trial.cell):<{width}} {delta}  {spread} {trial.compression_ratio:5.2f}x  {inside}")


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
