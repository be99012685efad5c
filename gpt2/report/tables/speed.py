"""Tables of time and memory. Each is of one machine, which its note names."""

from __future__ import annotations

from collections.abc import Callable

from gpt2.common import machine
from gpt2.report.table import Table, select

MOVES = ("offload_ms", "prefetch_ms")  # of a parked cache


def appending(record: dict, _: list[str]) -> Table:
    """Time to append one token: a row per codec, a column per number of tokens held.

    With a sliding window, what is held doesn't grow: columns are of tokens seen, and have the cache's size too.
    """
    window = record["args"].get("window")
    held = sorted({row["tokens_held"] for row in record["rows"]})
    lines = []
    for codec in dict.fromkeys(row["codec"] for row in record["rows"]):
        cells = {row["tokens_held"]: row for row in record["rows"] if row["codec"] == codec}
        times = [f"{cells[n]['append_ms_median']:.2f} ms" for n in held]
        if window:
            times = [f"{time}, {cells[n]['cache_bytes'] / 2**20:.2f} MiB" for time, n in zip(times, held, strict=True)]
        lines.append([codec, *times, *([] if window else [f"{cells[held[-1]]['bytes_per_token']:,.0f}"])])
    columns = [f"{n:,} tokens {'seen' if window else 'held'}" for n in held]
    return Table(["codec", *columns, *([] if window else ["bytes per token"])], lines, machine.caption(record))


def attention_step(record: dict, words: list[str]) -> Table:
    """Time of a decode step's attention: a row per context length and cache, of some context lengths or of all."""
    columns = [
        "context", "attention over", "time", "held", "read at", "of copy speed", "against sdpa", "against best 16-bit",
    ]  # fmt: skip
    rows, lines = select(record["rows"], "context_tokens", [int(word) for word in words]), []
    for row in rows:
        low, high = row["ms_quartiles"]
        best_low, best_high = row["speed_against_best_16_bit_quartiles"]
        lines.append([
            f"{row['context_tokens']:,}",
            f"**{row['row']}**" if row["best_16_bit"] else row["row"],
            f"{row['ms_median']:.3f} ms ({low:.3f} … {high:.3f})",
            f"{row['bytes_held'] / 2**20:,.1f} MiB",
            f"{row['bytes_per_s'] / 1e9:,.1f} GB/s",
            f"{row['share_of_copy']:.0%}",
            f"{row['speed_against_sdpa_median']:.2f}x",
            f"{row['speed_against_best_16_bit_median']:.2f}x ({best_low:.2f} … {best_high:.2f})",
        ])  # fmt: skip
    compiled = [sum(row["compile_s"].values()) for row in rows if "compile_s" in row]
    building = f" torch.compile took {min(compiled):.1f} to {max(compiled):.1f} s per context." if compiled else ""
    return Table(columns, lines, f"{_attention_setting(record)}{building} {machine.caption(record)}")


def _attention_setting(record: dict) -> str:
    args = record["args"]
    return (
        f"One layer, one token for each of {args['batch_size']} sequence{'s' * (args['batch_size'] > 1)}, "
        f"{args['heads']} query heads, {args['kv_heads']} KV heads of {args['head_dim']}, {record['dtype']}, on "
        f"{record['device']}; codes read by {record['kernels']}. Medians of {args['repeats']} repeats, "
        f"quartiles in brackets; in bold the fastest 16-bit row. Copies run at {record['copy_bytes_per_s'] / 1e9:,.0f} "
        "GB/s, read and written."
    )


def largest_batch(record: dict, _: list[str]) -> Table:
    """The most sequences whose caches fit, and how fast they are decoded together."""
    base = next((row for row in record["rows"] if row["cache"] == "baseline" and row["largest_batch"]), None)
    lines = []
    for row in record["rows"]:
        if not row["largest_batch"]:
            lines.append([row["cache"], "not even one"])
            continue
        more, faster = (
            format(row[key] / base[key], ".2f") + "x" if base else "–" for key in ("largest_batch", "tokens_per_s")
        )
        size = f"{'at least ' if row['at_limit'] else ''}{row['largest_batch']:,}"
        speed, held = f"{row['tokens_per_s']:,.1f}", f"{row['cache_bytes'] / 2**30:,.1f} GiB"
        lines.append([row["cache"], size, more, speed, faster, held])
    return Table(
        ["cache", "largest batch", "against baseline", "tokens/s", "against baseline", "cache"],
        lines,
        f"{record['model']} in {record['dtype']} on {record['device']}: sequences of "
        f"{record['args']['context_length']:,} tokens, {record['args']['decode_tokens']} tokens decoded."
        f"{_weights(record)} {machine.caption(record)}",
    )


