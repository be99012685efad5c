"""Tables of quality: what compression costs in perplexity and in the model's predictions."""

from __future__ import annotations

from pathlib import Path

from gpt2.report.table import Table, interval, select


def loss_cells(row: dict, kl_digits: int = 4) -> list[str]:
    """Cells of a measured loss: change of perplexity, its interval, KL in nats and top-1 agreement."""
    change, agreement = f"{row['ppl_delta']:+.2%}", f"{row['top1_agreement']:.1%}"
    return [change, interval(row["ppl_delta_interval"]), f"{row['kl_nats']:.{kl_digits}f}", agreement]


def validation(record: dict, groups: list[str]) -> Table:
    """Rows of the perplexity ablation, of some groups or of all."""
    rows = select(record["rows"], "group", groups)
    lines = [[row["label"], *loss_cells(row), f"{row['compression_ratio_2048']:.2f}x"] for row in rows]
    return Table(
        ["cache", "Δ perplexity", "95 % interval", "KL, nats", "top-1", "whole-KV ratio"],
        lines,
        f"{rows[0]['tokens']:,} tokens of {record['text']}, uncompressed perplexity {rows[0]['baseline_ppl']:.3f}.",
    )


def stability(record: dict, _: list[str]) -> Table:
    """Mean, deviation and range of Δ perplexity for each factor, and of all metrics over all runs."""
    lines = []
    percent = {"ppl_delta", "top1_agreement", "needle_accuracy", "needle_accuracy_change"}
    for row in record["summary"]:
        if row["factor"] != "all" and row["metric"] != "ppl_delta":
            continue
        form = "{:+.2%}" if row["metric"] == "ppl_delta" else "{:.1%}" if row["metric"] in percent else "{:.4f}"
        mean, std, low, high = (form.format(row[key]) for key in ("mean", "std", "min", "max"))
        name = record["metrics"][row["metric"]]
        lines.append([row["factor"], name, str(row["runs"]), mean, std.lstrip("+"), f"{low} … {high}"])
    note = f"{record['model']}, {record['cache']['label']}: {record['verdict']['line']}."
    return Table(["varied", "metric", "runs", "mean", "std", "range"], lines, note)


def layer_ablation(record: dict, _: list[str]) -> Table:
    """The layers that lose most and least when only they are compressed, a row per setting."""
    rows = [row for row in record["rows"] if row["kl_nats"] is not None]
    settings = sorted({(row["side"], row["rank"], row["bits"]) for row in rows})
    lines = []
    for side, rank, bits in settings:
        own = sorted(
            (row for row in rows if (row["side"], row["rank"], row["bits"]) == (side, rank, bits)),
            key=lambda row: -row["kl_nats"],
        )
        most, least = (
            ", ".join(f"{row['layer']} ({row['kl_nats']:.2g})" for row in some) for some in (own[:3], own[-3:])
        )
        total = sum(row["kl_nats"] for row in own)
        lines.append([f"{side.upper()} rank {rank}, {bits} bits", f"{total:.2g}", most, least])
    note = f"KL in nats on {rows[0]['tokens']:,} tokens of {record['text']}, by layer."
    if lost := len(record["rows"]) - len(rows):
        note += f" {lost} without a finite loss are left out."
    return Table(["alone in", "sum over layers", "most sensitive", "least sensitive"], lines, note)


def peers(record: dict, families: list[str]) -> Table:
    """Our caches beside those of other packages, of some families or of all, and always the uncompressed cache."""
    chosen = select(record["rows"], "family", families)
    baseline = next(row for row in record["rows"] if row["family"] == "baseline")
    lines = []
    for row in [baseline, *(row for row in chosen if row is not baseline)]:
        if "not_run" in row:
            lines.append([row["label"], f"not run: {row['not_run']}"])
            continue
        label = "16-bit cache" if row is baseline else row["label"]
        found = format(row["needle_exact_match"], ".0%") if "needle_exact_match" in row else "–"
        size, ratio = f"{row['bytes_per_token']:,.0f}", f"{row['compression_ratio_2048']:.2f}x"
        lines.append([label, size, ratio, *loss_cells(row), found])
    note = f"{record['model']}, {baseline['tokens']:,} tokens of {record['text']}, uncompressed perplexity "
    note += f"{baseline['ppl']:.3f}."
    if record["needle"]:
        context = " and ".join(f"{n:,}" for n in record["args"]["needle_context_lengths"])
        prompts = sum(cell["trials"] for cell in record["needle"]["cells"] if cell["cache"] == "baseline")
        note += f" Needle: exact match over {prompts} prompts of {context} tokens."
        unasked = [row for row in chosen if "needle_not_run" in row]
        note += "".join(f" Not asked: {row['label']} ({row['needle_not_run']})." for row in unasked)
    columns = ["cache", "bytes per token", "ratio", "Δ perplexity", "95 % interval", "KL, nats", "top-1", "needle"]
    return Table(columns, lines, note)


