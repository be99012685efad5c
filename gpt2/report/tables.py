"""Tables from results records, and pages kept in step with them: no figure is typed by hand.

README and docs/*.md hold regions that name the results file they come from:

    <!-- results: validate_ppl_smollm2-135m rank,bits -->
    …table…
    <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpt2.common.errors import PluginError, brief
from gpt2.evaluation.statistics import mean_interval
from gpt2.report.table import Table, interval, select
from gpt2.report.tables_guide import beside_guide
from gpt2.report.tables_scaling import scaling
from gpt2.report.tables_speed import appending, attention_step, cache_bytes, calibrating, largest_batch, profile

REGION = re.compile(r"(<!-- results: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def validation(record: dict, groups: list[str]) -> Table:
    """Rows of the perplexity ablation, of some groups or of all."""
    rows = select(record["rows"], "group", groups)
    lines = [[row["label"], *_loss(row), f"{row['compression_ratio_2048']:.2f}x"] for row in rows]
    return Table(
        ["cache", "Δ perplexity", "95 % interval", "KL, nats", "top-1", "whole-KV ratio"],
        lines,
        f"{rows[0]['tokens']:,} tokens of {record['text']}, uncompressed perplexity {rows[0]['baseline_ppl']:.3f}.",
    )


def _loss(row: dict, kl_digits: int = 4) -> list[str]:
    """Cells of a measured loss: change of perplexity, its interval, KL and top-1 agreement."""
    change, agreement = f"{row['ppl_delta']:+.2%}", f"{row['top1_agreement']:.1%}"
    return [change, interval(row["ppl_delta_interval"]), f"{row['kl_nats']:.{kl_digits}f}", agreement]


def architectures(record: dict, _: list[str]) -> Table:
    """Decoder families by what happens to them, a line per mode or per reason for refusing."""
    works = {"direct-capable": "works; its attention can be replaced", "reconstruct-only": "works; its attention can't"}
    order = [*works, "refused", "not tried", "failed"]
    groups: dict[str, list[str]] = {}
    for row in sorted(record["rows"], key=lambda row: order.index(row["mode"])):
        reason = row["reason"] or ""
        if row["mode"] != "failed":  # a bug is told in full; elsewhere the kind of reason will do
            reason = re.sub(r": .*| \(.*", "", reason)
        groups.setdefault(works.get(row["mode"]) or f"{row['mode']}: {reason}", []).append(row["model_type"])
    lines = [[label, str(len(names)), ", ".join(names)] for label, names in groups.items()]
    tried = f"{len(record['rows'])} families of transformers {record['versions']['transformers']}"
    note = f"{tried}, each tried as a small random model of its default config."
    return Table(["what happens", "families", "which"], lines, note)


def needle(record: dict, _: list[str]) -> Table:
    """Exact match and log-probability by context length, over depths, and where the baseline itself fails."""
    lines = []
    cells = {(c["cache"], c["context_tokens"], c["depth"]): c for c in record["cells"]}
    groups = dict.fromkeys((c["cache"], c["context_tokens"]) for c in record["cells"] if "verdict" in c)
    for cache, length in groups:
        own = [c for (name, tokens, _), c in cells.items() if (name, tokens) == (cache, length)]
        base = [cells["baseline", length, c["depth"]] for c in own]
        works = [c for c in own if c["baseline_works"]]
        exact, reference = (sum(c["exact_match"] for c in some) / len(some) for some in (own, base))
        changes = _logprob_changes(record, cache, length)
        low, high = mean_interval(changes)
        matched = sum(c["verdict"] == "matches" for c in works)
        verdict = f"{matched} of {len(works)} depths" if works else "the baseline fails"
        lines.append([cache, f"{length:,}", f"{exact:.0%}", f"{reference:.0%}", f"{changes.mean():+.3f}"])
        lines[-1] += [f"{low:+.3f} … {high:+.3f}", verdict]
    prompts = sum(c["trials"] for c in record["cells"] if c["cache"] == "baseline")
    return Table(
        ["cache", "context", "exact match", "baseline's", "change of log p, nats", "95 % interval"]
        + ["matches where the baseline works"],
        lines,
        f"{record['model']}, {prompts} prompts per cache in {record['text']}; a baseline works from "
        f"{record['baseline_works_from']:.0%} exact match on.",
    )


def _logprob_changes(record: dict, cache: str, length: int) -> np.ndarray:
    """Of every prompt of a context length, what a cache changes in the answer's log-probability, nats."""
    found = {}
    for row in record["rows"]:
        if row["context_tokens"] == length:
            found[row["cache"], row["depth"], row["trial"]] = row["answer_logprob_nats"]
    return np.array([p - found["baseline", *prompt] for (name, *prompt), p in found.items() if name == cache])


