"""Least times on GPUs: bytes are those of real stores, operations those of the kernels, the longest part counts."""

import functools
import json

import pytest
from script_runs import run

from gpt2.common.errors import PluginError
from gpt2.experiments import attention_speed, gpu_roofline
from gpt2.experiments.attention_speed import AttentionShape
from gpt2.experiments.gpu_roofline import DEVICES, Device, Work
from gpt2.report import tables

SHAPE = AttentionShape(32, 8, 128, 1)
UNIT = Device("unit", 1.0, 1.0, 1.0, 2.0)  # a byte, a product or an instruction takes a second


@functools.cache
def works(name: str, tokens: int, shape: AttentionShape = SHAPE) -> dict[str, Work] | None:
    ((_, pair),) = attention_speed.compressors(name, [4.0], shape)
    return gpu_roofline.step_works(pair, shape, tokens, 132)


def test_bytes_and_operations_are_what_is_stored_and_what_kernels_do():
    """Per token, KV head and side, of 128 channels: half a byte or one each, scale and offset by token or by block."""
    for name, each in (("int4", 68), ("int8", 132), ("int4_channel", 70), ("none", 512)):
        found = works(name, 6400)
        assert found["scores"].nbytes == found["weighted sums"].nbytes == 6400 * 8 * each
    found = works("int4_channel", 1280)
    product = 2 * 1280 * 128 * 16 * 8  # four queries per KV head are padded to 16
    assert found["weighted sums"].tensor == found["scores"].tensor == product
    assert works("none", 1280)["scores"].tensor == product
    assert works("int8_channel", 1280)["scores"].tensor == 2 * product, "codes of eight bits need more of a query"
    assert found["weighted sums"].vector == 1280 * 8 * 128 * 2
    planes = works("mixed", 1280)["weighted sums"].vector
    assert planes == 1280 * 8 * 128 * 3.625, "eight planes transposed, bytes apart, and exponents"
    # 1280 tokens are 20 tiles, at least two of them in a split
    assert found["split decode"].nbytes == 2 * 4 * (8 * 4 * 130) * 10
    assert works("int4_channel", 12800)["split decode"].nbytes == 2 * 4 * (8 * 4 * 130) * (4 * 132 // 8)
    assert found["quantize"].nbytes == 1280 * 8 * 2 * (256 + 70) and "quantize" not in works("none", 1280)
    tries = 3 * 4 + 4 * 2  # of the narrow widths four shares each, of the wide ones two
    assert works("mixed", 1280)["quantize"].vector == 1280 * 8 * 2 * 128 * (12 + 3 * 10 + 20 * tries)
    framed = works("framed", 1280)["quantize"]
    assert framed.vector == works("mixed", 1280)["quantize"].vector, "K and V are 256 channels of one code"
    narrow = AttentionShape(6, 3, 48, 2)  # channels are padded as well
    assert works("int8", 64, narrow)["weighted sums"].tensor == 2 * 64 * 64 * 16 * 6
    batch = works("int4", 1280, AttentionShape(32, 8, 128, 4))
    assert batch["scores"].nbytes == 4 * works("int4", 1280)["scores"].nbytes


def test_queries_of_frames_are_absorbed_for_every_block_and_shared_codes_are_read_once():
    """A basis for K and V of each of 8 heads, 256 channels, of which queries absorb half."""
    found = works("framed", 1280)
    assert found["weighted sums"].nbytes == 0 < found["scores"].nbytes
    assert found["absorb"] == Work(2 * 32 * 20 * (2 * 256 + 4), 4 * 32 * 20 * 256 * 128, 32 * 20 * 4 * 128 * 6)
    assert "absorb" not in works("grouped", 1280) and works("grouped", 1280)["weighted sums"].nbytes > 0
    without = {name: work for name, work in found.items() if name != "absorb"}
    absorbed = found["absorb"].bound(UNIT)["bound_us"]
    bounds = [gpu_roofline.attend_bound(each, UNIT)["bound_us"] for each in (found, without)]
    assert bounds[0] == pytest.approx(bounds[1] + absorbed)


def test_padding_is_that_of_the_kernels():
    pytest.importorskip("triton")
    from gpt2.compression.cache.triton_attention import PROGRAMS
    from gpt2.compression.cache.triton_step import slots
    from gpt2.compression.kernels.triton_tiles import DECODERS, TILE

    assert gpu_roofline.PROGRAMS == PROGRAMS and TILE.value == gpu_roofline.TILE
    assert {tuple(held) for held in DECODERS} == gpu_roofline.DECODE.keys(), "every format has a cost"
    for rank in (16, 48, 64, 100, 128, 200):
        assert all(slots(rank, decoder) == gpu_roofline.padded(rank) for decoder in DECODERS.values())


def test_what_takes_longest_counts_and_a_step_is_one_launch_and_the_merging_of_its_splits():
    for work, seconds, by in ((Work(5, 2, 3), 5, "memory"), (Work(1, 9, 3), 9, "tensor cores"),
                              (Work(1, 2, 7), 7, "vector units")):  # fmt: skip
        found = work.bound(UNIT)
        assert found["bound_us"] == pytest.approx(1e6 * seconds) and found["bound_by"] == by
        memory = work.bound(Device("unknown", 1.0))
        assert memory["bound_us"] == pytest.approx(1e6 * work.nbytes) and list(memory["us"]) == ["memory"]
    found = works("int8", 4096)
    attend = (found["scores"] + found["weighted sums"]).bound(UNIT)["bound_us"]
    bound = attend + found["split decode"].bound(UNIT)["bound_us"]
    assert gpu_roofline.attend_bound(found, UNIT)["bound_us"] == bound
    plain, int8 = gpu_roofline.rows([DEVICES["A100"]], SHAPE, [4096], ["int8"], [4.0])
    assert plain["bytes"] == 4096 * 8 * 512 and plain["bound_us"] == pytest.approx(1e6 * plain["bytes"] / 2.039e12)
    ratio = plain["bound_us"] / int8["bound_us"]
    assert int8["speed_against_16_bit"] == pytest.approx(ratio) and 1 < ratio < 2


def test_measured_times_stand_beside_the_bound_of_their_device():
    assert gpu_roofline.device_of("NVIDIA H200", 1.0) is DEVICES["H200"]
    other = gpu_roofline.device_of("NVIDIA H100 PCIe", 7.0)  # with slower memory than the data sheet that is known
    assert other.bytes_per_s == 7.0 and other.vector is None
    held = {"tokens_held": 4096, "bytes_held": 4e6, "ms_median": 8000.0}
    rows = [{"row": "sdpa", "kind": "16-bit"} | held, {"row": "int8", "kind": "compressed"} | held,
            {"row": "sdpa, float32", "kind": "float32"} | held]  # fmt: skip
    gpu_roofline.add_bounds(rows, Device("unknown", 1e6), SHAPE, ["int8"], [4.0])
    assert [row["bound_ms"] for row in rows] == pytest.approx([4096 * 8 * 512 / 1e3, 4000, 4000])
    assert rows[1]["share_of_bound"] == pytest.approx(0.5)
    gpu_roofline.add_bounds(rows, DEVICES["H100"], SHAPE, ["int8"], [4.0])
    bound = gpu_roofline.attend_bound(works("int8", 4096), DEVICES["H100"])
    assert rows[1]["bound_ms"] == pytest.approx(bound["bound_us"] / 1000)


def test_the_table_says_that_nothing_was_measured(tmp_path, capsys):
    flags = ["--on-paper", "--context-lengths", "4096,16384", "--quantizers", "int4,int8", "--output"]
    assert run("benchmarks/attention", *flags, tmp_path / "r.json") == 0
    assert "Computed, not measured" in capsys.readouterr().out
    record = json.loads((tmp_path / "r.json").read_text())
    table = tables.table("gpu_roofline_x", record, "16384,A100")
    rows = ("16-bit attention", "int4", "int8")
    assert [row[:3] for row in table.rows] == [["A100", "16,384", name] for name in rows]
    kernels = tables.table("gpu_roofline_x", record, "kernels,16384,A100")
    assert [row[3] for row in kernels.rows[:4]] == ["scores", "weighted sums", "split decode", "quantize"]
    with pytest.raises(PluginError, match="no rows of gpu T4"):
        tables.table("gpu_roofline_x", record, "T4")
