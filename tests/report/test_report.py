"""The report: one page that needs no network, whose figures are those of the results."""

import html.parser
import itertools
import json
import re
import shutil
import subprocess

import pytest
from sampling import sampled
from script_runs import run

from gpt2.common import files
from gpt2.common.errors import PluginError
from gpt2.models import embedded
from gpt2.report import chart as report_chart
from gpt2.report import html as report
from gpt2.report import tables

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, tables' cells by row, and whatever isn't closed in order."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tables, self.wrong = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page() -> str:
    """The page of the committed results, without the bytes of its pictures."""
    page, _ = report.page(files.RESULTS, report.CONFIGS, embedded.EMBEDDED)
    return re.sub('base64,[^"]+', "base64,", page)


@pytest.fixture
def space(tmp_path):
    """A folder of configs and results with one section of three tables, and headlines of two."""
    shown = [{"results": "benchmark_append", "heading": "A & B"}, {"results": "ratio_presets_{model}"}]
    section = {"title": "Adding <b>", "about": "Held `x<y`, **now**, kv-* and *so* on.", "runs": {}, "show": shown,
               "plots": ["gone"]}  # fmt: skip
    codecs = {"int8 <i>": 0.002, "int4": 0.0105, "none": 0.001}
    rows = [{"codec": codec, "tokens_held": n, "append_ms_median": n * scale, "bytes_per_token": 1000 * scale}
            for codec, scale in codecs.items() for n in (100, 2000)]  # fmt: skip
    provenance = {"args": {"tokens": "</pre><script>"}, "git_commit": "c0ffee", "versions": {"torch": "2"}}
    headlines = [{"results": results, "row": row, "figure": "2,000 tokens held", "says": "to add to {100 tokens held}"}
                 for results, row in (("benchmark_append", {"codec": "int4"}), ("benchmark_append", {"codec": "int5"}),
                                      ("ratio_presets_{model}", {}))]  # fmt: skip
    config = {"title": "T", "about": "A", "order": [], "picture": {"results": "none"}, "headlines": headlines}
    files.write_json(tmp_path / "tables/one.json", section)
    files.write_json(tmp_path / "runs/benchmark_append.json", provenance | {"rows": rows, "device": "cpu"})
    files.write_json(tmp_path / "report.json", config)
    (tmp_path / "plots").mkdir()
    return tmp_path


def test_the_page_is_well_formed_accessible_and_asks_nothing_of_a_network(page):
    read = Reader(page)
    assert not read.wrong and not read.open
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in read.elements if tag == "a"]
    assert links and {link.removeprefix("#") for link in links} <= set(ids), "every link leads somewhere"
    assert all(attributes["alt"].strip() for tag, attributes in read.elements if tag == "img")
    headings = [attributes for tag, attributes in read.elements if tag == "th"]
    assert headings and all(attributes.get("scope") in ("col", "row") for attributes in headings)
    assert '<html lang="en">' in page and page.count("<h1") == 1
    for tag, attributes in read.elements:
        assert tag not in ("link", "iframe", "base", "object")
        for name in ("src", "srcset", "data", "action", "poster", "xlink:href", *["href"] * (tag != "a")):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, name)
    assert not re.search(r"url\(|@import|\bimport\b.*from|fetch\(|XMLHttp", page)
    assert "default-src 'none'" in page


def test_every_table_and_headline_is_what_the_results_say(page):
    config = json.loads((report.CONFIGS / "report.json").read_text(encoding="utf-8"))
    sections = report.sections(files.RESULTS, report.CONFIGS, config["order"], embedded.EMBEDDED)
    made = [block["table"] for section in sections for block in section["blocks"] if block["table"]]
    *shown, provenance = Reader(page).tables
    assert len(shown) == len(made) > 10
    for rows, table in zip(shown, made, strict=True):
        assert rows == [[report.inline(cell).striptags() for cell in row] for row in [table.columns, *table.rows]]
    records = {path.stem: tables.read(path) for path in (files.RESULTS / "runs").glob("*.json")}
    for name, commit, *_ in provenance[1:]:
        assert commit == records[name]["git_commit"]
    named = {name for name in records if tables.kind_of(name)}
    assert named <= set(re.findall(r'id="source-([^"]+)"', page)), "nothing that was measured is left out"
    figures = re.findall(r'<li data-results="([^"]+)"><strong>([^<]+)</strong>', page)
    assert len(figures) == len(config["headlines"])
    for name, figure in figures:
        cells = itertools.chain(*tables.table(name, records[name]).rows)
        assert any(cell.split(" (")[0] == figure for cell in cells), figure
    said = re.findall(r"<g><title>(.*): (.*)x, (.*?) \(", page)
    assert set(said) == {
        (row["label"], f"{row['compression_ratio_2048']:.2f}", f"{row['ppl_delta']:+.2%}")
        for row in records[f"peers_{embedded.EMBEDDED}"]["rows"] if "not_run" not in row
    }  # fmt: skip


def test_what_is_missing_is_named_and_what_is_odd_escaped(space):
    page, missing = report.page(space, space, "tiny")
    read = Reader(page)
    assert not read.wrong and [tag for tag, _ in read.elements].count("script") == 1
    assert "Adding &lt;b&gt;" in page and "<code>x&lt;y</code>, <strong>now</strong>, kv-* and <em>so</em> on" in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page and "<h3>A &amp; B</h3>" in page
    assert read.tables[0][1:] == [["int8 <i>", "0.20 ms", "4.00 ms", "2"], ["int4", "1.05 ms", "21.00 ms", "10"],
                                  ["none", "0.10 ms", "2.00 ms", "1"]]  # fmt: skip
    assert "<strong>21.00 ms</strong> to add to 1.05 ms" in page
    assert "no row of codec int5" in missing[0] and "ratio_presets_tiny.json" in missing[1] and len(missing) == 3
    made = r"python scripts/reproduce_tables\.py one --model MODEL"
    assert re.fullmatch(f"not measured yet: `{made}` makes `ratio_presets_tiny`", missing[2])
    assert re.search(f'class="absent">not measured yet: <code>{made}</code> makes <code>ratio_presets_tiny<', page)
    for content, message in (('{"title": "x", "about": ""}', "has no plots, show"), ("{", "is not JSON")):
        (space / "tables/one.json").write_text(content)
        with pytest.raises(PluginError, match=rf"one\.json {message}"):
            report.page(space, space, "tiny")
    with pytest.raises(PluginError, match=r"can't read .*report\.json"):
        report.page(space, space / "tables", "tiny")


