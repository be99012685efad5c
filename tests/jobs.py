"""Every script that writes, with flags that make it small, and a folder in which it finds what it reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from checkouts import fake, make_checkout
from test_scripts import SMALL, SMALL_EVAL
from test_troubleshooting import FREE
from tiny import char_tokenizer, tiny_model, word_text, word_tokenizer

@dataclass(frozen=True)
class Job:
    flags: list

TEXT = ["--model", "tiny", "--text", "words.txt"]
TUNING = [*TEXT, *SMALL, *SMALL_EVAL, "--target-ppl-delta", "0.9", "--study", "s.db", "--output", "out/p.json"]
JOBS = {
  "auto_tune_kv_compression": ["--rank-grid", "12,10", "--bits", "16,8", *TUNING],
  "auto_tune_kv_compression layer": ["--rank-grid", "12,10", "--bits", "16,8", "--per-layer", *TUNING],
  "auto_tune_kv_compression codec": ["--search", "codec", "--codecs", "identity", "--num-trials", "5", *TUNING],
  "benchmark_append": ["--tokens", "16,32", "--layers", 2, "--repeats", 4, "--output", "out/r.json"],
  "benchmark_attention": ["--context-lengths", "128", "--heads", 4, "--kv-heads", 2, "--head-dim", 64, "--repeats", 2, "--flush-mib", 1, "--copy-mib", 1, "--quantizers", "int8,kv4", "--output", "out/r.json"],
  "benchmark_calibration": [*TEXT, "--samples", 2, "--seq-len", 64, "--repeats", 2, "--output", "out/r.json"],
  "calibrate_kv_lowrank": [*TEXT, *SMALL, "--output", "out/c.pt"],
  "compare_peers": [*TEXT, *SMALL_EVAL, "--peers", "kivi", "--preset", "free.json", "--needle-context-lengths", "128", "--num-trials", 1, "--output", "out/r.json"],
  "eval_long_context_needle": [*TEXT, "--preset", "free.json", "--context-lengths", "128", "--num-trials", "1", "--needle-positions", "0.5", "--output", "out/r.json"],
  "eval_stability": [*TEXT, "--preset", "free.json", *SMALL_EVAL, "--num-runs", "2", "--needle-length", "128", "--needle-trials", "1", "--output", "out/r.json"],
  "explore_codecs": [*TEXT, *SMALL, "--eval-tokens", 128, "--eval-seq-len", 64, "--bits", 4, "--rows", "memoryless", "--seq-len", 128, "--eval-seq-len", 128, "--output", "out/r.json"],
  "largest_batch": ["--model", "tiny", "--preset", "free.json", "--context-length", 64, "--most", 2, "--decode-tokens", 2, "--output", "out/r.json"],
  "list_architectures": ["--families", "llama,gpt2", "--output", "out/r.json"],
  "make_presets": [*TEXT, *SMALL, *SMALL_EVAL, "--seq-len", 100, "--ratios", "2,6.4", "--output", "out"],
  "make_report": ["--results", "made", "--output", "out/r.html"],
  "measure_cache_bytes": ["--model", "tiny", "--preset", "free.json", "--context-lengths", "64", "--output", "out/r.json"],
  "measure_scaling": ["--model", "tiny", "--quick", "--shapes", "qwen2.5-0.5b.json", "--context-lengths", 256,  "--presets", "kv8", "--timed-shapes", "qwen2.5-0.5b.json", "--timed-presets", "kv4", "--cache-shapes", "qwen2.5-0.5b.json", "--repeats", 3, "--output", "out/r.json"],
  "profile_kv_performance": ["--model", "tiny", "--preset", "free.json", "--context-lengths", "32", "--batch-sizes", "1", "--repeats", "1", "--decode-tokens", "2", "--output", "out/r.json"],
  "validate_ppl_postbugfix": [*TEXT, *SMALL, *SMALL_EVAL, "--groups", "control,rank", "--output", "out/r.json"],
}
