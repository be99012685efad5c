"""What a script works on: the text, the model and the caches that its flags name, and the files that it writes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from gpt2.common import files, machine, processes, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.codecs import IDENTITY
from gpt2.compression.named_caches import CacheChoice, from_policy, from_preset
from gpt2.compression.presets import resolve_preset
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory
from gpt2.models import loading, random_weights
from gpt2.report import tables
from gpt2.text import sources
from gpt2.text.overlap import require_apart
from gpt2.text.texts import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Script:
    """The opened inputs of one run of a script.

    text: None for a script without --text. eval_text: the text to measure on, which is `text` without --eval-text.
    """

    args: argparse.Namespace
    loaded: loading.LoadedModel
    text: Text | None
    eval_text: Text | None

    def output_files(self, stem: str) -> tuple[Path, Path]:
        """As `output_files`, with the model's name after the stem."""
        return output_files(self.args.output, f"{stem}_{self.loaded.slug}")

    def record(self, **more) -> dict:
        """A results record: provenance, model, and the evaluation text if there is one.

        more: further keys, which may replace these. `text_sha256` is that of the evaluation part.
        """
        about = {"model": self.loaded.spec, "fingerprint": self.loaded.fingerprint}
        if self.eval_text is not None:
            about |= {"text": self.eval_text.name, "text_sha256": self.eval_text.sha256("evaluation")}
        return provenance.provenance(self.args, **about | more)

    def evaluation_segments(self, part: str = "evaluation") -> Tensor:
        """As `evaluation_segments`, of one part of the evaluation text."""
        return evaluation_segments(self.args, self.loaded, self.eval_text, part)

    @property
    def dtype(self) -> str:
        """The model's dtype, such as `float32`."""
        return str(self.loaded.model.dtype).removeprefix("torch.")

    @property
    def weights(self) -> str:
        """What the weights are: trained, or random for a shape without weights."""
        return "random" if self.loaded.random_weights else "trained"


def open_script(args: argparse.Namespace, *, runs: bool = True) -> Script:
    """Open what the flags name, the cheapest first, so that mistakes show early: presets, text, then the model.

    With `add_shape_flags` the model may be a shape without weights. runs: whether the script runs the model; if not, a
    shape gets no random weights either.
    """
    shape = hasattr(args, "layers")
    for preset in [] if shape else _words(getattr(args, "preset", None)):
        resolve_preset(preset, args.model)
    text = sources.load_text(args.text, args.model) if hasattr(args, "text") else None
    other = getattr(args, "eval_text", None)
    eval_text = sources.load_text(other, args.model) if other else text
    if other:
        require_apart(text, eval_text, ("calibration",), f"--text {text.spec} --eval-text {other}")
    if shape:
        load = random_weights.load if runs else random_weights.outline
        return Script(args, load(args.model, args.device, args.dtype, args.layers), text, eval_text)
    return Script(args, loading.load(args.model, args.device, args.dtype), text, eval_text)


def output_files(given: Path | None, stem: str) -> tuple[Path, Path]:
    """Paths of a script's JSON and picture: `given` and a PNG beside it, or under results/ if `given` is None.

    Raises PluginError if they can't be written.
    """
    if given is not None:
        return given, files.picture_beside(given)
    record, picture = files.RESULTS / "runs" / f"{stem}.json", files.RESULTS / "plots" / f"{stem}.png"
    return files.check_writable(record), files.check_writable(picture)


def of_this_machine(stem: str, device: torch.device) -> str:
    """The name of results that measure time on a device, so that they don't replace another kind of machine's."""
    return machine.named(stem, provenance.machine_tag(device))


