"""The parser of every script, and flags that several scripts share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gpt2.cli.argument_types import natural, positive_int
from gpt2.common import files, processes, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.codecs import CODECS, codec_name
from gpt2.compression.presets.policies import KVPolicyName
from gpt2.models import embedded

WAIT_FOR_THE_FIRST_S = 3


class Parser(argparse.ArgumentParser):
    """An argument parser that also rejects a file that is both read and written.

    parsed: the arguments that were parsed last in this process, so that advice names only flags that the script has.
    """

    parsed: argparse.Namespace | None = None

    def error(self, message):
        if not processes.launched().first:  # all processes have the same arguments, so one message is enough
            fail_after_the_first()
        super().error(message)

    def parse_args(self, *args, **kwargs):
        parsed = Parser.parsed = super().parse_args(*args, **kwargs)
        if both := provenance.read_and_written(vars(parsed)):
            self.error("--{} and --{} name the same file, which would be overwritten: give another".format(*both))
        return parsed

    def reject_changed(self, parsed: argparse.Namespace, flags: Sequence[str], reason: str) -> None:
        """Exit with an error if one of these flags, given by their names in `parsed`, is not at its default."""
        for name in flags:
            if getattr(parsed, name) != self.get_default(name):
                self.error(f"--{name.replace('_', '-')} {reason}")


def fail_after_the_first() -> NoReturn:
    """Exit with an error, seconds after the first process printed it: a launcher stops all as soon as one exits."""
    time.sleep(WAIT_FOR_THE_FIRST_S)
    sys.exit(2)


def parser(manual: str) -> Parser:
    """A parser whose --help is the script's docstring followed by its flags with their defaults."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    return Parser(description=manual, formatter_class=Formatter, allow_abbrev=False)


def evaluation_parser(manual: str, tokens: int, *, calibrates: bool = False) -> Parser:
    """A `parser` with the flags of a script that measures perplexity: model, text, evaluation, calibration if any.

    tokens: default of --eval-tokens.
    """
    p = parser(manual)
    add_model_flags(p)
    add_text_flags(p)
    if calibrates:
        add_calibration_flags(p)
    add_evaluation_flags(p, tokens)
    return p


def add_output_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument("--output", type=output_path, help="JSON file; the PNG goes beside it, or into plots beside runs")


def output_path(word: str) -> Path:
    """A file to write. Rejected before any work where it, or the picture beside it, can't be written."""
    path = Path(word)
    try:
        files.check_writable(path)
        files.check_writable(files.picture_beside(path))
    except PluginError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def add_model_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default=embedded.EMBEDDED, help="embedded model's name, local folder, or hub id")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or all: layers over every GPU")
    p.add_argument("--dtype", default="auto", help="auto (float32 on CPU), float32, float16, bfloat16")


def add_shape_flags(p: argparse.ArgumentParser) -> None:
    """The model flags, for scripts whose figures don't depend on weights: --model may also be a shape file."""
    add_model_flags(p)
    p.add_argument("--layers", type=positive_int, help="layers of a shape without weights; all if omitted")


def add_text_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--text",
        help="embedded, wikitext2, a file, a folder with *valid*.txt and *test*.txt, self (the model's own samples), "
        "or several joined by +, in equal shares; by default embedded for the embedded model, else wikitext2",
    )
    p.add_argument("--seed", type=int, default=0, help="draws calibration windows, needle prompts and the bootstrap")


def add_eval_text_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument("--eval-text", help="text to measure on; --text if omitted")


def add_calibration_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--samples", type=positive_int, default=100, help="calibration sequences")
    p.add_argument("--seq-len", type=positive_int, default=1024, help="tokens per calibration sequence")
    p.add_argument("--sink-tokens", type=natural, default=4, help="first tokens, kept exact and out of statistics")


def add_codec_flag(p: argparse.ArgumentParser, what: str, default: str | None = "pca") -> None:
    names = f"{', '.join(CODECS)}, or bases joined by +, such as ln_nullspace+pca"
    p.add_argument("--codec", type=codec, default=default, help=f"{what}: {names}")


def codec(word: str) -> str:
    """A codec's name. An unknown one is rejected with the nearest known name."""
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


def add_evaluation_flags(p: argparse.ArgumentParser, tokens: int) -> None:
    p.add_argument("--eval-tokens", type=positive_int, default=tokens, help="tokens per perplexity")
    p.add_argument(
        "--eval-seq-len", type=positive_int, help="tokens per evaluated segment; 2048 or the model's context"
    )
    p.add_argument("--chunk", type=positive_int, default=64, help="tokens fed to the cache at a time")
    p.add_argument("--batch-size", type=positive_int, default=4, help="segments evaluated together")
