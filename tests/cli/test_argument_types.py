"""Types of command-line arguments: what they take, and what they reject."""

import argparse

import pytest
from script_runs import run

from gpt2 import cli

# A type, what it makes of words that it takes, and words that it rejects
TYPES = [
    (cli.seed, {"0": 0, "9223372036854775807": 2**63 - 1}, ["-1", "9223372036854775808", "x"]),
    (cli.positive_float, {"2e14": 2e14}, ["0", "-1", "nan", "inf", "x"]),
    (cli.natural_float, {"0": 0, "0.5": 0.5}, ["-1", "nan", "inf"]),
    (cli.word_list(["a", "b"]), {"b,a,b": ["b", "a"]}, ["a,c", ""]),
    (cli.int_list, {"8,4,8": [8, 4]}, ["12,x"]),
]


@pytest.mark.parametrize(("kind", "taken", "rejected"), TYPES)
def test_what_is_taken_and_what_is_rejected(kind, taken, rejected):
    assert {word: kind(word) for word in taken} == taken
    for word in rejected:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            print(f"{word} was taken as", kind(word))


@pytest.mark.parametrize(("script", "flag", "value"), [
    *((script, "--seed", "-1") for script in ("calibrate_kv_lowrank", "profile_kv_performance",
                                              "benchmarks/largest_batch", "benchmarks/attention")),
    ("benchmarks/parking", "--memory-gb", "nan"), ("benchmarks/scaling", "--flops-per-s", "0"),
    ("cache_tool", "--save-every", "-1"),
])  # fmt: skip
def test_scripts_reject_a_number_out_of_range_in_one_line(script, flag, value, capsys):
    assert run(script, flag, value) == 2
    err = capsys.readouterr().err
    assert flag in err and value in err and err.count("\n") == 1


@pytest.mark.parametrize(("script", "flag"), [("generate_with_preset", "--question"), ("cache_tool", "--prompt")])
def test_a_question_in_another_encoding_is_one_line(script, flag, capsys):
    assert run(script, flag, "caf\udce9") == 2
    assert f"argument {flag}: expected text in UTF-8" in capsys.readouterr().err
