"""Markdown tables from results records, and pages kept in step with them: no figure is typed by hand.

README and docs/*.md hold regions that name the results file they come from:

    <!-- results: validate_ppl_smollm2-135m rank,bits -->
    …table…
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from gpt2.errors import PluginError
from gpt2.tables_scaling import scaling

REGION = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def validation(record: dict, groups: list[str]) -> str:
    """Rows of the perplexity ablation, of some groups or of all."""
    if missing := set(groups) - {row["group"] for row in record["rows"]}:
        raise PluginError(f"the results have no rows of group {', '.join(sorted(missing))}: run the script with them")
    rows = [row for row in record["rows"] if not groups or row["group"] in groups]
    lines = [
        "| cache | Δ perplexity | 95 % interval | KL, nats | top-1 | whole-KV ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ppl_delta_interval"]
        lines.append(
            f"| {row['label']} | {row['ppl_delta']:+.2%} | {low:+.2%} … {high:+.2%} | {row['kl_nats']:.4f} "
            f"| {row['top1_agreement']:.1%} | {row['compression_ratio_2048']:.2f}x |"
        )
    tokens, baseline = rows[0]["tokens"], rows[0]["baseline_ppl"]
    return "\n".join(lines) + f"\n\n{tokens:,} tokens of {record['text']}, uncompressed perplexity {baseline:.3f}."


def appending(record: dict, _: list[str]) -> str:
    """Time to append one token, a row per codec and a column per number of tokens held."""
    held = sorted({row["tokens_held"] for row in record["rows"]})
    lines = [
        "| codec | " + " | ".join(f"{n:,} tokens held" for n in held) + " | bytes per token |",
        "|---" * (len(held) + 2) + "|",
    ]
    for codec in dict.fromkeys(row["codec"] for row in record["rows"]):
        cells = {row["tokens_held"]: row for row in record["rows"] if row["codec"] == codec}
        times = " | ".join(f"{cells[n]['append_ms_median']:.2f} ms" for n in held)
        lines.append(f"| {codec} | {times} | {cells[held[-1]]['bytes_per_token']:,.0f} |")
    return "\n".join(lines)


def attention_step(record: dict, words: list[str]) -> str:
    """Time of a decode step's attention, a row per context and way; of some context lengths or of all."""
    contexts = [int(word) for word in words]
    rows = [row for row in record["rows"] if not contexts or row["context_tokens"] in contexts]
    if missing := set(contexts) - {row["context_tokens"] for row in rows}:
        raise PluginError(f"the results have no rows of context {sorted(missing)}: run the script with them")
    lines = [
        "| context | attention over | time | held | read at | of copy speed | against sdpa | against best 16-bit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ms_quartiles"]
        best_low, best_high = row["speed_against_best_16_bit_quartiles"]
        name = f"**{row['row']}**" if row["best_16_bit"] else row["row"]
        lines.append(
            f"| {row['context_tokens']:,} | {name} | {row['ms_median']:.3f} ms ({low:.3f} … {high:.3f}) "
            f"| {row['bytes_held'] / 2**20:,.1f} MiB | {row['bytes_per_s'] / 1e9:,.1f} GB/s "
            f"| {row['share_of_copy']:.0%} | {row['speed_against_sdpa_median']:.2f}x "
            f"| {row['speed_against_best_16_bit_median']:.2f}x ({best_low:.2f} … {best_high:.2f}) |"
        )
    compiled = [sum(row["compile_s"].values()) for row in rows if "compile_s" in row]
    building = f" torch.compile took {min(compiled):.1f} to {max(compiled):.1f} s per context." if compiled else ""
    return "\n".join(lines) + f"\n\n{_attention_setting(record)}{building}"


