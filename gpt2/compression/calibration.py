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

from gpt2.compression import joint
from gpt2.compression.capture import Moments, Statistics, collect
from gpt2.compression.codecs import Transform, basis_of, full_rank, is_measured, metric_of, needs_calibration
from gpt2.compression.codecs.mixed import BLOCK
from gpt2.compression.gradients import collect_fisher
from gpt2.compression.joint import JointCodec, fit_joint
from gpt2.data import Text
from gpt2.errors import BadArtefact, PluginError
from gpt2.models import Geometry, LoadedModel

SIDES = ("k", "v")


@dataclass
class Calibration:
    """Contents of a calibration file. A compact one has neither `statistics` nor `bases`, but a measured codec.

    `bases[side]` has mean [L, H, d], E [L, H, d, r], D [L, H, r, d], spectrum [L, H, r], with r the full rank of
    `basis_codec`. joint, grouped: there when gradients were taken.
    """

    meta: dict
    statistics: Statistics | None
    bases: dict[str, dict[str, Tensor]]
    joint: JointCodec | None = None
    grouped: JointCodec | None = None
    _others: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.meta["num_layers"], self.meta["num_kv_heads"], self.meta["head_dim"])

    @property
    def basis_codec(self) -> str:
        """Codec of `bases`: the file's own, or where that is of several heads, the same metric on each head."""
        return "fisher" if is_measured(self.meta["codec"]) else self.meta["codec"]

    def energy(self, side: str) -> Tensor:
        """Share of the variance that the first r coordinates keep, [L, H, d]; all of it where there is none."""
        kept = self.bases[side]["spectrum"].double().cumsum(-1)
        return torch.where(kept[..., -1:] > 0, kept / kept[..., -1:], torch.ones_like(kept))

    def transform(self, side: str, layer: int, rank: int | None = None, codec: str | None = None) -> Transform:
        """The transform of one layer's K or V (`side` "k" or "v"), on the CPU.

        rank: coordinates kept, the file's default when None. codec: the file's own when None; another one is fitted to
        the file's statistics.
        """
        codec = codec or self.meta["codec"]
        if is_measured(codec):
            return self.measured(codec).transform(layer, side)
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

    def measured(self, codec: str) -> JointCodec:
        """The joint or the grouped codec. Raises PluginError where no gradients were taken, or a file has the other."""
        found = getattr(self, codec)
        if found is None:
            if self.meta.get("compact"):
                lacks = f"it has codec {self.meta['codec']} alone"
            else:
                lacks = "it was made before there was one" if self.joint else "it has no gradients"
            raise PluginError(f"codec {codec} is not in this calibration, {lacks}: make one with --metric fisher")
        return found

    def compact(self, codec: str = "joint") -> Calibration:
        """One measured codec alone, its basis in half precision."""
        meta = self.meta | {"codec": codec, "compact": True}
        return Calibration(meta, None, {}, **{codec: self.measured(codec).compact()})

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
    checkpointing: bool = False,
    progress=iter,
) -> Calibration:
    """Calibrate a model on the calibration part of a text.

    samples: sequences of `seq_len` tokens, drawn by `seed`; fewer where the text has fewer, which `meta` tells.
    metric: "fisher" takes gradients in a second pass, for codecs fisher and joint; what `codec` needs when None.
    checkpointing: recompute activations in that pass. progress: wraps the iterable of windows, such as tqdm.
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
    windows = text.segments("calibration", loaded, seq_len, samples, seed)
    statistics = collect(loaded, progress(windows), sink_tokens)
    measured = {}
    if metric == "fisher":
        gradients = collect_fisher(
            loaded, windows, statistics, sink_tokens, seed=seed, checkpointing=checkpointing, progress=progress
        )
        # Windows shorter than a block do for the metric alone; a measured codec says what it lacks
        if is_measured(codec) or gradients[0].reservoir.shape[2]:
            measured = {name: fit_joint(own) for name, own in zip(("joint", "grouped"), gradients, strict=True)}
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
    calibration = Calibration(meta, statistics, {}, **measured)
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
    shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
    measured = {name: joint.stand_in(*shape, joint=name == "joint") for name in ("joint", "grouped")}
    return Calibration(meta, Statistics(*moments, None, 0), bases, **measured)


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
