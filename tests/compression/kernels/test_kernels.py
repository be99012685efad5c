"""Kernels without a GPU: right in Triton's interpreter, and compiled for real ones; and all is well without Triton."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sampling import covering, sampled

from gpt2.compression.cache.token_store import TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor
from gpt2.compression.codecs.mixed import MixedFixed
from gpt2.compression.kernels import dispatch

SUPPORT = Path(__file__).parents[2] / "support"
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on every NVIDIA card since Ampere
COMPILED = ("none", "int8", "int4", "int8_channel", "int4_channel", "mixed", "mixed_fixed")


def test_without_triton(monkeypatch, caplog):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch._installed.cache_clear()
    x = SimpleNamespace(is_cuda=True)
    assert not dispatch.usable(x) and not dispatch.usable(x)
    assert [r.name for r in caplog.records] == ["gpt2.compression.kernels.dispatch"]
    dispatch._installed.cache_clear()


def test_not_for_tensors_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not dispatch.usable(torch.zeros(1))


def test_in_the_interpreter():
    pytest.importorskip("triton", reason="kernels need Triton, which isn't installed: pip install triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", SUPPORT / "kernels_interpreted.py"]
    done = subprocess.run(command, cwd=SUPPORT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Kernels that would be launched, compiled for an H100 and not run."""
    pytest.importorskip("triton", reason="kernels need Triton, which isn't installed: pip install triton")
    if dispatch.interpreted():
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made = []
    run = JITFunction.run

    def compile_only(self, *args, **kwargs):
        made.append(run(self, *args, **kwargs | {"warmup": True}))

    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: -1,  # none that a kernel could later run on
        get_current_stream=lambda device=None: 0,
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", device)
    return made


@pytest.mark.parametrize(("name", "dtype"), sampled(itertools.product(COMPILED, (torch.bfloat16, torch.float32)), 5))
def test_attention_compiles(name, dtype, compiled):
    from gpt2.compression.cache import triton_attention

    d, heads = 64, 2
    quantizer = QUANTIZERS[name] if name != "mixed_fixed" else MixedFixed(4.0, torch.full((heads, d), 3))
    stores = [TokenStore(Compressor(quantizer), 4, 0) for _ in range(2)]
    x = torch.randn(1, heads, 130, d).to(dtype)
    for store in stores:
        store.prepare(x, "test")
        store.append(x)
    query = x[:, :, :1].repeat_interleave(4, dim=1)
    triton_attention.attend(*stores, query, None, 1.0)
    assert [kernel.name for kernel in compiled] == ["attend_tiles", "merge_splits"]
    for kernel in compiled:
        assert kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_MEMORY
    assert "wgmma" in compiled[0].asm["ptx"]  # tensor cores


@pytest.mark.parametrize(
    ("dtype", "name"), covering((torch.bfloat16, torch.float32), ("int8", "int4", "int8_channel", "int4_channel"))
)
def test_quantizing_compiles(name, dtype, compiled):
    from gpt2.compression.kernels import triton_quantize

    triton_quantize.quantized(QUANTIZERS[name].encoding(80), torch.randn(1, 2, 128, 80).to(dtype))
    assert len(compiled) == 1 and compiled[0].asm["cubin"]
