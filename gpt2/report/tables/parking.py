"""Tables of parked conversations, from records that scripts/benchmarks/parking.py writes."""

from __future__ import annotations

from gpt2.common import machine
from gpt2.common.errors import PluginError
from gpt2.report.table import Table

MIB = 2**20


def parking(record: dict, words: list[str]) -> Table:
    """The table `parked`, of what fits into memory, or `woken`, of times; after `woken`, contexts to show."""
    name, *contexts = words or ["woken"]
    if name not in PARKING:
        raise PluginError(f"a table of parked conversations is one of {', '.join(PARKING)}, got {name!r}")
    return PARKING[name](record, [int(word) for word in contexts])


def _parked(record: dict, _: list[int]) -> Table:
    rows, left_out = ([row for row in record["parked"] if ("reason" in row) == wanted] for wanted in (False, True))
    memory, tokens = record["args"]["memory_gb"], rows[0]["context_tokens"]
    lines = [
        [row["shape"], row["cache"], f"{row['bytes'] / MIB:,.0f} MiB", f"{row['fit']:,}",
         f"{row['compression_ratio']:.2f}x"]
        for row in rows
    ]  # fmt: skip
    note = (
        f"Conversations of {tokens:,} tokens in {memory:g} GB, counted; exact tokens have 16 bits, and the basis, "
        "which all conversations share, takes its room once. 16-bit is transformers' own cache, with the states of "
        "recurrent layers, which count in all rows."
    )
    note += "".join(f" {row['shape']} has no {row['cache']}: {row['reason']}." for row in left_out)
    return Table(["model", "cache", "one conversation", f"fit in {memory:g} GB", "ratio"], lines, note)


def _woken(record: dict, contexts: list[int]) -> Table:
    lines = []
    for row in record["woken"]:
        if contexts and row["context_tokens"] not in contexts:
            continue
        low, high = row["wake_ms_quartiles"]
        lines.append([
            row["shape"], f"{row['context_tokens']:,}", row["cache"], f"{row['load_ms_median']:,.0f} ms",
            f"{row['first_token_ms_median']:,.0f} ms", f"{row['wake_ms_median']:,.0f} ms ({low:,.0f} … {high:,.0f})",
            ("≈ " if row["read"] == "counted" else "") + f"{row['read_s']:,.1f} s", f"{row['times_faster']:,.0f}x",
        ])  # fmt: skip
    args = record["args"]
    cut = dict.fromkeys(
        f"{row['shape']}: {row['layers']} of {row['whole_layers']} layers were run, with random weights and a cut "
        f"vocabulary, and times scaled"
        for row in record["woken"]
        if row["layers"] < row["whole_layers"]
    )
    note = (
        f"{record['dtype']} on {record['device']}. Medians of {args['repeats']} repeats, quartiles in brackets; files "
        "are in the page cache, and the model and the preset's basis in memory. Reading again is the faster of two "
        "runs with transformers' uncompressed cache; ≈ marks those counted by FLOPs at the speed of the longest prompt "
        f"that was read. {''.join(f'{words}. ' for words in cut)}{machine.caption(record)}"
    )
    return Table(["model", "tokens", "cache", "load", "first token", "both", "reading again", "faster"], lines, note)


PARKING = {"parked": _parked, "woken": _woken}
