"""Parked conversations: how many fit into a memory, and how long waking one takes against reading its tokens again.

    python scripts/benchmarks/parking.py
    python scripts/benchmarks/parking.py --context-lengths 1024,4096 --presets kv4 --shapes none --output parking.json

A conversation is parked as a file of its compressed cache, and woken by loading the file and feeding one token, with
attention over the stored codes where they can be read. Bytes are counted at the longest context, of the model and of
--shapes. Waking is measured on the model, from files whose pages are in memory, as is reading again, with transformers'
uncompressed cache. Contexts beyond those that the model was trained for repeat its codes, and reading them is counted
by FLOPs at the measured speed. Of a shape, the layers up to the first that attends are measured with random weights and
a cut vocabulary; times are scaled to all layers. Times are only valid on a machine that is otherwise idle.
Writes results/runs/parking_MODEL.json, or where --output says; the kind of machine follows the name unless it is a CPU
with AVX-512: parking_MODEL_avx2.
"""

from gpt2 import cli
from gpt2.common import files, machine
from gpt2.experiments import parking
from gpt2.models import random_weights
from gpt2.report import tables


def arguments():
    p = cli.parser(__doc__)
    cli.add_model_flags(p)
    p.add_argument("--shapes", type=names, default="llama-3.1-8b.json,qwen3.5-4b.json",
                   help="models without weights: files of configs/models, or none")  # fmt: skip
    p.add_argument("--presets", type=names, default="kv8,kv4,kv-4x", help="caches to park")
    p.add_argument("--context-lengths", type=cli.int_list, default=[4096, 8192, 32768], help="tokens of conversations")
    p.add_argument("--memory-gb", type=cli.positive_float, default=64, help="memory for conversations, in 10⁹ bytes")
    p.add_argument("--shape-tokens", type=cli.positive_int, default=1024, help="most tokens that a shape's layers read")
    p.add_argument("--repeats", type=cli.positive_int, default=5, help="timed runs per cache and context")
    cli.add_output_flag(p, picture=False)
    return p


def names(words: str) -> list[str]:
    """`a,b` as ["a", "b"], each name once, `none` as []."""
    return [] if words == "none" else list(dict.fromkeys(words.split(",")))


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded, shapes = script.loaded, random_weights.read_shapes(args.shapes)
    stem = cli.of_this_machine(f"parking_{loaded.slug}", loaded.device)
    output = args.output or files.check_writable(files.RESULTS / "runs" / f"{stem}.json")
    subject = parking.subject(loaded, args.context_lengths)
    configs = {loaded.slug: loaded.model.config} | shapes
    longest, progress = max(args.context_lengths), cli.bar("bytes", "model")
    parked = parking.fitting_rows(configs, longest, args.presets, 1e9 * args.memory_gb, progress)
    own = machine.before_timing(args.device)
    woken = woken_rows(args, subject, parked, args.context_lengths)
    for name, config in shapes.items():
        cut = parking.subject_of_shape(name, config, min(args.shape_tokens, longest), loaded.device)
        woken += woken_rows(args, cut, parked, [longest])
    record = script.record(machine=own, dtype=script.dtype, parked=parked, woken=woken)
    files.write_json(output, record)
    for rows in ("parked", "woken"):
        tables.show("parking", record, rows)
    print(f"\nwrote {files.shown(output)}")


def woken_rows(args, subject: parking.Subject, parked: list[dict], contexts: list[int]) -> list[dict]:
    """Rows of one model, for the presets that its layers can have."""
    missing = {row["cache"] for row in parked if row["shape"] == subject.name and "reason" in row}
    presets = [preset for preset in args.presets if preset not in missing]
    return parking.waking_rows(subject, presets, contexts, args.repeats, cli.bar(f"waking {subject.name}", "cache"))


if __name__ == "__main__":
    cli.run(main)
