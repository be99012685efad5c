"""README, docs and pages show what the committed results say, and a figure that they don't hold is noticed."""

import pytest
from checkouts import make_checkout

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.runs.check import check, not_found

PROSE = """About {figure} of it.
<!-- results: ratio_presets_x -->
| kv-4x | 3.97x | +0.14% | 0.00158 |
<!-- end -->
"""


def test_this_repository():
    check(files.ROOT)


@pytest.mark.parametrize(
    "figure", ["3.97x", "4.0x", "+0.14 %", "+0.1 %", "0.1 %", "12 tokens", "4x", "5 %", "`9.99x`", "kv-5.3x"]
)
def test_a_figure_that_a_table_shows_is_found(figure):
    assert not_found(PROSE.format(figure=figure), []) == []
    assert not_found("It is 1.47x.", ["| a | 1.47x (1.44 … 1.51) |"]) == [], "of a page"


@pytest.mark.parametrize("figure", ["3.98x", "4.1x", "+0.15 %", "-0.14 %", "−0.14 %", "3.97 %", "+1 %", "9.5 nats"])
def test_a_figure_that_no_table_shows_is_named_with_its_line(figure):
    assert not_found(f"\n\n{PROSE.format(figure=figure)}", []) == [
        f"line 3: {figure} is in no table of committed results"
    ]


def test_everything_that_differs_is_named_at_once(tmp_path):
    checkout = make_checkout(tmp_path)
    (checkout / "results" / "tables").mkdir(parents=True)
    (checkout / "results" / "tables" / "gone.md").write_text("# Gone\n")
    (checkout / "docs").mkdir()
    (checkout / "docs" / "a.md").write_text("It is 9.99x.\n")
    (checkout / "README.md").write_text("<!-- results: none -->\n<!-- end -->\n")
    with pytest.raises(PluginError) as caught:
        check(checkout)
    assert str(caught.value).splitlines() == [
        "figures that differ from the committed results:",
        "results/tables/gone.md has no table in configs/tables: remove it",
        "README.md: a table asks for none.json, which is not among the committed results: run it first",
        "docs/a.md, line 1: 9.99x is in no table of committed results",
    ]
