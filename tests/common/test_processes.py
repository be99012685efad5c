"""Several processes that share a calibration: the file of one, whatever the number; and none left hanging."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from script_runs import CALIBRATE, ONE_THREAD, listing, run
from tiny import tiny_loaded, tiny_model, word_text, word_tokenizer
from torch import Tensor

from gpt2 import cli
from gpt2.common import files, processes
from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.models import loading
from gpt2.text.sources import by_position
from gpt2.tuning import ratio_presets

TEXT = by_position("words", "words.txt", word_text(3000))
# The sample is full before the last window, and the windows are an odd number
FLAGS = ["--model", "tiny", "--text", "words.txt", "--samples", 7, "--seq-len", 460, "--metric", "fisher"]


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("tiny")
    word_tokenizer().save_pretrained("tiny")
    (tmp_path / "words.txt").write_text(word_text(6000))
    return tmp_path


def launch(*command) -> subprocess.CompletedProcess:
    """Run a script in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launcher, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env=ONE_THREAD, timeout=300)


def tensors(record, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a file, by where it is."""
    if isinstance(record, Tensor):
        return {name: record.double()}
    inner = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return {key: tensor for part, own in inner for key, tensor in tensors(own, f"{name}.{part}").items()}


def test_two_processes_make_the_file_of_one(space):
    assert run(CALIBRATE, *FLAGS, "--output", "one.pt") == 0
    done = launch(files.ROOT / "scripts" / f"{CALIBRATE}.py", *FLAGS, "--output", "two.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.pt") == done.stdout.count("energy kept") == 1, "the first one alone"
    one, two = (torch.load(f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one["meta"] == two["meta"]
    ours, theirs = tensors(two), tensors(one)
    assert ours.keys() == theirs.keys()
    assert {".joint.E", ".grouped.errors", ".statistics.metrics.k.attention"} <= ours.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name


FAILING = """
import os, runpy, sys
from gpt2.compression.codecs.moments import Moments
from gpt2.common.errors import PluginError

def update(self, layer, x, update=Moments.update):
    if os.environ["RANK"] == "1" and layer == 2:
        raise PluginError("layer 2 is of no use")
    update(self, layer, x)

Moments.update = update
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_one_that_fails_takes_the_others_down_and_says_why(space):
    """In the middle of its windows, while the first waits for its sums."""
    (space / "failing.py").write_text(FAILING)
    before = listing(space)
    done = launch("failing.py", files.ROOT / "scripts" / "make_presets.py", *FLAGS[:-2], "--output", "out")
    assert done.returncode != 0
    assert done.stderr.count("error: layer 2 is of no use") == 1 and "another process stopped" not in done.stderr
    assert listing(space) == before and "wrote" not in done.stdout


@dataclass(frozen=True)
class Second(Processes):
    """The second of two, where the first one says what was agreed."""

    rank: int = 1
    size: int = 2
    said: object = None

    def agreed(self, value):
        assert value is None, "only the first one does the work"
        return self.said


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_every_item_is_somebodys_and_shares_are_even(count, size):
    shares = [Processes(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_sent():
    x = torch.randn(3)
    assert ALONE.total(x) is x and ALONE.agreed(x) is x and ALONE.first and ALONE.first_to_fail()


def test_more_processes_than_sequences_are_refused():
    with pytest.raises(PluginError, match="2 processes are too many for 1 sequences: start fewer, or .*--samples"):
        calibrate(tiny_loaded(), TEXT, rank=9, samples=1, seq_len=80, processes=Second(said=torch.zeros(1, 80)))


def test_a_calibration_made_before_is_the_first_ones(tmp_path):
    made_from = {"codec": "joint", "samples": 2, "seq_len": 80, "seed": 0, "sink_tokens": 4}
    path = tmp_path / "c.pt"
    made = ratio_presets.compact_calibration(tiny_loaded(), TEXT, path, **made_from)
    path.write_bytes(b"")  # what another machine has there is not read
    assert (
        ratio_presets.compact_calibration(tiny_loaded(), TEXT, path, **made_from, processes=Second(said=made)) is made
    )


def test_a_process_that_is_alone_at_the_meeting_says_so(monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("connection to 10.0.0.1 refused\nand a page of details")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes.dist, "rendezvous", refused)
    with (
        pytest.raises(PluginError, match="process 1 of 2 can't meet the others: connection to 10.0.0.1 refused$"),
        processes.together(),
    ):
        pass


@pytest.mark.parametrize(("rank", "code", "said"), [("0", 2, "runs in one process"), ("1", 2, "")])
def test_other_scripts_run_in_one_process(monkeypatch, capsys, rank, code, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: pytest.fail("it ran"))
    printed = capsys.readouterr().err
    assert stopped.value.code == code and said in printed and bool(printed) == bool(said)


def test_only_the_first_shows_progress_and_wrong_flags(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.bar("label", "unit")(range(2)).disable is True
    with pytest.raises(SystemExit):
        cli.parser("manual").parse_args(["--wrong"])
    assert not capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        cli.parser("manual").parse_args(["--wrong"])
    assert "--wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "local", "expected"),
    [("auto", "1", "cuda:1"), ("cuda", "0", "cuda:0"), ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu")],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, device, local, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.resolve_device(device) == torch.device(expected)


def test_gpus_that_are_too_few_or_wanted_whole_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        PluginError, match=r"'cuda:1' is not there \(1 CUDA devices found\): start 1 processes, or use cpu"
    ):
        loading.resolve_device("auto")
    with pytest.raises(PluginError, match="--device all spreads one model over every GPU.*--device auto"):
        loading.resolve_device("all")
