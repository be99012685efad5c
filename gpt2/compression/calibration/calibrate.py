"""Calibration: what one or two passes over a model leave, and every basis that is fitted to it.

One calibration serves every rank and every basis: it holds the full-rank basis it was fitted with, and the statistics
from which another basis is fitted when it is asked for.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager

import torch
import transformers

from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.calibration.fisher import collect_fisher
from gpt2.compression.calibration.fit import Calibration, fit, geometry_record
from gpt2.compression.calibration.multi_head_fit import fit_multi_head
from gpt2.compression.calibration.statistics import collect
from gpt2.compression.codecs import basis_of, full_rank, multi_head_bases, needs_calibration, takes_gradients
from gpt2.compression.codecs.base import SIDES
from gpt2.compression.codecs.formats import BLOCK
from gpt2.models.loading import LoadedModel
from gpt2.models.probe import rotary, sketch
from gpt2.text.sources import Text

log = logging.getLogger(__name__)
FEW = 4  # tokens for each dimension of a basis; of fewer it fits these tokens rather than the model


@contextmanager
def _on_the_cpu():
    """What is gathered lies there, whatever the caller's default device."""
    with torch.device("cpu"):
        yield


@_on_the_cpu()
def calibrate(
    loaded: LoadedModel,
    text: Text,
    *,
    rank: int,
    samples: int = 100,
    seq_len: int = 1024,
    seed: int = 0,
    sink_tokens: int = 4,
    codec: str = "pca",
    metric: str | None = None,
    compact: bool = False,
    checkpointing: bool = False,
    progress=iter,
    processes: Processes = ALONE,
) -> Calibration:
    """Calibrate a model on the calibration part of a text.

    samples: sequences of `seq_len` tokens, drawn by `seed`; fewer where the text has fewer: meta["tokens"] has how
    many were used. metric: one that takes gradients, "fisher", adds a second pass, for all codecs that need them; what
    `codec` needs when None. compact: gather and fit `codec` alone, a basis that heads share, without the first pass.
    checkpointing: recompute activations where gradients are taken. progress: wraps the iterable of segments, as tqdm.
    processes: each has the model and takes a share of the segments; all get the same calibration, which is that of one
    process to rounding.
    """
    if not needs_calibration(codec):
        raise PluginError(f"codec {codec} needs no calibration: give its name to a preset or to the tuner as it is")
    widest = max(shape.width for _, _, shape in loaded.geometry.sides())  # a rank is cut where a layer has fewer
    most = full_rank(codec, widest)
    if not 1 <= rank <= most:
        limit = "" if most == widest else f", of which {codec} stores {most}"
        raise PluginError(f"rank {rank} is out of range: {loaded.spec} has head_dim {widest}{limit}")
    loaded.require_context(seq_len)
    basis = basis_of(codec)
    if basis.multi_head and seq_len < sink_tokens + BLOCK:
        raise PluginError(
            f"codec {codec} is tried on blocks of {BLOCK} tokens behind the sinks: --seq-len {seq_len} is too "
            f"short, give {sink_tokens + BLOCK} or more"
        )
    if basis.multi_head and (reason := basis.misfit(loaded.geometry)):
        raise PluginError(reason)
    metric = metric or basis.metric
    if basis.gradients and not takes_gradients(metric):
        raise PluginError(
            f"codec {codec} needs gradients, which metric {metric} doesn't take: use --metric {basis.metric}"
        )
    if compact and not basis.multi_head:
        raise PluginError(f"a compact calibration has one codec that heads share ({', '.join(multi_head_bases())}), "
                          f"and codec {codec} is of single heads")  # fmt: skip
    segments = text.segments("calibration", loaded, seq_len, samples, seed) if processes.first else None
    segments = processes.agreed(segments)
    if len(segments) < processes.size:
        raise PluginError(f"{processes.size} processes are too many for {len(segments)} sequences: start fewer, or "
                          "give more --samples")  # fmt: skip
    if processes.first:
        sizes = [shape.size if basis.multi_head else shape.width for _, _, shape in loaded.geometry.sides()]
        _warn_of_few(segments, sink_tokens, max(sizes))
    own = segments[processes.share(len(segments))]
    statistics = None if compact else collect(loaded, progress(own), sink_tokens, processes=processes)
    fitted = {}
    if takes_gradients(metric):
        every = {name: other for name, other in multi_head_bases().items() if not other.misfit(loaded.geometry)}
        gathered = collect_fisher(
            loaded, segments, statistics, sink_tokens, {codec: basis} if compact else every,
            seed=seed, checkpointing=checkpointing, progress=progress, processes=processes,
        )  # fmt: skip
        # In segments shorter than a block there is only the metric of single heads
        fitted = {name: fit_multi_head(own) for name, own in gathered.items() if own.sampled}
    meta = calibration_key(loaded, text, samples, seq_len, seed, sink_tokens) | {
        "model": loaded.spec,
        "sketch": sketch(loaded.model),
        **geometry_record(loaded.geometry),
        "rank": rank,
        "codec": codec,
        "metric": metric,
        "text": text.name,
        "text_spec": text.spec,
        "tokens": segments.numel(),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    calibration = Calibration(meta, statistics, {}, fitted)
    if compact:
        return calibration.compact(codec)
    calibration.bases = {side: fit(calibration.basis_codec, getattr(statistics, side)) for side in SIDES}
    return calibration


def _warn_of_few(segments: torch.Tensor, sink_tokens: int, dimensions: int) -> None:
    """Log a warning where segments [n, T] without their sinks have too few tokens for a basis of so many dimensions."""
    tokens = segments.numel() - len(segments) * sink_tokens
    if tokens < FEW * dimensions:
        log.warning("a basis of %d dimensions is fitted to %d tokens, which is too few for a good one: give more "
                    "--samples, a longer --seq-len or a longer --text", dimensions, tokens)  # fmt: skip


def chosen_codec(codec: str | None, metric: str | None, compact: bool) -> tuple[str, str]:
    """Codec and metric of a calibration for which the user gave both, one or neither of them.

    compact: choose a multi-head codec, the only kind that a compact file can hold, the first one if neither is given.
    Raises PluginError where the given codec or metric rules that out.
    """
    several = list(multi_head_bases())
    if compact and (codec not in (None, *several) or (metric and not takes_gradients(metric))):
        given = f"--codec {codec}" if codec not in (None, *several) else f"--metric {metric}"
        raise PluginError(f"--compact keeps one codec that heads share, and {given} is none that goes with it: give "
                          f"--codec {' or '.join(several)}, or leave --codec and --metric out")  # fmt: skip
    chosen = codec or (several[0] if compact else metric or "pca")
    return chosen, metric or basis_of(chosen).metric


def recalibrate(calibration: Calibration, loaded: LoadedModel, text: Text, number: int, progress=iter) -> Calibration:
    """The same calibration from other samples of the same text: `number` > 0 moves the seed.

    At most half of the text's segments are drawn: with all of them, every seed would draw the same. Raises PluginError
    for a text other than the calibration's, and for one with no other samples.
    """
    meta = calibration.meta
    check_samples(calibration, loaded, text)
    available = text.available("calibration", loaded, meta["seq_len"])
    return calibrate(
        loaded, text, rank=meta["rank"], samples=min(meta["samples"], available // 2), seq_len=meta["seq_len"],
        seed=meta["seed"] + number, sink_tokens=meta["sink_tokens"], codec=meta["codec"], metric=meta.get("metric"),
        compact=meta.get("compact", False), progress=progress,
    )  # fmt: skip


def check_samples(calibration: Calibration, loaded: LoadedModel, text: Text) -> None:
    """Raise PluginError unless `recalibrate` can draw other samples of the same text."""
    meta = calibration.meta
    if meta["text_sha256"] != text.sha256("calibration"):
        raise PluginError(
            f"the calibration was made from another text than {text.name!r}: give --text {meta['text_spec']}, "
            "or other samples would mean another text too"
        )
    if text.available("calibration", loaded, meta["seq_len"]) < 2:
        raise PluginError(f"the calibration part of text {text.name!r} has one segment of {meta['seq_len']} tokens: "
                          "there are no other samples to draw")  # fmt: skip


def calibration_key(loaded: LoadedModel, text: Text, samples: int, seq_len: int, seed: int, sink_tokens: int) -> dict:
    """What decides a calibration's statistics: a file with the same values can be used again."""
    return {
        "fingerprint": loaded.fingerprint,
        "rotary": rotary(loaded.model.config),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "text_sha256": text.sha256("calibration"),
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "sink_tokens": sink_tokens,
    }


def suggested_rank(head_dim: int) -> int:
    """Three quarters of head_dim, where the guide starts."""
    return math.ceil(head_dim * 0.75)
