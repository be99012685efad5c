"""The parser of all scripts, and the flags that several scripts share."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gpt2.cli.argument_types import natural, positive_int, seed, word_list
from gpt2.common import files, processes, provenance
from gpt2.common.errors import PluginError
from gpt2.compression.codecs import CODECS, codec_name
from gpt2.compression.presets.policies import KVPolicyName
from gpt2.models import embedded, loading

# What argument types expect, by the names of their functions, which argparse's own message would show
EXPECTED = dict.fromkeys(("int", "positive_int", "natural", "seed"), "a whole number")
EXPECTED |= dict.fromkeys(("float", "fraction", "positive_float", "natural_float"), "a number")
EXPECTED |= {"int_list": "whole numbers with commas between them", "positions": "numbers with commas between them"}
EXPECTED |= {"lengths": EXPECTED["int_list"], "bits_list": EXPECTED["positions"]}
WAIT_FOR_THE_FIRST_S = 3  # seconds in which the first process prints its error


class Parser(argparse.ArgumentParser):
    """An argument parser that also rejects a file that is both read and written.

    parsed: the arguments that were parsed last in this process, so that advice names only flags that the script has.
    """

    parsed: argparse.Namespace | None = None

    def error(self, message):
        if not processes.launched().first:  # all processes have the same arguments: the first one prints the error
            fail_after_the_first()
        message = re.sub(
            r"invalid (\w+) value: (.*)", lambda m: f"{m[2]} is not {EXPECTED.get(m[1], 'what it takes')}", message
        )
        self.exit(2, f"error: {message} (--help shows all flags)\n")  # one line, as every other error

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
    """Wait until the first process has printed its error, then exit: launchers stop all processes when one exits."""
    time.sleep(WAIT_FOR_THE_FIRST_S)
    sys.exit(2)


def parser(manual: str) -> Parser:
    """A parser whose --help is the script's docstring followed by its flags, with their defaults if they have any."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            # Not `in (None, [], False)`: 0 is False
            none = action.default is None or action.default is False or action.default == []
            return action.help if none else super()._get_help_string(action)

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


def add_output_flag(p: argparse.ArgumentParser, *, picture: bool = True) -> None:
    """--output, for a script that writes a JSON file. picture: whether it also draws one."""
    beside = "; the PNG is written beside it, or for a file in a folder `runs` into `plots` beside that folder"
    p.add_argument("--output", type=output_file(".json"), help="JSON file" + (beside if picture else ""))