def cache_bytes(record: dict, _: list[str]) -> Table:
    """Bytes of whole caches by context length, and the shares of exact tokens and of unused room.

    Two more columns where they say something: the ratio of K and V alone, in models that cache something else as well,
    and the ratio with the basis, of calibrated caches.
    """
    rows = record["rows"]
    others = any(row["uncompressed_bytes"] for row in rows)
    calibrated = any(cache["calibration_file"] for cache in record["caches"])
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("cache", lambda row: row["cache"]),
        ("context", lambda row: f"{row['context_tokens']:,}"),
        ("bytes", lambda row: f"{row['bytes']:,}"),
        ("bytes per token", lambda row: f"{row['bytes_per_token']:,.0f}"),
        ("16-bit cache", lambda row: f"{row['plain_bytes']:,}"),
        ("ratio", lambda row: f"{row['compression_ratio']:.2f}x"),
    ]
    if others:
        columns.append(("K and V alone", lambda row: f"{row['attention_ratio']:.2f}x"))
    columns += [
        ("exact", lambda row: f"{row['exact_bytes'] / row['bytes']:.1%}"),
        ("unused room", lambda row: f"{row['unused_bytes'] / row['bytes']:.1%}"),
    ]
    if calibrated:
        columns.append(("ratio with the basis", lambda row: f"{row['ratio_with_codec']:.2f}x"))
    notes = [f"{record['model']}, one conversation against transformers' cache in 16 bits."]
    notes += ["The ratio is of the whole cache, recurrent states and indexer keys among it."] if others else []
    notes += ["Exact: sinks and tail."]
    if calibrated:
        notes.append("The last column counts the basis as if this conversation alone had to hold it.")
    lines = [[cell(row) for _, cell in columns] for row in rows]
    return Table([name for name, _ in columns], lines, " ".join(notes))


def calibrating(record: dict, _: list[str]) -> Table:
    """Time and memory of calibration."""
    lines = [
        ["time against bare forward passes", f"{record['ratio_to_forward']['body']:.2f}x"],
        ["the same, the forward passes with logits", f"{record['ratio_to_forward']['with_logits']:.2f}x"],
    ]
    sizes = record["peak_rss_mb_by_samples"].items()
    lines += [[f"peak memory with {n} samples", f"{size:,.0f} MB"] for n, size in sizes]
    return Table(["cost of calibration", ""], lines)


def profile(record: dict, words: list[str]) -> Table:
    """Latency, throughput and memory: a row per batch size, context length and cache.

    words: the rows to show, by batch size (`1`), by context length (`context=8000`), or all if there are none.
    """
    contexts = [word.removeprefix("context=") for word in words if word.startswith("context=")]
    batches = [int(word) for word in words if not word.startswith("context=")]
    rows, lines = select(record["rows"], "batch_size", batches), []
    for row in select(rows, "context_tokens", list(map(int, contexts))):
        start = [str(row["batch_size"]), f"{row['context_tokens']:,}", row["cache"]]
        if row.get("out_of_memory"):
            lines.append([*start, "out of memory"])
            continue
        ratio = "1.00x"
        if "ratio_to_baseline" in row:
            low, high = row["ratio_to_baseline"]["tokens_per_s_quartiles"]
            ratio = f"{row['ratio_to_baseline']['tokens_per_s_median']:.2f}x ({low:.2f} … {high:.2f})"
        lines.append([
            *start,
            f"{row['ttft_ms_median']:,.0f} ms" if "ttft_ms_median" in row else "–",
            f"{row['token_ms_median']:,.1f} ms",
            f"{row['tokens_per_s_median']:,.1f}",
            ratio,
            f"{row['cache_bytes'] / 2**20:,.1f} MiB",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ])  # fmt: skip
    args = record["args"]
    noise = " Caches were filled with noise, so that there is no first token." if args.get("noise") else ""
    return Table(
        ["batch", "context", "cache", "first token", "per token", "tokens/s", "against baseline", "cache",
         "peak memory"],
        lines,
        f"{record['model']} in {record['dtype']} on {record['device']}, {args['decode_tokens']} tokens decoded, "
        f"medians of {args['repeats']} repeats, quartiles in brackets.{noise} Peak memory: {record['peak_memory']}."
        f"{_weights(record)} {machine.caption(record)}",
    )  # fmt: skip


