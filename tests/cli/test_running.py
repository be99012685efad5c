"""What all scripts share: one line for every error, the first process alone speaks, and outputs that can be written."""

import argparse
import io
import sys

import pytest

from gpt2 import cli
from gpt2.cli import flags


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is the second of two, and doesn't wait until the first has printed its error."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(flags, "WAIT_FOR_THE_FIRST_S", 0)


def test_the_second_process_says_nothing(second_of_two, monkeypatch, capsys):
    """Neither that a script runs in one process alone, nor of wrong flags, nor how far it is."""
    assert cli.bar("label", "unit")(range(2)).disable is True
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        for ends, message in (
            (lambda: cli.run(lambda: pytest.fail("it ran")), "runs in one process"),
            (lambda: cli.parser("manual").parse_args(["--wrong"]), "--wrong"),
        ):
            with pytest.raises(SystemExit) as stopped:
                ends()
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and (said == "" if rank == "1" else message in said)


def test_help_says_every_default_that_there_is():
    p = cli.parser("manual")
    for name, default in (("zero", 0), ("small", 0.0), ("word", "x"), ("none", None), ("several", []), ("off", False)):
        p.add_argument(f"--{name}", default=default, help=f"text of {name}")
    lines = {line.split()[0]: line for line in p.format_help().splitlines() if "text of" in line}
    shown = [name for name, line in lines.items() if "(default: " in line]
    assert shown == ["--zero", "--small", "--word"]


def test_an_output_has_an_ending_of_its_kind(tmp_path):
    either = cli.output_file(".pt", ".safetensors")
    for name in ("a.pt", "b.safetensors"):
        assert either(str(tmp_path / name)) == tmp_path / name
    for name in ("a.json", "a", "a.pt.txt"):
        with pytest.raises(argparse.ArgumentTypeError, match="ends in .pt or .safetensors, got"):
            either(str(tmp_path / "new" / name))
    assert not list(tmp_path.iterdir()), "rejected before a folder is made"


@pytest.mark.parametrize(("words", "said"), [((), "nothing half-written was left behind"), (("kept 3",), "kept 3")])
def test_ctrl_c_says_what_is_kept(words, said, capsys):
    def interrupted():
        raise KeyboardInterrupt(*words)

    with pytest.raises(SystemExit) as stopped:
        cli.run(interrupted)
    assert stopped.value.code == 130 and capsys.readouterr().err == f"\ninterrupted: {said}\n"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_what_stdout_cant_encode_is_escaped(encoding, monkeypatch):
    """Δ on a Latin-1 terminal, and a path that isn't UTF-8 on any."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    cli.run(lambda: print("Δ perplexity of caf\udce9.txt"))
    stdout.flush()
    said = stdout.buffer.getvalue().decode(encoding)
    assert ("Δ" in said or "\\u0394" in said) and "caf\\udce9" in said
