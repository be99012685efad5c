"""The tuner's two searches, from the arguments of its script to trials: of one codec's grid, and of all codecs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpt2.common import files, provenance
from gpt2.compression.calibration.reuse import obtain_calibration
from gpt2.compression.codecs import basis_of
from gpt2.compression.presets import calibration_lookup
from gpt2.tuning import codec_search, console, grid_search, search_space
from gpt2.tuning.measurement import Search

Found = tuple[Search, list[grid_search.Trial], str, str, dict]


def search_grid(args, loaded, text, output: Path, inputs: dict, show_layers: Callable) -> Found | None:
    """The search, its trials, the calibration as a preset names it, advice for an empty hand, and more preset keys.

    inputs: `tuning` and `evaluation` segments, and `bar`, as `Search` takes them. show_layers: called with the rows of
    a layer ablation, the file that has them, and a title.
    """
    cells = grid_search.grid(args.rank_grid, args.bits, loaded.geometry.head_dim, args.codec)
    basis = basis_of(args.codec)
    metric = basis.metric if basis.calibrated else None
    parts, calibration_file = measured_with(args, loaded, text, output, inputs, metric, cells[0].rank)
    search = Search(**parts)
    study_name = grid_search.study_name(search.key(text.sha256("tuning")))
    if args.layer_ablation or args.per_layer:
        beside = args.study.parent / f"layer_ablation_{loaded.slug}_{study_name[-8:]}.json"
        ablation = args.output if args.layer_ablation and args.output else beside
        made = provenance.provenance(args, text=text.name, text_sha256={"tuning": text.sha256("tuning")})
        rows = search.ablate(cells, ablation, text.sha256("tuning"), made)
        show_layers(rows, ablation, f"{args.model}: one layer compressed at a time, {text.name}")
        if args.layer_ablation:
            return None
        cells += search.per_layer(rows, args.target_ppl_delta)
    study = grid_search.open_study(args.study, study_name)
    trials = grid_search.run_grid(study, args.study, cells, search.evaluate, console.print_progress)
    return search, trials, calibration_file, grid_search.ADVICE, {}


def search_codecs(args, loaded, text, output: Path, inputs: dict) -> Found:
    """As `search_grid`."""
    budget, head_dim = args.target_ppl_delta, loaded.geometry.head_dim
    metric = search_space.metric_for(args.codecs or search_space.default_families())
    parts, calibration_file = measured_with(args, loaded, text, output, inputs, metric, head_dim)
    recent = (0, *(args.recent_grid or ()))
    space, left_out = search_space.space_for(parts["calibration"], head_dim, args.codecs, args.rank_grid, recent)
    for family, reason in left_out.items():
        print(f"without {family}: {reason}")
    search = codec_search.CodecSearch(**parts, space=space, budget=budget)
    study = grid_search.open_study(args.study, grid_search.study_name(search.key(text.sha256("tuning"))))
    trials = codec_search.run_search(
        study, args.study, space, budget, search.ratio, search.evaluate, num_trials=args.num_trials, seed=args.seed,
        report=console.print_progress,
    )  # fmt: skip
    return search, trials, calibration_file, codec_search.ADVICE, {"skipped": codec_search.skipped_records(study)}


def measured_with(args, loaded, text, output: Path, inputs: dict, metric: str | None, rank: int) -> tuple[dict, str]:
    """Arguments that both searches have, and how the preset names its calibration; none where no `metric` is needed."""
    for path in (output, files.picture_beside(output)):
        files.check_writable(path)  # now, and not after an hour
    names = ("target", "codec", "sink_tokens", "chunk", "batch_size", "seed")
    parts = {name: getattr(args, name) for name in names} | inputs | {"calibration": None, "loaded": loaded}
    if metric is None:
        return parts, ""
    parts["calibration"], path = obtain_calibration(
        loaded, text, given=args.calibration, rank=rank, samples=args.samples, seq_len=args.seq_len, seed=args.seed,
        sink_tokens=args.sink_tokens, metric=metric, progress=inputs["bar"]("calibrating", "seq"),
    )  # fmt: skip
    return parts, calibration_lookup.reference_to(path, output)
