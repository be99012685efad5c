"""What each choice in the joint codec is worth: the codec with one choice changed at a time, at equal total bits.

It is a simulation: in one forward pass K and V are replaced by their reconstruction, and no codes are packed. The
result is that of a real cache that is fed one block at a time, as such a cache holds only whole blocks at every step.
In all variations K and V of a layer share the bytes of a block, and bits are shared out over the layers so that one bit
saves the same error in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.fisher import (
    CROSS_HEAD_SHARE,
    detect_rotary,
    drawn_labels,
    watched_cache,
    without_parameter_gradients,
)
from gpt2.compression.codecs.metric import fit_in_metric
from gpt2.compression.codecs.mixed import BLOCK, WIDTHS
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.multi_head import JointTransform, heads_per_group, side_by_side
from gpt2.compression.codecs.rope import NONE, Rotary
from gpt2.evaluation.perplexity import BASELINE, Scores, baseline_factory, compare, score, segment_sums
from gpt2.evaluation.statistics import paired_bootstrap
from gpt2.experiments import query_rounding
from gpt2.experiments.codec_simulation import Fitted, Replaced, Simulation, Variation, led, share_out
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel

LONGEST = 128  # tokens of the longest block; texts have a multiple of it, so that every row compresses the same tokens
SAMPLE_BLOCKS = 24  # blocks of LONGEST tokens to share out bits on: as many tokens as the product's calibration samples
BETWEEN_HEADS = {"heads": 0.0, "shrunk": CROSS_HEAD_SHARE, "fisher": 1.0}  # factor of the metric's cross-head entries
PRODUCT = Variation()
FINER = tuple(share / 20 for share in range(20, 8, -1))

# Rows by question; each question has the product among its rows
QUESTIONS: dict[str, dict[str, Variation]] = {
    "arrangement": {
        "each head alone, keys as cached": Variation(frame=None, parts="head"),
        "heads together, keys as cached": Variation(frame=None, parts="side"),
        "heads together, keys turned to their block's middle": Variation(frame=BLOCK, parts="side"),
        "heads together, keys without positions": Variation(parts="side"),
        "K and V together, keys as cached": Variation(frame=None),
        "K and V of a head together, keys without positions": Variation(parts="pair"),
        "all together, keys without positions": PRODUCT,
    },
    "frame": {
        **{f"of {frame} tokens": Variation(frame=frame) for frame in (16, 32, BLOCK, LONGEST)},
        f"of {BLOCK} tokens, K and V of a head together": Variation(frame=BLOCK, parts="pair"),
        f"of {BLOCK} tokens, K and V apart": Variation(frame=BLOCK, parts="side"),
        "none, keys without positions": PRODUCT,
    },
    "queries": {
        f"in floats, frame of {BLOCK} tokens": Variation(frame=BLOCK),
        **{
            f"in {bits} bits, frame of {BLOCK} tokens": Variation(frame=BLOCK, query_bits=bits)
            for bits in (16, 12, 10, 8)
        },
        "in floats, no frame, keys without positions": PRODUCT,
    },
    "metric": {
        "plain PCA": Variation(metric="identity"),
        "PCA, K and V of each head weighted by their mean Fisher": Variation(metric="weighted"),
        "Fisher within heads": Variation(metric="heads"),
        f"Fisher, {CROSS_HEAD_SHARE:.0%} of it between heads": PRODUCT,
        "Fisher in full": Variation(metric="fisher"),
    },
    "widths": {
        "fixed at calibration": Variation(widths="fixed"),
        "by block within its bytes": PRODUCT,
        "by block, blocks of any size at one price, set on the text that is read": Variation(widths="text"),
        "by block, blocks of any size at one price, set at calibration": Variation(widths="calibration"),
    },
    "menu": {
        "0, 2, 4, 8 bits": Variation(menu=(0, 2, 4, 8)),
        "0, 1, 2, 3, 4, 5, 6, 8 bits": Variation(menu=(0, 1, 2, 3, 4, 5, 6, 8)),
        ", ".join(map(str, WIDTHS)) + " bits": PRODUCT,
    },
    "block": {
        "32 tokens": Variation(block=32),
        "64 tokens": PRODUCT,
        "128 tokens": Variation(block=128),
    },
    "metadata": {
        "scale and offset in 16 bits each": Variation(metadata="half"),
        "scale and offset in 8 bits each": PRODUCT,
        "scale and offset in 4 bits each": Variation(metadata="nibbles", wide=(1.0, 1.2, 1.45)),
        "scale in 8 bits, about the calibrated mean": Variation(metadata="scale"),
    },
    "clipping": {
        "none, the whole range": Variation(narrow=(1.0,)),
        "four shares of the range": PRODUCT,
        "twelve shares of the range": Variation(narrow=FINER),
    },
    "levels": {
        "uniform": PRODUCT,
        "of a Gaussian (Lloyd–Max) up to 4 bits": Variation(levels="gaussian"),
    },
    "rotation": {
        "none": PRODUCT,
        "Hadamard among channels of equal width": Variation(rotated=True),
    },
    "lattice": {
        "none": PRODUCT,
        "E8 over 8 tokens at 2 and 3 bits": Variation(levels="lattice"),
    },
}


# --- statistics for bases and budgets


FRAMES = list(dict.fromkeys(row.frame for rows in QUESTIONS.values() for row in rows.values()))


def unrotated(k: Tensor, rotary: Rotary, frame: int | None) -> Tensor:
    """Keys [B, H, T, d] from position 0 on, un-rotated as `Variation.frame` says."""
    return k if frame is None else rotary.unrotate(k, 0, frame)


class Gathered:
    """Statistics of K, V and their gradients, with keys un-rotated in frames of every length in FRAMES.

    moments: key of FRAMES to moments of [K | V] side by side, [G, w] per layer, with metrics["fisher"]. sample [L, n,
    2H, 128, d] float16: n blocks at positions `starts`, K's heads before V's, with RoPE as they are cached.
    """

    def __init__(self, loaded: LoadedModel, rotary: list[Rotary], sink_tokens: int, segments: int, seed: int):
        self.geometry, self.rotary, self.sink_tokens = loaded.geometry, rotary, sink_tokens
        H, d = self.geometry.num_kv_heads, self.geometry.head_dim
        self.groups = H // heads_per_group(H, d)
        shape = Geometry.uniform(self.geometry.num_layers, self.groups, 2 * H * d // self.groups)
        self.moments = {frame: Moments.zeros(shape) for frame in FRAMES}
        for moments in self.moments.values():
            moments.metrics["fisher"] = [torch.zeros_like(scatter) for scatter in moments.scatter]
        self.sample: Tensor | None = None
        self.starts: list[int] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._per_segment = -(-SAMPLE_BLOCKS // segments)
        self._waiting: dict[int, dict[str, Tensor]] = {}
        self._kept: dict[int, Tensor] = {}

    def watch(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Register for the gradients of one layer's k, v [1, H, T, d]. Raises PluginError if there will be none."""
        if not (k.requires_grad and v.requires_grad):
            raise PluginError("no gradients reach K and V of this model, so its Fisher metric can't be measured")
        kept = {"k": k.detach(), "v": v.detach()}
        for side, x in (("k", k), ("v", v)):
            x.register_hook(partial(self._arrived, layer, side, kept))

    def _arrived(self, layer: int, side: str, kept: dict[str, Tensor], gradient: Tensor) -> None:
        gradients = self._waiting.setdefault(layer, {})
        gradients[side] = gradient.detach()
        if len(gradients) < 2:
            return
        del self._waiting[layer]
        for frame, moments in self.moments.items():
            x, g = (
                side_by_side(unrotated(pair["k"].float(), self.rotary[layer], frame), pair["v"].float(), self.groups)
                for pair in (kept, gradients)
            )
            g = g[0, :, self.sink_tokens :]
            moments.update(layer, x[:, :, self.sink_tokens :])
            moments.metrics["fisher"][layer] += (g.mT @ g).double().cpu()
        self._kept[layer] = torch.cat((kept["k"], kept["v"]), dim=1)[0].half().cpu()

    def next_segment(self) -> None:
        """Add a few blocks of the finished segment to the sample, at the same positions in every layer."""
        x = torch.stack([self._kept.pop(layer) for layer in range(self.geometry.num_layers)])  # [L, 2H, T, d]
        blocks = led(x, self.sink_tokens).unflatten(2, (-1, LONGEST)).transpose(1, 2)
        chosen = torch.randperm(blocks.shape[1], generator=self._generator)[: self._per_segment]
        self.starts += (LONGEST * chosen).tolist()
        found = blocks[:, chosen]
        self.sample = found if self.sample is None else torch.cat((self.sample, found), dim=1)

    def finish(self) -> Gathered:
        for moments in self.moments.values():
            for metric, count in zip(moments.metrics["fisher"], moments.count, strict=True):
                metric /= count
        return self


