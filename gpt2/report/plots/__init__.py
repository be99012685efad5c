"""Figures from results records, one function each. Matplotlib only; no window is ever opened."""

from gpt2.report.plots.by_position import by_position
from gpt2.report.plots.calibration import spectra
from gpt2.report.plots.needle import needles, tasks
from gpt2.report.plots.quality import codec_variations, frontier, peers, perplexity_changes, stability
from gpt2.report.plots.scaling import growth
from gpt2.report.plots.side_by_side import side_by_side
from gpt2.report.plots.speed import append_times, attention_times, profiles, ratios_by_context
from gpt2.report.plots.tuning import codec_frontier, grid_frontier, layer_losses, ratio_presets

__all__ = [
    "append_times",
    "attention_times",
    "by_position",
    "codec_frontier",
    "codec_variations",
    "frontier",
    "grid_frontier",
    "growth",
    "layer_losses",
    "needles",
    "peers",
    "perplexity_changes",
    "profiles",
    "ratio_presets",
    "ratios_by_context",
    "side_by_side",
    "spectra",
    "stability",
    "tasks",
]
