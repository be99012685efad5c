"""One run of the tuner, from its script's arguments to a preset: both searches and their messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gpt2.common import files, provenance
from gpt2.common.errors import PluginError
from gpt2.common.trial_queue import TrialQueue
from gpt2.compression.calibration.reuse import obtain_calibration
from gpt2.compression.codecs import basis_of
from gpt2.compression.presets import build, calibration_lookup
from gpt2.models.loading import LoadedModel
from gpt2.text.texts import Text
from gpt2.tuning import codec_search, grid_search, search_space
from gpt2.tuning.measurement import Search
from gpt2.tuning.trials import Trial, confirm_best, percent


@dataclass
class Job:
    """The inputs of both searches.

    args: of the script. tuning, evaluation: token segments [n, T] of two parts of `text`. output: the preset's file.
    bar: as for `Search`.
    """

    args: object
    loaded: LoadedModel
    text: Text
    tuning: Tensor
    evaluation: Tensor
    output: Path
    bar: Callable

    def measured_with(self, metric: str | None, rank: int) -> tuple[dict, str]:
        """Arguments for both searches, and the calibration file's name for presets.

        A calibration with this metric is found, or made with this default rank. With None as the metric there is no
        calibration, and the name is "".
        """
        for path in (self.output, files.picture_beside(self.output)):
            files.check_writable(path)  # before an hour of work, not after it
        args = self.args
        given = ("chunk", "batch_size", "seed", "context_length")
        parts = {name: getattr(args, name) for name in given} | {"loaded": self.loaded, "bar": self.bar}
        parts |= {"tuning": self.tuning, "evaluation": self.evaluation, "calibration": None}
        if metric is None and args.calibration:
            raise PluginError(
                f"--calibration {args.calibration}: no codec of this search takes a calibration: leave the flag out, "
                "or name codecs that take one"
            )
        if metric is None:
            return parts, ""
        parts["calibration"], path = obtain_calibration(
            self.loaded, self.text, given=args.calibration, rank=rank, samples=args.samples, seq_len=args.seq_len,
            seed=args.seed, sink_tokens=args.sink_tokens, metric=metric, progress=self.bar("calibrating", "seq"),
        )  # fmt: skip
        return parts, calibration_lookup.reference_to(path, self.output)

    def study_name(self, search: Search) -> str:
        """The study's name. The same search has the same name and resumes; another search starts a new study."""
        key = json.dumps(search.key(self.text.sha256("tuning")), sort_keys=True)
        return "auto-tune-" + hashlib.sha256(key.encode()).hexdigest()[:16]


@dataclass
class Found:
    """The trials of a search.

    resumed: whether an earlier run made some of them. calibration_file: its name for presets. advice: text for the case
    that no trial is within the budget. more: further keys of the preset.
    """

    search: Search
    trials: list[Trial]
    resumed: bool
    calibration_file: str
    advice: str
    more: dict

    @property
    def records(self) -> list[dict]:
        """The trials as results files and presets have them."""
        return [trial.record() for trial in self.trials]


def search_grid(job: Job, show_layers: Callable[[list[dict], Path, str], None]) -> Found | None:
    """Search one codec's grid. Returns None if only a layer ablation was wanted.

    show_layers: called with the rows of a layer ablation, the file that has them, and a title.
    """
    args = job.args
    widths = [shape.width for _, side, shape in job.loaded.geometry.sides() if side in args.target]
    cells = grid_search.grid(args.rank_grid, args.bits, min(widths), args.codec)  # latent attention: V is narrower
    basis = basis_of(args.codec)
    parts, calibration_file = job.measured_with(basis.metric if basis.calibrated else None, cells[0].rank)
    search = grid_search.GridSearch(**parts, target=args.target, codec=args.codec, sink_tokens=args.sink_tokens)
    name = job.study_name(search)
    if args.layer_ablation or args.per_layer:
        folder = args.study.parent if isinstance(args.study, Path) else files.RESULTS / "studies"
        beside = folder / f"layer_ablation_{job.loaded.slug}_{name[-8:]}.json"
        path, text_sha256 = args.output if args.layer_ablation and args.output else beside, job.text.sha256("tuning")
        made = provenance.provenance(args, text=job.text.name, text_sha256={"tuning": text_sha256})
        rows = search.ablate(cells, path, text_sha256, made)
        show_layers(rows, path, f"{args.model}: one layer compressed at a time, {job.text.name}")
        if args.layer_ablation:
            return None
        cells += search.per_layer(rows, args.target_ppl_delta)
    queue = TrialQueue(args.study, name)
    resumed = bool(queue.trials())
    trials = grid_search.run_grid(queue, cells, search.evaluate, print_progress)
    return Found(search, trials, resumed, calibration_file, grid_search.ADVICE, {})