def gather(
    loaded: LoadedModel, segments: Tensor, sink_tokens: int, *, seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Gathered:  # fmt: skip
    """Statistics of one forward and backward pass over segments [n, T], T a multiple of LONGEST.

    seed: draws labels from the model's predictions, and the sampled blocks. Raises PluginError for segments of another
    length and for too many sink tokens.
    """
    check_length(segments.shape[1], "--seq-len")
    if sink_tokens >= BLOCK // 2:
        raise PluginError(f"--sink-tokens {sink_tokens}: give fewer than {BLOCK // 2}, half of a block")
    gathered = Gathered(loaded, detect_rotary(loaded, segments[0], sink_tokens), sink_tokens, len(segments), seed)
    model = loaded.model
    with torch.enable_grad(), without_parameter_gradients(model), watched_cache(model, gathered.watch) as run:
        for number, segment in enumerate(progress(segments)):
            logits = run(segment[None].to(loaded.device))[0]
            labels = drawn_labels(logits, seed, number)
            nn.functional.cross_entropy(logits.float(), labels, reduction="sum").backward()
            gathered.next_segment()
    return gathered.finish()


def check_length(tokens: int, flag: str) -> None:
    """Raise PluginError unless segments of so many tokens consist of whole blocks of every size."""
    if tokens % LONGEST:
        raise PluginError(f"{flag} {tokens}: give a multiple of {LONGEST}, so that all block sizes fill it")


# --- a variation, fitted and measured


def fit(gathered: Gathered, variation: Variation, device: torch.device | str = "cpu") -> Fitted:
    """The bases of a variation, fitted separately for each set of channels that share one."""
    moments, d = gathered.moments[variation.frame], gathered.geometry.head_dim
    scatter, mean = torch.stack(moments.scatter), torch.stack(moments.mean)
    w, spectrum = mean.shape[-1], torch.zeros_like(mean)
    E, D = torch.zeros_like(scatter), torch.zeros_like(scatter)
    for layer in range(len(E)):
        covariance = moments.covariance(layer)
        metric = _metric(moments.metrics["fisher"][layer], variation.metric, d)
        for own in _parts(variation.parts, w, d):
            square = (slice(None), own[:, None], own)
            found, variances = fit_in_metric(moments.mean[layer][:, own], covariance[square], metric[square])
            E[layer][square], D[layer][square], spectrum[layer][:, own] = found.E, found.D, variances
    # One factor for the whole model, as in the product, so that steps lie well inside the range of a scale's byte
    unit = spectrum.mean().clamp_min(1e-30).sqrt()
    whole = [part.float().to(device) for part in (E / unit, D * unit, mean)]
    frame = variation.frame
    transforms = [
        JointTransform(*parts, rotary=NONE if frame is None else rotary, shared=frame or 1)
        for *parts, rotary in zip(*whole, gathered.rotary, strict=True)
    ]
    return Fitted(variation, transforms, (spectrum.sqrt() / unit).float().to(device))


def _metric(fisher: Tensor, how: str, d: int) -> Tensor:
    """The metric of squared error, [G, w, w], that `how` makes of the Fisher information."""
    if how == "identity":
        return torch.eye(fisher.shape[-1], dtype=fisher.dtype).expand_as(fisher)
    if how == "weighted":
        weights = fisher.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, d))
        return torch.diag_embed(weights.mean(-1, keepdim=True).expand_as(weights).flatten(-2))
    within = torch.kron(torch.eye(fisher.shape[-1] // d), torch.ones(d, d))
    return fisher * torch.lerp(torch.tensor(BETWEEN_HEADS[how]), torch.tensor(1.0), within)


def _parts(how: str, w: int, d: int) -> Tensor:
    """Channels that share a basis, [bases, channels]: one row for each basis."""
    channels = torch.arange(w).view(2, -1, d)  # K and V, heads
    orders = {"head": channels.flatten(0, 1), "side": channels.flatten(1), "joint": channels.flatten()[None]}
    return (orders | {"pair": channels.transpose(0, 1).flatten(1)})[how]


def measured_on_sample(fitted: Fitted, gathered: Gathered) -> list[Tensor]:
    """Squared errors of the sample's blocks at every width, [G, n, w, widths] for each layer."""

    def of(layer: int) -> Tensor:
        blocks = zip(gathered.sample[layer].float(), gathered.starts, strict=True)
        device = fitted.spread.device
        return torch.cat([fitted.errors(layer, x[None].to(device), start)[0] for x, start in blocks], dim=1).cpu()

    return [of(layer) for layer in range(len(fitted.transforms))]


@torch.no_grad()
def measured_on_text(fitted: Fitted, loaded: LoadedModel, segments: Tensor, sink_tokens: int) -> list[Tensor]:
    """Squared errors of a text's uncompressed K and V at every width, [G, n, w, widths] for each layer.

    segments: token ids [n, T].
    """
    found: dict[int, list[Tensor]] = {}

    def watch(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        error = fitted.errors(layer, led(torch.cat((k, v), dim=1).float(), sink_tokens))
        found.setdefault(layer, []).append(error[0].cpu())
        return k, v

    for segment in segments:
        loaded.model.base_model(input_ids=segment[None].to(loaded.device), past_key_values=Replaced(watch))
    return [torch.cat(found[layer], dim=1) for layer in sorted(found)]


@dataclass
class Measured:
    """Scores of a simulation, and the bits per coordinate that it counted."""

    scores: Scores
    bits: float


def measure(
    loaded: LoadedModel, segments: Tensor, gathered: Gathered, rows: dict[str, Variation], budgets: Sequence[float],
    known: dict, *, seed: int = 0, progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict]:  # fmt: skip
    """Score rows at every budget; one results record per row and budget, with changes from baseline and product.

    segments: token ids [n, T]. rows: variations by label, with the product among them. budgets: bits per coordinate.
    known: earlier measurements by (variation, budget), to which new ones are added.
    """
    check_length(segments.shape[1], "--eval-seq-len")
    new = {variation: simulations(loaded, segments, gathered, variation, budgets)
           for variation in dict.fromkeys(rows.values()) if (variation, budgets[0]) not in known}  # fmt: skip
    named = {f"{i} {bits:g}": (variation, bits) for i, variation in enumerate(new) for bits in budgets}
    running = {name: new[variation][bits] for name, (variation, bits) in named.items()}
    caches = {BASELINE: baseline_factory(loaded)} | {
        name: partial(Replaced, one.replace) for name, one in running.items()
    }
    if running:
        rounds = any(variation.query_bits for variation in new)
        with query_rounding.rounding_queries(loaded.model) if rounds else nullcontext():
            scores = score(loaded, segments, caches, chunk=segments.shape[1], batch_size=1, progress=progress)
        known[BASELINE] = scores[BASELINE]
        known |= {named[name]: Measured(scores[name], one.bits) for name, one in running.items()}
    return [_record(label, variation, bits, known, seed) for label, variation in rows.items() for bits in budgets]


def simulations(
    loaded: LoadedModel, segments: Tensor, gathered: Gathered, variation: Variation, budgets: Sequence[float]
) -> dict[float, Simulation]:
    """A simulation for every budget.

    If blocks may take any number of bits, the total depends on the text. With widths="text" the price of a bit is set
    on the evaluated text itself, so that all rows have equal bits; a real cache couldn't know this price in advance.
    """
    fitted = fit(gathered, variation, loaded.device)
    if variation.widths == "text":
        measured = measured_on_text(fitted, loaded, segments, gathered.sink_tokens)
    else:
        measured = measured_on_sample(fitted, gathered)
    return {bits: Simulation(fitted, share_out(variation, measured, bits), gathered.sink_tokens) for bits in budgets}


def _record(label: str, variation: Variation, bits: float, known: dict, seed: int) -> dict:
    own, product = known[variation, bits], known[PRODUCT, bits]
    difference = own.scores.kl - product.scores.kl
    # `paired_bootstrap` returns exp(mean) − 1, which the logarithm undoes
    interval = np.log1p(paired_bootstrap(difference, seed))
    against = {"kl_change": float(difference.mean() / product.scores.kl.mean()),
               "kl_change_interval": (interval / product.scores.kl.mean()).tolist()}  # fmt: skip
    # A price that is set on the whole text gives other figures where only its first segment is measured
    sums = {} if variation.widths == "text" else {"segment_sums": segment_sums(known[BASELINE], own.scores)}
    return {
        "label": label, "product": variation == PRODUCT, "bits": bits, "bits_counted": own.bits,
        **compare(known[BASELINE], own.scores, seed), **({} if variation == PRODUCT else against), **sums,
    }  # fmt: skip
