"""Shape of a model's cache from its config alone: laid out without weights, nothing is allocated or downloaded."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM

from gpt2.errors import PluginError
from gpt2.models import Geometry, probe_geometry, refuse_unsupported

_GEOMETRIES: dict[str, tuple[Geometry, int]] = {}


def geometry_of(model_config, model_id: str) -> tuple[Geometry, int]:
    """Shape of a model's cache and bytes of its weights, from its config.

    Raises UnsupportedModel where the cache can't be compressed, PluginError where the config alone doesn't tell.
    """
    refuse_unsupported(model_config, model_id)
    key = model_config.to_json_string(use_diff=False)
    if key not in _GEOMETRIES:  # a model of 80 layers takes seconds to lay out
        _GEOMETRIES[key] = _laid_out(model_config, model_id)
    return _GEOMETRIES[key]


def _laid_out(model_config, model_id: str) -> tuple[Geometry, int]:
    dtype = getattr(model_config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    # With a padding token some models look for it among the probe's tokens, which have no values here; others need one
    for padded in (False, True):
        try:
            config = copy.deepcopy(model_config)
            config.pad_token_id = config.pad_token_id if padded else None
            with torch.device("meta"):
                # eager: the mask of others may look at values that there are none of
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
            size = sum(weights.numel() for weights in model.parameters()) * dtype.itemsize
            return probe_geometry(model, model_id), size
        except PluginError:
            raise
        except Exception as error:  # code that reads values where there are none fails in many ways
            reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise PluginError(
        f"{model_id} ({model_config.model_type}): its config alone doesn't tell the shape of its cache ({reason}): "
        "load the model and use from_preset or from_policy of gpt2.compression.choice, or give geometry="
    )
