"""What every script shares at the command line: common flags, argument types, and one-line errors."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NoReturn

from torch import Tensor
from tqdm import tqdm

from gpt2.common import files, interrupts, processes, provenance
from gpt2.common.errors import PluginError, is_out_of_memory, printable
from gpt2.compression.codecs import CODECS, IDENTITY, codec_name
from gpt2.compression.named_caches import CacheChoice, from_policy, from_preset
from gpt2.compression.presets.policies import KVPolicyName
from gpt2.evaluation.perplexity import BASELINE
from gpt2.models import embedded, loading
from gpt2.text.sources import Text

WAIT_FOR_THE_FIRST_S = 3
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on a disk, in one's share of it, in a file
# Flag to what it does against it, in the order to try; a script shows those that it has
AGAINST_OUT_OF_MEMORY = {
    "--samples": "reduce --samples (50 is often enough)",
    "--seq-len": "use --seq-len 512 instead of the default 1024",
    "--gradient-checkpointing": "use --gradient-checkpointing (only for metrics that need gradients)",
    "--batch-size": "while evaluating, a smaller --batch-size",
    "--batch-sizes": "smaller --batch-sizes",
    "--prefill-chunk": "read the prompt in pieces: --prefill-chunk 512",
    "--context-lengths": "shorter --context-lengths",
    "--dtype": "a smaller --dtype (bfloat16)",
    "--device": "--device cpu",
}


class Parser(argparse.ArgumentParser):
    """Remembers the latest one made, so that advice names flags that the script has."""

    latest: Parser | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Parser.latest = self

    def error(self, message):
        if not processes.launched().first:  # all have the same arguments: one tells
            leave_it_to_the_first()
        super().error(message)

    def parse_args(self, *args, **kwargs):
        parsed = super().parse_args(*args, **kwargs)
        if both := provenance.read_and_written(vars(parsed)):
            self.error("--{} and --{} name the same file, which would be lost: give another".format(*both))
        return parsed


def leave_it_to_the_first() -> NoReturn:
    """Fail some seconds after the first process has said why: a launcher stops them all as soon as one is gone."""
    time.sleep(WAIT_FOR_THE_FIRST_S)
    sys.exit(2)


def parser(manual: str) -> argparse.ArgumentParser:
    """A parser whose --help is the script's docstring followed by its flags with their defaults."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    return Parser(description=manual, formatter_class=Formatter, allow_abbrev=False)


def out_of_memory() -> str:
    """The error that scripts print, with the flags of this one that help."""
    known = Parser.latest._option_string_actions if Parser.latest else AGAINST_OUT_OF_MEMORY
    helps = [words for flag, words in AGAINST_OUT_OF_MEMORY.items() if flag in known]
    lines = [f"  {number}. {words}" for number, words in enumerate(helps, start=1)]
    return "\n".join(["error: out of memory. What helps, in this order:", *lines])


def add_output_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument("--output", type=output_path, help="JSON file; the PNG goes beside it, or into plots beside runs")


def output_path(word: str) -> Path:
    """A file to write, refused before any work where it, or the picture beside it, can't be."""
    path = Path(word)
    try:
        files.check_writable(path)
        files.check_writable(files.picture_beside(path))
    except PluginError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def output_files(given: Path | None, stem: str) -> tuple[Path, Path]:
    """Where a script writes its JSON and its picture: beside each other where --output says, else under results/."""
    if given is not None:
        return given, files.picture_beside(given)
    record, picture = files.RESULTS / "runs" / f"{stem}.json", files.RESULTS / "plots" / f"{stem}.png"
    return files.check_writable(record), files.check_writable(picture)


def add_model_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default=embedded.EMBEDDED, help="embedded model's name, local folder, or hub id")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or all: layers over every GPU")
    p.add_argument("--dtype", default="auto", help="auto (float32 on CPU), float32, float16, bfloat16")


def add_text_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--text",
        help="embedded, wikitext2, a file, a folder with *valid*.txt and *test*.txt, self (the model's own samples), "
        "or several joined by +, in equal shares; by default embedded for the embedded model, else wikitext2",
    )
    p.add_argument("--seed", type=int, default=0, help="draws calibration windows, needle prompts and the bootstrap")


def add_calibration_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--samples", type=positive_int, default=100, help="calibration sequences")
    p.add_argument("--seq-len", type=positive_int, default=1024, help="tokens per calibration sequence")
    p.add_argument("--sink-tokens", type=natural, default=4, help="first tokens, kept exact and out of statistics")


def add_codec_flag(p: argparse.ArgumentParser, what: str, default: str | None = "pca") -> None:
    names = f"{', '.join(CODECS)}, or bases joined by +, such as ln_nullspace+pca"
    p.add_argument("--codec", type=codec, default=default, help=f"{what}: {names}")


