"""Which caches are compared: for speed a few by name, for quality a list of entries by family.

The families are those of `evaluation.other_caches` and two of this project: `lowrank`, the guide's method (V in the
built-in presets `rN-vonly`), and `ours`, all other presets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt2.common.errors import PluginError
from gpt2.compression.cache.dynamic_cache import identity_cache
from gpt2.compression.named_caches import CacheChoice, from_preset
from gpt2.compression.presets.preset_files import built_in_presets
from gpt2.evaluation import other_caches
from gpt2.evaluation.perplexity import BASELINE, CacheFactory, baseline_factory
from gpt2.models.loading import LoadedModel

LOW_RANK, OURS = "lowrank", "ours"
PEERS = (*other_caches.FAMILIES, LOW_RANK)
DIRECT = ", direct"  # ends the names of caches whose codes attention reads
# The best known setting of each package; without exact latest tokens hqq fails at odd lengths
SPEED_SETTING = "4 bits, residual 128"


def for_speed(
    loaded: LoadedModel, choices: Sequence[CacheChoice], *, identity: bool = False, direct: bool = False,
    reconstruct: bool = True, packages: Sequence[str] = (),
) -> dict[str, CacheFactory]:  # fmt: skip
    """Cache factories by name, the baseline first.

    identity: add our cache without compression. direct: list each of our caches twice if attention can read its codes,
    once with reconstruction and once without; only without it if `reconstruct` is False. packages: add caches of quanto
    or hqq; raises PluginError if one of these isn't installed.
    """
    ours: dict[str, CacheFactory] = {"identity": lambda: identity_cache(loaded.geometry)} if identity else {}
    ours |= {choice.label: choice.make for choice in choices}
    if direct:
        ours = {
            label: made for name, make in ours.items() for label, made in _both_ways(name, make, reconstruct).items()
        }
    others = [entry for family in packages for entry in _of_family(family, loaded) if SPEED_SETTING in entry.label]
    for entry in others:
        if entry.error:
            raise PluginError(f"--peers {entry.family}: {entry.error}") from entry.error
    return {BASELINE: baseline_factory(loaded)} | ours | {entry.label: entry.make for entry in others}


def _both_ways(name: str, make: CacheFactory, reconstruct: bool) -> dict[str, CacheFactory]:
    direct = {f"{name}{DIRECT}": make} if make().readable else {}
    return ({name: _reconstructing(make)} if reconstruct or not direct else {}) | direct


def slower_directly(rows: Sequence[dict]) -> str | None:
    """A line on the rows of `timing.measure_cell` in which reading codes was slower than the uncompressed cache.

    None where there is no such row. One whose quartiles reach the uncompressed cache's speed doesn't count.
    """
    slower = [
        f"{row['cache']} {ratio['tokens_per_s_median']:.2f}x at {row['context_tokens']:,} tokens, batch of "
        f"{row['batch_size']}"
        for row in rows
        if row["cache"].endswith(DIRECT) and (ratio := row.get("ratio_to_baseline"))
        and ratio["tokens_per_s_quartiles"][1] < 1
    ]  # fmt: skip
    if not slower:
        return None
    return (
        f"note: on this machine reading codes was slower than the uncompressed cache: {'; '.join(slower)}. "
        "enable_compressed_attention(model, when='auto') reads codes only where reconstruction takes longer still"
    )


def _reconstructing(make: CacheFactory) -> CacheFactory:
    def made():
        cache = make()
        cache.direct = False
        return cache

    return made


@dataclass(frozen=True)
class Entry:
    """One cache of a comparison. make: None if it can't be made; `error` is then the reason.

    identity: what decides what the cache reads, as JSON: of a preset as `CacheChoice.identity` has it.
    """

    family: str
    label: str
    make: CacheFactory | None = None
    error: Exception | None = None
    preset: dict = field(default_factory=dict)  # as results files have it; empty for caches without one
    identity: dict = field(default_factory=dict)


def for_quality(
    loaded: LoadedModel, families: Sequence[str] = PEERS, presets: Sequence[str] | None = None,
    only_peers: Sequence[str] | None = None,
) -> list[Entry]:  # fmt: skip
    """Entries of other families and of presets, without the baseline.

    only_peers: labels of those to take of the families, all for None; PluginError is raised for one that none has.
    presets: files or built-in names; PluginError is raised if one can't be used. With None all built-in presets of the
    model are taken, and those that can't be used become entries with an error.
    """
    built_in = list(built_in_presets().get(loaded.spec, {}))
    low_rank = [name for name in built_in if re.fullmatch(r"r\d+-vonly", name)] if LOW_RANK in families else []
    entries = [entry for family in families if family != LOW_RANK for entry in _of_family(family, loaded)]
    entries += [_built_in(name, loaded, LOW_RANK) for name in low_rank]
    if LOW_RANK in families and not low_rank:
        entries.append(Entry(LOW_RANK, "low rank", error=PluginError(f"no preset rN-vonly for {loaded.spec}")))
    entries = only(entries, only_peers)
    there = {entry.label for entry in entries if entry.label in low_rank}
    if presets is None:
        entries += [_built_in(name, loaded, OURS) for name in built_in if name not in low_rank]
    else:
        entries += [_of_choice(from_preset(name, loaded)) for name in presets if name not in there]
    labels = [BASELINE, *(entry.label for entry in entries)]
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
        raise PluginError(f"two caches are called {twice[0]!r}: give one of them another name")
    return entries


def only(entries: Sequence[Entry], labels: Sequence[str] | None) -> list[Entry]:
    """The entries with these labels, or all for None. Raises PluginError for a label that none has."""
    known = [entry.label for entry in entries]
    if unknown := [label for label in labels or () if label not in known]:
        raise PluginError(f"no cache is called {unknown[0]!r}: there are {'; '.join(known) or 'none, give --peers'}")
    return [entry for entry in entries if labels is None or entry.label in labels]


def working(entries: Sequence[Entry]) -> dict[str, CacheFactory]:
    """Factories by name. Raises PluginError for the first entry that can't be made, with the reason."""
    for entry in entries:
        if entry.error:
            raise PluginError(f"cache {entry.label!r} can't be made: {entry.error}") from entry.error
    return {entry.label: entry.make for entry in entries}


def _of_family(family: str, loaded: LoadedModel) -> list[Entry]:
    """Entries of another family, each tried once: a missing package or a rejected model shows here."""
    entries = []
    for label, make in other_caches.factories(family, loaded):
        try:
            other_caches.require_package(family)
            make()
            entries.append(Entry(family, label, make, identity=other_caches.identity(family, label)))
        except Exception as error:  # third-party code may raise anything
            entries.append(Entry(family, label, error=error))
    return entries


def _built_in(name: str, loaded: LoadedModel, family: str) -> Entry:
    try:
        return _of_choice(from_preset(name, loaded))
    except PluginError as error:
        return Entry(family, name, error=error)


def _of_choice(choice: CacheChoice) -> Entry:
    """An entry of a preset; one that only cuts coordinates, at 16 bits in all layers, is the guide's low rank."""
    preset = choice.record()
    cut = preset["bits"] == 16 and preset["rank"] < preset["head_dim"] and not preset.get("layers")
    return Entry(LOW_RANK if cut else OURS, choice.label, choice.make, preset=preset, identity=choice.identity())
