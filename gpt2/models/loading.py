"""Load a causal language model by its spec, with the shape of its cache; reject models that can't be compressed.

A spec is the embedded model's name, a local folder, or a hub id.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gpt2.common.errors import PluginError, UnsupportedModel, first_line, is_out_of_memory
from gpt2.common.processes import launched, local_rank
from gpt2.models.embedded import EMBEDDED, embedded_folder
from gpt2.models.geometry import Geometry
from gpt2.models.probe import fingerprint, probe_geometry
from gpt2.models.support import SUPPORTED, drops_at, refuse_unsupported, warn_of_positions

log = logging.getLogger(__name__)
SPREAD = {"all": "auto"}  # a --device value to the device_map that spreads layers over GPUs
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def slug_of(spec: str) -> str:
    """A model's spec as a part of a file name. A folder has its real name, also where it is spelled `.` or `..`."""
    return os.path.basename(os.path.abspath(os.path.expanduser(spec))).lower().replace(" ", "-")


def plain_spec(spec: str) -> str:
    """A model's spec in the spelling that results have: a folder without `./` before it and `/` behind it."""
    plain = os.path.normpath(spec) if spec else spec
    is_folder = os.path.isfile(os.path.join(os.path.expanduser(plain), "config.json"))
    return plain if is_folder and plain != EMBEDDED else spec  # a folder of that name needs its ./


@dataclass
class LoadedModel:
    """A model ready to run, with what files record of it: its spec and its fingerprint.

    tokenizer: None if the weights are random (`random_weights`), since such a model understands no text.
    """

    model: PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase | None
    spec: str
    geometry: Geometry
    fingerprint: str
    random_weights: bool = False

    @property
    def device(self) -> torch.device:
        """Where its caches are made: with the weights, on the CPU where there are none."""
        return torch.device("cpu") if self.model.device.type == "meta" else self.model.device

    @property
    def slug(self) -> str:
        """The spec as a part of a file name."""
        name = slug_of(self.spec)
        return re.sub(r"[(),]|\.json", "", name) if self.random_weights else name

    @property
    def max_context(self) -> int | None:
        """Longest trained context in tokens; None if the config doesn't have it."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def needs_one_pass(self, tokens: int) -> bool:
        """Whether a text is longer than where longrope's factors switch.

        Fed in chunks, keys of its first ones would have other factors than later ones, in any cache.
        """
        switch = drops_at(self.model.config)
        return switch is not None and tokens > switch

    def chunk_of(self, tokens: int, chunk: int) -> int:
        """How many of a text's tokens to feed at a time, where `chunk` is wanted; all, with a warning, if need be."""
        if chunk >= tokens or not self.needs_one_pass(tokens):
            return chunk
        log.warning(
            "%s: rotary factors switch at %d tokens, so a text of %d is fed in one pass, not %d tokens at a time",
            self.spec, drops_at(self.model.config), tokens, chunk,
        )  # fmt: skip
        return tokens

    def require_context(
        self, tokens: int, flag: str = "--seq-len", *, after: int = 0, after_flag: str | None = None
    ) -> None:
        """Raise PluginError for a context longer than the model was trained for.

        tokens: as many as `flag` says. after: tokens that go with them, as many as `after_flag` says, if there is one.
        """
        longest = self.max_context
        if not longest or tokens + after <= longest:
            return
        if after < longest:
            advice = f"use {flag} {longest - after} or less"
        else:
            advice = f"use a smaller {after_flag}" if after_flag else "use a model with a longer context"
        following = f" with {after} more" if after else ""
        raise PluginError(
            f"a context of {tokens} tokens{following} is longer than the {longest} that {self.spec} was trained for: "
            f"{advice}"
        )