def codec(word: str) -> str:
    """A codec's name, with the nearest one where there is none."""
    try:
        return codec_name(word)
    except PluginError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_cache_flags(p: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--preset and --policy: which compressed cache to measure, or which ones."""
    how = {"nargs": "+", "default": []} if several else {}
    group = p if several else p.add_mutually_exclusive_group()
    group.add_argument("--preset", help="preset file, built-in name, or kv8 or kv4 for any model", **how)
    group.add_argument("--policy", choices=list(KVPolicyName), help="a policy instead of a preset", **how)


def chosen_caches(args: argparse.Namespace, loaded: loading.LoadedModel) -> list[CacheChoice]:
    """The caches that --preset and --policy name, checked against the model."""

    def words(value) -> list[str]:
        return value if isinstance(value, list) else [value] if value else []

    chosen = [from_preset(word, loaded) for word in words(args.preset)]
    chosen += [from_policy(word, loaded) for word in words(args.policy)]
    if not chosen:
        raise PluginError("nothing to measure: give --preset (a file or a built-in name) or --policy")
    taken = {BASELINE, IDENTITY}  # as the caches beside them are called
    for choice in chosen:
        if choice.label in taken:
            raise PluginError(f"two caches are called {choice.label!r}: give one of them another name")
        taken.add(choice.label)
    return chosen


def bar(label: str, unit: str) -> Callable[[Iterable], Iterable]:
    """A progress bar that wraps an iterable, on a terminal and in the first process; a log file gets none."""
    hidden = None if processes.launched().first else True
    return lambda items: tqdm(items, desc=label, unit=unit, disable=hidden, leave=False)


def add_evaluation_flags(p: argparse.ArgumentParser, tokens: int) -> None:
    p.add_argument("--eval-tokens", type=positive_int, default=tokens, help="tokens per perplexity")
    p.add_argument(
        "--eval-seq-len", type=positive_int, help="tokens per evaluated segment; 2048 or the model's context"
    )
    p.add_argument("--chunk", type=positive_int, default=64, help="tokens fed to the cache at a time")
    p.add_argument("--batch-size", type=positive_int, default=4, help="segments evaluated together")


def evaluation_length(args: argparse.Namespace, loaded: loading.LoadedModel) -> int:
    """Tokens per evaluation segment: --eval-seq-len, or 2048 where the model and --eval-tokens allow it."""
    length = min(args.eval_seq_len or min(2048, loaded.max_context or 2048), args.eval_tokens)
    loaded.require_context(length, "--eval-seq-len")
    return length


def evaluation_segments(args: argparse.Namespace, loaded: loading.LoadedModel, text: Text, part: str) -> Tensor:
    """The token segments that --eval-tokens and --eval-seq-len ask for, [n, length]."""
    length = evaluation_length(args, loaded)
    segments = text.segments(part, loaded, length, args.eval_tokens // length, flag="--eval-seq-len")
    if segments.numel() < args.eval_tokens:
        print(f"note: the {part} part of {text.name} gives {segments.numel():,} tokens, not {args.eval_tokens:,}")
    return segments


def positive_int(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a positive number")
    return value


def natural(word: str) -> int:
    value = int(word)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{word} is negative")
    return value


def int_list(word: str) -> list[int]:
    """`60,56,48` to [60, 56, 48], in the order given, each once."""
    return list(dict.fromkeys(positive_int(part) for part in word.split(",")))


def ratio_list(word: str) -> list[float]:
    """`2,3.5,4` to [2.0, 3.5, 4.0], each above 1 and once."""
    try:
        ratios = list(dict.fromkeys(float(part) for part in word.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word}: give compression ratios, such as 2,3.5,4") from error
    if not all(1 < ratio < 64 for ratio in ratios):
        raise argparse.ArgumentTypeError(f"{word}: a compression ratio lies between 1 and 64")
    return ratios


def word_list(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type for `a,b` out of the allowed words."""

    def parse(words: str) -> list[str]:
        chosen = words.split(",")
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}: choose from {','.join(allowed)}")
        return chosen

    return parse


def fraction(word: str) -> float:
    """A budget such as 0.05; 5 would be 500 % and is surely a slip."""
    value = float(word)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{word} is out of range: 0.05 means 5 %, give a number between 0 and 1")
    return value


def run(main: Callable[..., None], *, shared: bool = False) -> None:
    """Run a script's main; what a user can put right is one line on stderr and a non-zero exit, not a traceback.

    shared: several processes may run it, and main takes the `Processes`. The first one alone prints, but for an error.
    """
    provenance.git_commit()  # now: in an hour, when results are written, the checkout may have moved on

    def together() -> None:
        with processes.together() as own, _muted(not own.first):
            # Inside, so that whoever fails has said so before the others notice that it is gone
            _told_in_one_line(lambda: main(own), own)

    def alone() -> None:
        own = processes.launched()
        if not own.first:
            leave_it_to_the_first()
        if own.size > 1:
            raise PluginError("this script runs in one process: start it with python (and without WORLD_SIZE set)")
        main()

    _told_in_one_line(together if shared else alone, processes.ALONE)


def _told_in_one_line(work: Callable[[], None], own: processes.Processes) -> None:
    def stop(message: str, exit_code: int) -> NoReturn:
        if own.first_to_fail():  # the others stop because of this one
            print(printable(message), file=sys.stderr, flush=True)
        sys.exit(exit_code)

    try:
        work()
        if sys.stdout:  # closed by `>&-`
            sys.stdout.flush()
    except PluginError as error:
        stop(f"error: {error}", error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        stop(out_of_memory(), 4)
    except KeyboardInterrupt:
        stop(interrupts.MESSAGE, interrupts.EXIT_CODE)
    except BrokenPipeError:  # `script | head`
        _print_nowhere()
        sys.exit(141)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _print_nowhere()
        stop(f"error: can't write {error.filename or 'what is printed'}: {error.strerror}", 2)


def _print_nowhere() -> None:
    """What is still to be printed can't be: the interpreter must not try it again as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _muted(really: bool):
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if really else sys.stdout):
        yield
