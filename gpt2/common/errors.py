"""Errors that a user can act on. Scripts print them as one line and exit with `exit_code`; no traceback."""

import reprlib

import torch

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlevel, _BRIEF.maxlist = 2, 4


class PluginError(ValueError):
    """An error that the user can fix. The message names the cause, what was expected and what to do."""

    exit_code = 2


class NotInThisCache(PluginError, AttributeError):
    """An attribute that other caches have and this one can't: `hasattr` says False."""


class UnsupportedModel(PluginError):
    """This toolkit can't compress the model's cache; the message gives the reason."""


class CalibrationNotFound(PluginError):
    """No calibration file was found in any of the searched folders."""


class BadArtefact(PluginError):
    """A calibration or preset file is damaged, of another kind, or belongs to another model."""


class LossNotFinite(PluginError):
    """A model's loss with a cache is NaN or infinite. cache: the cache's name."""

    def __init__(self, message: str, cache: str):
        super().__init__(message)
        self.cache = cache


class BudgetNotMet(PluginError):
    """No configuration kept the perplexity within the budget."""

    exit_code = 3


# Texts of errors by which PyTorch's CPU allocator, CUDA libraries and Triton report a lack of memory. They raise plain
# RuntimeErrors, so the text is the only way to tell
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory")
NO_MEMORY += ("CUBLAS_STATUS_ALLOC_FAILED",)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, judged by its type or else by its text."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in NO_MEMORY)


def brief(value) -> str:
    """The repr of a value that was read from a file, shortened to fit in a message however large the value is."""
    return _BRIEF.repr(value)


def printable(message: str) -> str:
    """A message for a terminal, with control characters escaped: text from an untrusted file could hide lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