def test_the_script_writes_the_page_and_says_what_it_lacks(tmp_path, capsys):
    flags = ["--html", "--results", tmp_path, "--model", "none"]
    assert run("reproduce_tables", *flags) == 2
    assert "has no folder runs" in capsys.readouterr().err and not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    assert run("reproduce_tables", *flags) == 0
    assert "ratio_presets_none" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_the_picture_keeps_order_and_stays_inside():
    points = {1.9: -0.0001, 2.0: 0.0, 4.0: 0.01, 8.0: 10.0}
    rows = [{"family": "ours", "label": f"{ratio}", "compression_ratio_2048": ratio, "ppl_delta": change,
             "ppl_delta_interval": [change - 0.001, change + 0.001]} for ratio, change in points.items()]  # fmt: skip
    chart = report_chart.compression_against_loss([*rows, {"family": "hqq", "label": "h", "not_run": "no"}])
    xs, ys = ([point[axis] for point in chart.points] for axis in "xy")
    assert xs == sorted(xs) and ys == sorted(ys, reverse=True) and len(xs) == 4
    assert all(chart.left <= x <= chart.right for x in xs)
    assert all(chart.top <= point["high"] <= point["y"] <= point["low"] <= chart.bottom for point in chart.points)
    ticks = {text: at for at, text in chart.y_ticks}
    assert ticks["0%"] == ys[1] and ticks["1%"] == ys[2] and ticks["1000%"] == ys[3]
    assert [point["leftwards"] for point in chart.points] == [True, False, False, True]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_column_really_sorts_in_a_browser(space, tmp_path):
    same = {"ppl": 9, "ppl_delta_interval": [0, 0], "tokens": 1, "kl_nats": 0, "top1_agreement": 1}
    same |= {"family": "ours", "bytes_per_token": 1, "compression_ratio_2048": 1}
    rows = [{"label": "worse", "ppl_delta": 0.011} | same, {"label": "broken", "family": "ours", "not_run": "no"},
            {"label": "best", "ppl_delta": -0.2} | same, {"label": "better", "ppl_delta": -0.03} | same,
            {"label": "", "ppl_delta": 0.0} | same | {"family": "baseline"}]  # fmt: skip
    record = tables.read(space / "runs/benchmark_append.json")
    files.write_json(space / "runs/peers_m.json", record | {"rows": rows, "model": "m", "text": "t", "needle": None})
    page, _ = report.page(space, space, "tiny")
    clicks = """<script>
    const found = [], shown = document.querySelectorAll("table")[1], heads = shown.querySelectorAll("thead button");
    for (const column of [3, 3, 0]) {
      heads[column].click();
      const order = [...shown.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
      found.push([...shown.querySelectorAll("[aria-sort]")].map((head) => head.ariaSort) + ": " + order.join(" "));
    }
    document.body.dataset.found = found.join("; ");
    </script></body>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", clicks), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += f"--disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --dump-dom"
    command = [CHROMIUM, *flags.split(), f"file://{tmp_path}/page.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert re.search(r'data-found="([^"]*)"', dom)[1].split("; ") == [
        "ascending: best better 16-bit cache worse broken",  # by the figure; what has none comes last
        "descending: worse 16-bit cache better best broken",
        "ascending: 16-bit cache best better broken worse",
    ]


NO_RECORDS = ("", "[]", '"x"', "{}", "[" * 10**5, '{"rows": []}', '{"rows": [{}], "args": []}')
BROKEN = {"rows": [[], {}, [[]], [{}], "x", 5], "versions": [[3], "x", None], "device": [None], "created_utc": [5],
          "git_commit": [None], "args": [float("inf")]}  # fmt: skip


def test_results_and_pictures_that_are_none_are_named_or_left_out(space):
    """A folder from outside: nothing in it stops the page."""
    path = space / "runs/benchmark_append.json"
    good = json.loads(path.read_text())
    lacking = [{name: value for name, value in good.items() if name != key} for key in good]
    others = [good | {key: value} for key, values in BROKEN.items() for value in values]
    for content in [*NO_RECORDS, *sampled(map(json.dumps, lacking + others), 6)]:
        path.write_text(content)
        html, missing = report.page(space, space, "smollm2-135m")
        assert not Reader(html).wrong
        assert all("\n" not in line and len(line) < 1000 for line in missing), content
    path.write_bytes(b"\xff\xfe")
    _, missing = report.page(space, space, "smollm2-135m")
    assert any("benchmark_append.json doesn't hold what is shown of it (UnicodeDecodeError" in line for line in missing)
    pictures = {"a": b"", "b": b"x", "c": b"\x89PNG", "d": b"<svg onload=alert(1)>" * 9}
    for name, content in pictures.items():
        (space / f"plots/{name}.png").write_bytes(content)
    section = json.loads((space / "tables/one.json").read_text())
    files.write_json(space / "tables/one.json", section | {"plots": [*pictures]})
    assert "data:image/png" not in report.page(space, space, "smollm2-135m")[0]
