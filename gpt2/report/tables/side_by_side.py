"""The table of one conversation through several caches."""

from __future__ import annotations

import textwrap

from gpt2.report.table import Table

FIRST_WORDS = 48  # characters of an answer
FEWEST_TOKENS = 512  # of a document whose change of perplexity is shown: of fewer it is mostly chance


def side_by_side(record: dict, _: list[str]) -> Table:
    """Bytes, loss, time and answer of each cache, as scripts/generate_with_preset.py measures them."""
    rows = record["rows"]
    scored, largest = rows[0]["tokens"], max(rows, key=lambda row: row["codec_bytes"] / row["bytes"])
    lines = []
    for row in rows:
        lines.append([
            row["cache"],
            f"{row['bytes'] / 2**20:.2f}",
            f"{row['codec_bytes'] / 2**20:.2f}",
            f"{row['compression_ratio']:.2f}x",
            f"{row['ppl_delta']:+.2%}" if scored >= FEWEST_TOKENS else "–",
            f"{row['token_ms_median']:,.0f}{'*' * row['direct']}" if "token_ms_median" in row else "–",
            textwrap.shorten(row["answer"], FIRST_WORDS, placeholder=" …"),
        ])  # fmt: skip
    outweighs = largest["codec_bytes"] > largest["bytes"]
    note = f"{record['model']}, {record['dtype']} on {record['device']}. MiB: {rows[0]['context_tokens']:,} tokens, "
    note += "with an answer of the greatest length, as a model that runs in 16 bits holds them. Basis: stored once for "
    note += "all conversations"
    note += f"; that of {largest['cache']} outweighs one of this length in a model this small." if outweighs else "."
    note += " Blocks of 64 tokens are compressed; attention sinks and an unfinished block stay exact."
    if scored >= FEWEST_TOKENS:
        note += f" Δ perplexity: {scored:,} tokens of the document, uncompressed {rows[0]['baseline_ppl']:.3f}."
    else:
        note += f" Δ perplexity – : {scored:,} tokens of the document are too few, it takes {FEWEST_TOKENS}."
    if not all("token_ms_median" in row for row in rows):
        note += " ms per token – : the answer was too short to time a token."
    if any(row["direct"] for row in rows):
        note += " *: read as stored; the other compressed caches are reconstructed at every step."
    columns = ["cache", "MiB", "basis MiB", "ratio", "Δ perplexity", "ms per token", "first words of the answer"]
    return Table(columns, lines, note)
