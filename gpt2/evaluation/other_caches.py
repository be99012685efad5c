"""KV caches of other packages and papers, by family.

quanto, hqq    transformers' QuantizedCache: groups of 64 adjacent numbers, which are one token's where head_dim is 64.
               A new chunk stays exact until the next one, as does a residual of the latest tokens; each time the
               residual is full, everything held is quantized again.
fp8            transformers' QuantizedCache: one scale per layer and side, fixed by the first chunk.
kivi           KIVI (Liu et al. 2024, arXiv:2402.02750), see `evaluation.kivi`.
turboquant     TurboQuant (Zandieh et al. 2025, arXiv:2504.19874), see `evaluation.turboquant`.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial

import transformers
from transformers import cache_utils
from transformers.cache_utils import Cache, QuantizedCache

from gpt2.common.errors import PluginError
from gpt2.evaluation.kivi import kivi_cache
from gpt2.evaluation.perplexity import CacheFactory
from gpt2.evaluation.turboquant import turboquant_cache
from gpt2.models.geometry import FULL, INDEXED, SLIDING, Geometry
from gpt2.models.loading import LoadedModel

PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq.core.quantize", "hqq")}  # module, package
FAMILIES = (*PACKAGES, "fp8", "kivi", "turboquant")
AXES = {"quanto": 0, "hqq": 1}  # each backend's number for groups along the last dimension
RESIDUALS = (128, 0)  # exact latest tokens: transformers' default, and the fewest it allows
PAPER_BITS, PAPER_SINKS = (4, 3, 2), (4, 0)  # of methods that are written from their papers
PAPERS = {"kivi": ("KIVI", kivi_cache), "turboquant": ("TurboQuant", turboquant_cache)}


class SharedCache(QuantizedCache):
    """transformers' QuantizedCache with a copy that shares tensors with the original.

    The needle test needs copies, and quanto's tensors can't be copied. The layers replace their tensors and never write
    to them, so the copy keeps its state.
    """

    def __deepcopy__(self, memo: dict) -> SharedCache:
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin


def factories(family: str, loaded: LoadedModel) -> Iterator[tuple[str, CacheFactory]]:
    """Label and factory of each cache of a family of FAMILIES."""
    config, geometry = loaded.model.config, loaded.geometry
    if family == "fp8":
        yield "fp8, a scale per layer", partial(SharedCache, "fp8", config)
    elif family in PAPERS:
        name, make = PAPERS[family]
        for bits in PAPER_BITS:
            for sinks in PAPER_SINKS:
                exact = "" if sinks else ", no exact sinks"
                yield f"{name} {bits} bits{exact}", partial(_from_paper, name, make, geometry, bits, sinks)
    else:
        axes = {"axis_key": AXES[family], "axis_value": AXES[family]}
        for bits in (4, 2):
            for residual in RESIDUALS:
                settings = {"nbits": bits, "q_group_size": 64, "residual_length": residual, **axes}
                yield f"{family} {bits} bits, residual {residual}", partial(SharedCache, family, config, **settings)


def _from_paper(name: str, make: Callable[[int, int, int], Cache], geometry: Geometry, bits: int, sinks: int) -> Cache:
    """An empty cache of PAPERS. Raises PluginError where the paper's method has nothing to say of a layer."""
    if others := sorted({layer.kind for layer in geometry.layers} - {FULL, SLIDING, INDEXED}):
        raise PluginError(f"{name} is of K and V alone; this model has layers of other kinds: {', '.join(others)}")
    return make(geometry.num_layers, bits, sinks)


def identity(family: str, label: str) -> dict:
    """What decides what a cache of `factories` reads: its label, and the version of the code behind it."""
    package = PACKAGES.get(family, (None, None if family in PAPERS else "transformers"))[1]
    return {"label": label} | ({package: importlib.metadata.version(package)} if package else {})


def require_package(family: str) -> None:
    """Raise PluginError if a family needs a package that isn't installed, or a newer transformers."""
    if family == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        raise PluginError(
            f"transformers {transformers.__version__} has no fp8 cache: install the version of requirements.txt"
        )
    if family not in PACKAGES:
        return
    module, package = PACKAGES[family]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise PluginError(f"{package} is not installed: pip install -r requirements-peers.txt") from error
