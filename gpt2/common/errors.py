"""Errors that a user can act on. Scripts print them as one line and exit with `exit_code`; no traceback."""

import reprlib

import torch

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlevel, _BRIEF.maxlist = 2, 4


class PluginError(ValueError):
    """Something the user can put right: names the thing, what was expected and what to do."""

    exit_code = 2


class UnsupportedModel(PluginError):
    """The model's cache can't be compressed by this toolkit; the message has the reason."""


class CalibrationNotFound(PluginError):
    """No calibration file at any of the places looked at."""


class BadArtefact(PluginError):
    """A calibration or preset file is damaged, foreign, or of another model."""


class LossNotFinite(PluginError):
    """A model's loss with a cache is NaN or infinite. cache: the cache's name."""

    def __init__(self, message: str, cache: str):
        super().__init__(message)
        self.cache = cache


class BudgetNotMet(PluginError):
    """No configuration kept the perplexity within the budget."""

    exit_code = 3


# As PyTorch's CPU allocator, CUDA's libraries and Triton say it, in errors of no kind of their own
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory")
NO_MEMORY += ("CUBLAS_STATUS_ALLOC_FAILED",)


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch's CUDA allocator has an exception of its own for it; others only a message."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in NO_MEMORY)


def brief(value) -> str:
    """A value out of a file as messages have it: its repr, however large or deep it is, cut to a line."""
    return _BRIEF.repr(value)


def printable(message: str) -> str:
    """A message for a terminal: what could move its cursor or hide a line, as from a stranger's file, is escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)


def first_line(error: Exception) -> str:
    """What an error says in its first line, its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