def profile_of_machines(records: list[dict], words: list[str]) -> Table:
    """As `profile`, of several machines side by side: rows that all of them have measured, time and ratio of each."""
    return _side_by_side(records, profile, words, ["batch", "context", "cache"], ["per token", "against baseline"])


def attention_of_machines(records: list[dict], words: list[str]) -> Table:
    """As `attention_step`, of several machines side by side."""
    shown = ["time", "against sdpa", "against best 16-bit"]
    return _side_by_side(records, attention_step, words, ["context", "attention over"], shown)


def _side_by_side(
    records: list[dict], make: Callable[[dict, list[str]], Table], words: list[str], keys: list[str], shown: list[str]
) -> Table:
    """The rows of one table per machine, joined by the first columns `keys`; other columns say of which machine."""
    names, made = machine.labels(records), [make(record, words) for record in records]
    cells = []
    for table in made:
        places = [table.columns.index(column) for column in shown]
        rows = {tuple(cell.strip("*") for cell in row[: len(keys)]): row for row in table.rows}
        cells.append({key: [row[i] for i in places] for key, row in rows.items() if len(row) == len(table.columns)})
    common = [key for key in cells[0] if all(key in own for own in cells)]
    columns = [f"{column}, {name}" for name in names for column in shown]
    captions = (f"{name}: {machine.caption(record)}" for name, record in zip(names, records, strict=True))
    about = "Two machines' times say nothing about each other; compare the ratios."
    return Table(
        [*keys, *columns], [[*key, *(cell for own in cells for cell in own[key])] for key in common],
        " ".join([about, *captions]),
    )  # fmt: skip


def profile_steps(record: dict, words: list[str]) -> Table:
    """A decode step: its time, and where that goes in shares of an instrumented step; of some batch sizes or of all."""
    rows = [
        row for row in select(record["rows"], "batch_size", [int(word) for word in words]) if "share_of_step" in row
    ]
    parts = list(dict.fromkeys(part for row in rows for part in row["share_of_step"]))
    lines = [
        [str(row["batch_size"]), f"{row['context_tokens']:,}", row["cache"], *_step(row)]
        + [format(row["share_of_step"].get(part, 0), ".0%") for part in parts]
        for row in rows
    ]
    return Table(
        ["batch", "context", "cache", "per token", "against baseline", *parts], lines,
        f"{record['model']} in {record['dtype']}. Shares of a decode step, measured in a pass of its own. "
        f"{machine.caption(record)}",
    )  # fmt: skip


def _step(row: dict) -> list[str]:
    """A step's time, and how much faster it is than the baseline's."""
    ratio = row["ratio_to_baseline"]["tokens_per_s_median"] if "ratio_to_baseline" in row else 1
    return [f"{row['token_ms_median']:,.1f} ms", f"{ratio:.2f}x"]


def profile_parking(record: dict, words: list[str]) -> Table:
    """Moving whole caches to the CPU's memory and back, of some batch sizes or of all; no rows where nothing moves."""
    rows = [row for row in select(record["rows"], "batch_size", [int(word) for word in words]) if "parking" in row]
    lines = []
    for row in rows:
        own = row["parking"]
        speeds = (f"{own[key]:,.1f} ms, {own['moved_bytes'] / own[key] / 1e6:,.1f} GB/s" for key in MOVES)
        start = [str(row["batch_size"]), f"{row['context_tokens']:,}", row["cache"]]
        lines.append([*start, f"{own['moved_bytes'] / 2**20:,.1f} MiB", *speeds])
    return Table(
        ["batch", "context", "cache", "moved", "offload", "prefetch"], lines,
        "Parking: a whole cache is moved to the CPU's pinned memory and back, each waited for. "
        f"{machine.caption(record)}",
    )  # fmt: skip


def _weights(record: dict) -> str:
    return "" if record["weights"] == "trained" else f" Weights are {record['weights']}."
