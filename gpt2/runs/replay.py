"""Replay: measure one segment or one prompt of a results file again with the present code, and compare.

Results stay up to date when code changes, as making all of them again takes days. A replay shows in seconds to minutes
whether the present code still gives what a file says: the file's own script runs with the file's arguments, but for
flags that leave one segment or one prompt of each cache, and every figure that both have is compared. The outcome is
noted with the commit in results/replays.json, beside the hash of the results file, so that it counts for no other.

A script that can be replayed has a line in REPLAYS. Times are of their machine and are never replayed; a calibration is
replayed with what was measured with it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt2.common import files, machine, provenance
from gpt2.common.errors import PluginError
from gpt2.experiments import architectures
from gpt2.models import loading
from gpt2.runs.config import Run, RunOptions
from gpt2.runs.up_to_date import REPLAYED, Matcher, replays
from gpt2.tuning import ratio_presets

log = logging.getLogger(__name__)
Figures = dict[str, float]
# Times the tolerance where a file was made on another processor, whose sums have another order: that draws the noise of
# quantization anew. Of one segment's KL at two bits up to 4.6 % were seen, a wrong offset multiplies it
ELSEWHERE = 3
# Nats by which 16 generated tokens may differ. KIVI's prompt is read through its own codes, so that a last bit of
# float32 grows from layer to layer: at 2 bits the same prompt gives −0.45, −0.35 and −0.26 in three batches.
# A wrong offset costs more than 20
GENERATED_NATS = 0.2


@dataclass(frozen=True)
class Replay:
    """How results of one script are replayed.

    flags: from a record to the flags that differ in a replay; {folder} in a value is a folder that is removed
    afterwards. figures: from a record to its figures, by names that are the same in a replay. absolute, relative: a
    replayed figure may differ by `absolute + relative · |recorded|`; other batches change the last bits of float32,
    which may move a value into the next code. reads: from the options and a record to files, relative to the folder of
    results, that the script finds in its output folder; in a replay it finds copies.
    """

    flags: Callable[[dict], dict]
    figures: Callable[[dict], Figures]
    absolute: float
    relative: float
    reads: Callable[[RunOptions, dict], list[Path]] = lambda options, record: []

    def allowed(self, recorded: float, elsewhere: bool = False) -> float:
        """elsewhere: the file was made on another processor (`ELSEWHERE`)."""
        return (self.absolute + self.relative * abs(recorded)) * (ELSEWHERE if elsewhere else 1)


def _answers(record: dict) -> Figures:
    """Log-probability of the answer for each cache and prompt, in nats."""
    keys = ("cache", "task", "context_tokens", "depth", "trial")
    rows = [row | ({"depth": ""} if "task" in row else {}) for row in record["rows"]]  # a task's depth is a result
    return {
        " ".join(str(row[key]) for key in keys if row.get(key, "") != ""): row["answer_logprob_nats"] for row in rows
    }


def _generated(record: dict) -> Figures:
    """Log-probability of the first tokens of the answer for each cache and problem, in nats."""
    return {f"{row['cache']} {row['task_id']}": row["first_tokens_logprob_nats"] for row in record["rows"]}


def _segments(record: dict) -> Figures:
    """Mean loss and KL of the first segment for each cache, in nats per token."""
    return {
        f"{row['label']}, {name} of the first segment": sums[name][0] / sums["predictions"]
        for row in record["rows"] if (sums := row.get("segment_sums")) for name in ("nll", "kl_nats") if name in sums
    }  # fmt: skip


def _of_presets(record: dict) -> Figures:
    """Bits, and mean loss and KL of the first segment, for each preset by ratio."""
    return _segments(record) and _segments(record) | {f"{row['label']}, bits": row["bits"] for row in record["rows"]}


def _calibration(options: RunOptions, record: dict) -> list[Path]:
    """The calibration that a file of presets by ratio was made with."""
    args, slug = record["args"], loading.slug_of(options.model)
    slug += f"_{args['tag']}" if args.get("tag") else ""
    return [Path("calibrations") / ratio_presets.calibration_name(record["calibration"]["codec"], slug)]


def _positions(cells: str, record: dict) -> Figures:
    """KL of the first segment by position for each cache, in nats. cells: `quarters` or `bins`."""
    return {
        f"{row['cache']}, KL of the first segment from {cell['position']}": cell["kl_nats_by_segment"][0]
        for row in record["rows"] for cell in row[cells]
    }  # fmt: skip


def _first_bins(record: dict) -> dict:
    """The first two bins of a long text, whose figures don't depend on what follows."""
    per_bin = record["rows"][0]["bins"][0]["tokens"] // record["segments"][0]
    return {"segments": 1, "greedy-tokens": 0, "context-length": 2 * per_bin + 1, "bins": 2}