def load(spec: str = EMBEDDED, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load model and tokenizer.

    device: auto (CUDA where there is one), cpu, cuda, cuda:N, or all (layers spread over all GPUs). dtype: auto (the
    checkpoint's own on CUDA, float32 on CPU), float32, float16 or bfloat16. Raises PluginError if it can't be loaded,
    and UnsupportedModel if its cache can't be compressed; if the config shows that, before any weight is read.
    """
    target = resolve_device(device)
    if not (sys.stderr.isatty() and launched().first):  # a log file wants no progress bars
        transformers.utils.logging.disable_progress_bar()
    config, source = read_config(spec), _source(spec)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=resolve_dtype(dtype, target), output_loading_info=True,
            trust_remote_code=False, device_map=SPREAD.get(device),
        )  # fmt: skip
        tokenizer = read_tokenizer(spec)
    except PluginError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        if is_out_of_memory(error):
            raise
        raise PluginError(_cant_load(spec, error)) from error
    if missing := sorted(report["missing_keys"]):  # transformers initializes them at random and only logs it
        raise PluginError(f"model {spec!r}: its files lack {len(missing)} weights that its config asks for, such as "
                          f"{missing[0]}: the checkpoint and its config.json don't belong together")  # fmt: skip
    if device in SPREAD:
        reject_offloaded(model, spec, target)
    else:
        model = model.to(target)
    return wrap(model, tokenizer, spec)


def read_config(spec: str) -> transformers.PretrainedConfig:
    """A model's config, without its weights. Raises PluginError as `load` does."""
    source = _source(spec)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # damaged files raise errors of many kinds
        raise PluginError(_cant_load(spec, error)) from error
    refuse_unsupported(config, spec)
    return config


def read_tokenizer(spec: str) -> transformers.PreTrainedTokenizerBase:
    """A model's tokenizer, without its weights. Raises PluginError as `load` does."""
    source = _source(spec)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # damaged files raise errors of many kinds
        raise PluginError(_cant_load(spec, error)) from error


def reject_offloaded(model: PreTrainedModel, spec: str, target: torch.device) -> None:
    """Raise PluginError if layers that don't fit on the GPUs were left on the CPU, as every step would copy them."""
    if {parameter.device.type for parameter in model.parameters()} != {target.type}:
        raise PluginError(f"model {spec!r} doesn't fit on all GPUs together: use a smaller --dtype or model")


def wrap(model: PreTrainedModel, tokenizer, spec: str) -> LoadedModel:
    """Check a model that is already in memory and measure its cache's shape. Raises as `load` does."""
    refuse_unsupported(model.config, spec, model)
    warn_of_positions(model.config)
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"Model doesn't have past_key_values: {spec}'s forward takes none; {SUPPORTED}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PluginError(f"{spec}: some layers don't fit on the devices of its device_map and were offloaded, so "
                          "their weights can't be read: use a smaller dtype or model")  # fmt: skip
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, spec, probe_geometry(model, spec), fingerprint(model))


def described(model: PreTrainedModel, spec: str) -> LoadedModel:
    """As `wrap`, of a caller's own model, which stays in training mode and goes on learning where it does."""
    modes = [(module, module.training) for module in model.modules()]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        return wrap(model, None, spec)
    finally:
        for module, training in modes:
            module.training = training
        for parameter in learning:
            parameter.requires_grad_(True)


def resolve_device(device: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `all` means; for `all` it has only the type, `cuda`.

    If several processes run on a machine, `auto` and `cuda` mean another GPU in each. Raises PluginError for a device
    that doesn't exist.
    """
    own = local_rank()
    if own is not None and device in SPREAD:
        raise PluginError(f"--device {device} spreads one model over every GPU, so other processes have none: "
                          "give --device auto, or start the script with python")  # fmt: skip
    if own is not None and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{own}"
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device("cuda" if device in SPREAD else device)
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cpu", "cuda"):
        raise PluginError(f"unknown device {device!r}: use auto, cpu, cuda or cuda:N, or all for every GPU")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        advice = "use auto or cpu" if own is None else f"start {found} processes, or use cpu"
        raise PluginError(f"device {device!r} is not there ({found} CUDA devices found): {advice}")
    return target


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """A --dtype value as `from_pretrained` takes it. Raises PluginError for an unknown one."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise PluginError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _source(spec: str) -> str:
    """Folder or hub id of a spec, as transformers takes it."""
    if spec == EMBEDDED:
        return str(embedded_folder())
    folder = Path(os.path.expanduser(spec))  # pathlib raises for unknown users after ~ and for very long names
    if os.path.isfile(folder / "config.json"):
        return str(folder)
    if folder.suffix == ".json":
        raise PluginError(f"{spec} is a shape without weights: only scripts that measure speed and memory take one")
    if not spec or spec.startswith((".", "/", "~")) or ("/" in spec and os.path.exists(folder)):
        raise PluginError(f"no model in {spec!r}: expected a folder with a config.json, as save_pretrained writes it")
    return spec


def _cant_load(spec: str, error: Exception) -> str:
    return f"can't load model {spec!r}: {first_line(error)}. {_hint(spec)}"


def _hint(spec: str) -> str:
    if os.path.isdir(os.path.expanduser(spec)):
        hidden = (
            "" if os.path.exists(Path(spec) / "config.json") else f"A folder named {spec} hides a hub id of that name. "
        )
        return f"{hidden}A model's folder is complete as save_pretrained writes it: config, weights and tokenizer"
    if difflib.get_close_matches(spec, [EMBEDDED]):
        return f"Did you mean {EMBEDDED!r}?"
    offline = " HF_HUB_OFFLINE is set, so only what is already on this machine can be used." if _offline() else ""
    return f"Give {EMBEDDED!r}, a local folder, or a hub id that this machine can reach.{offline}"


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}