def write(paths: tuple[Path, Path], record: dict, draw: Callable[[], Figure], show: Sequence[str] = ()) -> None:
    """Write a record and its picture to the paths from `output_files`, then print its tables and where the files are.

    The record's `wall_s` becomes the time until now, unless a resumed script left it unknown.

    show: for each table its name and the words that `tables.show` takes, such as `scaling bytes`.
    """
    output, picture = paths
    if record.get("wall_s") is not None:  # many scripts make the record first, and fill its rows while they measure
        record["wall_s"] = provenance.taken()
    files.write_run(output, record, picture, draw)
    for words in show:
        kind, *chosen = words.split()
        tables.show(kind, record, *chosen)
    print(f"\nwrote {files.shown(output)} and {files.shown(picture)}")


def chosen_caches(args: argparse.Namespace, loaded: loading.LoadedModel) -> list[CacheChoice]:
    """The caches that --preset and --policy name. Raises PluginError for equal names, and for none without --peers."""
    chosen = [from_preset(word, loaded) for word in _words(args.preset)]
    chosen += [from_policy(word, loaded) for word in _words(args.policy)]
    if not chosen and not getattr(args, "peers", None):
        raise PluginError("nothing to measure: give --preset (a file or a built-in name) or --policy")
    taken = {BASELINE, IDENTITY}  # names of caches that scripts add themselves
    for choice in chosen:
        if choice.label in taken:
            raise PluginError(f"two caches are called {choice.label!r}: give one of them another name")
        taken.add(choice.label)
    return chosen


def compared_caches(
    args: argparse.Namespace, loaded: loading.LoadedModel
) -> tuple[list[CacheChoice], dict[str, CacheFactory]]:
    """What `chosen_caches` gives, and factories by name: of the uncompressed cache, of these, of --peers that work."""
    chosen = chosen_caches(args, loaded)
    factories = {BASELINE: baseline_factory(loaded)} | {choice.label: choice.make for choice in chosen}
    if peers := getattr(args, "peers", None):
        from gpt2.evaluation import lineup  # here, as most runs have no such caches

        factories |= lineup.working(lineup.for_quality(loaded, peers, []))
    return chosen, factories


def command_line(script: str, flags: dict[str, object]) -> str:
    """The shell command that runs a script with these flags; flags whose value is None are left out."""
    words = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", str(value))]
    return f"python scripts/{script}.py {shlex.join(words)}"


def _words(value: str | list[str] | None) -> list[str]:
    """The values of a flag that takes one value or several, as a list."""
    return value if isinstance(value, list) else [value] if value else []


def bar(label: str, unit: str) -> Callable[[Iterable], Iterable]:
    """A progress bar that wraps an iterable. It shows only on a terminal, and only in the first process."""
    hidden = None if processes.launched().first else True
    return lambda items: tqdm(items, desc=label, unit=unit, disable=hidden, leave=False)


def evaluation_length(args: argparse.Namespace, loaded: loading.LoadedModel) -> int:
    """Tokens per evaluation segment: --eval-seq-len, or 2048 where the model and --eval-tokens allow it.

    Raises PluginError for a length that is beyond the model's context, or leaves nothing to predict.
    """
    length = min(args.eval_seq_len or min(2048, loaded.max_context or 2048), args.eval_tokens)
    if length < 2:
        raise PluginError(
            f"an evaluated segment has {length} token: expected at least 2, as the first one isn't predicted: give a "
            "larger --eval-seq-len and --eval-tokens"
        )
    loaded.require_context(length, "--eval-seq-len")
    return length


def evaluation_segments(args: argparse.Namespace, loaded: loading.LoadedModel, text: Text, part: str) -> Tensor:
    """Token segments [n, length] of a part, by --eval-tokens and --eval-seq-len. Prints a note if there are fewer."""
    length, asked = evaluation_length(args, loaded), args.eval_tokens
    segments = text.segments(part, loaded, length, asked // length, flag="--eval-seq-len")
    if len(segments) < asked // length:
        print(f"note: the {part} part of {text.name} gives {segments.numel():,} tokens, not {asked:,}")
    elif segments.numel() < asked:
        print(f"note: --eval-tokens {asked:,} is measured as {segments.numel():,}: {len(segments)} whole segments of "
              f"{length:,} tokens")  # fmt: skip
    return segments