def output_file(*endings: str) -> Callable[[str], Path]:
    """An argument type: a file to write, whose name ends in one of `endings`.

    Rejected, before any work, if it has another ending, or if it or its picture can't be written.
    """

    def checked(word: str) -> Path:
        path = Path(word)
        try:
            if path.suffix not in endings and not os.path.isdir(path):  # takes any name, a Path no long one
                raise PluginError(f"expected a name that ends in {' or '.join(endings)}, got {word}")
            files.check_writable(path)
            files.check_writable(files.picture_beside(path))
        except PluginError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return path

    return checked


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """--model, --device and --dtype."""
    p.add_argument(
        "--model",
        type=loading.plain_spec,
        default=embedded.EMBEDDED,
        help="embedded model's name, local folder, or hub id",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, or all: layers over every GPU")
    p.add_argument("--dtype", default="auto", help="auto (float32 on CPU), float32, float16, bfloat16")


def add_device_flag(p: argparse.ArgumentParser) -> None:
    """--device, for a benchmark that needs no model."""
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_shape_flags(p: argparse.ArgumentParser) -> None:
    """The model flags, for scripts whose figures don't depend on weights: --model may also be a shape file."""
    add_model_flags(p)
    p.add_argument("--layers", type=positive_int, help="number of layers of a shape without weights; all if omitted")


def add_text_flags(p: argparse.ArgumentParser) -> None:
    """--text and --seed."""
    p.add_argument(
        "--text",
        help="embedded, wikitext2, a file, a folder with *valid*.txt and *test*.txt, self (sampled from the model), "
        "or several of these joined by +, in equal shares; embedded if omitted for the embedded model, else wikitext2",
    )
    p.add_argument("--seed", type=seed, default=0, help="of calibration segments, needle prompts and the bootstrap")


def add_eval_text_flag(p: argparse.ArgumentParser) -> None:
    """--eval-text, for a script that may measure on another text than the one it calibrates on."""
    p.add_argument("--eval-text", help="text to measure on; --text if omitted")


def add_calibration_flags(p: argparse.ArgumentParser) -> None:
    """--samples, --seq-len and --sink-tokens."""
    p.add_argument("--samples", type=positive_int, default=100, help="number of calibration sequences")
    p.add_argument("--seq-len", type=positive_int, default=1024, help="tokens per calibration sequence")
    p.add_argument("--sink-tokens", type=natural, default=4, help="first tokens, kept exact and left out of statistics")


def add_calibration_file_flag(p: argparse.ArgumentParser) -> None:
    """--calibration, for a script that calibrates itself without one."""
    p.add_argument("--calibration", type=Path, help="calibration file; a matching one is found or made if omitted")


def add_codec_flag(p: argparse.ArgumentParser, what: str, default: str | None = "pca") -> None:
    """--codec. what: the start of its help."""
    names = f"{', '.join(CODECS)}, or bases joined by +, such as ln_nullspace+pca"
    p.add_argument("--codec", type=codec, default=default, help=f"{what}: {names}")


def codec(word: str) -> str:
    """An argument type: a codec's name. The error for an unknown one has the nearest known name."""
    try:
        return codec_name(word)
    except PluginError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_word(word: str) -> str:
    """An argument type: a word that becomes a part of a file's name."""
    if not word.strip() or "/" in word or "\\" in word or not word.isprintable():
        raise argparse.ArgumentTypeError(f"{word!r} becomes a part of a file's name: give a word without / and \\")
    return word


def study(word: str) -> Path | str:
    """An argument type: an SQLite file, or a database's URL."""
    from gpt2.common import trial_queue  # here, as most scripts have no study and importing Optuna takes time

    try:
        return trial_queue.storage_of(word)
    except PluginError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_cache_flags(p: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--preset and --policy: the compressed cache to measure. several: each flag takes several values."""
    how = {"nargs": "+", "default": []} if several else {}
    group = p if several else p.add_mutually_exclusive_group()
    group.add_argument("--preset", help="preset file, built-in name, or the calibration-free kv8 or kv4", **how)
    policies = [str(name) for name in KVPolicyName]
    group.add_argument("--policy", choices=policies, help="a policy instead of a preset", **how)


def add_peers_flag(p: argparse.ArgumentParser, default: Sequence[str] = (), single: bool = False) -> None:
    """--peers: caches of other packages to measure beside ours. single: also --only-peers, some of them by label."""
    from gpt2.evaluation import lineup  # here, as most scripts have no such caches

    p.add_argument(
        "--peers", type=word_list(lineup.PEERS), default=list(default), help="caches of other packages, by comma"
    )
    if single:
        p.add_argument("--only-peers", nargs="+", metavar="LABEL", help="only these of --peers, such as 'KIVI 2 bits'")


def add_chunk_flag(p: argparse.ArgumentParser) -> None:
    """--chunk, for a script that streams texts through a cache."""
    p.add_argument("--chunk", type=positive_int, default=64, help="tokens fed to the cache at a time")


def add_prefill_chunk_flag(p: argparse.ArgumentParser) -> None:
    """--prefill-chunk, for a script that gives prompts to a cache."""
    p.add_argument("--prefill-chunk", type=positive_int, help="prompt tokens fed at a time; all if omitted")


def add_evaluation_flags(p: argparse.ArgumentParser, tokens: int) -> None:
    """--eval-tokens, --eval-seq-len, --chunk and --batch-size. tokens: default of --eval-tokens."""
    p.add_argument("--eval-tokens", type=positive_int, default=tokens, help="tokens to measure perplexity on")
    p.add_argument(
        "--eval-seq-len", type=positive_int,
        help="tokens per evaluated segment; 2048, or less if the model's context is shorter, if omitted",
    )  # fmt: skip
    add_chunk_flag(p)
    p.add_argument("--batch-size", type=positive_int, default=4, help="segments evaluated together")
