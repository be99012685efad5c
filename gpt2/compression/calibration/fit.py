"""A calibration in memory: statistics, and every basis that is fitted to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration.bit_allocation import MultiHeadFit
from gpt2.compression.calibration.statistics import Statistics
from gpt2.compression.codecs import Transform, basis_of, is_measured, single_heads
from gpt2.compression.codecs.moments import Moments
from gpt2.models.geometry import Geometry


@dataclass(eq=False)  # by identity, so that it can be a key of what is made of it
class Calibration:
    """Contents of a calibration file. A compact one has neither `statistics` nor `bases`, but a measured codec.

    `bases[side]` has mean [L, H, d], E [L, H, d, r], D [L, H, r, d], spectrum [L, H, r], with r the full rank of
    `basis_codec`. measured: codecs of several heads by name; there are some where gradients were taken.
    """

    meta: dict
    statistics: Statistics | None
    bases: dict[str, dict[str, Tensor]]
    multi_head: dict[str, MultiHeadFit] = field(default_factory=dict)
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
        spectra = spectra or self.fit_of(self.meta["codec"]).spectra()
        kept = {side: spectrum.double().cumsum(-1) for side, spectrum in spectra.items()}
        return {side: torch.where(x[..., -1:] > 0, x / x[..., -1:], torch.ones_like(x)) for side, x in kept.items()}

    def transform(self, side: str, layer: int, rank: int | None = None, codec: str | None = None) -> Transform:
        """The transform of one layer's K or V (`side` "k" or "v"), on the CPU.

        rank: coordinates kept, the file's default when None. codec: the file's own when None; another one is fitted to
        the file's statistics.
        """
        codec = codec or self.meta["codec"]
        if is_measured(codec):
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

    def fit_of(self, codec: str) -> MultiHeadFit:
        """A codec of several heads. Raises PluginError where no gradients were taken, or a file has another alone."""
        if codec not in self.multi_head:
            if self.meta.get("compact"):
                lacks = f"it has codec {self.meta['codec']} alone"
            else:
                lacks = "it was made before there was one" if self.multi_head else "it has no gradients"
            raise PluginError(f"codec {codec} is not in this calibration, {lacks}: make one with --metric fisher")
        return self.multi_head[codec]

    def compact(self, codec: str) -> Calibration:
        """One measured codec alone, its basis in half precision."""
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
