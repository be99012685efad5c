"""Speed and memory of compressed caches beside the uncompressed one: time to first token, per token, bytes, profile.

    python scripts/profile_kv_performance.py --preset int4-vonly
    python scripts/profile_kv_performance.py --preset int8-vonly int4-vonly --identity --batch-sizes 1,8 --repeats 9
    python scripts/profile_kv_performance.py --preset kv4 kv-4x --direct --identity --peers quanto,hqq
    python scripts/profile_kv_performance.py --model configs/models/qwen2.5-0.5b.json --layers 2 --policy default

--direct measures each of our caches twice: reconstructing the history at every step, and with attention over the
stored codes. It says at the end where that was slower than the uncompressed cache, and measures once per machine from
how many tokens on codes are read faster than reconstructed, for enable_compressed_attention(model, when="auto"),
unless other work is running.
--noise fills caches with noise where a prompt would be read: decoding alone is measured, in a small part of the time.
--identity adds our cache without compression; with --direct it is also read without copying K and V at every step and
without repeating KV heads. --peers adds transformers' quantized caches.
Caches take turns in one process, in alternating order, each time with a fresh cache after a warm-up. Figures are
medians with quartiles, ratios are paired by repeat. Tokens per second are of the whole batch. The parts of a step's
time and the peak of memory are measured in a separate pass, as the instruments take time, and so is parking: moving one
of our caches to the CPU's memory and back, with the bytes moved; on a CPU nothing moves. A model's shape from
configs/models gets random weights, as speed and memory don't depend on them.
Writes results/runs/profile_MODEL.json and results/plots/profile_MODEL.png, or where --output says; the kind of machine
follows the name unless it is a CPU with AVX-512: profile_MODEL_avx2.
"""

import argparse

from gpt2 import cli
from gpt2.common import machine
from gpt2.evaluation import lineup
from gpt2.evaluation.instruments import cuda_devices, memory_method
from gpt2.evaluation.other_caches import PACKAGES
from gpt2.evaluation.timing import find_crossovers, measure_cell
from gpt2.models.loading import LoadedModel
from gpt2.report import plots, tables


def arguments() -> argparse.ArgumentParser:
    p = cli.parser(__doc__)
    cli.add_shape_flags(p)
    cli.add_cache_flags(p, several=True)
    p.add_argument("--identity", action="store_true", help="add our cache without compression, as a control")
    p.add_argument("--direct", action="store_true", help="also attend over the stored codes of our caches")
    p.add_argument("--direct-only", action="store_true", help="--direct without the rows that reconstruct")
    p.add_argument("--peers", type=cli.word_list(list(PACKAGES)), default=[], help="quanto, hqq, or both")
    p.add_argument("--noise", action="store_true", help="fill caches with noise, not by reading a prompt: much faster")
    p.add_argument("--context-lengths", type=cli.int_list, default=[512, 1024, 2048], help="tokens before decoding")
    p.add_argument("--batch-sizes", type=cli.int_list, default=[1, 4], help="sequences in a batch")
    p.add_argument("--decode-tokens", type=cli.positive_int, default=16, help="tokens decoded per repeat")
    p.add_argument("--repeats", type=cli.positive_int, default=3, help="timed runs per cache, context and batch")
    p.add_argument("--seed", type=cli.seed, default=0, help="of the random tokens that fill the caches")
    cli.add_output_flag(p)
    return p


def main() -> None:
    args = arguments().parse_args()
    script = cli.open_script(args)
    loaded = script.loaded
    paths = cli.output_files(args.output, cli.of_this_machine(f"profile_{loaded.slug}", loaded.device))
    loaded.require_context(
        max(args.context_lengths), "--context-lengths", after=args.decode_tokens, after_flag="--decode-tokens"
    )
    choices = cli.chosen_caches(args, loaded)
    direct, reconstruct = args.direct or args.direct_only, not args.direct_only
    caches = lineup.for_speed(
        loaded, choices, identity=args.identity, direct=direct, reconstruct=reconstruct, packages=args.peers
    )
    rows, own = [], machine.before_timing(args.device)
    if direct:
        find_crossovers(loaded, caches, args.batch_sizes, busy=machine.is_busy(own))
    if loaded.random_weights:
        print("note: the weights are random; speed and memory don't depend on them")
    record = script.record(
        machine=own, rows=rows, weights=script.weights, dtype=script.dtype,
        peak_memory=memory_method(cuda_devices(loaded.model)), caches=[choice.record() for choice in choices],
    )  # fmt: skip
    for batch in args.batch_sizes:
        for context in args.context_lengths:
            progress = cli.bar(f"batch {batch}, {context} tokens", "run")
            found = measure_cell(
                loaded, caches, context, batch, decode_tokens=args.decode_tokens, repeats=args.repeats, seed=args.seed,
                noise=args.noise, progress=progress,
            )  # fmt: skip
            rows += found
            tables.show("profile", record | {"rows": found}, note=False)
    tables.show("profile_steps", record)
    if any("parking" in row for row in rows):
        tables.show("profile_parking", record)
    else:
        print("parking: nothing is moved, as these caches are in the CPU's memory or can't be parked as a whole")
    print(f"\n{tables.profile(record, []).note}")
    if slower := lineup.slower_directly(rows):
        print(slower)
    cli.write(paths, record, lambda: plots.profiles(rows, title(record, loaded)))


def title(record: dict, loaded: LoadedModel) -> str:
    args = record["args"]
    made = f"{args['decode_tokens']} tokens decoded, medians of {args['repeats']} repeats with quartiles"
    return f"{loaded.spec}, {record['dtype']} on {record['device']}: {made}\n{machine.short(record)}"


if __name__ == "__main__":
    cli.run(main)
