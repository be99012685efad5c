"""A calibration in memory: statistics, and every basis that is fitted to them."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import BASES, Quantizer, Transform, basis_of
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import LAYERS, Geometry
from gpt2.models.probe import likeness, rotary, rotary_difference, sketch

if TYPE_CHECKING:
    from gpt2.models.loading import LoadedModel

log = logging.getLogger(__name__)

LEAST_LIKENESS = 0.9  # copies in 4 bits and more lie above it, unrelated weights at 0.5


@dataclass(eq=False)  # by identity, so that it can be a key of what is made of it
class Calibration:
    """Contents of a calibration file. A compact one has neither `statistics` nor `bases`, but one multi-head basis.

    `bases[side]` has, for every layer, mean [H, d], E [H, d, r], D [H, r, d] and spectrum [H, r], with r the full rank
    of `basis_codec`; None for layers without K and V. multi_head: fitted bases that heads share, by name; there are
    some where gradients were taken.
    """

    meta: dict
    statistics: Statistics | None
    bases: dict[str, dict[str, list[Tensor | None]]]
    multi_head: dict[str, MultiHeadFit] = field(default_factory=dict)
    _others: dict[tuple[str, int, str], Transform] = field(default_factory=dict, repr=False)

    @property
    def geometry(self) -> Geometry:
        """The layers of the calibrated model's cache."""
        return described_geometry(self.meta)

    @property
    def basis_codec(self) -> str:
        """Codec of `bases`: the file's own, or where heads share that one, the basis of single heads in its metric."""
        return basis_of(self.meta["codec"]).per_head

    def kept_variance(self) -> dict[str, list[Tensor | None]]:
        """Share of the variance that the first r coordinates keep, all of it where there is none.

        Of `bases`, "k" and "v", for every layer [H, d]; of a compact file's codec "kv", or "k" and "v", [G, w]. None
        for layers without K and V.
        """

        def share(spectrum: Tensor | None) -> Tensor | None:
            if spectrum is None:
                return None
            kept = spectrum.double().cumsum(-1)
            return torch.where(kept[..., -1:] > 0, kept / kept[..., -1:], torch.ones_like(kept))

        spectra = {side: basis["spectrum"] for side, basis in self.bases.items()}
        spectra = spectra or self.fit_of(self.meta["codec"]).spectra()
        return {side: list(map(share, own)) for side, own in spectra.items()}

    def transform(self, side: str, layer: int, rank: int | None = None, codec: str | None = None) -> Transform:
        """The transform of one layer's K or V (`side` "k" or "v"), on the CPU.

        rank: coordinates kept, the file's default when None. codec: the file's own when None; another one is fitted to
        the file's statistics.
        """
        codec = codec or self.meta["codec"]
        if basis_of(codec).multi_head:
            return self.fit_of(codec).transform(layer, side)
        if not self.bases:
            raise PluginError(
                f"codec {codec}: this is a compact calibration of {self.meta['model']}, which has codec "
                f"{self.meta['codec']} only: use that, or calibrate without --compact"
            )
        if codec == self.basis_codec:
            whole = Transform(*(self.bases[side][name][layer] for name in ("E", "D", "mean")))
        else:
            if (side, layer, codec) not in self._others:
                parts = fit_layer(codec, getattr(self.statistics, side), layer)
                self._others[side, layer, codec] = Transform(*(parts[name] for name in ("E", "D", "mean")))
            whole = self._others[side, layer, codec]
        return whole.truncate(min(self.meta["rank"], whole.rank) if rank is None else rank)

    def quantizer(
        self, quantizer: Quantizer, side: str, layer: int, codec: str, context_length: int | None = None
    ) -> Quantizer:
        """A quantizer for one layer's K or V in a codec's basis, where its bits are meant on average over all.

        context_length: tokens at which layers with a window count by what they hold; None where all layers count alike.
        """
        if not basis_of(codec).multi_head:
            return quantizer
        weights = None
        if context_length is not None:
            held = [max(layer.held(context_length), 1) for layer in self.geometry.layers]
            weights = [tokens / context_length for tokens in held]
        return self.fit_of(codec).quantizer(quantizer, layer, side, weights)

    def bits_range(self) -> tuple[float, float] | None:
        """Least and most bits that all of its multi-head bases can share out over layers; None where it has none."""
        ranges = [fit.allocation.bits_range() for fit in self.multi_head.values()]
        return (max(low for low, _ in ranges), min(high for _, high in ranges)) if ranges else None

    def fit_of(self, codec: str) -> MultiHeadFit:
        """A basis that heads share. Raises PluginError where no gradients were taken, or the file has another alone."""
        if codec not in self.multi_head:
            if reason := BASES[codec].misfit(self.geometry):
                raise PluginError(reason)
            if self.meta.get("compact"):
                lacks = f"it has codec {self.meta['codec']} alone"
            else:
                lacks = "it was made before there was one" if self.multi_head else "it has no gradients"
            metric = basis_of(codec).metric
            raise PluginError(f"codec {codec} is not in this calibration, {lacks}: make one with --metric {metric}")
        return self.multi_head[codec]

    def compact(self, codec: str) -> Calibration:
        """One multi-head basis alone, in eight bits."""
        kept = {codec: self.fit_of(codec).compact()}
        return Calibration(self.meta | {"codec": codec, "compact": True}, None, {}, kept)

    def check_model(self, loaded: LoadedModel, where: str) -> None:
        """Raise BadArtefact unless this calibration is of that model. where: the file it is from, for messages.

        Of a copy whose weights differ a little, quantized or tuned further, its bases are used with a warning.
        """
        meta = self.meta
        if difference := rotary_difference(meta.get("rotary", {}), rotary(loaded.model.config)):
            raise BadArtefact(
                f"{where}: calibrated on {meta['model']} with other rotary positions than those of {loaded.spec} "
                f"({difference}): calibrate this model"
            )
        if meta["fingerprint"] == loaded.fingerprint:
            return
        alike = likeness(meta["sketch"], sketch(loaded.model)) if "sketch" in meta else 0.0
        if alike < LEAST_LIKENESS:
            raise BadArtefact(
                f"{where}: calibrated on {meta['model']} (config {meta['fingerprint']}), but the model is "
                f"{loaded.spec} (config {loaded.fingerprint}): calibrate this model"
            )
        _warn_of_other_weights(where, meta["model"], loaded.spec, alike)


