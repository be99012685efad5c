"""Tables of docs/scale.md, from records that scripts/measure_scaling.py writes."""

from __future__ import annotations

import re
from collections.abc import Callable

from gpt2.errors import PluginError

GIB, MIB = 2**30, 2**20


def scaling(record: dict, words: list[str]) -> str:
    """One of the tables by name, `bytes`, `time`, `memory`, `passes` or `slopes`; slopes of some steps, or of all."""
    if not words or words[0] not in SCALING:
        raise PluginError(f"a table of {record['model']} asks for {words}: name one of {', '.join(SCALING)} first")
    return SCALING[words[0]](record, words[1:])


def _bytes(record: dict, _: list[str]) -> str:
    contexts = sorted({row["context_tokens"] for row in record["caches"]})
    lines = [
        f"| model | cache | bytes per token | {' | '.join(f'{n:,} tokens' for n in contexts)} | ratio | basis |",
        "|---" * (len(contexts) + 5) + "|",
    ]
    for shape, cache in dict.fromkeys((row["shape"], row["cache"]) for row in record["caches"]):
        own = {r["context_tokens"]: r for r in record["caches"] if (r["shape"], r["cache"]) == (shape, cache)}
        last = own[contexts[-1]]
        sizes = " | ".join(f"{own[n]['bytes'] / GIB:,.2f} GiB" for n in contexts)
        basis = f"{last['basis_bytes'] / MIB:.3g} MiB" if last["basis_bytes"] else "–"
        ratio = f"{last['compression_ratio']:.2f}x"
        lines.append(f"| {shape} | {cache} | {last['bytes_per_token']:,.0f} | {sizes} | {ratio} | {basis} |")
    return "\n".join(lines) + (
        f"\n\nOne sequence; bytes per token and ratio at {contexts[-1]:,} tokens, against 16 bits. Caches filled with "
        "noise in one layer of the real class and counted, times the layers. The basis is float32, held once for all "
        "sequences, and not in the ratio."
    )


def _time(record: dict, _: list[str]) -> str:
    lines = [
        "| model | a forward pass of all samples | first pass | gradients | checkpointing | together | fitting |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["calibrations"]:
        passes, together = row["in_forward_passes"], row["seconds"]["first_pass"] + row["seconds"]["gradient_pass"]
        fits = ", ".join(f"{count:,} of {width}" for width, count in row["bases"].items())
        lines.append(
            f"| {row['shape']} | {row['forward_flops'] / 1e15:,.2f} PFLOP | {passes['first_pass']:.2f}x "
            f"| {passes['gradient_pass']:.2f}x | {passes['gradient_pass_checkpointing']:.2f}x | {together:,.1f} s "
            f"| {row['fitting_s']:,.0f} s ({fits}) |"
        )
    args, threads = record["args"], record["threads"]
    return "\n".join(lines) + (
        f"\n\n{args['samples']} samples of {args['seq_len']:,} tokens. Passes are counted, in forward passes without "
        f"logits; together: at an assumed {args['flops_per_s'] / 1e12:,.0f} TFLOP/s, without checkpointing. Fitting: "
        f"number of bases by width, each at what one took with {threads} thread{'s' * (threads > 1)}."
    )


def _memory(record: dict, _: list[str]) -> str:
    lines = [
        "| model | weights | statistics of heads | of bases | sample of blocks | one sample's activations "
        "| with checkpointing | its logits, one copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["calibrations"]:
        added = row["gradient_statistics_bytes"]
        sizes = (
            row["weight_bytes"], row["statistics_bytes"] + added["heads"], added["joint"] + added["grouped"],
            added["blocks"], row["activation_bytes"], row["checkpointed_bytes"], row["logits_bytes"],
        )  # fmt: skip
        lines.append(f"| {row['shape']} | " + " | ".join(f"{size / GIB:,.2f} GiB" for size in sizes) + " |")
    return "\n".join(lines) + (
        f"\n\nCounted. A sample has {record['args']['seq_len']:,} tokens, weights and activations 16 bits, statistics "
        "float64 in the host's memory; none of them depends on the number of samples."
    )


def _passes(record: dict, _: list[str]) -> str:
    lines = ["| pass | counted | measured | quartiles |", "|---|---|---|---|"]
    for row in record["passes"]:
        low, high = row["ratio_quartiles"]
        lines.append(f"| {row['step']} | {row['counted']:.2f}x | {row['ratio_median']:.2f}x | {low:.2f} … {high:.2f} |")
    row = record["passes"][0]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {row['samples']} samples of {row['tokens']:,} tokens, in forward passes without "
        "logits; the second with the pass over one sample that finds the rotation of keys."
    )


def _slopes(record: dict, steps: list[str]) -> str:
    rows = [row for row in record["slopes"] if not steps or re.match(r"\w+", row["step"])[0] in steps]
    if not rows:
        raise PluginError(f"the results have no slopes of {', '.join(steps)}: run the script with them")
    lines = [
        "| step | against | on | from … to | expected | measured | 95 % interval | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["exponent_interval"]
        verdict = row["verdict"] if row["verdict"] == "agrees" else f"**{row['verdict']}**"
        lines.append(
            f"| {row['step']} | {row['against']} | {row['on']} | {_number(row['x'][0])} … {_number(row['x'][-1])} "
            f"| {row['expected_exponent']:.2f} | {row['exponent']:.2f} | {low:.2f} … {high:.2f} | {verdict} |"
        )
    return "\n".join(lines)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x < 1e6 else f"{x:.1e}"


SCALING: dict[str, Callable[[dict, list[str]], str]] = {
    "bytes": _bytes,
    "time": _time,
    "memory": _memory,
    "passes": _passes,
    "slopes": _slopes,
}
