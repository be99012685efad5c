"""Presets by ratio: one multi-head basis, and the quantizer's bits chosen for each compression ratio.

    calibration, file = compact_calibration(loaded, text, path, codec="framed", samples=48)
    presets = [make_ratio_preset(loaded, calibration, ratio) for ratio in RATIOS]

The basis determines the presets' names: kv-4x is made with `framed`, fast-4x with `grouped`, whose codes attention
reads without reconstructing K and V, and store-4x with `joint`, which loses least. Presets of one basis share one
compact calibration file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from gpt2.common import files, tensor_file
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.cache import size
from gpt2.compression.cache.dynamic_cache import CompressedDynamicCache
from gpt2.compression.calibration.calibrate import calibrate, calibration_key
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.reuse import find_reusable
from gpt2.compression.codecs import BASES, adjustable_quantizers, multi_head_bases
from gpt2.compression.presets import calibration_lookup
from gpt2.compression.presets.build import new_preset
from gpt2.compression.settings import compressors_for
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory, compare, score, segment_sums
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel
from gpt2.text.texts import Text

RATIOS = (2.0, 3.5, 4.0, 4.6, 5.3, 6.4, 8.0)
TOKENS = 2048  # sequence length at which a preset has the ratio in its name
MUCH = 1.02  # ratio reached over the wanted one from which more bits are tried
STEP = 0.01  # smallest change of the bits while they are reduced until the ratio is reached
# A preset's figures hold for a calibration that agrees in these keys of its metadata
MADE_FROM = ("fingerprint", "dtype", "text_sha256", "samples", "seq_len", "seed", "sink_tokens")


@dataclass(frozen=True)
class Outputs:
    """Where the presets of one basis go: their folder, the calibration, the results record and its picture."""

    presets: Path
    calibration: Path
    record: Path
    picture: Path

    @classmethod
    def under(cls, root: Path, calibration: Path, record_name: str) -> Outputs:
        """The folders of `root`. Raises PluginError if one of them can't be written."""
        record = root / "runs" / f"{record_name}.json"
        outputs = cls(root / "presets", calibration, record, files.picture_beside(record))
        for path in (outputs.record, outputs.picture, outputs.presets / f"{record_name}.json"):
            files.check_writable(path)
        return outputs


@dataclass(frozen=True)
class RatioPreset:
    """A cache that is compressed by at least `ratio`.

    ratio: of K and V in layers that hold all tokens, at least; with whole_at, of the whole cache at so many tokens.
    bits: per coordinate of K and V, metadata included. compression_ratio, attention_ratio: the measured ones at
    `TOKENS`, of the whole cache and of K and V alone. make: makes fresh caches. reached: the measured ratio that
    `ratio` asks for.
    """

    codec: str
    quantizer: str
    sink_tokens: int
    ratio: float
    bits: float
    compression_ratio: float
    attention_ratio: float
    make: CacheFactory
    reached: float
    whole_at: int | None = None

    @property
    def name(self) -> str:
        return f"{BASES[self.codec].preset_prefix}-{self.ratio:g}x{'-whole' if self.whole_at else ''}"

    def __str__(self) -> str:
        what = f"the whole cache at {self.whole_at:,} tokens" if self.whole_at else "K and V"
        return f"{self.name}: {self.bits:g} bits per coordinate, {self.reached:.2f}x of {what}"

    def row(self, measured: dict) -> dict:
        """Its row of a results file. measured: as `perplexity.compare` returns it."""
        sizes = {"target_ratio": self.ratio, "compression_ratio_2048": self.compression_ratio, "bits": self.bits}
        return {"label": self.name, "quantizer": self.quantizer, **sizes, **measured}

    def preset(self, loaded: LoadedModel, calibration: Calibration, calibration_file: str, **more) -> dict:
        """The preset's record. calibration_file: as presets name it; more: `measured`, `made_by` and further keys."""
        return new_preset(
            loaded, None, calibration_file, compression_ratio=self.compression_ratio, name=self.name, target="kv",
            rank=loaded.geometry.head_dim, bits=self.bits, codec=self.codec, quantizer=self.quantizer,
            sink_tokens=self.sink_tokens, calibrated_with={key: calibration.meta[key] for key in MADE_FROM},
            **self._of_mixed_layers(loaded), **more,
        )  # fmt: skip

    def _of_mixed_layers(self, loaded: LoadedModel) -> dict:
        """What a preset says where layers differ: K and V's own ratio, and that of the whole cache it was made for."""
        whole = {"whole_cache": {"ratio": round(self.reached, 4), "context_length": self.whole_at}}
        own = {} if loaded.geometry.alike else {"attention_ratio": self.attention_ratio}
        return own | (whole if self.whole_at else {})


