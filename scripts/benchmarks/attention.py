"""Time of one decode step's attention in one layer over a filled cache: over codes, and over 16-bit K and V.

    python scripts/benchmarks/attention.py
    python scripts/benchmarks/attention.py --device cuda --context-lengths 4096,16384,65536,131072 --repeats 50
    python scripts/benchmarks/attention.py --context-lengths 4096 --quantizers int4_channel,mixed --bits 3,4 --compiled
    python scripts/benchmarks/attention.py --on-paper

Needs no weights: keys and values are noise. Rows take turns in one process; the processor's caches are flushed before
each run, and the output of each row is first compared with float32 attention. Beside the time, the table has the bytes
that a step reads, their rate, and this rate as a share of the device's copy speed. Ratios, paired by repeat, are to
PyTorch's attention as transformers calls it, and to the fastest 16-bit row. On a GPU times are measured on the GPU; the
host's time to launch a step is in the file.
--bound adds the least time that a step can take by its bytes and operations, on GPUs whose data sheet is known, else by
its bytes at the measured copy speed. --on-paper measures nothing and computes this for H100, H200, L40S and A100; it
writes results/runs/gpu_roofline_SHAPE.json.
Writes results/runs/attention_step_DEVICE_SHAPE.json and results/plots/attention_step_DEVICE_SHAPE.png, with the kind of
a CPU after the name unless it has AVX-512: attention_step_cpu_SHAPE_avx2.
"""

import gpt2  # noqa: F401  first, so that Ctrl-C during the import of PyTorch prints one line

# isort: split
import argparse

import torch

from gpt2 import cli
from gpt2.common import files, machine, provenance
from gpt2.experiments import attention_speed, gpu_roofline
from gpt2.models import loading
from gpt2.report import plots, tables

CODECS = "int4_channel,int8_channel,int4,int8,mixed,framed,kv4,kv8"


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    p.add_argument("--context-lengths", type=cli.int_list, default=[4096, 16384], help="tokens of the prompt")
    p.add_argument("--heads", type=cli.positive_int, default=32, help="query heads")
    p.add_argument("--kv-heads", type=cli.positive_int, default=8, help="heads of keys and values")
    p.add_argument("--head-dim", type=cli.positive_int, default=128, help="numbers of a head's key or value")
    p.add_argument("--batch-size", type=cli.positive_int, default=1, help="sequences in a batch")
    cli.add_device_flag(p)
    p.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of the 16-bit rows")
    p.add_argument("--quantizers", type=cli.word_list(attention_speed.CODECS), default=CODECS.split(","),
                   help="for both K and V; kv4 and kv8 are the calibration-free presets, framed and "
                        "grouped bases that heads share")  # fmt: skip
    p.add_argument("--bits", type=bits_list, default=[4.0], help="bits per coordinate of adjustable quantizers (mixed)")
    p.add_argument("--compiled", action="store_true", help="add int4_channel by torch.compile; only on a CPU")
    p.add_argument("--bound", action="store_true", help="also print the least time by bytes and operations")
    p.add_argument("--on-paper", action="store_true", help="only compute this time for known GPUs")
    p.add_argument("--repeats", type=cli.positive_int, default=20, help="timed steps per row and context")
    p.add_argument("--flush-mib", type=cli.positive_int, default=256, help="written before a step to flush caches")
    p.add_argument("--copy-mib", type=cli.positive_int, default=512, help="copied to measure the device's copy speed")
    p.add_argument("--seed", type=cli.seed, default=0, help="of random keys, values and queries")
    cli.add_output_flag(p)
    return p


def parse() -> argparse.Namespace:
    p = arguments()
    args = p.parse_args()
    if args.compiled and loading.resolve_device(args.device).type != "cpu":
        p.error("--compiled is for --device cpu")
    return args


def bits_list(word: str) -> list[float]:
    """`3,4.5` as [3.0, 4.5]."""
    return [float(part) for part in word.split(",")]


def main() -> None:
    args = parse()
    shape = attention_speed.AttentionShape(args.heads, args.kv_heads, args.head_dim, args.batch_size)
    if args.on_paper:
        return on_paper(args, shape)
    device = loading.resolve_device(args.device)
    name = f"attention_step_{provenance.device_slug(device)}_{shape}"
    paths = cli.output_files(args.output, cli.of_this_machine(name, device))
    own = machine.before_timing(str(device))
    timer = attention_speed.Timer(device, args.flush_mib << 20)
    bandwidth = attention_speed.copy_bandwidth(timer, args.copy_mib << 20)
    rows = []
    reads = attention_speed.kernels(device)
    record = provenance.provenance(
        args, machine=own, copy_bytes_per_s=bandwidth, kernels=reads, dtype=args.dtype, rows=rows
    )
    for context in args.context_lengths:
        rows += attention_speed.measure(
            shape, context, args.quantizers, args.bits, timer, bandwidth, dtype=getattr(torch, args.dtype),
            repeats=args.repeats, compiled=args.compiled, seed=args.seed, progress=cli.bar(f"{context} tokens", "turn"),
        )  # fmt: skip
        tables.show("attention_step", record, str(context), note=context == args.context_lengths[-1])
    if args.bound:
        gpu = gpu_roofline.device_of(record["device"], bandwidth)
        gpu_roofline.add_bounds(rows, gpu, shape, args.quantizers, args.bits)
        tables.show("attention_bound", record | {"bound": gpu.record()})
    cli.write(paths, record, lambda: plots.attention_times(record))


def on_paper(args: argparse.Namespace, shape: attention_speed.AttentionShape) -> None:
    output = args.output or files.check_writable(files.RESULTS / "runs" / f"gpu_roofline_{shape}.json")
    known = list(gpu_roofline.DEVICES.values())
    rows = list(gpu_roofline.rows(known, shape, args.context_lengths, args.quantizers, args.bits))
    record = provenance.provenance(args, device="none", gpus=[gpu.record() for gpu in known], rows=rows)
    files.write_json(output, record)
    tables.show("gpu_roofline", record)
    print(f"\nwrote {files.shown(output)}")


if __name__ == "__main__":
    cli.run(main)
