"""Several processes that share a calibration: the file of one, whatever the number; and none left hanging."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from calibrations import TEXT
from forked import Child, start
from pictures import draw_nothing
from sampling import ALL
from script_runs import CALIBRATE, ONE_THREAD, listing, run
from tiny import tiny_loaded, word_text
from torch import Tensor

from gpt2.common import files, processes
from gpt2.common.errors import PluginError
from gpt2.common.processes import ALONE, Processes
from gpt2.compression.calibration import fisher
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.codecs.moments import Moments
from gpt2.models import loading
from gpt2.tuning import ratio_presets


def tensors(record, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a file, by where it is."""
    if isinstance(record, Tensor):
        return {name: record.double()}
    inner = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return {key: tensor for part, own in inner for key, tensor in tensors(own, f"{name}.{part}").items()}


@pytest.fixture
def flags(tiny_flags, tmp_path, monkeypatch):
    """The sample is full before the last window, and the windows are an odd number.

    torchrun's processes, which only `make test-all` starts, are no forks: they have a sample as large as ever.
    """
    draw_nothing(monkeypatch)
    if ALL:
        (tmp_path / "words.txt").write_text(word_text(6000))
        return [*tiny_flags, "--samples", "7", "--seq-len", "460"]
    monkeypatch.setattr(fisher, "SAMPLED_BLOCKS", 5)
    return [*tiny_flags, "--samples", "3", "--seq-len", "140"]


def launch(script: str, *flags, before=lambda: None) -> tuple[list[int], str, str]:
    """A script in two processes that find their places in the environment: exit codes, what both print, errors."""
    with socket.create_server(("localhost", 0)) as free:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}

    def run_as(rank: str) -> Child:
        own = shared | {"RANK": rank, "LOCAL_RANK": rank}
        said = Path.cwd().parent / f"{script} {rank}"
        return start(script, flags, Path.cwd(), said, lambda: os.environ.update(own), before)

    both = [run_as(rank) for rank in "01"]
    codes = [child.wait() for child in both]
    codes = [child.send(signal.SIGKILL) if code is None else code for child, code in zip(both, codes, strict=True)]
    return codes, "".join(child.out for child in both), "".join(child.err for child in both)


def test_two_processes_make_the_file_of_one(flags):
    """So does torchrun, which has a store of its own where they meet; it takes seconds, so in `make test-all`."""
    flags = [*flags, "--metric", "fisher"]
    codes, out, err = launch(CALIBRATE, *flags, "--output", "two.pt")
    assert codes == [0, 0], err
    assert out.count("wrote two.pt") == out.count("variance kept") == 1, "the first one alone"
    assert run(CALIBRATE, *flags, "--output", "one.pt") == 0
    one, two = (torch.load(name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one["meta"] == two["meta"]
    ours, theirs = tensors(two), tensors(one)
    assert ours.keys() == theirs.keys()
    assert {".joint.E", ".grouped.errors", ".statistics.metrics.k.attention"} <= ours.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name
    if ALL:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, str(files.ROOT / "scripts" / f"{CALIBRATE}.py"), *flags, "--output", "torchrun.pt"]
        subprocess.run(command, check=True, env=ONE_THREAD, timeout=300)
        found = tensors(torch.load("torchrun.pt", weights_only=True))
        assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in found)


def test_one_that_fails_takes_the_others_down_and_says_why(flags, tmp_path):
    """The second fails amid its windows, while the first waits for its sums."""

    def fails() -> None:
        def failing(self, layer, x, update=Moments.update):
            if os.environ["RANK"] == "1" and layer == 2:
                raise PluginError("layer 2 is of no use")
            update(self, layer, x)

        Moments.update = failing

    before = listing(tmp_path)
    codes, out, err = launch("make_presets", *flags, "--output", "out", before=fails)
    assert 0 not in codes and err.count("error: layer 2 is of no use") == 1 and "another process stopped" not in err
    assert listing(tmp_path) == before and "wrote" not in out


@dataclass(frozen=True)
class Second(Processes):
    """The second of two, where the first one says what was agreed."""

    rank: int = 1
    size: int = 2
    said: object = None

    def agreed(self, value):
        assert value is None, "only the first one does the work"
        return self.said


def test_every_item_is_somebodys_and_shares_are_even():
    for count, size in ((count, size) for count in (0, 1, 2, 7, 100) for size in (1, 2, 3, 8)):
        shares = [Processes(rank, size).share(count) for rank in range(size)]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    x = torch.randn(3)
    assert ALONE.total(x) is x and ALONE.agreed(x) is x and ALONE.first and ALONE.first_to_fail(), "nothing is sent"


def test_the_second_takes_what_the_first_has_and_needs_a_sequence_of_its_own(tmp_path):
    with pytest.raises(PluginError, match="2 processes are too many for 1 sequences: start fewer, or .*--samples"):
        calibrate(tiny_loaded(), TEXT, rank=9, samples=1, seq_len=80, processes=Second(said=torch.zeros(1, 80)))
    how = {"codec": "joint", "samples": 2, "seq_len": 80, "seed": 0, "sink_tokens": 4}
    path = tmp_path / "c.pt"
    made, _ = ratio_presets.compact_calibration(tiny_loaded(), TEXT, path, **how)
    path.write_bytes(b"")  # what another machine has there is not read
    second = ratio_presets.compact_calibration(tiny_loaded(), TEXT, path, **how, processes=Second(said=made))
    assert second == (made, path)


def test_a_process_that_is_alone_at_the_meeting_says_so(monkeypatch):
    def refused(*args, **kwargs):
        raise RuntimeError("connection to 10.0.0.1 refused\nand a page of details")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes.dist, "rendezvous", refused)
    message = "process 1 of 2 can't meet the others: connection to 10.0.0.1 refused$"
    with pytest.raises(PluginError, match=message), processes.together():
        pass


@pytest.mark.parametrize(("device", "local", "count", "expected"), [
    ("auto", "1", 2, "cuda:1"), ("cuda", "0", 2, "cuda:0"), ("cuda:0", "1", 2, "cuda:0"), ("cpu", "1", 2, "cpu"),
    ("auto", "1", 1, r"'cuda:1' is not there \(1 CUDA devices found\): start 1 processes, or use cpu"),
    ("all", "1", 2, "--device all spreads one model over every GPU.*--device auto"),
])  # fmt: skip
def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, device, local, count, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if " " not in expected:
        assert loading.resolve_device(device) == torch.device(expected)
        return
    with pytest.raises(PluginError, match=expected):
        loading.resolve_device(device)
