"""The calibration file: made by one pass over a model, read with every shape checked.

One file serves every rank and every basis: it holds the full-rank basis it was fitted with, and the statistics from
which another basis is fitted when it is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor

from gpt2 import results
from gpt2.compression.capture import Moments, Statistics, collect
from gpt2.compression.codecs import Transform, basis_of, full_rank, needs_calibration
from gpt2.data import Text
from gpt2.errors import BadArtefact, CalibrationNotFound, PluginError
from gpt2.models import Geometry, LoadedModel

FORMAT = "kv-plugin-calibration/1"
SIDES = ("k", "v")
META = {
    "model": str,
    "fingerprint": str,
    "num_layers": int,
    "num_kv_heads": int,
    "head_dim": int,
    "rank": int,
    "codec": str,
    "sink_tokens": int,
    "samples": int,
    "seq_len": int,
    "seed": int,
    "text": str,
    "text_spec": str,
    "text_sha256": str,
    "tokens": int,
    "dtype": str,
    "versions": dict,
}


@dataclass
class Calibration:
    """Contents of a calibration file.

    `bases[side]` has mean [L, H, d], E [L, H, d, r], D [L, H, r, d], spectrum [L, H, r], with r the codec's full rank.
    """

    meta: dict
    statistics: Statistics
    bases: dict[str, dict[str, Tensor]]
    _others: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.meta["num_layers"], self.meta["num_kv_heads"], self.meta["head_dim"])

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
        if codec == self.meta["codec"]:
            basis = self.bases[side]
        else:
            if (side, codec) not in self._others:
                self._others[side, codec] = fit(codec, getattr(self.statistics, side))
            basis = self._others[side, codec]
        whole = Transform(*(basis[name][layer] for name in ("E", "D", "mean")))
        return whole.truncate(min(self.meta["rank"], whole.rank) if rank is None else rank)

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
    progress=iter,
) -> Calibration:
    """Calibrate a model on the calibration part of a text.

    samples: sequences of `seq_len` tokens, drawn by `seed`; fewer where the text has fewer, which `meta` tells.
    progress: wraps the iterable of windows, such as tqdm.
    """
    if not needs_calibration(codec):
        raise PluginError(f"codec {codec} needs no calibration: give its name to a preset or to the tuner as it is")
    head_dim, most = loaded.geometry.head_dim, full_rank(codec, loaded.geometry.head_dim)
    if not 1 <= rank <= most:
        limit = "" if most == head_dim else f", of which {codec} stores {most}"
        raise PluginError(f"rank {rank} is out of range: {loaded.spec} has head_dim {head_dim}{limit}")
    loaded.require_context(seq_len)
    windows = text.segments("calibration", loaded.tokenizer, seq_len, samples, seed)
    statistics = collect(loaded, progress(windows), sink_tokens)
    meta = calibration_key(loaded, text, samples, seq_len, seed, sink_tokens) | {
        "model": loaded.spec,
        "num_layers": loaded.geometry.num_layers,
        "head_dim": loaded.geometry.head_dim,
        "num_kv_heads": loaded.geometry.num_kv_heads,
        "rank": rank,
        "codec": codec,
        "text": text.name,
        "text_spec": text.spec,
        "tokens": windows.numel(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }
    return Calibration(meta, statistics, {side: fit(codec, getattr(statistics, side)) for side in SIDES})


def recalibrate(calibration: Calibration, loaded: LoadedModel, text: Text, number: int, progress=iter) -> Calibration:
    """The same calibration from other samples of the same text: `number` > 0 moves the seed.

    At most half of the text's windows are drawn: with all of them, every seed would draw the same. Raises PluginError
    for a text other than the calibration's, and for one with no other samples.
    """
    meta = calibration.meta
    check_samples(calibration, loaded, text)
    available = len(text.segments("calibration", loaded.tokenizer, meta["seq_len"]))
    return calibrate(
        loaded, text, rank=meta["rank"], samples=min(meta["samples"], available // 2), seq_len=meta["seq_len"],
        seed=meta["seed"] + number, sink_tokens=meta["sink_tokens"], codec=meta["codec"], progress=progress,
    )  # fmt: skip


def check_samples(calibration: Calibration, loaded: LoadedModel, text: Text) -> None:
    """Raise PluginError unless `recalibrate` can draw other samples of the same text."""
    meta = calibration.meta
    if meta["text_sha256"] != text.sha256("calibration"):
        raise PluginError(
            f"the calibration was made from another text than {text.name!r}: give --text {meta['text_spec']}, "
            "or other samples would mean another text too"
        )
    if len(text.segments("calibration", loaded.tokenizer, meta["seq_len"])) < 2:
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
    return Calibration(meta, Statistics(*moments, None, 0), bases)


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


def save_calibration(calibration: Calibration, path: str | Path) -> Path:
    """Write a calibration atomically."""
    moments = {
        f"{side}_{name}": getattr(getattr(calibration.statistics, side), name)
        for side in SIDES
        for name in ("count", "mean", "scatter")
    }
    record = {
        "format": FORMAT,
        "meta": calibration.meta,
        "bases": calibration.bases,
        "energy": {side: calibration.energy(side).float() for side in SIDES},
        "statistics": moments
        | {"queries": calibration.statistics.queries, "query_count": calibration.statistics.query_count},
    }
    return results.write_torch(path, record)


def load_calibration(path: str | Path) -> Calibration:
    """Read a calibration. Raises BadArtefact, naming file, field, expected and found; never runs code from the file."""
    path = Path(path)
    if not path.exists():
        raise CalibrationNotFound(
            f"Calibration file not found: {path}. Give its full path, or make it: "
            f"python scripts/calibrate_kv_lowrank.py --output {path}"
        )
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows as any of a dozen types, and nothing but reading happens in the block
        raise BadArtefact(f"{path}: not a readable calibration file ({type(error).__name__}): make it again") from error
    return _parse(record, path)


def _parse(record, path: Path) -> Calibration:
    def expect(good: bool, field: str, expected, found) -> None:
        if not good:
            raise BadArtefact(f"{path}: field {field!r}: expected {expected}, found {found}: make the file again")

    expect(isinstance(record, dict), "file", "a dict", type(record).__name__)
    expect(record.get("format") == FORMAT, "format", FORMAT, record.get("format"))
    meta = record.get("meta")
    expect(isinstance(meta, dict), "meta", "a dict", type(meta).__name__)
    for name, kind in META.items():
        expect(type(meta.get(name)) is kind, f"meta.{name}", kind.__name__, repr(meta.get(name)))
    L, H, d = meta["num_layers"], meta["num_kv_heads"], meta["head_dim"]
    expect(1 <= meta["rank"] <= d, "meta.rank", f"1 to {d}", meta["rank"])
    expect(_is_calibrated(meta["codec"]), "meta.codec", "a calibrated codec, such as pca", repr(meta["codec"]))
    r = full_rank(meta["codec"], d)

    def tensor(group: str, name: str, *shape: int) -> Tensor:
        value = record.get(group)
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        expect(isinstance(value, Tensor) and list(value.shape) == list(shape), f"{group}.{name}", list(shape), found)
        expect(bool(torch.isfinite(value).all()), f"{group}.{name}", "finite numbers", "NaN or infinity")
        return value

    shapes = {"mean": (L, H, d), "E": (L, H, d, r), "D": (L, H, r, d), "spectrum": (L, H, r)}
    bases = {
        side: {name: tensor("bases", f"{side}.{name}", *shape) for name, shape in shapes.items()} for side in SIDES
    }
    moments = [
        Moments(
            tensor("statistics", f"{side}_count", L),
            tensor("statistics", f"{side}_mean", L, H, d),
            tensor("statistics", f"{side}_scatter", L, H, d, d),
        )
        for side in SIDES
    ]
    has_queries = record["statistics"].get("queries") is not None
    queries = tensor("statistics", "queries", L, H, d, d) if has_queries else None
    query_count = record["statistics"].get("query_count")
    expect(type(query_count) is int, "statistics.query_count", "int", repr(query_count))
    return Calibration(meta, Statistics(*moments, queries, query_count), bases)


def _is_calibrated(codec: str) -> bool:
    try:
        return needs_calibration(codec)
    except PluginError:
        return False


def obtain_calibration(
    loaded: LoadedModel,
    text: Text,
    *,
    given: Path | None,
    output: Path | None = None,
    rank: int,
    samples: int,
    seq_len: int,
    seed: int,
    sink_tokens: int,
    progress=iter,
) -> tuple[Calibration, Path]:
    """The calibration to work with and its file: the one given, else a matching one made before, else a new one.

    Matching is by model, text, samples, length, seed and sinks; looked for in results/calibrations and the working
    folder. A new one is written to `output`, by default into results/calibrations.
    """
    made_from = {"samples": samples, "seq_len": seq_len, "seed": seed, "sink_tokens": sink_tokens}
    path = given or find_reusable(calibration_key(loaded, text, **made_from), (*calibration_folders(), Path(".")))
    if path:
        print(f"calibration: using {path}", flush=True)
        calibration = load_calibration(path)
        calibration.check_model(loaded.fingerprint, loaded.spec, str(path))
        return calibration, path
    key = calibration_key(loaded, text, **made_from)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
    path = output or calibration_folders()[0] / f"kv_lowrank_calib_{loaded.slug}_{digest}.pt"
    results.check_writable(path)
    calibration = calibrate(loaded, text, rank=rank, progress=progress, **made_from)
    return calibration, save_calibration(calibration, path)


def find_reusable(key: dict, folders: Iterable[Path]) -> Path | None:
    """The first calibration file in `folders` made with the same `calibration_key`; other files are passed over."""
    for path in (path for folder in folders for path in sorted(folder.glob("*.pt"))):
        try:
            meta = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"]
        except Exception:  # any foreign .pt may lie in a user's folder; whatever is wrong with it, it isn't ours
            continue
        if isinstance(meta, dict) and key.items() <= meta.items():
            return path
    return None


def calibration_folders() -> list[Path]:
    """Where calibrations lie: results/calibrations of the working folder and of this checkout."""
    here = Path("results") / "calibrations"
    return [here] if here.resolve() == (results.RESULTS / "calibrations") else [here, results.RESULTS / "calibrations"]


def suggested_rank(head_dim: int) -> int:
    """Three quarters of head_dim, where the guide starts."""
    return math.ceil(head_dim * 0.75)
