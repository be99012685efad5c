"""Types of command-line arguments: what they take, and what they reject."""

import argparse

import pytest
from script_runs import run

from gpt2 import cli

TAKEN = [
    (cli.seed, "0", 0),
    (cli.seed, "9223372036854775807", 2**63 - 1),
    (cli.positive_float, "2e14", 2e14),
    (cli.natural_float, "0", 0),
    (cli.natural_float, "0.5", 0.5),
    (cli.word_list(["a", "b"]), "b,a,b", ["b", "a"]),
    (cli.int_list, "8,4,8", [8, 4]),
]
REJECTED = [
    (cli.seed, ["-1", "9223372036854775808", "x"]),
    (cli.positive_float, ["0", "-1", "nan", "inf", "x"]),
    (cli.natural_float, ["-1", "nan", "inf"]),
    (cli.word_list(["a", "b"]), ["a,c", ""]),
]


@pytest.mark.parametrize(("kind", "word", "value"), TAKEN)
def test_what_is_taken(kind, word, value):
    assert kind(word) == value


@pytest.mark.parametrize(("kind", "word"), [(kind, word) for kind, words in REJECTED for word in words])
def test_what_is_rejected(kind, word):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        kind(word)


FLAGS = {
    "--seed -1": ["calibrate_kv_lowrank", "profile_kv_performance", "benchmarks/largest_batch", "benchmarks/attention"],
    "--memory-gb nan": ["benchmarks/parking"],
    "--flops-per-s 0": ["benchmarks/scaling"],
    "--save-every -1": ["cache_tool"],
}


@pytest.mark.parametrize(("flag", "script"), [(flag, script) for flag, scripts in FLAGS.items() for script in scripts])
def test_scripts_reject_a_number_out_of_range_in_one_line(flag, script, capsys):
    assert run(script, *flag.split()) == 2
    err = capsys.readouterr().err
    assert flag.split()[0] in err and flag.split()[1] in err and err.count("\n") == 1