def first_fitting(geometry: Geometry) -> str:
    """The first multi-head basis that a model's layers can have, with a note where it isn't the usual one.

    The usual one where none fits, for which `calibrate` says why.
    """
    bases = multi_head_bases()
    usual, *others = bases
    reason = bases[usual].misfit(geometry)
    found = next((name for name in others if reason and not bases[name].misfit(geometry)), usual)
    if found != usual:
        print(f"note: {reason}; presets are called {bases[found].preset_prefix}-*", flush=True)
    return found


def calibration_name(codec: str, slug: str) -> str:
    """File name of the compact calibration of a model's presets. slug: the model's, with the tag of other results."""
    return f"kv_{codec}_{slug}.pt"


def compact_calibration(
    loaded: LoadedModel, text: Text, path: Path, *, codec: str, samples: int, seq_len: int, seed: int, sink_tokens: int,
    checkpointing: bool = False, progress=iter, processes: Processes = ALONE,
) -> tuple[Calibration, Path]:  # fmt: skip
    """The compact calibration at `path` if it was made with the same arguments, else a new one, and its file.

    Presets may need what `path` has, so a new one is written beside it until `put_in_place` puts it there; if nothing
    is there, at once. Arguments as `calibrate` takes them; of several processes the first one reads and writes.
    """
    made_from = {"samples": samples, "seq_len": seq_len, "seed": seed, "sink_tokens": sink_tokens}
    files.check_writable(path)
    key = calibration_key(loaded, text, **made_from) | {"compact": True, "codec": codec}
    real = path.resolve()  # what a link points to
    waiting = real.with_name(f".{real.stem}.new{real.suffix}")  # also what a run that was stopped later has left
    file = find_reusable(key, [path, waiting]) if processes.first else None
    if found := processes.agreed(load_calibration(file) if file else None):
        print(f"calibration: using {file or path}", flush=True)
        return found, file or path
    file = waiting if path.exists() else path
    if path.exists():
        if not _is_calibration(path):
            raise PluginError(f"{path} is no calibration and would be replaced by one: give another "
                              "--calibration-file, or move it away")  # fmt: skip
        print(f"note: {path} was made with other arguments and will be replaced when the new presets are measured, "
              "also for presets that name it; another --tag or --calibration-file keeps it", flush=True)  # fmt: skip
    calibration = calibrate(
        loaded, text, rank=loaded.geometry.head_dim, codec=codec, compact=True, checkpointing=checkpointing,
        progress=progress, processes=processes, **made_from,
    )  # fmt: skip
    if processes.first:
        save_calibration(calibration, file)
    return calibration, file


def put_in_place(file: Path, path: Path) -> None:
    """Let a new calibration replace the one at `path`, once all that could fail is done."""
    if file != path:
        file.replace(path.resolve())


def _is_calibration(path: Path) -> bool:
    try:
        return isinstance(tensor_file.read(path, only="meta"), dict)
    except BadArtefact:
        return False


def make_ratio_preset(
    loaded: LoadedModel, calibration: Calibration, ratio: float, *, quantizer: str | None = None,
    sink_tokens: int = 4, whole_at: int | None = None,
) -> RatioPreset:  # fmt: skip
    """The preset with the most bits whose K and V of `TOKENS` tokens take at most 1 / `ratio` of 16-bit ones.

    Of layers that hold all of them: so a ratio means the same bits in every model, also where windows hold few tokens
    and an exact tail beside them. Everything that is held of K and V counts, except the shared basis; recurrent states,
    which no preset makes smaller, don't. quantizer: an adjustable one, the first one if None. whole_at: a number of
    tokens at which the ratio is that of the whole cache instead, as windows and states leave it. Raises PluginError for
    a ratio that the quantizer can't reach; of the whole cache, it names the highest.
    """
    geometry = loaded.geometry
    counted, tokens = (geometry, whole_at) if whole_at else (geometry.without_windows(), TOKENS)
    quantizer = quantizer or adjustable_quantizers()[0]

    def at(bits: float) -> tuple[CacheFactory, float]:
        make = factory(loaded, calibration, bits, quantizer, sink_tokens)
        return make, size.attention_ratio(partial(make, geometry=counted), counted, tokens)

    wanted = _of_attention(ratio, geometry, whole_at) if whole_at else ratio
    exact = 16 * sink_tokens / tokens  # bits per coordinate that the exact sinks take
    bits = round(16 / wanted - exact, 4)  # rounded as in preset files, so that their caches are those measured here
    while True:
        try:
            make, held = at(bits)
        except PluginError as error:
            if whole_at:
                raise PluginError(
                    f"ratio {ratio:g} of the whole cache at {tokens:,} tokens is out of range: with states and exact "
                    f"tokens counted, this codec reaches {_highest_whole(at, geometry, tokens):.2f} at most; {error}"
                ) from error
            raise PluginError(
                f"ratio {ratio:g} is out of range: it means about 16 / {ratio:g} bits, {sink_tokens} exact sinks "
                f"included; {error}"
            ) from error
        if whole_at and held > MUCH * wanted:
            bits = most_bits(lambda more: at(more)[1], bits, wanted)
            make, held = at(bits)
        if held >= wanted:
            whole = held if geometry.alike and not whole_at else size.compression_ratio(make, geometry, TOKENS)
            own = held if geometry == counted and not whole_at else size.attention_ratio(make, geometry, TOKENS)
            reached = _of_whole(held, geometry, whole_at) if whole_at else held
            return RatioPreset(
                calibration.meta["codec"], quantizer, sink_tokens, ratio, bits, whole, own, make, reached, whole_at
            )
        # As many steps at once as if bytes were proportional to bits
        bits = round(bits - max(int((1 - held / wanted) * bits / STEP), 1) * STEP, 4)