def _first_kl(label: str, record: dict) -> Figures:
    """KL of the first segment for each row that has its sums, in nats per token. label: a row's name, of its keys."""
    return {
        f"{label.format(**row)}: KL of the first segment": sums["kl_nats"][0] / sums["predictions"]
        for row in record["rows"] if (sums := row.get("segment_sums"))
    }  # fmt: skip


def _one_segment_of_layers(record: dict) -> dict:
    sums = next(row["segment_sums"] for row in record["rows"] if "segment_sums" in row)
    return {"eval-tokens": sums["predictions"] + 1, "bits": str(min(record["args"]["bits"]))}


def _trials(record: dict) -> Figures:
    """Δ perplexity of each trial of the tuner."""
    return {f"{trial['label']}: Δ perplexity": trial["ppl_delta"] for trial in record["trials"]}


def _one_trial(record: dict) -> dict:
    """The first trial, in a study of its own."""
    first, flags = record["trials"][0], {"study": "{folder}/study.db"}
    if record["args"]["search"] == "grid":
        return flags | {"rank-grid": str(first["rank"]), "bits": str(first["bits"])}
    return flags | {"num-trials": 1, "codecs": first["family"]}


def _as_given(record: dict) -> Figures:
    """KL and Δ perplexity of the run in which nothing is varied."""
    row = record["rows"][0]
    return {f"as given, {name}": row[name] for name in ("kl_nats", "ppl_delta")}


def _families(record: dict) -> Figures:
    """How each family works, as a number, and how far lossless and 4-bit caches move its logits."""
    names = ("identity_logit_change", "int4_logit_change")
    modes = {f"{row['model_type']}, mode": float(architectures.MODES.index(row["mode"])) for row in record["rows"]}
    return modes | {
        f"{row['model_type']}, {name}": row[name]
        for row in record["rows"] for name in names if row.get(name) is not None
    }  # fmt: skip


def _some_families(record: dict) -> dict:
    return {"families": ",".join(row["model_type"] for row in record["rows"][::15])}


def _bytes(record: dict) -> Figures:
    return {f"{row['cache']}, bytes of {row['context_tokens']} tokens": row["bytes"] for row in record["rows"]}


def _on_paper(record: dict) -> Figures:
    """Shortest time of a step for each GPU, in µs."""
    return {f"{row['gpu']}, {row['row']}, {row['context_tokens']} tokens": row["bound_us"] for row in record["rows"]}


def _two_runs(record: dict) -> dict:
    """As given and with one other seed: the script refuses fewer runs than two."""
    return {"num-runs": 2, "vary": "seed", "needle-trials": 1}


def _first(record: dict, *names: str) -> dict:
    """The first of a list that a flag has, for each of some flags."""
    return {name.replace("_", "-"): str(record["args"][name][0]) for name in names}


def _one_segment(record: dict) -> dict:
    return {"eval-tokens": record["segments"][1]}


def _one_of_each_family(record: dict) -> dict:
    """One segment of our caches, and of each other family the first cache that ran: some take minutes each."""
    ran = {row["family"]: row["label"] for row in reversed(record["rows"]) if "segment_sums" in row}
    peers = [ran[family] for family in record["args"]["peers"] if family in ran]
    flags = _one_segment(record) | {"needle-context-lengths": "none"}
    return flags | ({"only-peers": peers} if peers else {})


def _two_tasks(record: dict) -> dict:
    """A prompt of the first and of the last task: each is read by every cache."""
    tasks = record["args"]["tasks"]
    return ONE_PROMPT | _first(record, "context_lengths") | {"tasks": ",".join(dict.fromkeys((tasks[0], tasks[-1])))}