def stability(record: dict, _: list[str]) -> Table:
    """Mean, deviation and range of Δ perplexity, by factor, and what the other metrics did over all runs."""
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
    """The layers that lose most and least when they alone are compressed, a row per setting."""
    settings = sorted({(row["side"], row["rank"], row["bits"]) for row in record["rows"]})
    lines = []
    for side, rank, bits in settings:
        own = sorted(
            (row for row in record["rows"] if (row["side"], row["rank"], row["bits"]) == (side, rank, bits)),
            key=lambda row: -row["kl_nats"],
        )
        most, least = (
            ", ".join(f"{row['layer']} ({row['kl_nats']:.2g})" for row in some) for some in (own[:3], own[-3:])
        )
        total = sum(row["kl_nats"] for row in own)
        lines.append([f"{side.upper()} rank {rank}, {bits} bits", f"{total:.2g}", most, least])
    note = f"KL in nats on {record['rows'][0]['tokens']:,} tokens of {record['text']}, by layer."
    return Table(["alone in", "sum over layers", "most sensitive", "least sensitive"], lines, note)


def peers(record: dict, families: list[str]) -> Table:
    """Our caches beside other people's, of some families or of all; the uncompressed one always."""
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
        lines.append([label, size, ratio, *_loss(row), found])
    words = f"{record['model']}, {baseline['tokens']:,} tokens of {record['text']}, uncompressed perplexity "
    words += f"{baseline['ppl']:.3f}."
    if record["needle"]:
        context = " and ".join(f"{n:,}" for n in record["args"]["needle_context_lengths"])
        words += f" Needle: exact match over {record['needle']['summary'][0]['prompts']} prompts of {context} tokens."
        words += "".join(
            f" Not asked: {row['label']} ({row['needle_not_run']})."
            for row in chosen
            if "needle_not_run" in row
        )
    columns = ["cache", "bytes per token", "ratio", "Δ perplexity", "95 % interval", "KL, nats", "top-1", "needle"]
    return Table(columns, lines, words)


