"""Tables of costs at scale, from records that scripts/benchmarks/scaling.py writes."""

from __future__ import annotations

import re
from collections.abc import Callable

from gpt2.common.errors import PluginError
from gpt2.report.table import Table

GIB, MIB = 2**30, 2**20


def scaling(record: dict, words: list[str]) -> Table:
    """The table `bytes`, `time`, `memory`, `passes` or `slopes`, by the first word; other words are steps of slopes."""
    name, *steps = words or ["slopes"]
    if name not in SCALING:
        raise PluginError(f"a table of {record['model']} asks for {name}: give one of {', '.join(SCALING)} first")
    return SCALING[name](record, steps)


def _bytes(record: dict, _: list[str]) -> Table:
    caches, left_out = ([row for row in record["caches"] if ("reason" in row) == wanted] for wanted in (False, True))
    contexts = sorted({row["context_tokens"] for row in caches})
    columns = ["model", "cache", "bytes per token", *(f"{n:,} tokens" for n in contexts), "ratio", "basis"]
    rows = []
    for shape, cache in dict.fromkeys((row["shape"], row["cache"]) for row in caches):
        own = {r["context_tokens"]: r for r in caches if (r["shape"], r["cache"]) == (shape, cache)}
        last = own[contexts[-1]]
        sizes = [f"{own[n]['bytes'] / GIB:,.2f} GiB" for n in contexts]
        basis = f"{last['basis_bytes'] / MIB:.3g} MiB" if last["basis_bytes"] else "–"
        rows.append(
            [shape, cache, f"{last['bytes_per_token']:,.0f}", *sizes, f"{last['compression_ratio']:.2f}x", basis]
        )
    note = (
        f"One sequence; bytes per token and ratio at {contexts[-1]:,} tokens, against transformers' own cache in 16 "
        "bits. One layer of each sort is filled and counted, and stands for all like it. The basis is float32, held "
        "once for all sequences, and not in the ratio."
    )
    note += "".join(f" {row['shape']} has no {row['cache']}: {row['reason']}." for row in left_out)
    return Table(columns, rows, note)


def _time(record: dict, _: list[str]) -> Table:
    columns = ["model", "a forward pass of all samples", "first pass", "gradients", "checkpointing", "together"]
    rows = []
    for row in record["calibrations"]:
        passes, together = row["in_forward_passes"], row["seconds"]["first_pass"] + row["seconds"]["gradient_pass"]
        fits = ", ".join(f"{count:,} of {width}" for width, count in row["bases"].items())
        fitting = fits if row["fitting_s"] is None else f"{row['fitting_s']:,.0f} s ({fits})"
        counted = (passes[key] for key in ("first_pass", "gradient_pass", "gradient_pass_checkpointing"))
        rows.append(
            [row["shape"], f"{row['forward_flops'] / 1e15:,.2f} PFLOP", *(f"{n:.2f}x" for n in counted)]
            + [f"{together:,.1f} s", fitting]
        )
    args, threads = record["args"], record["threads"]
    timed = any(row["fitting_s"] is not None for row in record["calibrations"])
    took = f", each at what one took with {threads} thread{'s' * (threads > 1)}" if timed else ""
    note = (
        f"{args['samples']} samples of {args['seq_len']:,} tokens. Passes are counted, in forward passes without "
        f"logits; together: at an assumed {args['flops_per_s'] / 1e12:,.0f} TFLOP/s, without checkpointing. Fitting: "
        f"number of bases by width{took}."
    )
    return Table([*columns, "fitting"], rows, note)


def _memory(record: dict, _: list[str]) -> Table:
    columns = ["model", "weights", "statistics of heads", "of bases", "sample of blocks", "one sample's activations"]
    rows = []
    for row in record["calibrations"]:
        added = dict(row["gradient_statistics_bytes"])
        heads, blocks = added.pop("heads"), added.pop("blocks")
        sizes = (
            row["weight_bytes"], row["statistics_bytes"] + heads, sum(added.values()), blocks, row["activation_bytes"],
            row["checkpointed_bytes"], row["logits_bytes"],
        )  # fmt: skip
        rows.append([row["shape"], *("–" if size is None else f"{size / GIB:,.2f} GiB" for size in sizes)])
    note = (
        f"Counted. A sample has {record['args']['seq_len']:,} tokens, weights and activations 16 bits, statistics "
        "float64 in the host's memory; none of them depends on the number of samples."
    )
    if any(row["activation_bytes"] is None for row in record["calibrations"]):
        note += " –: activations are counted of layers like Llama's alone."
    return Table([*columns, "with checkpointing", "its logits, one copy"], rows, note)


def _passes(record: dict, _: list[str]) -> Table:
    rows = []
    for row in record["passes"]:
        low, high = row["ratio_quartiles"]
        rows.append([row["step"], f"{row['counted']:.2f}x", f"{row['ratio_median']:.2f}x", f"{low:.2f} … {high:.2f}"])
    row = record["passes"][0]
    note = (
        f"{record['model']}, {row['samples']} samples of {row['tokens']:,} tokens, in forward passes without "
        "logits; the second with the pass over one sample that finds the rotation of keys."
    )
    return Table(["pass", "counted", "measured", "quartiles"], rows, note)


def _slopes(record: dict, steps: list[str]) -> Table:
    chosen = [row for row in record["slopes"] if not steps or re.match(r"\w+", row["step"])[0] in steps]
    if not chosen:
        raise PluginError(f"the results have no slopes of {', '.join(steps)}: run the script with them")
    rows = []
    for row in chosen:
        low, high = row["exponent_interval"]
        verdict = row["verdict"] if row["verdict"] == "agrees" else f"**{row['verdict']}**"
        rows.append(
            [row["step"], row["against"], row["on"], f"{_number(row['x'][0])} … {_number(row['x'][-1])}"]
            + [f"{row['expected_exponent']:.2f}", f"{row['exponent']:.2f}", f"{low:.2f} … {high:.2f}", verdict]
        )
    columns = ["step", "against", "on", "from … to", "expected", "measured", "95 % interval", "verdict"]
    return Table(columns, rows)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x < 1e6 else f"{x:.1e}"


SCALING: dict[str, Callable[[dict, list[str]], Table]] = {
    "bytes": _bytes,
    "time": _time,
    "memory": _memory,
    "passes": _passes,
    "slopes": _slopes,
}
