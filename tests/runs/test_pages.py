"""Pages of results, README and docs: what they show; what was edited, is left over or is in no table is noticed."""

import json
import re
import shutil

import pytest
from checkouts import fake, make_checkout, write_table

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.report.plots.figure import new_figure
from gpt2.runs import pages
from gpt2.runs.check import check, not_found
from gpt2.runs.config import RunOptions, load

RESULT = "ratio_presets_smollm2-135m"


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one table: of the committed presets by ratio, or of another model's."""
    return define(make_checkout(tmp_path))


def define(checkout, **more):
    show = [{"results": "ratio_presets_{model}", "heading": "Presets"}]
    write_table(checkout, "t", runs={"ratio_presets_{model}": fake()}, show=show, **more)
    return checkout


def write(checkout, model: str = "smollm2-135m"):
    options = RunOptions(model, checkout=checkout)
    return pages.write(options, load(options)[0]["t"])


def with_results(checkout) -> None:
    (checkout / "results" / "runs").mkdir(parents=True)
    for name in (RESULT, "ratio_presets_other-1b"):
        shutil.copy(files.RESULTS / "runs" / f"{RESULT}.json", checkout / "results" / "runs" / f"{name}.json")


def test_a_page_that_was_edited_is_noticed(checkout):
    assert "Not measured yet: `python scripts/reproduce_tables.py t --text TEXT`" in write(checkout).read_text()
    with_results(checkout)
    page = write(checkout)
    text = page.read_text()
    assert "# Table t\n\nFor tests.\n\n## Presets\n\n| preset |" in text and f"Source: `{RESULT}.json`" in text
    assert write(checkout, "models/Other-1B").name == "t_other-1b.md"
    assert pages.differing(checkout) == [], "another model's page is its own"
    page.write_text(re.sub(r"\+0\.\d\d%", "+0.99%", text, count=1))
    assert pages.differing(checkout) == [
        "results/tables/t.md differs from its results: run scripts/reproduce_tables.py --pages"
    ]
    page.rename(page.with_name("gone.md"))
    assert pages.differing(checkout) == ["results/tables/gone.md has no table in configs/tables: remove it"]


def test_a_figure_of_several_models_is_drawn_with_the_page(checkout, monkeypatch):
    """From all results that its patterns find, the embedded model's first; again when a model is added."""
    drawn = []

    def frontier(records: list[dict]):
        drawn.append([record["model"] for record in records])
        return new_figure(figsize=(1, 1))[0]

    monkeypatch.setattr(pages.plots, "frontier", frontier)
    define(checkout, figures=[{"name": "models", "plot": "frontier", "results": ["peers_*"]}])
    assert "plots/models.png" not in write(checkout).read_text() and not drawn
    runs = checkout / "results" / "runs"
    runs.mkdir(parents=True)
    for model in ("smollm2-135m", "a-model", "org/b-model"):
        (runs / f"peers_{model.rpartition('/')[2]}.json").write_text(json.dumps({"model": model}))
        assert "![models](../plots/models.png)" in write(checkout).read_text()
    assert drawn[-1] == ["smollm2-135m", "a-model", "org/b-model"] and len(drawn[0]) == 1
    assert (checkout / "results" / "plots" / "models.png").is_file()


def test_regions_are_made_anew_also_where_one_cant_be(checkout):
    with_results(checkout)
    (checkout / "docs").mkdir()
    region = "<!-- results: {} -->\nold\n<!-- end -->\n"
    (checkout / "README.md").write_text(region.format("gone"))
    (checkout / "docs" / "a.md").write_text(f"# A\n\n{region.format(RESULT)}Prose.\n")
    with pytest.raises(PluginError, match=r"^README\.md: a table asks for gone\.json"):
        pages.write_regions(checkout)
    text = (checkout / "docs" / "a.md").read_text()
    assert "| kv-4x |" in text and "old" not in text and text.endswith("<!-- end -->\nProse.\n")


def test_this_repository():
    """Tables of every kind, of several machines and models, as README, docs and results/tables show them."""
    check(files.ROOT)


PROSE = """About {figure} of it.
<!-- results: ratio_presets_x -->
| kv-4x | 3.97x | +0.14% | 0.00158 |
<!-- end -->
"""


SHOWN = ["3.97x", "4.0x", "+0.14 %", "+0.1 %", "0.1 %", "12 tokens", "4x", "5 %", "`9.99x`", "kv-5.3x"]
NOT_SHOWN = ["3.98x", "4.1x", "+0.15 %", "-0.14 %", "−0.14 %", "3.97 %", "+1 %", "9.5 nats"]


def test_a_figure_that_no_table_shows_is_named_with_its_line():
    for figure in SHOWN:
        assert not_found(PROSE.format(figure=figure), []) == []
    for figure in NOT_SHOWN:
        message = f"line 3: {figure} is in no table of committed results"
        assert not_found(f"\n\n{PROSE.format(figure=figure)}", []) == [message]
    assert not_found("It is 1.47x.", ["| a | 1.47x (1.44 … 1.51) |"]) == [], "of a page"


def test_everything_that_differs_is_named_at_once(tmp_path):
    checkout = make_checkout(tmp_path)
    for name, text in {"results/tables/gone.md": "# Gone\n", "docs/a.md": "It is 9.99x.\n",
                       "README.md": "<!-- results: none -->\n<!-- end -->\n"}.items():  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    with pytest.raises(PluginError) as caught:
        check(checkout)
    assert str(caught.value).splitlines() == [
        "figures that differ from the committed results:",
        "results/tables/gone.md has no table in configs/tables: remove it",
        "README.md: a table asks for none.json, which is not among the committed results: run it first",
        "docs/a.md, line 1: 9.99x is in no table of committed results",
    ]
