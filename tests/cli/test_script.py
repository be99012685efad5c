"""What flags name: the caches that a script compares."""

import argparse
import json

import pytest
from matplotlib.figure import Figure
from tiny import word_text

from gpt2 import cli
from gpt2.common import provenance
from gpt2.common.errors import PluginError
from gpt2.text.sources import by_position


def test_caches_are_compared_beside_the_uncompressed_one_and_those_of_other_packages(llama):
    p = cli.parser("Compare.")
    cli.add_cache_flags(p, several=True)
    cli.add_peers_flag(p)
    args = p.parse_args(["--preset", "kv4", "kv8", "--peers", "turboquant,kivi"])
    chosen, caches = cli.compared_caches(args, llama)
    assert [choice.label for choice in chosen] == ["kv4", "kv8"]
    assert list(caches)[:4] == ["baseline", "kv4", "kv8", "TurboQuant 4 bits"]
    assert {name.split()[0] for name in list(caches)[3:]} == {"TurboQuant", "KIVI"}
    assert all(make() is not make() for make in caches.values()), "a fresh cache for every prompt"
    assert not p.parse_args([]).peers
    with pytest.raises(PluginError, match="nothing to measure"):
        cli.compared_caches(p.parse_args([]), llama)
    without = argparse.Namespace(preset="kv4", policy=None)  # of a script that has no --peers
    assert list(cli.compared_caches(without, llama)[1]) == ["baseline", "kv4"]


def test_a_note_says_why_fewer_tokens_are_measured(llama, capsys):
    p = cli.parser("Measure.")
    p.add_argument("--eval-tokens", type=int)
    p.add_argument("--eval-seq-len", type=int)
    text = by_position("words", "words.txt", word_text(3000))  # 600 tokens of evaluation
    for tokens, length, note in (
        (500, 100, ""), (550, 100, "note: --eval-tokens 550 is measured as 500: 5 whole segments of 100 tokens"),
        (900, 100, "note: the evaluation part of words gives 600 tokens, not 900"),
    ):  # fmt: skip
        args = p.parse_args(["--eval-tokens", str(tokens), "--eval-seq-len", str(length)])
        cli.evaluation_segments(args, llama, text, "evaluation")
        assert capsys.readouterr().out.strip() == note


def test_text_to_measure_on_has_nothing_of_the_calibration(tmp_path):
    p = cli.parser("Measure.")
    cli.add_model_flags(p)
    cli.add_text_flags(p)
    cli.add_eval_text_flag(p)
    folder = tmp_path / "wiki"
    folder.mkdir()
    for name in ("valid", "test", "other"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name}{i}" for i in range(3000)))
    text = ["--model", "no such model", "--text", str(folder / "test.txt"), "--eval-text"]
    with pytest.raises(PluginError, match="calibration part of .*test.txt' has text of the evaluation part of .*wiki'"):
        cli.open_script(p.parse_args([*text, str(folder)]))
    with pytest.raises(PluginError, match="no such model"):  # the texts are read before the model
        cli.open_script(p.parse_args([*text, str(folder / "other.txt")]))


def test_the_time_that_a_script_took_is_that_until_it_writes(tmp_path, monkeypatch):
    paths = tmp_path / "run.json", tmp_path / "run.png"
    record, resumed = provenance.provenance(), provenance.provenance(wall_s=provenance.taken(resumed=True))
    monkeypatch.setattr(provenance, "STARTED", provenance.STARTED - 600)  # ten minutes later
    for made, known in ((record, True), (resumed, False)):
        cli.write(paths, made, Figure)
        wall_s = json.loads(paths[0].read_text())["wall_s"]
        assert wall_s >= 600 if known else wall_s is None