def search_codecs(job: Job) -> Found:
    """Search all codecs, or those of --codecs."""
    args, widths = job.args, {shape.width for _, _, shape in job.loaded.geometry.sides()}
    head_dim = min(widths)
    metric = search_space.metric_for(args.codecs or search_space.default_families())
    parts, calibration_file = job.measured_with(metric, head_dim)
    recent = (0, *(args.recent_grid or ()))
    space, left_out = search_space.space_for(parts["calibration"], head_dim, args.codecs, args.rank_grid, recent,
                                             mixed=len(widths) > 1)  # fmt: skip
    for family, reason in left_out.items():
        print(f"note: {family} is left out: {reason}")
    search = codec_search.CodecSearch(**parts, space=space, budget=args.target_ppl_delta)
    queue = TrialQueue(args.study, job.study_name(search))
    resumed = bool(queue.trials())
    trials = codec_search.run_search(
        queue, space, search.budget, search.ratio, search.evaluate, num_trials=args.num_trials, seed=args.seed,
        report=print_progress,
    )  # fmt: skip
    skipped = {"skipped": codec_search.skipped_records(queue)}
    return Found(search, trials, resumed, calibration_file, codec_search.ADVICE, skipped)


def choose(job: Job, found: Found, name: str) -> tuple[dict, Trial]:
    """The preset of the best trial that is within the budget on evaluation text too, and the trial; prints both.

    Raises BudgetNotMet if there is none.
    """
    search, budget, text = found.search, job.args.target_ppl_delta, job.text
    best, measured, failed = confirm_best(found.trials, budget, search.confirm, found.advice)
    for trial, record in failed:
        print(f"{trial.candidate} is within the budget on tuning text but not on evaluation text: "
              f"{percent(record['ppl_delta'])}")  # fmt: skip
    low, high = measured["ppl_delta_interval"]
    print(f"\nchosen: {best.candidate}, {best.compression_ratio:.2f}x over the whole cache; on evaluation text "
          f"{measured['ppl_delta']:+.2%} perplexity [{low:+.2%}, {high:+.2%}]")  # fmt: skip
    keys = search.preset_keys(best.candidate)
    calibrated = basis_of(keys["codec"]).calibrated
    preset = build.new_preset(
        job.loaded, search.calibration if calibrated else None, found.calibration_file if calibrated else "",
        compression_ratio=best.compression_ratio, measured=measured, name=name, **keys, **found.more,
        **search.context_keys(),
        trials=found.records,
        refused_on_evaluation_text=[{"label": str(trial.candidate)} | record for trial, record in failed],
        provenance=provenance.provenance(
            job.args, text=text.name, text_sha256=text.sha256("evaluation"), wall_s=provenance.taken(found.resumed)
        ),
    )  # fmt: skip
    return preset, best


def print_progress(trials: Sequence[Trial], note: str) -> None:
    """Print a line on the latest trial. note: appended unless ""."""
    last = f"; last {trials[-1].candidate}: {percent(trials[-1].ppl_delta)}" if trials else ""
    print(f"tuning: {len(trials)} measured{last}{'; ' + note if note else ''}", flush=True)