def ratio_presets(record: dict, _: list[str]) -> Table:
    """Presets by ratio, one row each."""
    lines = [
        [row["label"], f"{row['compression_ratio_2048']:.2f}x", f"{row['bits']:.2f}", *_loss(row, kl_digits=5)]
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


def tuned(record: dict, _: list[str]) -> Table:
    """Every candidate that a codec search has measured, most compressed first; the chosen one in bold."""
    budget, lines = record["args"]["target_ppl_delta"], []
    chosen = {key: record[key] for key in ("codec", "bits", "quantizer", "sink_tokens")}
    for trial in sorted(record["trials"], key=lambda trial: -trial["compression_ratio"]):
        label = f"**{trial['label']}**" if chosen.items() <= trial.items() else trial["label"]
        change, spread = f"{trial['ppl_delta']:+.2%}", interval(trial["ppl_delta_interval"])
        lines.append([label, f"{trial['compression_ratio']:.2f}x", change, spread])
    return Table(
        ["cache", "whole-KV ratio", "Δ perplexity, tuning text", "95 % interval"],
        lines,
        f"{record['model']}, budget {budget:+.1%}. On {record['figures']['tokens']:,} evaluation tokens of "
        f"{record['text']} the chosen one costs {record['ppl_delta']:+.2%} "
        f"({interval(record['figures']['ppl_delta_interval'])}).",
    )


def exploration(record: dict, questions: list[str]) -> Table:
    """The joint codec with one thing changed at a time, of some questions or of all; the product's rows in bold."""
    rows, lines = select(record["rows"], "question", questions), []
    budgets = sorted({row["bits"] for row in rows}, reverse=True)
    for question, label in dict.fromkeys((row["question"], row["label"]) for row in rows):
        own = {row["bits"]: row for row in rows if (row["question"], row["label"]) == (question, label)}
        last = own[budgets[-1]]
        name = f"**{label}**" if last["product"] else label
        change, spread, _, agreement = _loss(last)
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


def _against_product(row: dict) -> str:
    if row["product"]:
        return ""
    low, high = row["kl_change_interval"]
    return f" ({'≈ ' if low <= 0 <= high else ''}{row['kl_change']:+.0%})"


def _kl(row: dict) -> str:
    """A row's KL, against the product, with its bits where they aren't those that its column says."""
    off = f" with {row['bits_counted']:.2f} bits" if abs(row["bits_counted"] / row["bits"] - 1) > 0.01 else ""
    return f"{row['kl_nats']:.5f}{_against_product(row)}{off}"


TABLES: dict[str, Callable[[dict, list[str]], Table]] = {
    "attention_step": attention_step,
    "validate_ppl": validation,
    "auto_tune": tuned,
    "beside_guide": beside_guide,
    "benchmark_append": appending,
    "cache_bytes": cache_bytes,
    "benchmark_calibration": calibrating,
    "architectures": architectures,
    "explore_codecs": exploration,
    "ratio_presets": ratio_presets,
    "largest_batch": largest_batch,
    "layer_ablation": layer_ablation,
    "needle": needle,
    "peers": peers,
    "profile": profile,
    "scaling": scaling,
    "stability": stability,
}


def read(path: Path) -> dict:
    """A results record. Raises PluginError where the file is missing, or holds none."""
    if not path.is_file():
        raise PluginError(f"a table asks for {path.name}, which is not among the committed results: run it first")
    with shown_of(path.stem):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


@contextmanager
def shown_of(name: str) -> Iterator[None]:
    """Raise PluginError for whatever a block meets in a results file that isn't what it should be.

    Such a file may be a stranger's, or cut: it may lack anything, or have something else there.
    """
    try:
        yield
    except PluginError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {brief(str(error))}"
        raise PluginError(f"{name}.json doesn't hold what is shown of it ({why}): make it again") from error


def kind_of(name: str) -> str | None:
    """Which of TABLES goes with results of this name, None where none does."""
    return next((prefix for prefix in TABLES if name.startswith(prefix)), None)


def table(name: str, record: dict, words: str | None = None, kind: str | None = None) -> Table:
    """The table of a results file. words: some of its rows, by comma; kind: which of TABLES, by its name if None.

    Raises PluginError where there is no such table, or a kind of rows is missing.
    """
    make = TABLES.get(kind or kind_of(name))
    if make is None:
        raise PluginError(f"no table is made of {name}: give `as`, one of {', '.join(TABLES)}")
    with shown_of(name):
        made = make(record, words.split(",") if words else [])
        made.markdown()  # joins its cells, which have to be strings
        return made


def pages(root: Path) -> list[Path]:
    """Files with regions: README, and the pages of docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def fill(text: str, runs: Path) -> str:
    """Text with every region made anew from the results in `runs`. Raises PluginError where a file is missing."""

    def region(match: re.Match) -> str:
        start, name, words, end = match.groups()
        return f"{start}{table(name, read(runs / f'{name}.json'), words).markdown()}\n{end}"

    return REGION.sub(region, text)