@functools.cache  # once for each file and model
def _warn_of_other_weights(where: str, calibrated: str, spec: str, alike: float) -> None:
    log.warning(
        "%s: calibrated on %s with other weights than those of %s (%.1f %% of sampled signs agree, as in a quantized "
        "copy): the calibration is used, but figures of its presets weren't measured on these weights: measure them "
        "here, or calibrate this model",
        where, calibrated, spec, 100 * alike,
    )  # fmt: skip


def described_geometry(meta: dict) -> Geometry:
    """The geometry that a calibration's metadata describe: `layers`, or where all are alike three numbers."""
    if "layers" in meta:
        return Geometry.from_record(meta["layers"])
    return Geometry.uniform(meta["num_layers"], meta["num_kv_heads"], meta["head_dim"])


def geometry_record(geometry: Geometry) -> dict:
    """The inverse of `described_geometry`. Where layers differ the three numbers are of the first with K and V."""
    record = {name: getattr(geometry, name) for name in ("num_layers", "head_dim", "num_kv_heads")}
    return record if geometry.alike else record | {"layers": LAYERS.parse(geometry.record(), ())}


def fit(codec: str, moments: Moments) -> dict[str, list[Tensor | None]]:
    """Fit a codec's basis to every layer: mean, E, D, spectrum as in `Calibration.bases`, float32."""
    fitted = [None if mean is None else fit_layer(codec, moments, layer) for layer, mean in enumerate(moments.mean)]
    return {name: [parts and parts[name] for parts in fitted] for name in ("mean", "E", "D", "spectrum")}


def fit_layer(codec: str, moments: Moments, layer: int) -> dict[str, Tensor]:
    """Fit a codec's basis to one layer: mean, E, D, spectrum."""
    transform, spectrum = basis_of(codec).fit(moments, layer)
    parts = {"mean": transform.mean, "E": transform.E, "D": transform.D, "spectrum": spectrum}
    return {name: part.float().contiguous() for name, part in parts.items()}
