"""The machine that a result was measured on: processor, instruction sets, cores, memory speed, other work, GPU.

A results file has this as its record `machine`. Times of different machines must not stand in one table unnoticed, so
tables show it in their caption, and each kind of machine has results files of its own: NAME.json is of the reference
kind, a CPU with AVX-512, and NAME_TAG.json of another, such as profile_direct_smollm2-135m_avx2.json.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

CPUINFO, STAT = Path("/proc/cpuinfo"), Path("/proc/stat")
# Features as /proc/cpuinfo and sysctl call them, of those that decide how fast kernels for codes can be
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16",
            "neon", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip
# Kind of processor and the feature that makes it one, the widest vectors first
KINDS = {"avx512": "avx512bw", "avx2": "avx2", "sve": "sve", "neon": "asimd"}
GENERIC = "generic"
WORDS = {"avx512": "AVX-512", "avx2": "AVX2", "sve": "SVE", "neon": "NEON", GENERIC: "other CPU"}
REFERENCE = "avx512"  # the kind of machine whose results have no tag
TAG = re.compile(rf"_((?:{'|'.join([*KINDS, GENERIC])})(?:-[a-z0-9-]+)?|cuda-[a-z0-9-]+)$")
BUSY = 0.3  # cores that others may use before a measurement of time without a warning
LOOK_S = 0.4  # seconds for which other work is watched
COPY_BYTES, COPIES = 256 << 20, 3
AFTERWARDS = "afterwards"  # value of `recorded` where a person added the record to an older file


def describe(device: str = "auto") -> dict:
    """What this machine is: a record of JSON values, units in keys. device: as of --device; a GPU is named with driver.

    kernels_for: the instruction set that CPU kernels are built for, `native` unless KV_CPU_ISA lowers it; with `-float`
    where KV_CPU_PRODUCTS makes them multiply floats.
    """
    floats = "-float" * (os.environ.get("KV_CPU_PRODUCTS") == "float")
    found = {
        "processor": processor(),
        "architecture": platform.machine(),
        "instruction_sets": instruction_sets(),
        "kernels_for": (os.environ.get("KV_CPU_ISA") or "native") + floats,
        "cores": cores(),
        "threads": torch.get_num_threads(),
    }
    if device != "cpu" and torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(None if device in ("auto", "all") else device)}
        found |= {"gpu_driver": gpu_driver()}
    return found


def before_timing(device: str = "auto") -> dict:
    """As `describe`, with other work on the machine and the speed of memory; takes about a second.

    Called before times are measured. Prints a warning to stderr if other work is running.
    """
    load, busy = load_average(), busy_cores()
    if is_busy({"busy_cores_before": busy}):
        print(
            f"warning: other work is running ({busy:.1f} of this machine's {os.cpu_count() or 1} cores are busy): "
            "timings will be wrong. Wait until it has ended, or stop it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return describe(device) | {
        "busy_cores_before": busy, "load_average_before": load, "copy_bytes_per_s": copy_bytes_per_s(),
    }  # fmt: skip


def is_busy(machine: dict) -> bool:
    """Whether other work was running where `before_timing` made this record; no where the system doesn't say."""
    return (machine.get("busy_cores_before") or 0) > BUSY


# --- what is recorded


@functools.cache
def processor() -> str:
    """The processor's name; on x86 with family, model and stepping, as a name such as `AMD EPYC` alone says little."""
    entry = _first_processor()
    name = entry.get("model name") or _sysctl("machdep.cpu.brand_string")
    if entry.get("cpu family"):
        numbers = (f"{key} {entry.get(held, '?')}" for key, held in
                   (("family", "cpu family"), ("model", "model"), ("stepping", "stepping")))  # fmt: skip
        return f"{name or 'unnamed'} ({', '.join(numbers)})"
    if not name and entry.get("CPU part"):  # ARM's Linux gives numbers
        return f"ARM implementer {entry.get('CPU implementer', '?')}, part {entry['CPU part']}"
    return name or platform.processor() or "unknown"


@functools.cache
def instruction_sets() -> list[str]:
    """Those of FEATURES that the processor has; empty where the system doesn't say."""
    entry = _first_processor()
    words = set((entry.get("flags") or entry.get("Features") or "").split())
    if sys.platform == "darwin":
        words |= set(_sysctl("machdep.cpu.features", "machdep.cpu.leaf7_features").lower().split())
        words |= {"neon", "asimd"} if platform.machine() == "arm64" else set()
    return [name for name in FEATURES if name in words]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_driver() -> str | None:
    """The NVIDIA driver's version; None where nvidia-smi doesn't tell."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(command).partition("\n")[0] or None


def load_average() -> float | None:
    """Runnable tasks, averaged over the last minute; None where the system doesn't say. Just ended work counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_cores() -> float | None:
    """Cores that other processes use now, watched for LOOK_S; the load average where there is no /proc/stat."""
    if (before := _busy_ticks()) is None:
        return load_average()
    own = time.process_time()
    time.sleep(LOOK_S)
    own = (time.process_time() - own) * os.sysconf("SC_CLK_TCK")
    (busy, whole), (busy_before, whole_before) = _busy_ticks(), before
    return cores_busy(busy - busy_before - own, whole - whole_before, os.cpu_count() or 1)