def _attention_setting(record: dict) -> str:
    args = record["args"]
    threads = f", {record['threads']} thread{'s' * (record['threads'] > 1)}" if record["device"] == "cpu" else ""
    return (
        f"One layer, one token for each of {args['batch_size']} sequence{'s' * (args['batch_size'] > 1)}, "
        f"{args['heads']} query heads, {args['kv_heads']} KV heads of {args['head_dim']}, {record['dtype']}, on "
        f"{record['device']}{threads}; codes read by {record['kernels']}. Medians of {args['repeats']} repeats, "
        f"quartiles in brackets; in bold the fastest 16-bit row. Copies run at {record['copy_bytes_per_s'] / 1e9:,.0f} "
        "GB/s, read and written."
    )


def largest_batch(record: dict, _: list[str]) -> str:
    """The most sequences whose caches fit, and how fast they are decoded together."""
    lines = [
        "| cache | largest batch | against baseline | tokens/s | against baseline | cache |",
        "|---|---|---|---|---|---|",
    ]
    base = next((row for row in record["rows"] if row["cache"] == "baseline" and row["largest_batch"]), None)
    for row in record["rows"]:
        if not row["largest_batch"]:
            lines.append(f"| {row['cache']} | not even one | | | | |")
            continue
        more, faster = (
            format(row[key] / base[key], ".2f") + "x" if base else "–" for key in ("largest_batch", "tokens_per_s")
        )
        size = f"{'at least ' if row['at_limit'] else ''}{row['largest_batch']:,}"
        lines.append(
            f"| {row['cache']} | {size} | {more} | {row['tokens_per_s']:,.1f} | {faster} "
            f"| {row['cache_bytes'] / 2**30:,.1f} GiB |"
        )
    weights = "" if record["weights"] == "trained" else f" Weights are {record['weights']}."
    return "\n".join(lines) + (
        f"\n\n{record['model']} in {record['dtype']} on {record['device']}: sequences of "
        f"{record['args']['context_length']:,} tokens, {record['args']['decode_tokens']} tokens decoded.{weights}"
    )


def calibrating(record: dict, _: list[str]) -> str:
    """Cost of calibration."""
    lines = [
        "| cost of calibration | |",
        "|---|---|",
        f"| time against bare forward passes | {record['ratio_to_forward']['body']:.2f}x |",
        f"| the same, the forward passes with logits | {record['ratio_to_forward']['with_logits']:.2f}x |",
    ]
    sizes = record["peak_rss_mb_by_samples"].items()
    return "\n".join(lines + [f"| peak memory with {n} samples | {size:,.0f} MB |" for n, size in sizes])


