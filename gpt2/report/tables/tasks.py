"""Tables of tasks: by task and context length, and by pairs of prompts."""

from __future__ import annotations

from pathlib import Path

from gpt2.evaluation.asking import FAILS
from gpt2.report.table import Table, select
from gpt2.report.tables.needle import pairs


def tasks(record: dict, names: list[str]) -> Table:
    """Exact match and change of log-probability by task, context length and cache, of some tasks or of all."""
    cells = select(record["cells"], "task", names)
    reference = {(c["task"], c["context_tokens"]): c for c in cells if c["cache"] == "baseline"}
    lines = []
    for (task, length), base in reference.items():
        for cell in cells:
            if (cell["task"], cell["context_tokens"]) != (task, length) or cell is base:
                continue
            works = cell["verdict"] != FAILS
            lines.append([
                task.replace("_", " "), f"{length:,}", cell["cache"], f"{cell['exact_match']:.0%}",
                f"{base['exact_match']:.0%}", f"{cell['chance']:.2g}", f"{cell['recall']:.0%}",
                f"{cell['logprob_change_nats']:+.3f}", cell["verdict"] if works else "the baseline fails",
            ])  # fmt: skip
    trials = next(iter(reference.values()))["trials"]
    return Table(
        ["task", "context", "cache", "exact match", "baseline's", "chance", "answers found", "change of log p, nats"]
        + ["verdict"],
        lines,
        f"{record['model']}, prompts per row: {trials}. Chance is that of a guess among the candidates in the prompt; "
        "where the baseline isn't at least halfway from chance to always right, it fails.",
    )


def tasks_pairs(record: dict, _: list[str]) -> Table:
    """Each cache over all prompts of all tasks, paired with the baseline's answers to the same prompts."""
    return pairs(record["summary"])


def tasks_of_models(records: list[dict], names: list[str]) -> Table:
    """Exact match and change of log-probability by task, models side by side: caches of `names`, or all.

    The last row is over the prompts of all tasks; a task that a model wasn't asked has a dash.
    """
    asked = dict.fromkeys(row["task"] for record in records for row in record["by_task"])
    lines = [[task.replace("_", " ")] for task in asked] + [["all"]]
    columns, notes = ["task"], []
    for record in records:
        model = Path(record["model"]).name
        caches = names or [row["cache"] for row in record["summary"]]
        columns += [f"{model}: uncompressed", *caches]
        own = {(row["task"], row["cache"]): row for row in record["by_task"]}
        own |= {("all", row["cache"]): row for row in record["summary"]}
        for task, line in zip([*asked, "all"], lines, strict=True):
            rows = [own.get((task, cache)) for cache in caches]
            line += [f"{rows[0]['baseline_exact_match']:.0%}" if rows[0] else "–"]
            line += [f"{row['exact_match']:.0%} ({row['logprob_change_nats']:+.2f})" if row else "–" for row in rows]
        lengths = " and ".join(f"{length:,}" for length in record["args"]["context_lengths"])
        notes.append(f"{model}: {record['summary'][0]['prompts']} prompts of {lengths} tokens.")
    about = "Exact match, in brackets the change of the answer's log p in nats."
    return Table(columns, lines, " ".join([about, *notes]))
