"""Calibration: what one or two passes over a model leave, and every basis that is fitted to it.

One calibration serves every rank and every basis: it holds the full-rank basis it was fitted with, and the statistics
from which another basis is fitted when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from gpt2.compression import measured
from gpt2.compression.capture import Moments, Statistics, collect
from gpt2.compression.codecs import (
    BASES,
    Transform,
    basis_of,
    full_rank,
    is_measured,
    measured_codecs,
    metric_of,
    needs_calibration,
    single_heads,
)
from gpt2.compression.codecs.mixed import BLOCK
from gpt2.compression.gradients import collect_fisher
from gpt2.compression.measured import MeasuredCodec, fit_measured
from gpt2.data import Text
from gpt2.errors import BadArtefact, PluginError
from gpt2.models import Geometry, LoadedModel
from gpt2.processes import ALONE, Processes

SIDES = ("k", "v")


@dataclass
class Calibration:
    """Contents of a calibration file. A compact one has neither `statistics` nor `bases`, but a measured codec.

    `bases[side]` has mean [L, H, d], E [L, H, d, r], D [L, H, r, d], spectrum [L, H, r], with r the full rank of
    `basis_codec`. measured: codecs of several heads by name; there are some where gradients were taken.
    """

    meta: dict
    statistics: Statistics | None
    bases: dict[str, dict[str, Tensor]]
    measured: dict[str, MeasuredCodec] = field(default_factory=dict)
    _others: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.meta["num_layers"], self.meta["num_kv_heads"], self.meta["head_dim"])

    @property
    def basis_codec(self) -> str:
        """Codec of `bases`: the file's own, or where that is of several heads, the same metric on each head."""
        return single_heads(self.meta["codec"])

    def energies(self) -> dict[str, Tensor]:
        """Share of the variance that the first r coordinates keep, all of it where there is none.

        Of `bases`, "k" and "v" [L, H, d]; of a compact file's codec what shares a basis in a layer, [L, G, w].
        """
        spectra = {side: basis["spectrum"] for side, basis in self.bases.items()}
        spectra = spectra or self.measured_codec(self.meta["codec"]).spectra()
        kept = {side: spectrum.double().cumsum(-1) for side, spectrum in spectra.items()}
        return {side: torch.where(x[..., -1:] > 0, x / x[..., -1:], torch.ones_like(x)) for side, x in kept.items()}

    def transform(self, side: str, layer: int, rank: int | None = None, codec: str | None = None) -> Transform:
        """The transform of one layer's K or V (`side` "k" or "v"), on the CPU.

        rank: coordinates kept, the file's default when None. codec: the file's own when None; another one is fitted to
        the file's statistics.
        """
        codec = codec or self.meta["codec"]
        if is_measured(codec):
            return self.measured_codec(codec).transform(layer, side)
        if not self.bases:
            raise PluginError(
                f"codec {codec}: this is a compact calibration of {self.meta['model']}, which has codec "
                f"{self.meta['codec']} only: use that, or calibrate without --compact"
            )
        if codec == self.basis_codec:
            basis = self.bases[side]
        else:
            if (side, codec) not in self._others:
                self._others[side, codec] = fit(codec, getattr(self.statistics, side))
            basis = self._others[side, codec]
        whole = Transform(*(basis[name][layer] for name in ("E", "D", "mean")))
        return whole.truncate(min(self.meta["rank"], whole.rank) if rank is None else rank)

    def measured_codec(self, codec: str) -> MeasuredCodec:
        """A codec of several heads. Raises PluginError where no gradients were taken, or a file has another alone."""
        if codec not in self.measured:
            if self.meta.get("compact"):
                lacks = f"it has codec {self.meta['codec']} alone"
            else:
                lacks = "it was made before there was one" if self.measured else "it has no gradients"
            raise PluginError(f"codec {codec} is not in this calibration, {lacks}: make one with --metric fisher")
        return self.measured[codec]

    def compact(self, codec: str) -> Calibration:
        """One measured codec alone, its basis in half precision."""
        kept = {codec: self.measured_codec(codec).compact()}
        return Calibration(self.meta | {"codec": codec, "compact": True}, None, {}, kept)

    def check_model(self, fingerprint: str, spec: str, where: str) -> None:
        """Raise BadArtefact unless this calibration is of the model with that config fingerprint."""
        if self.meta["fingerprint"] != fingerprint:
            raise BadArtefact(
                f"{where}: calibrated on {self.meta['model']} (config {self.meta['fingerprint']}), but the model is "
                f"{spec} (config {fingerprint}): calibrate this model"
            )