def profile(record: dict, words: list[str]) -> str:
    """Latency, throughput and memory, a row per cell and cache; of some batch sizes or of all."""
    batches = [int(word) for word in words]
    rows = [row for row in record["rows"] if not batches or row["batch_size"] in batches]
    if not rows:
        raise PluginError(f"the profile has no rows of batch size {', '.join(words)}: run the script with them")
    lines = [
        "| batch | context | cache | first token | per token | tokens/s | against baseline | cache | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['batch_size']} | {row['context_tokens']:,} | {row['cache']} |"
        if row.get("out_of_memory"):
            lines.append(f"{start} out of memory | | | | | |")
            continue
        ratio = "1.00x"
        if "ratio_to_baseline" in row:
            low, high = row["ratio_to_baseline"]["tokens_per_s_quartiles"]
            ratio = f"{row['ratio_to_baseline']['tokens_per_s_median']:.2f}x ({low:.2f} … {high:.2f})"
        lines.append(
            f"{start} {row['ttft_ms_median']:,.0f} ms | {row['token_ms_median']:,.1f} ms "
            f"| {row['tokens_per_s_median']:,.1f} | {ratio} | {row['cache_bytes'] / 2**20:,.1f} MiB "
            f"| {row['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    args = record["args"]
    weights = "" if record["weights"] == "trained" else f" Weights are {record['weights']}."
    return "\n".join(lines) + (
        f"\n\n{record['model']} in {record['dtype']} on {record['device']}, {args['decode_tokens']} tokens decoded, "
        f"medians of {args['repeats']} repeats, quartiles in brackets. Peak memory: {record['peak_memory']}.{weights}"
    )


def architectures(record: dict, _: list[str]) -> str:
    """Decoder families by what happens to them, a line per mode or per reason for refusing."""
    works = {"direct-capable": "works; its attention can be replaced", "reconstruct-only": "works; its attention can't"}
    order = [*works, "refused", "not tried", "failed"]
    groups: dict[str, list[str]] = {}
    for row in sorted(record["rows"], key=lambda row: order.index(row["mode"])):
        reason = row["reason"] or ""
        if row["mode"] != "failed":  # a bug is told in full; elsewhere the kind of reason will do
            reason = re.sub(r": .*| \(.*", "", reason)
        label = works.get(row["mode"]) or f"{row['mode']}: {reason}".replace("|", "\\|")
        groups.setdefault(label, []).append(row["model_type"])
    lines = ["| what happens | families | which |", "|---|---|---|"]
    lines += [f"| {label} | {len(names)} | {', '.join(names)} |" for label, names in groups.items()]
    tried = f"{len(record['rows'])} families of transformers {record['versions']['transformers']}"
    return "\n".join(lines) + f"\n\n{tried}, each tried as a small random model of its default config."


def needle(record: dict, _: list[str]) -> str:
    """Exact match and log-probability by context length, over depths, and where the baseline itself fails."""
    lines = [
        "| cache | context | exact match | baseline's | change of log p, nats | matches where the baseline works |",
        "|---|---|---|---|---|---|",
    ]
    cells = {(c["cache"], c["context_tokens"], c["depth"]): c for c in record["cells"]}
    groups = dict.fromkeys((c["cache"], c["context_tokens"]) for c in record["cells"] if "verdict" in c)
    for cache, length in groups:
        own = [c for (name, tokens, _), c in cells.items() if (name, tokens) == (cache, length)]
        base = [cells["baseline", length, c["depth"]] for c in own]
        works = [c for c in own if c["baseline_works"]]
        exact, reference = (sum(c["exact_match"] for c in some) / len(some) for some in (own, base))
        change = sum(c["logprob_change_nats"] for c in own) / len(own)
        matched = sum(c["verdict"] == "matches" for c in works)
        verdict = f"{matched} of {len(works)} depths" if works else "the baseline fails"
        lines.append(f"| {cache} | {length:,} | {exact:.0%} | {reference:.0%} | {change:+.3f} | {verdict} |")
    prompts = sum(c["trials"] for c in record["cells"] if c["cache"] == "baseline")
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {prompts} prompts per cache in {record['text']}; a baseline works from "
        f"{record['baseline_works_from']:.0%} exact match on."
    )


def stability(record: dict, _: list[str]) -> str:
    """Mean, deviation and range of Δ perplexity, by factor, and what the other metrics did over all runs."""
    lines = ["| varied | metric | runs | mean | std | range |", "|---|---|---|---|---|---|"]
    percent = {"ppl_delta", "top1_agreement", "needle_accuracy", "needle_accuracy_change"}
    for row in record["summary"]:
        if row["factor"] != "all" and row["metric"] != "ppl_delta":
            continue
        form = "{:+.2%}" if row["metric"] == "ppl_delta" else "{:.1%}" if row["metric"] in percent else "{:.4f}"
        mean, std, low, high = (form.format(row[key]) for key in ("mean", "std", "min", "max"))
        name = record["metrics"][row["metric"]]
        lines.append(f"| {row['factor']} | {name} | {row['runs']} | {mean} | {std.lstrip('+')} | {low} … {high} |")
    return "\n".join(lines) + f"\n\n{record['model']}, {record['cache']['label']}: {record['verdict']['line']}."


def layer_ablation(record: dict, _: list[str]) -> str:
    """The layers that lose most and least when they alone are compressed, a row per setting."""
    settings = sorted({(row["side"], row["rank"], row["bits"]) for row in record["rows"]})
    lines = ["| alone in | sum over layers | most sensitive | least sensitive |", "|---|---|---|---|"]
    for side, rank, bits in settings:
        own = sorted(
            (row for row in record["rows"] if (row["side"], row["rank"], row["bits"]) == (side, rank, bits)),
            key=lambda row: -row["kl_nats"],
        )
        most, least = (
            ", ".join(f"{row['layer']} ({row['kl_nats']:.2g})" for row in some) for some in (own[:3], own[-3:])
        )
        total = sum(row["kl_nats"] for row in own)
        lines.append(f"| {side.upper()} rank {rank}, {bits} bits | {total:.2g} | {most} | {least} |")
    return "\n".join(lines) + f"\n\nKL in nats on {record['rows'][0]['tokens']:,} tokens of {record['text']}, by layer."


def peers(record: dict, families: list[str]) -> str:
    """Our caches beside other people's, of some families or of all; the uncompressed one always."""
    if missing := set(families) - {row["family"] for row in record["rows"]}:
        raise PluginError(f"the results have no rows of family {', '.join(sorted(missing))}: run the script with them")
    lines = [
        "| cache | bytes per token | ratio | Δ perplexity | 95 % interval | KL, nats | top-1 | needle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    baseline = next(row for row in record["rows"] if row["family"] == "baseline")
    for row in record["rows"]:
        if families and row["family"] not in families and row is not baseline:
            continue
        if "not_run" in row:
            why = row["not_run"].replace("|", "\\|")
            lines.append(f"| {row['label']} | not run: {why} | | | | | | |")
            continue
        low, high = row["ppl_delta_interval"]
        found = format(row["needle_exact_match"], ".0%") if "needle_exact_match" in row else "–"
        lines.append(
            f"| {'16-bit cache' if row is baseline else row['label']} | {row['bytes_per_token']:,.0f} "
            f"| {row['compression_ratio_2048']:.2f}x | {row['ppl_delta']:+.2%} | {low:+.2%} … {high:+.2%} "
            f"| {row['kl_nats']:.4f} | {row['top1_agreement']:.1%} | {found} |"
        )
    words = f"{record['model']}, {baseline['tokens']:,} tokens of {record['text']}, uncompressed perplexity "
    words += f"{baseline['ppl']:.3f}."
    if record["needle"]:
        context = " and ".join(f"{n:,}" for n in record["args"]["needle_context_lengths"])
        words += f" Needle: exact match over {record['needle']['summary'][0]['prompts']} prompts of {context} tokens."
        words += "".join(
            f" Not asked: {row['label']} ({row['needle_not_run']})."
            for row in record["rows"]
            if "needle_not_run" in row
        )
    return "\n".join(lines) + f"\n\n{words}"


def ladder(record: dict, _: list[str]) -> str:
    """Presets by ratio, one row each."""
    lines = [
        "| preset | ratio | bits | Δ perplexity | 95 % interval | KL, nats | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        low, high = row["ppl_delta_interval"]
        lines.append(
            f"| {row['label']} | {row['compression_ratio_2048']:.2f}x | {row['bits']:.2f} | {row['ppl_delta']:+.2%} "
            f"| {low:+.2%} … {high:+.2%} | {row['kl_nats']:.5f} | {row['top1_agreement']:.1%} |"
        )
    tokens, baseline = record["rows"][0]["tokens"], record["rows"][0]["baseline_ppl"]
    meta = record["calibration"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {tokens:,} evaluation tokens of {record['text']}, uncompressed perplexity "
        f"{baseline:.3f}; calibrated on {meta['tokens']:,} calibration tokens of {meta['text']}."
    )


def tuned(record: dict, _: list[str]) -> str:
    """Every candidate that a codec search has measured, most compressed first; the chosen one in bold."""
    lines = ["| cache | whole-KV ratio | Δ perplexity, tuning text | 95 % interval |", "|---|---|---|---|"]
    budget = record["args"]["target_ppl_delta"]
    chosen = {key: record[key] for key in ("codec", "bits", "quantizer", "sink_tokens")}
    for trial in sorted(record["trials"], key=lambda trial: -trial["compression_ratio"]):
        low, high = trial["ppl_delta_interval"]
        label = f"**{trial['label']}**" if chosen.items() <= trial.items() else trial["label"]
        lines.append(
            f"| {label} | {trial['compression_ratio']:.2f}x | {trial['ppl_delta']:+.2%} | {low:+.2%} … {high:+.2%} |"
        )
    low, high = record["figures"]["ppl_delta_interval"]
    return "\n".join(lines) + (
        f"\n\n{record['model']}, budget {budget:+.1%}. On {record['figures']['tokens']:,} evaluation tokens of "
        f"{record['text']} the chosen one costs {record['ppl_delta']:+.2%} ({low:+.2%} … {high:+.2%})."
    )


def exploration(record: dict, questions: list[str]) -> str:
    """The joint codec with one thing changed at a time, of some questions or of all; the product's rows in bold."""
    if missing := set(questions) - {row["question"] for row in record["rows"]}:
        raise PluginError(f"the results have no rows on {', '.join(sorted(missing))}: run the script with them")
    rows = [row for row in record["rows"] if not questions or row["question"] in questions]
    budgets = sorted({row["bits"] for row in rows}, reverse=True)
    lines = [
        f"| changed | {' | '.join(f'KL at {bits:g} bits' for bits in budgets)} | Δ perplexity at {budgets[-1]:g} bits "
        "| 95 % interval | top-1 |",
        "|---" * (len(budgets) + 4) + "|",
    ]
    for question, label in dict.fromkeys((row["question"], row["label"]) for row in rows):
        own = {row["bits"]: row for row in rows if (row["question"], row["label"]) == (question, label)}
        last = own[budgets[-1]]
        name = f"**{label}**" if last["product"] else label
        low, high = last["ppl_delta_interval"]
        cells = " | ".join(_kl(own[bits]) for bits in budgets)
        lines.append(
            f"| {question}: {name} | {cells} | {last['ppl_delta']:+.2%} | {low:+.2%} … {high:+.2%} "
            f"| {last['top1_agreement']:.1%} |"
        )
    return "\n".join(lines) + (
        f"\n\n{record['model']}, {rows[0]['tokens']:,} tokens of {record['text']}, uncompressed perplexity "
        f"{rows[0]['baseline_ppl']:.3f}, calibrated on {record['calibration_text']}. KL in nats, in brackets its "
        "change from the product (bold), ≈ where the 95 % interval of the paired difference has zero in it. Simulated; "
        "bits are per coordinate, all counted."
    )


def _against_product(row: dict) -> str:
    if row["product"]:
        return ""
    low, high = row["kl_change_interval"]
    return f" ({'≈ ' if low <= 0 <= high else ''}{row['kl_change']:+.0%})"


def _kl(row: dict) -> str:
    """A row's KL, against the product, with its bits where they aren't those that its column says."""
    off = f" with {row['bits_counted']:.2f} bits" if abs(row["bits_counted"] / row["bits"] - 1) > 0.01 else ""
    return f"{row['kl_nats']:.5f}{_against_product(row)}{off}"


TABLES: dict[str, Callable[[dict, list[str]], str]] = {
    "attention_step": attention_step,
    "validate_ppl": validation,
    "auto_tune": tuned,
    "benchmark_append": appending,
    "benchmark_calibration": calibrating,
    "architectures": architectures,
    "explore_codecs": exploration,
    "ladder": ladder,
    "largest_batch": largest_batch,
    "layer_ablation": layer_ablation,
    "needle": needle,
    "peers": peers,
    "profile": profile,
    "scaling": scaling,
    "stability": stability,
}


def pages(root: Path) -> list[Path]:
    """Files with regions: README, and the pages of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(text: str, runs: Path) -> str:
    """Text with every region made anew from the results in `runs`. Raises PluginError where a file is missing."""

    def region(match: re.Match) -> str:
        start, name, words, end = match.groups()
        path = runs / f"{name}.json"
        if not path.is_file():
            raise PluginError(f"a table asks for {path.name}, which is not among the committed results: run it first")
        make = next(table for prefix, table in TABLES.items() if name.startswith(prefix))
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"{start}{make(record, words.split(',') if words else [])}\n{end}"

    return REGION.sub(region, text)