def ratio_presets(record: dict, _: list[str]) -> Table:
    """Presets by ratio, one row each."""
    lines = [
        [row["label"], f"{row['compression_ratio_2048']:.2f}x", f"{row['bits']:.2f}", *loss_cells(row, kl_digits=5)]
        for row in record["rows"]
    ]
    tokens, baseline = record["rows"][0]["tokens"], record["rows"][0]["baseline_ppl"]
    meta = record["calibration"]
    return Table(
        ["preset", "ratio", "bits", "Δ perplexity", "95 % interval", "KL, nats", "top-1"],
        lines,
        f"{record['model']}, {tokens:,} evaluation tokens of {record['text']}, uncompressed perplexity "
        f"{baseline:.3f}; calibrated on {meta['tokens']:,} calibration tokens of {meta['text']}.",
    )


def ratio_presets_of_models(records: list[dict], names: list[str]) -> Table:
    """Presets by ratio of several models side by side: those of `names`, or all that every model has."""
    rows = [{row["label"]: row for row in record["rows"]} for record in records]
    lines = [[label] for label in names or [label for label in rows[0] if all(label in own for own in rows)]]
    columns, notes = ["preset"], []
    for record, own in zip(records, rows, strict=True):
        model, first = Path(record["model"]).name, record["rows"][0]
        columns += [f"{model}: Δ perplexity (95 % interval)", "KL, nats", "top-1"]
        notes.append(
            f"{model}: {first['tokens']:,} evaluation tokens of {record['text']}, uncompressed perplexity "
            f"{first['baseline_ppl']:.3f}."
        )
        for line in lines:
            change, bounds, *rest = loss_cells(own[line[0]], kl_digits=5)
            line += [f"{change} ({bounds})", *rest]
    return Table(columns, lines, " ".join(notes))


def tuned(record: dict, _: list[str]) -> Table:
    """Every candidate that a search has measured, most compressed first, with the chosen one in bold."""
    lines = []
    for trial in sorted(record["trials"], key=lambda trial: -trial["compression_ratio"]):
        label = f"**{trial['label']}**" if "figures" in record and _is_chosen(trial, record) else trial["label"]
        bounds = trial["ppl_delta_interval"]
        loss = [f"{trial['ppl_delta']:+.2%}", interval(bounds)] if bounds else ["no finite loss"]
        lines.append([label, f"{trial['compression_ratio']:.2f}x", *loss])
    note = f"{record['model']}, budget {record['args']['target_ppl_delta']:+.1%}."
    if "figures" in record:
        note += (
            f" On {record['figures']['tokens']:,} evaluation tokens of {record['text']} the chosen one costs "
            f"{record['ppl_delta']:+.2%} ({interval(record['figures']['ppl_delta_interval'])})."
        )
    return Table(["cache", "whole-KV ratio", "Δ perplexity, tuning text", "95 % interval"], lines, note)


def _is_chosen(trial: dict, record: dict) -> bool:
    """Whether a trial is the one that the search chose. Presets round the ratio to 4 digits."""
    keys = ("codec", "rank", "bits", "quantizer", "sink_tokens")
    same = all(record[key] == trial[key] for key in keys if key in trial)
    return same and round(trial["compression_ratio"], 4) == record["compression_ratio"]


def codec_variations(record: dict, questions: list[str]) -> Table:
    """The joint codec with one thing changed at a time, of some questions or of all; rows of the product in bold."""
    rows, lines = select(record["rows"], "question", questions), []
    budgets = sorted({row["bits"] for row in rows}, reverse=True)
    for question, label in dict.fromkeys((row["question"], row["label"]) for row in rows):
        own = {row["bits"]: row for row in rows if (row["question"], row["label"]) == (question, label)}
        last = own[budgets[-1]]
        name = f"**{label}**" if last["product"] else label
        change, spread, _, agreement = loss_cells(last)
        lines.append([f"{question}: {name}", *(_kl(own[bits]) for bits in budgets), change, spread, agreement])
    at = f"at {budgets[-1]:g} bits"
    return Table(
        ["changed", *(f"KL at {bits:g} bits" for bits in budgets), f"Δ perplexity {at}", "95 % interval", "top-1"],
        lines,
        f"{record['model']}, {rows[0]['tokens']:,} tokens of {record['text']}, uncompressed perplexity "
        f"{rows[0]['baseline_ppl']:.3f}, calibrated on {record['calibration_text']}. KL in nats, in brackets its "
        "change from the product (bold), ≈ where the 95 % interval of the paired difference has zero in it. Simulated; "
        "bits are per coordinate, all counted.",
    )


def _kl(row: dict) -> str:
    """A row's KL, its change from the product, and its bits if they differ from those of its column."""
    words = f"{row['kl_nats']:.5f}"
    if not row["product"]:
        low, high = row["kl_change_interval"]
        words += f" ({'≈ ' if low <= 0 <= high else ''}{row['kl_change']:+.0%})"
    if abs(row["bits_counted"] / row["bits"] - 1) > 0.01:
        words += f" with {row['bits_counted']:.2f} bits"
    return words