ONE_PROMPT = {"num-trials": 1}
LAYER, VARIATION = "{side} of layer {layer}, {bits} bits", "{question}, {label}, {bits} bits"
# By script; where a flag changes what a script measures, by script and flag
REPLAYS = {
    "eval_long_context_needle": Replay(
        lambda record: ONE_PROMPT | _first(record, "context_lengths", "needle_positions"), _answers, 0.02, 0.01
    ),
    "eval_tasks": Replay(_two_tasks, _answers, 0.02, 0.01),
    "eval_code": Replay(lambda record: {"limit": 1}, _generated, GENERATED_NATS, 0.1),
    "eval_by_position": Replay(
        lambda record: {"segments": 1, "greedy-tokens": 0}, partial(_positions, "quarters"), 1e-5, 0.05
    ),
    "eval_by_position --over": Replay(_first_bins, partial(_positions, "bins"), 1e-5, 0.05),
    "compare_peers": Replay(_one_of_each_family, _segments, 1e-4, 0.02),
    "make_presets": Replay(
        lambda record: _one_segment(record) | {"calibration-file": None}, _of_presets, 1e-4, 0.02, _calibration
    ),
    "validate_ppl_postbugfix": Replay(_one_segment, _segments, 1e-4, 0.02),
    "auto_tune_kv_compression": Replay(_one_trial, _trials, 5e-4, 0.05),
    "auto_tune_kv_compression --layer-ablation": Replay(_one_segment_of_layers, partial(_first_kl, LAYER), 1e-6, 0.1),
    "eval_stability": Replay(_two_runs, _as_given, 1e-4, 0.02),
    "benchmarks/codec_variations": Replay(
        lambda record: _one_segment(record) | _first(record, "bits", "rows"), partial(_first_kl, VARIATION), 1e-5, 0.05
    ),
    "benchmarks/architectures": Replay(_some_families, _families, 1e-4, 0.05),
    "benchmarks/cache_bytes": Replay(lambda record: _first(record, "context_lengths"), _bytes, 0.5, 0),
    "benchmarks/attention --on-paper": Replay(lambda record: {}, _on_paper, 0, 1e-6),
}


def how_to(run: Run) -> Replay | None:
    """How results of a run are replayed; None if they can't be."""
    flagged = (f"{run.script} --{flag}" for flag in run.args)
    return REPLAYS.get(next((name for name in flagged if name in REPLAYS), run.script))


def replay_all(matcher: Matcher, wanted: Sequence[str], say: Callable[[str], None] = print) -> list[str]:
    """Replay those of some runs that can be; returns the names of those that differ or fail.

    say: called with a line on each run, and below it one for each figure that differs.
    """
    wrong = []
    for name in wanted:
        if reason := replayable(matcher, name):
            say(f"{name:<44} not replayed: {reason}")
            continue
        try:
            differing = replay(matcher, name)
        except PluginError as error:
            differing = [str(error)]
        say("\n  ".join([f"{name:<44} {'differs' if differing else 'agrees'}", *differing]))
        wrong += [name] * bool(differing)
    return wrong


def replayable(matcher: Matcher, name: str) -> str | None:
    """Why a run's results can't be replayed; None if they can."""
    run, record = matcher.runs[name], matcher.record(name)
    if record is None:
        return "missing"
    if run.tag is not None:
        return "it measures time, which is of its machine"
    how = how_to(run)
    if how is None:
        return f"results of {run.script}.py have no replay"
    if reason := matcher.stale(name, any_code=True) or matcher.not_allowed(run):
        return reason
    try:
        figures = how.figures(record)
        how.flags(record)
        read = how.reads(matcher.options, record)
    except (KeyError, IndexError, TypeError) as error:
        return f"its record lacks what a replay needs ({type(error).__name__}: {error})"
    if missing := [path for path in read if not (matcher.options.results / path).is_file()]:
        return f"{missing[0]}, which it was made with, isn't there: make it again"
    return None if figures else "made before sums of segments were kept: make it again"


