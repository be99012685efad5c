"""The table of HumanEval: pass@1 by cache, paired with the uncompressed cache."""

from __future__ import annotations

from gpt2.report.table import Table

MOST_NAMED = 8  # problems in a cell; the results file has all


def code(record: dict, _: list[str]) -> Table:
    """pass@1, problems that only one of the two caches solves, and McNemar's exact test of these."""
    lines = []
    for row in record["summary"]:
        size = f"{record['compression_ratios'][row['cache']]:.2f}x"
        line = [row["cache"], size, f"{row['pass_at_1']:.1%}", f"{row['passed']} of {row['problems']}"]
        if row["cache"] == "baseline":
            line += ["–", "–", "–", "–"]
        else:
            line += [_named(row["only_baseline"]), _named(row["only_compressed"]), f"{row['mcnemar_p']:.2g}"]
            line += [f"{row['same_answers'] / row['problems']:.0%}"]
        lines.append([*line, str(row["unfinished"])])
    return Table(
        ["cache", "ratio", "pass@1", "solved", "only the baseline solves", "only this cache solves", "McNemar's p"]
        + ["same answers", "cut off"],
        lines,
        f"{record['model']}, {record['problems']['count']} problems of {record['problems']['file']}, greedy, "
        f"{record['prompt_style']} prompts, at most {record['args']['max_new_tokens']} tokens an answer. The ratio is "
        f"at {record['sequence_tokens']} tokens, the mean of prompt and answer. Problems by number.",
    )


def _named(task_ids: list[str]) -> str:
    """How many problems, and the numbers of the first of them."""
    if not task_ids:
        return "0"
    shown = ", ".join(task_id.rpartition("/")[2] for task_id in task_ids[:MOST_NAMED])
    return f"{len(task_ids)}: {shown}{', …' if len(task_ids) > MOST_NAMED else ''}"
