"""The table type: what a terminal, Markdown and sorting make of the same cells."""

import pytest

from gpt2.report.table import Table, number

TABLE = Table(
    ["cache", "ms", "against baseline"],
    [["int4, of a long name", "1.0", "0.95x (0.93 … 1.21)"], ["a|b", "12.5", "–"], ["hqq", "not run: no package"]],
    "A note " * 30,
)


def test_a_terminal_gets_aligned_columns_and_wrapped_notes():
    head, rule, *rows = TABLE.console().splitlines()
    assert rows[0] == "int4, of a long name   1.0  0.95x (0.93 … 1.21)" and rows[1] == "a|b                   12.5  –"
    assert head == "cache                   ms  against baseline" and set(rule) == {"-"} and len(rule) == len(rows[0])
    assert rows[2] == "hqq                   not run: no package", "a short row's last cell takes the rest of the line"
    assert len(rows) == 5 and all(len(line) <= 120 for line in rows), "the note has two lines"


def test_long_words_are_wrapped_in_their_column_and_figures_stay_right():
    wide = Table(["families", "which"], [["97", ", ".join(["family"] * 30)], ["2", "x, y"]]).console().splitlines()
    assert all(line.startswith(" " * 10 + "family") or line.startswith("      97  family") for line in wide[2:-1])
    assert sum(line.count("family") for line in wide[2:]) == 30 and wide[-1] == "       2  x, y"


@pytest.mark.parametrize(("cell", "value"), [
    ("+0.14%", 0.14), ("-1,125.6% … +2%", -1125.6), ("0.95x (0.93 … 1.21)", 0.95), ("4.1e-05", 4.1e-5),
    ("12.0 MiB", 12), ("at least 3", 3), ("5 of 5 depths", 5), ("–", None), ("kv4", None), ("**8 bits**", None),
    ("3 (0.1), 4 (0.2)", None),
])  # fmt: skip
def test_the_figure_that_a_cell_is_sorted_by(cell, value):
    assert number(cell) == value
    column = Table(["x"], [[cell], [cell], ["–"]])
    assert column.numeric() == [value is not None], "of most cells"