def cores_busy(busy: float, whole: float, processors: int) -> float:
    """Busy cores from ticks of all processors together: those that were busy, and all."""
    return max(busy, 0.0) / whole * processors if whole else 0.0


def copy_bytes_per_s() -> float:
    """Bytes per second, read plus written, of copying COPY_BYTES with this process's threads: a median of COPIES."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    target.copy_(source)  # the first write to a memory page is slower
    times = []
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / statistics.median(times)


def _busy_ticks() -> tuple[int, int] | None:
    """Ticks since the start of the machine: busy ones, with what a hypervisor has taken, and all."""
    try:
        ticks = [int(word) for word in STAT.read_text().partition("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(ticks) - sum(ticks[3:5]), sum(ticks)  # fields 4 and 5: idle, and waiting for a disk


def _first_processor() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty on other systems."""
    try:
        text = CPUINFO.read_text().strip().partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _sysctl(*names: str) -> str:
    return _output(["sysctl", "-n", *names]).strip() if sys.platform == "darwin" else ""


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# --- names of results files


def kind(machine: dict) -> str:
    """The kind of a machine's processor, the first of KINDS whose feature it has, else `generic`."""
    held = machine.get("instruction_sets") or []
    return next((name for name, feature in KINDS.items() if feature in held), GENERIC)


def tag(machine: dict | None = None, gpu: str | None = None) -> str:
    """The tag of a machine's results files, this one's by default: its kind, or the GPU's slug where there is one.

    Where KV_CPU_ISA or KV_CPU_PRODUCTS changes the kernels the tag says so: `avx512-as-avx2`, whose 16-bit rows still
    use AVX-512.
    """
    machine = machine or describe("cpu")
    lowered = machine.get("kernels_for", "native")
    return gpu or kind(machine) + ("" if lowered == "native" else f"-as-{lowered}")


def named(stem: str, own: str) -> str:
    """The name of a machine's results file, by its tag: without the tag for the reference kind, and not twice."""
    return stem if own == REFERENCE or f"_{own}" in stem else f"{stem}_{own}"


def untagged(stem: str) -> str:
    """The name of the same results on the reference machine."""
    return TAG.sub("", stem)


def siblings(folder: Path, stem: str, suffix: str = ".json") -> list[str]:
    """Names of the files in a folder that have this name, and those with a tag after it, the untagged first."""
    found = sorted(path.stem for path in folder.glob(f"{stem}_*{suffix}") if untagged(path.stem) == stem)
    return [name for name in (stem, *found) if (folder / f"{name}{suffix}").is_file()]


def same(one: dict | None, other: dict | None) -> bool:
    """Whether two records are surely of the same machine: both are recorded with the run, and name the same parts."""
    if not (one and other) or AFTERWARDS in (one.get("recorded"), other.get("recorded")):
        return False
    return all(one.get(key) == other.get(key) for key in ("processor", "cores", "gpu", "kernels_for"))


# --- for people


def short(record: dict) -> str:
    """A results record's machine in a few words, for headings and pictures."""
    held = record.get("machine")
    if not isinstance(held, dict):
        return "machine not recorded"
    if held.get("gpu"):
        return held["gpu"]
    return ", ".join([held.get("processor") or "a CPU", *[WORDS[kind(held)]] * (kind(held) != GENERIC)])


def labels(records: list[dict]) -> list[str]:
    """A word for each of several machines, such as AVX2, which is different for every one."""
    held = [record.get("machine") or {} for record in records]
    names = [machine.get("gpu") or WORDS[kind(machine)] for machine in held]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def caption(record: dict) -> str:
    """A sentence on the machine of a results record, for the caption of a table of speed."""
    held = record.get("machine")
    if not isinstance(held, dict):
        return "Machine not recorded."
    parts = [short(record)]
    if held.get("gpu_driver"):
        parts.append(f"driver {held['gpu_driver']}")
    counts = {"core": held.get("cores"), "thread": held.get("threads", record.get("threads"))}
    parts += [f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count]
    if held.get("kernels_for", "native") != "native":
        parts.append(f"kernels built for {held['kernels_for']}")
    if held.get("copy_bytes_per_s"):
        parts.append(f"memory copied at {held['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    if (busy := held.get("busy_cores_before")) is not None:
        parts.append(f"{busy:.1f} cores busy with other work before" if is_busy(held) else "nothing else running")
    noted = " (noted afterwards, not by the run)" if held.get("recorded") == AFTERWARDS else ""
    return f"Machine: {', '.join(parts)}{noted}."