def fit(codec: str, moments: Moments) -> dict[str, Tensor]:
    """Fit a codec's basis to every layer: mean, E, D, spectrum as in `Calibration.bases`, float32."""
    basis = basis_of(codec)
    fitted = [basis.fit(moments, layer) for layer in range(len(moments.count))]

    def stacked(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts)).float().contiguous()

    parts = {name: stacked(getattr(transform, name) for transform, _ in fitted) for name in ("mean", "E", "D")}
    return parts | {"spectrum": stacked(spectrum for _, spectrum in fitted)}


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

    samples: sequences of `seq_len` tokens, drawn by `seed`; fewer where the text has fewer, which `meta` tells.
    metric: "fisher" takes gradients in a second pass, for codecs fisher and all of several heads; what `codec` needs
    when None. compact: gather and fit `codec` alone, which must be of several heads; the first pass falls away.
    checkpointing: recompute activations where gradients are taken. progress: wraps the iterable of windows, as tqdm.
    processes: each has the model and takes a share of the windows; all get the same calibration, which is that of one
    process to rounding.
    """
    if not needs_calibration(codec):
        raise PluginError(f"codec {codec} needs no calibration: give its name to a preset or to the tuner as it is")
    head_dim, most = loaded.geometry.head_dim, full_rank(codec, loaded.geometry.head_dim)
    if not 1 <= rank <= most:
        limit = "" if most == head_dim else f", of which {codec} stores {most}"
        raise PluginError(f"rank {rank} is out of range: {loaded.spec} has head_dim {head_dim}{limit}")
    loaded.require_context(seq_len)
    if is_measured(codec) and seq_len < sink_tokens + BLOCK:
        raise PluginError(
            f"codec {codec} is measured on blocks of {BLOCK} tokens behind the sinks: --seq-len {seq_len} is too "
            f"short, give {sink_tokens + BLOCK} or more"
        )
    metric = metric or metric_of(codec)
    if metric_of(codec) == "fisher" != metric:
        raise PluginError(f"codec {codec} needs gradients, which metric {metric} doesn't take: use --metric fisher")
    if compact and not is_measured(codec):
        raise PluginError(f"a compact calibration has a codec of several heads ({', '.join(measured_codecs())}) alone, "
                          f"and codec {codec} is none")  # fmt: skip
    windows = text.segments("calibration", loaded, seq_len, samples, seed) if processes.first else None
    windows = processes.agreed(windows)
    if len(windows) < processes.size:
        raise PluginError(f"{processes.size} processes are too many for {len(windows)} sequences: start fewer, or give "
                          "more --samples")  # fmt: skip
    own = windows[processes.share(len(windows))]
    statistics = None if compact else collect(loaded, progress(own), sink_tokens, processes=processes)
    fitted = {}
    if metric == "fisher":
        gathered = collect_fisher(
            loaded, windows, statistics, sink_tokens, {codec: BASES[codec]} if compact else measured_codecs(),
            seed=seed, checkpointing=checkpointing, progress=progress, processes=processes,
        )  # fmt: skip
        # Windows shorter than a block do for the metric alone
        fitted = {name: fit_measured(own) for name, own in gathered.items() if own.reservoir.shape[2]}
    meta = calibration_key(loaded, text, samples, seq_len, seed, sink_tokens) | {
        "model": loaded.spec,
        "num_layers": loaded.geometry.num_layers,
        "head_dim": loaded.geometry.head_dim,
        "num_kv_heads": loaded.geometry.num_kv_heads,
        "rank": rank,
        "codec": codec,
        "metric": metric,
        "text": text.name,
        "text_spec": text.spec,
        "tokens": windows.numel(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    calibration = Calibration(meta, statistics, {}, fitted)
    if compact:
        return calibration.compact(codec)
    calibration.bases = {side: fit(calibration.basis_codec, getattr(statistics, side)) for side in SIDES}
    return calibration


def recalibrate(calibration: Calibration, loaded: LoadedModel, text: Text, number: int, progress=iter) -> Calibration:
    """The same calibration from other samples of the same text: `number` > 0 moves the seed.

    At most half of the text's windows are drawn: with all of them, every seed would draw the same. Raises PluginError
    for a text other than the calibration's, and for one with no other samples.
    """
    meta = calibration.meta
    check_samples(calibration, loaded, text)
    available = text.available("calibration", loaded, meta["seq_len"])
    return calibrate(
        loaded, text, rank=meta["rank"], samples=min(meta["samples"], available // 2), seq_len=meta["seq_len"],
        seed=meta["seed"] + number, sink_tokens=meta["sink_tokens"], codec=meta["codec"], metric=meta.get("metric"),
        progress=progress,
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
        raise PluginError(f"the calibration part of text {text.name!r} has one window of {meta['seq_len']} tokens: "
                          "there are no other samples to draw")  # fmt: skip


def stand_in(loaded: LoadedModel) -> Calibration:
    """A calibration fitted to noise, for a model without weights: the cost of a basis doesn't depend on its values."""
    geometry = loaded.geometry
    moments = [Moments.zeros(geometry) for _ in SIDES]
    generator = torch.Generator().manual_seed(0)
    for side in moments:
        for layer in range(geometry.num_layers):
            side.update(layer, torch.randn(1, geometry.num_kv_heads, 64, geometry.head_dim, generator=generator))
    meta = {"model": loaded.spec, "codec": "pca", "rank": geometry.head_dim, "num_layers": geometry.num_layers}
    meta |= {"num_kv_heads": geometry.num_kv_heads, "head_dim": geometry.head_dim}
    bases = {side: fit("pca", own) for side, own in zip(SIDES, moments, strict=True)}
    fitted = {name: measured.stand_in(basis, geometry) for name, basis in measured_codecs().items()}
    return Calibration(meta, Statistics(*moments, None, 0), bases, fitted)


def calibration_key(loaded: LoadedModel, text: Text, samples: int, seq_len: int, seed: int, sink_tokens: int) -> dict:
    """What decides a calibration's statistics: a file with the same values can be used again."""
    return {
        "fingerprint": loaded.fingerprint,
        "text_sha256": text.sha256("calibration"),
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "sink_tokens": sink_tokens,
    }


def suggested_rank(head_dim: int) -> int:
    """Three quarters of head_dim, where the guide starts."""
    return math.ceil(head_dim * 0.75)