def replay(matcher: Matcher, name: str) -> list[str]:
    """Replay a run's results and note the outcome; returns a line for each figure that differs.

    Raises PluginError if the script fails, or gives no figure of the results file.
    """
    run, record = matcher.runs[name], matcher.record(name)
    how = how_to(run)
    recorded, measured = how.figures(record), how.figures(_small(matcher, run, record))
    both = [key for key in measured if key in recorded]
    if not both:
        raise PluginError(f"{name}: the replay has no figure of the results file")
    elsewhere = _of_another_processor(record)
    allowed = {key: how.allowed(recorded[key], elsewhere) for key in both}
    shares = {key: abs(measured[key] - recorded[key]) / allowed[key] for key in both}
    differing = [
        f"{key} is {measured[key]:.6g}, recorded {recorded[key]:.6g}, allowed ± {allowed[key]:.2g}"
        for key, share in shares.items()
        if not share <= 1  # also NaN
    ]
    _note(matcher, name, {
        "commit": provenance.git_commit(), "agrees": not differing, "figures": len(both),
        "largest_share_of_tolerance": max(shares.values()), "absolute": how.absolute, "relative": how.relative,
        "of_another_processor": elsewhere, "sha256": files.file_sha256(matcher.record_path(name)),
    })  # fmt: skip
    return differing


def _small(matcher: Matcher, run: Run, record: dict) -> dict:
    """The record that a run's script makes with some flags changed, in a folder that is removed afterwards."""
    how = how_to(run)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "runs" / f"{run.name}.json"
        for path in how.reads(matcher.options, record):
            (Path(folder) / path).parent.mkdir(parents=True)
            shutil.copy(matcher.options.results / path, Path(folder) / path)
        given = str(output if Path(run.output).suffix else folder)  # some scripts take the folder of results
        flags = {name: str(value).replace("{folder}", folder) if isinstance(value, str) else value
                 for name, value in how.flags(record).items()}  # fmt: skip
        flags |= _missing_products(matcher, run, Path(folder))
        changed = dataclasses.replace(run, args=run.args | flags, output=given)
        _run_script(matcher, changed, _as_recorded(record), output)
        return json.loads(output.read_text(encoding="utf-8"))


def _missing_products(matcher: Matcher, run: Run, folder: Path) -> dict[str, str]:
    """Flags that name the products of needed runs that aren't there, such as calibrations, made again in a folder."""
    flags = {}
    for need in run.needs:
        other = matcher.runs[need]
        path = matcher.options.fill("{results}/") + other.output
        named = [flag for flag, value in run.args.items() if value == path]
        if named and not matcher.product(need).is_file():
            made = folder / other.output
            log.warning("%s: %s, which it needs, isn't there: making it for this replay alone", run.name, other.output)
            _run_script(matcher, dataclasses.replace(other, output=str(made)), {}, made)
            flags |= dict.fromkeys(named, str(made))
    return flags


def _run_script(matcher: Matcher, run: Run, environment: dict[str, str], output: Path) -> None:
    """Run a run's script; PluginError if it writes no `output`. environment: variables that are set for it."""
    done = subprocess.run(matcher.command(run), capture_output=True, text=True, env=os.environ | environment)
    if not output.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PluginError(f"{run.name}: its script made no results, exit code {done.returncode}: {last}")


def _as_recorded(record: dict) -> dict[str, str]:
    """Environment variables by which this machine computes as the recorded one: its threads, and AVX2 if that was all.

    Another order of sums draws the quantization noise anew, which moves KL of a few hundred tokens by up to a third.
    """
    had = (record.get("machine") or {}).get("instruction_sets") or []
    limits = {"KV_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    lower = "avx2" in had and "avx512f" not in had and "avx512f" in machine.instruction_sets()
    return {"OMP_NUM_THREADS": str(record.get("threads", 1))} | (limits if lower else {})


def _of_another_processor(record: dict) -> bool:
    """Whether a file names another processor than this machine's, its stepping aside; false where it names none."""
    made_on = (record.get("machine") or {}).get("processor")
    return made_on is not None and made_on.partition(", stepping")[0] != machine.processor().partition(", stepping")[0]


def _note(matcher: Matcher, name: str, outcome: dict) -> None:
    folder = matcher.options.results
    files.write_json(folder / REPLAYED, dict(sorted((replays(folder) | {name: outcome}).items())))
