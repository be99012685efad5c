"""Which caches are measured beside each other for speed: the baseline, ours in both ways, and other people's."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2.common.errors import PluginError
from gpt2.compression.cache.dynamic_cache import identity_cache
from gpt2.compression.named_caches import CacheChoice
from gpt2.evaluation import peers
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory
from gpt2.models.loading import LoadedModel

# Of each package its best known setting; without exact latest tokens hqq fails at odd lengths
PEER_SETTING = "4 bits, residual 128"


def lineup(
    loaded: LoadedModel, choices: Sequence[CacheChoice], *, identity: bool = False, direct: bool = False,
    packages: Sequence[str] = (),
) -> dict[str, CacheFactory]:  # fmt: skip
    """Caches by name, the baseline first.

    identity: with our cache that stores everything as it comes. direct: every cache of ours by reconstruction and,
    where its codec allows it, read as it is stored. packages: other people's, quanto or hqq; raises PluginError where
    one isn't installed.
    """
    L = loaded.geometry.num_layers
    ours: dict[str, CacheFactory] = {"identity": lambda: identity_cache(L)} if identity else {}
    ours |= {choice.label: choice.make for choice in choices}
    if direct:
        ours = {label: made for name, make in ours.items() for label, made in _both_ways(name, make).items()}
    return {BASELINE: baseline_factory(loaded)} | ours | _of_others(loaded, packages)


def _both_ways(name: str, make: CacheFactory) -> dict[str, CacheFactory]:
    direct = {f"{name}, direct": make} if make().readable else {}
    return {name: _reconstructing(make)} | direct


def _reconstructing(make: CacheFactory) -> CacheFactory:
    def made():
        cache = make()
        cache.direct = False
        return cache

    return made


def _of_others(loaded: LoadedModel, packages: Sequence[str]) -> dict[str, CacheFactory]:
    if not packages:
        return {}
    entries = [entry for entry in peers.entries(loaded, packages, presets=[]) if entry.label.endswith(PEER_SETTING)]
    for entry in entries:
        if entry.error:
            raise PluginError(f"--peers {entry.family}: {entry.error}") from entry.error
    return {entry.label: entry.make for entry in entries}
