"""Models with random weights: an architecture in its real shape, to measure speed and memory without a download.

A shape is a JSON file of config fields, such as those in configs/models. Speed and memory don't depend on the weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gpt2.common import files
from gpt2.common.errors import PluginError, brief, first_line, is_out_of_memory
from gpt2.common.schema import Anything, Default, Record, String, Whole, parse, read_json
from gpt2.models import loading, probe, support
from gpt2.models.loading import LoadedModel

FOLDER = files.ROOT / "configs" / "models"
NOISE = 0.02  # standard deviation of random weights
SHAPE = Record({"model_type": String(), "num_hidden_layers": Default(Whole(1))}, Anything())


def load(spec: str, device: str = "auto", dtype: str = "auto", layers: int | None = None) -> LoadedModel:
    """A model as `loading.load` loads it, or a model with random weights where `spec` is a shape's JSON file.

    layers: number of a shape's layers to make, all if None. device, dtype: as for `loading.load`, except that a shape
    is made on one device, by default in bfloat16 on CUDA. Raises PluginError if the file is not a shape, and
    UnsupportedModel if the cache of such a model can't be compressed.
    """
    if not spec.endswith(".json"):
        if layers:
            raise PluginError(f"--layers is for a shape such as {_known()[0]}: {spec} has weights")
        return loading.load(spec, device, dtype)
    if device in loading.SPREAD:
        raise PluginError(f"{spec} is made on one device: use --device cuda, and --layers where it doesn't fit")
    target = loading.resolve_device(device)
    kind = loading.resolve_dtype(dtype, target)
    path = _find(spec)
    config = read_shape(path, layers)
    try:
        return from_config(config, path.name, target, torch.bfloat16 if kind == "auto" else kind)
    except PluginError:
        raise
    except Exception as error:  # inconsistent fields raise errors of many kinds when the model is made
        if is_out_of_memory(error):
            raise
        raise PluginError(
            f"{path}: no model can be made of this shape ({type(error).__name__}: {brief(str(error))})"
        ) from error


def outline(spec: str, device: str = "auto", dtype: str = "auto", layers: int | None = None) -> LoadedModel:
    """As `load`, except that a shape becomes a model without weights: for what asks only the layers of its cache.

    It takes as little memory for 671 billion parameters as for one, and can't run. Its name is the file's, such as
    `deepseek-v3`.
    """
    if not spec.endswith(".json"):
        return load(spec, device, dtype, layers)
    path = _find(spec)
    name = path.stem + (f" ({layers} layer{'s' * (layers > 1)})" if layers else "")
    return outline_of(read_shape(path, layers), name)


def outline_of(config: PretrainedConfig, name: str) -> LoadedModel:
    """As `outline`, of a config. Raises PluginError where it alone doesn't tell the layers of the cache."""
    model, geometry = probe.lay_out(config, name)
    return LoadedModel(model.eval(), None, name, geometry, probe.fingerprint(model), random_weights=True)


def from_config(
    config: PretrainedConfig, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """A model of this shape with random weights. name: its name in results, to which the number of layers is added."""
    loaded = loading.wrap(_random_model(config, torch.device(device), dtype), None, name)
    count = loaded.geometry.num_layers
    return replace(loaded, spec=f"{name} (random weights, {count} layer{'s' * (count > 1)})", random_weights=True)


def changed(config: PretrainedConfig, layers: int | None = None, **fields) -> PretrainedConfig:
    """A copy of a config with other values of `fields`, reduced to its first `layers` layers if given."""
    return AutoConfig.for_model(**_cut(config.to_dict(), layers, config.model_type) | fields)


def read_shape(path: Path, layers: int | None = None) -> PretrainedConfig:
    """The config in a shape's file, reduced to its first `layers` layers if given. Raises PluginError if invalid."""
    fields = parse(read_json(path, "model's shape"), SHAPE, path)
    try:
        config = AutoConfig.for_model(**_cut(fields, layers, path.name))
    except PluginError:
        raise
    except Exception as error:  # config classes raise many kinds of errors for wrong fields
        raise PluginError(
            f"{path}: not a model's shape: {first_line(error)}: expected the fields of a config"
        ) from error
    support.refuse_unsupported(config, path.name)
    return config


def read_shapes(specs: Iterable[str]) -> dict[str, PretrainedConfig]:
    """Configs by name. specs: paths of shape files, or names of files in configs/models."""
    return {path.stem: read_shape(path) for path in map(_find, specs)}


def _cut(fields: dict, layers: int | None, name: str) -> dict:
    if not layers:
        return fields
    if layers > fields["num_hidden_layers"]:
        raise PluginError(f"--layers {layers}: {name} has {fields['num_hidden_layers']} layers")
    per_layer = {"layer_types": fields["layer_types"][:layers]} if fields.get("layer_types") else {}
    return fields | {"num_hidden_layers": layers} | per_layer


@torch.no_grad()
def _random_model(config: PretrainedConfig, target: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with small random weights and norms of 1. transformers' own initialization would take minutes."""
    with target, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator(target).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, NOISE, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def _find(spec: str) -> Path:
    for path in (Path(os.path.expanduser(spec)), FOLDER / Path(spec).name):
        if os.path.isfile(path):
            return path
    raise PluginError(f"no shape {spec!r}: give a JSON file of config fields, such as {', '.join(_known())}")


def _known() -> list[str]:
    return [files.shown(path) for path in sorted(FOLDER.glob("*.json"))]
