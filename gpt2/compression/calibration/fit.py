"""A calibration in memory: statistics, and every basis that is fitted to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration.multi_head_fit import MultiHeadFit
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import Quantizer, Transform, basis_of
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import Geometry


@dataclass(eq=False)  # by identity, so that it can be a key of what is made of it
class Calibration:
    """Contents of a calibration file. A compact one has neither `statistics` nor `bases`, but one multi-head basis.

    `bases[side]` has mean [L, H, d], E [L, H, d, r], D [L, H, r, d], spectrum [L, H, r], with r the full rank of
    `basis_codec`. multi_head: fitted bases that heads share, by name; there are some where gradients were taken.
    """

    meta: dict
    statistics: Statistics | None
    bases: dict[str, dict[str, Tensor]]
    multi_head: dict[str, MultiHeadFit] = field(default_factory=dict)
    _others: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def geometry(self) -> Geometry:
        return Geometry.uniform(self.meta["num_layers"], self.meta["num_kv_heads"], self.meta["head_dim"])

    @property
    def basis_codec(self) -> str:
        """Codec of `bases`: the file's own, or where heads share that one, the basis of single heads in its metric."""
        return basis_of(self.meta["codec"]).per_head

    def energies(self) -> dict[str, Tensor]:
        """Share of the variance that the first r coordinates keep, all of it where there is none.

        Of `bases`, "k" and "v" [L, H, d]; of a compact file's codec "kv", or "k" and "v", [L, G, w].
        """
        spectra = {side: basis["spectrum"] for side, basis in self.bases.items()}
        spectra = spectra or self.fit_of(self.meta["codec"]).spectra()
        kept = {side: spectrum.double().cumsum(-1) for side, spectrum in spectra.items()}
        return {side: torch.where(x[..., -1:] > 0, x / x[..., -1:], torch.ones_like(x)) for side, x in kept.items()}

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
            basis = self.bases[side]
        else:
            if (side, codec) not in self._others:
                self._others[side, codec] = fit(codec, getattr(self.statistics, side))
            basis = self._others[side, codec]
        whole = Transform(*(basis[name][layer] for name in ("E", "D", "mean")))
        return whole.truncate(min(self.meta["rank"], whole.rank) if rank is None else rank)

    def quantizer(self, quantizer: Quantizer, side: str, layer: int, codec: str) -> Quantizer:
        """A quantizer for one layer's K or V in a codec's basis, where its bits are meant on average over all."""
        return self.fit_of(codec).quantizer(quantizer, layer, side) if basis_of(codec).multi_head else quantizer

    def bits_range(self) -> tuple[float, float] | None:
        """Least and most bits that all of its multi-head bases can share out over layers; None where it has none."""
        ranges = [fit.allocation.bits_range() for fit in self.multi_head.values()]
        return (max(low for low, _ in ranges), min(high for _, high in ranges)) if ranges else None

    def fit_of(self, codec: str) -> MultiHeadFit:
        """A basis that heads share. Raises PluginError where no gradients were taken, or the file has another alone."""
        if codec not in self.multi_head:
            if self.meta.get("compact"):
                lacks = f"it has codec {self.meta['codec']} alone"
            else:
                lacks = "it was made before there was one" if self.multi_head else "it has no gradients"
            metric = basis_of(codec).metric
            raise PluginError(f"codec {codec} is not in this calibration, {lacks}: make one with --metric {metric}")
        return self.multi_head[codec]

    def compact(self, codec: str) -> Calibration:
        """One multi-head basis alone, in half precision."""
        kept = {codec: self.fit_of(codec).compact()}
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
