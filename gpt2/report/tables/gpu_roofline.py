"""Tables of the least time that attention over codes takes on a GPU, computed from bytes and operations."""

from __future__ import annotations

from gpt2.common import machine
from gpt2.report.table import Table, select

KERNELS = "kernels"  # the word that shows kernels one by one


def gpu_roofline(record: dict, words: list[str]) -> Table:
    """Least time of a decode step: a row per GPU, context length and codec. Nothing in it is measured.

    words: context lengths and GPUs to show, or all if there are none; `kernels` for a row per kernel instead.
    """
    contexts = [int(word) for word in words if word.isdigit()]
    gpus = [word for word in words if not word.isdigit() and word != KERNELS]
    rows = select(select(record["rows"], "context_tokens", contexts), "gpu", gpus)
    if KERNELS in words:
        lines = [
            [*_start(row), kernel, *_bound(bound)] for row in rows for kernel, bound in row.get("kernels", {}).items()
        ]
        head = ["GPU", "context", "attention over", "kernel"]
        return Table([*head, *COLUMNS], lines, _note(record))
    lines = [[*_start(row), *_bound(row), f"{row['speed_against_16_bit']:.2f}x"] for row in rows]
    return Table(["GPU", "context", "attention over", *COLUMNS, "against 16 bits"], lines, _note(record))


COLUMNS = ["read and written", "memory", "tensor cores", "vector units", "at least"]


def _start(row: dict) -> list[str]:
    return [row["gpu"], f"{row['context_tokens']:,}", row["row"]]


def _bound(row: dict) -> list[str]:
    parts = [f"{row['us'][part]:,.1f} µs" for part in COLUMNS[1:4]]
    return [f"{row['bytes'] / 2**20:,.1f} MiB", *parts, f"{row['bound_us']:,.1f} µs ({row['bound_by']})"]


def _note(record: dict) -> str:
    args = record["args"]
    sheets = (
        f"{gpu['gpu']} {gpu['bytes_per_s'] / 1e9:,.0f} GB/s, {gpu['tensor16_ops_per_s'] / 1e12:,.0f} and "
        f"{gpu['tensor8_ops_per_s'] / 1e12:,.0f} TFLOPS in 16 and 8 bits, {gpu['vector_ops_per_s'] / 1e12:,.1f} in "
        "float32"
        for gpu in record["gpus"]
    )
    return (
        f"Computed, not measured: one layer, one token per sequence, batch of {args['batch_size']}, {args['heads']} "
        f"query heads, {args['kv_heads']} KV heads of {args['head_dim']}; in brackets what takes longest. Data sheets: "
        f"{'; '.join(sheets)}. The kernels multiply in 16 bits."
    )


def attention_bound(record: dict, _: list[str]) -> Table:
    """Measured time of a decode step's attention beside the least that its bytes and operations take on the device."""
    lines = [
        [f"{row['context_tokens']:,}", row["row"], f"{row['ms_median']:.3f} ms",
         f"{row['bound_ms']:.4f} ms ({row['bound_by']})", f"{row['share_of_bound']:.0%}"]
        for row in record["rows"]
    ]  # fmt: skip
    bound = record["bound"]
    source = "from its data sheet" if bound["vector_ops_per_s"] else "measured by copying, and operations not counted"
    return Table(
        ["context", "attention over", "measured", "at least", "reached"], lines,
        f"At least: by bytes and operations at the speed of {bound['gpu']}, {bound['bytes_per_s'] / 1e9:,.0f} GB/s "
        f"{source}. {machine.caption(record)}",
    )  # fmt: skip
