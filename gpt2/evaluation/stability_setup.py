"""Preparation of a stability test: which factors can be varied, text windows, and caches for each calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from gpt2.common.errors import PluginError
from gpt2.compression.calibration.calibrate import check_samples, recalibrate
from gpt2.compression.named_caches import CacheChoice, from_preset
from gpt2.compression.presets.calibration_lookup import calibration_of
from gpt2.compression.settings import needs_calibration_file
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.evaluation.stability import Setup, windows_of
from gpt2.models.loading import LoadedModel
from gpt2.text.texts import Text

SPEED_CONTEXT = 512  # tokens held in the speed test at most
SPEED_TOKENS = 8  # tokens decoded there


def usable_factors(
    factors: Sequence[str], num_runs: int, choice: CacheChoice, loaded: LoadedModel, text: Text
) -> list[str]:
    """The factors that can be varied. Where the calibration can't be, it is left out and a note is printed.

    The calibration can be varied if the cache has one, made from `text`, and `text` has other samples. Raises
    PluginError for fewer than two runs.
    """
    if num_runs < 2:
        raise PluginError("--num-runs 1 varies nothing: use 2 or more")
    if "calibration" not in factors:
        return list(factors)
    try:
        if not needs_calibration_file(choice.preset.plan):
            raise PluginError(f"{choice.label} has none")
        check_samples(calibration_of(choice.preset, loaded), loaded, text)
        return list(factors)
    except PluginError as error:
        print(f"note: the calibration is not varied: {error}")
        return [factor for factor in factors if factor != "calibration"]


def prepare(
    choice: CacheChoice, loaded: LoadedModel, text: Text, *, length: int, tokens: int, num_windows: int,
    needle_length: int, needle_trials: int, chunk: int, batch_size: int, bar: Callable,
) -> Setup:  # fmt: skip
    """The setup of all runs of one cache.

    length, tokens: tokens per segment and per run. num_windows: how many text windows there are. bar: from a label and
    a unit to a progress bar. Raises PluginError where the text or the model's context is too short.
    """
    speed_context = min(SPEED_CONTEXT, needle_length)
    # In this order, so that the advice of the first is enough for both
    loaded.require_context(speed_context, "--needle-length", after=SPEED_TOKENS)
    loaded.require_context(needle_length, "--needle-length")
    per_run = tokens // length
    haystack = text.tokens("evaluation", loaded)
    segments = text.segments("evaluation", loaded, length, num_windows * per_run, flag="--eval-seq-len")

    @cache
    def make(number: int) -> CacheFactory:
        if not number:
            return choice.make
        given = calibration_of(choice.preset, loaded)
        other = recalibrate(given, loaded, text, number, bar(f"calibration {number}", "seq"))
        print(f"calibration {number}: {other.meta['tokens']:,} newly drawn tokens; the preset's calibration has "
              f"{given.meta['tokens']:,}", flush=True)  # fmt: skip
        return from_preset(choice.preset, loaded, other).make

    return Setup(
        loaded, windows_of(segments, num_windows, per_run), haystack, make, chunk, batch_size, needle_length,
        needle_trials, speed_context,
    )  # fmt: skip