def most_bits(ratio_at: Callable[[float], float], bits: float, wanted: float) -> float:
    """The most bits, up to 16, with which a ratio is still reached, found by halving; `bits` reach it.

    ratio_at: the ratio with so many bits; may raise PluginError for more than the codec takes.

    Layers with windows hold few tokens, so where these get more than the average of bits, bytes are fewer than the
    average says.
    """
    few, many = bits, 16.0
    while many - few > STEP:
        middle = round((few + many) / 2, 4)
        try:
            reached = ratio_at(middle) >= wanted
        except PluginError:
            reached = False
        few, many = (middle, many) if reached else (few, middle)
    return few


def _of_attention(ratio: float, geometry: Geometry, tokens: int) -> float:
    """The ratio of K and V alone that gives the whole cache `ratio`; infinite where other bytes are too many."""
    left = size.plain_bytes(geometry, tokens) / ratio - geometry.uncompressed_bytes(tokens)
    return geometry.attention_bytes(tokens) / left if left > 0 else math.inf


def _of_whole(ratio: float, geometry: Geometry, tokens: int) -> float:
    """The ratio of the whole cache where K and V alone have `ratio`: the inverse of `_of_attention`."""
    held = geometry.attention_bytes(tokens) / ratio + geometry.uncompressed_bytes(tokens)
    return size.plain_bytes(geometry, tokens) / held


def _highest_whole(at: Callable[[float], tuple[CacheFactory, float]], geometry: Geometry, tokens: int) -> float:
    """The ratio of the whole cache with the fewest bits that the codec takes, found by halving; rounded down."""
    few, enough, highest = 0.0, 4.0, 0.0
    while enough - few > STEP:
        bits = round((few + enough) / 2, 4)
        try:
            highest, enough = at(bits)[1], bits
        except PluginError:
            few = bits
    return math.floor(100 * _of_whole(highest, geometry, tokens)) / 100 if highest else 0.0


def write_presets(
    loaded: LoadedModel, presets: Sequence[RatioPreset], calibration: Calibration, outputs: Outputs,
    measured: dict[str, dict], **more,
) -> list[Path]:  # fmt: skip
    """Write each preset as MODEL-NAME.json. measured: by name, as `measure` returns it; more: further keys.

    The sums over segments stay in results files.
    """
    written = []
    for preset in presets:
        path = outputs.presets / f"{loaded.slug}-{preset.name}.json"
        reference = calibration_lookup.reference_to(outputs.calibration, path)
        figures = {key: value for key, value in measured[preset.name].items() if key != "segment_sums"}
        record = preset.preset(loaded, calibration, reference, measured=figures, **more)
        written.append(files.write_json(path, record))
    return written


def factory(
    loaded: LoadedModel, calibration: Calibration, bits: float, quantizer: str, sink_tokens: int
) -> CacheFactory:
    """A factory of caches with `bits` per coordinate. All caches share their compressors, and so the basis.

    All layers count alike, those with a window too: for a context length, bits would go to windows, which hold few
    tokens, and away from the layers that remember what is far.
    """
    k, v = compressors_for("kv", bits, None, calibration, quantizer=quantizer, device=loaded.device)
    return partial(CompressedDynamicCache, k, v, geometry=loaded.geometry, sink_tokens=sink_tokens)


def measure(
    loaded: LoadedModel, segments: Tensor, presets: Sequence[RatioPreset], seed: int, **scoring
) -> dict[str, dict]:
    """Each preset's name to its loss against the uncompressed cache, with the sums over segments that it follows from.

    segments, scoring: as for `perplexity.score`.
    """
    caches = {BASELINE: baseline_factory(loaded)} | {preset.name: preset.make for preset in presets}
    scores = score(loaded, segments, caches, **scoring)
    pairs = {preset.name: (scores[BASELINE], scores[preset.name]) for preset in presets}
    return {name: compare(*pair, seed) | {"segment_sums": segment_sums(*pair)} for name, pair in pairs.items()}
