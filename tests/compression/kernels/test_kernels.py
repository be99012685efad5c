"""Kernels without a GPU: Triton's, right in its interpreter and compiled for real ones; and the CPU's, built for every
instruction set that this processor has."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, PropertyMock

import pytest
import torch
from sampling import ALL, covering, sampled
from stores import filled
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2.common.errors import PluginError
from gpt2.compression.cache.token_store import Half, TokenStore
from gpt2.compression.codecs import QUANTIZERS, Compressor, JointTransform, Transform
from gpt2.compression.codecs.mixed import Mixed, MixedFixed
from gpt2.compression.codecs.rope import Rotary
from gpt2.compression.kernels import cpu, dispatch

ROOT = Path(__file__).parents[3]
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on every NVIDIA card since Ampere
DTYPES = (torch.bfloat16, torch.float32)
WITHOUT_TRITON = "kernels need Triton, which isn't installed: pip install triton"
# Of K and of V. Compiling takes seconds: `make test` has the pair with the longest kernels
COMPILED = [("mixed_fixed", "mixed"), ("int8_channel", "int4_channel"), ("int8", "int4"), ("none", "none")]
COMPILED += [(name, name) for name in QUANTIZERS]


@contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_triton(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    usable = runpy.run_path(dispatch.__file__, run_name=dispatch.__name__)["usable"]  # which has looked for nothing yet
    x = SimpleNamespace(is_cuda=True)
    assert not usable(x) and not usable(x)
    assert [r.name for r in caplog.records] == [dispatch.__name__], "warned once"


def test_without_a_compiler_for_launches(monkeypatch, caplog):
    driver = pytest.importorskip("triton.runtime", reason=WITHOUT_TRITON).driver

    utils = PropertyMock(side_effect=RuntimeError("Failed to find C compiler\nand how to set one"))
    monkeypatch.setattr(driver, "_active", type("Active", (), {"utils": utils})())
    assert not dispatch.launches.__wrapped__()
    (record,) = caplog.records
    assert record.message.endswith("slower: Failed to find C compiler")


def test_not_for_tensors_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    assert not dispatch.usable(torch.zeros(1))


def pass_in_a_process(*tests: str, **environment: str) -> None:
    """Run tests in a process of their own, with other environment variables; none is skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # Imports begin in the working folder: the gpt2 of this checkout is tested, not one that is installed
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_in_the_interpreter():
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    pass_in_a_process("tests/support/kernels_interpreted.py", TRITON_INTERPRET="1")


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Kernels that would be launched, compiled for an H100 and not run."""
    pytest.importorskip("triton", reason=WITHOUT_TRITON)
    if dispatch.interpreted():
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made, run = [], JITFunction.run
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: -1,  # none that a kernel could later run on
        get_current_stream=lambda device=None: 0,
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", lambda *args, **how: made.append(run(*args, **how | {"warmup": True})))
    monkeypatch.setattr(driver, "_active", device)
    return made


def attend_compiles(compiled, k, v, query) -> None:
    from gpt2.compression.cache import triton_attention

    triton_attention.attend(k, v, query, None, 1.0)
    framed = ["absorb_frames"] * (k.compressor.frame is not None)
    assert [kernel.name for kernel in compiled] == [*framed, "attend_tiles", "merge_splits"]
    assert all(kernel.asm["cubin"] and kernel.metadata.shared <= SHARED_MEMORY for kernel in compiled)


@pytest.mark.parametrize(("pair", "dtype"), sampled(covering(COMPILED, DTYPES), 1))
def test_attention_compiles(pair, dtype, compiled):
    d, heads = 64, 2
    x = torch.randn(1, heads, 130, d).to(dtype)
    stores = []
    for name in pair:
        quantizer = QUANTIZERS[name] if name != "mixed_fixed" else MixedFixed(4.0, torch.full((heads, d), 3))
        stores.append(filled(Compressor(quantizer), (4, 0), [x]))
    attend_compiles(compiled, *stores, x[:, :, :1].repeat_interleave(4, dim=1))
    assert "wgmma" in compiled[0].asm["ptx"]  # tensor cores


def test_attention_compiles_with_a_query_for_every_block_of_keys(compiled):
    """K and V of a head in one code."""
    E = torch.linalg.qr(torch.randn(1, 64, 64)).Q
    turned = JointTransform(E, E.mT, torch.zeros(1, 64), Rotary(torch.logspace(0, -3, 16)), 64)
    x = torch.randn(1, 2, 130, 32).bfloat16()
    held = filled(Compressor(QUANTIZERS["int4_channel"], turned), (4, 0), [x])
    attend_compiles(compiled, Half(held, 0), Half(held, 1), x[:, :, :1].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("dtype", sampled(DTYPES, 1))
def test_attention_compiles_with_all_that_a_call_may_have(dtype, compiled):
    """A basis for each head, rows with left padding and so a mask, soft capping and sink logits."""
    from gpt2.compression.cache import triton_attention

    x, stores = torch.randn(2, 2, 130, 16).to(dtype), []
    E = torch.linalg.qr(torch.randn(2, 16, 16)).Q
    for _ in range(2):
        held = TokenStore(Compressor(QUANTIZERS["int4_channel"], Transform(E, E.mT, torch.zeros(2, 16))), 4, 0)
        held.own_sinks.set_padding(torch.tensor([0, 50]))
        held.prepare(x, "test")
        held.append(x)
        stores.append(held)
    triton_attention.attend(*stores, x[:, :, :1], None, 1.0, softcap=5.0, sinks=torch.zeros(2))
    assert [kernel.name for kernel in compiled] == ["attend_tiles", "merge_splits"]
    assert all(kernel.asm["cubin"] for kernel in compiled)


ENCODED = ("mixed", "int4", "int8", "int8_channel", "int4_channel")  # of any width, by channel and by token


@pytest.mark.parametrize(("dtype", "name"), sampled(covering(DTYPES, ENCODED), 1))
def test_quantizing_compiles(name, dtype, compiled):
    from gpt2.compression.kernels import triton_quantize

    rank = 80 if ALL else 16  # longer ones take longer to compile
    triton_quantize.quantized(QUANTIZERS[name].encoding(rank), torch.randn(1, 2, 128, rank).to(dtype))
    assert len(compiled) == (3 if name == "mixed" else 1) and all(kernel.asm["cubin"] for kernel in compiled)


# --- of the CPU


# Highest first, after `native`, which is the highest but for tuning. Each other takes a build: of them `make test` has
# the one of most other machines, where this machine has a higher one
_, *NAMED = cpu.instruction_sets()
LOWER = NAMED[1:] or NAMED


def test_kernels_are_built_where_there_is_a_compiler():
    """Else all tests of them are skipped, and it isn't noticed that this PyTorch doesn't compile them."""
    compiler = shutil.which("g++")
    if not compiler or int(subprocess.check_output([compiler, "-dumpversion"]).split(b".")[0]) < 12:
        pytest.skip("no compiler on this machine that can build the kernels")
    assert cpu.loaded()


@pytest.mark.parametrize("name", LOWER if ALL else [name for name in LOWER if name == "avx2"])
def test_every_instruction_set(name):
    """As the other tests compare the processor's own with PyTorch: a process loads one build."""
    if not cpu.loaded():
        pytest.skip("no compiler on this machine")
    direct = ("scores_and_sums", "a_decode_step_absorbs_queries_for_every_frame")
    tests = [f"tests/compression/cache/test_direct_attention.py::test_{test}" for test in direct]
    tests += ["tests/compression/cache/test_attention.py::test_sixteen_bit_models"]
    stored = ("mixed_widths_as_pytorch_does", "integers_by_token_as_pytorch_does")
    tests += [f"tests/compression/codecs/test_numerics.py::test_kernels_store_{test}" for test in stored]
    without_kernels = "PyTorch or (sixteen_bit and False)"  # as those parametrize their fixture `kernels`
    pass_in_a_process("-k", f"not ({without_kernels})", *tests, KV_CPU_ISA=name)


@pytest.mark.parametrize("wanted", ["avx2", "AVX2", "native,avx2"])
def test_an_instruction_set_that_isnt_there(wanted, monkeypatch):
    monkeypatch.setattr(cpu, "processor_features", lambda: "flags : fpu sse2")
    monkeypatch.setenv("KV_CPU_ISA", wanted)
    with pytest.raises(PluginError, match=f"^KV_CPU_ISA='{wanted}': this machine has native, generic$"):
        cpu.loaded.__wrapped__()


def test_a_build_in_a_folder_that_cant_be_written_is_used(monkeypatch, caplog, tmp_path):
    if not cpu.loaded():
        pytest.skip("no compiler on this machine")
    monkeypatch.setattr(cpu, "FileLock", Mock(side_effect=PermissionError("read-only")))
    assert cpu.loaded.__wrapped__() and not caplog.records
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not cpu.loaded.__wrapped__() and "read-only" in caplog.text


def test_a_build_that_this_system_cant_load_is_done_without(monkeypatch, caplog):
    """As where a home folder is shared with a system of a newer C++ library."""
    if not cpu.loaded():
        pytest.skip("no compiler on this machine")
    monkeypatch.setattr(torch.ops, "load_library", Mock(side_effect=OSError("GLIBCXX_3.4.32 not found")))
    assert not cpu.loaded.__wrapped__() and "GLIBCXX_3.4.32 not found" in caplog.text


def test_every_instruction_set_has_its_build(monkeypatch):
    named = [cpu.build_name(flags) for flags in cpu.instruction_sets().values()]
    assert len(set(named)) == len(named) > 1
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.instruction_sets() == {"native": ["-march=native"], "generic": []}


@pytest.mark.parametrize("basis", ["each head", "one for all", "K and V"])
@pytest.mark.parametrize("name", ["mixed", "mixed_fixed"])
def test_bit_planes_are_reconstructed_as_by_pytorch(name, basis):
    """By a kernel where there is one, also of some blocks alone."""
    heads, d, generator = 4, 12, torch.Generator().manual_seed(0)
    groups, width = {"each head": (heads, d), "one for all": (1, d), "K and V": (2, 2 * d)}[basis]
    E = torch.linalg.qr(torch.randn(groups, width, width, generator=generator)).Q
    matrices = E, E.mT.contiguous(), torch.randn(groups, width, generator=generator)
    rotary = Rotary(torch.logspace(0, -1, d // 2))
    transform = JointTransform(*matrices, rotary=rotary) if basis == "K and V" else Transform(*matrices)
    coded = 2 if basis == "K and V" else heads  # groups of codes
    widths = torch.arange(coded * width).reshape(coded, width) % 8
    own = Compressor(Mixed(5.0) if name == "mixed" else MixedFixed(5.0, widths), transform)
    x = torch.randn(2, heads, 4 * 64, d, generator=generator) + 3
    encoded = own.compress(x, 64)
    for dtype in (torch.float32, torch.float16):
        expected = own.reconstruct(encoded, d, dtype, 64)
        found = dispatch.reconstruct(own, encoded, d, dtype, 64)
        assert found.dtype == dtype and found.shape == x.shape
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-4)
        later = {field: stored[:, :, 1:3] for field, stored in encoded.items()}
        assert torch.equal(dispatch.reconstruct(own, later, d, dtype, 128), found[:, :, 64:192])
    with default_dtype(torch.bfloat16):
        assert torch.equal(dispatch.reconstruct(own, encoded, d, torch.float16, 64), found)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_shares_are_float32_whatever_the_default_dtype(default):
    triton_planes = pytest.importorskip("gpt2.compression.kernels.triton_planes", reason=WITHOUT_TRITON)
    triton_planes.share_factors.cache_clear()
    with default_dtype(default):
        factors = triton_planes.share_factors(QUANTIZERS["mixed"].encoding(16), torch.device("cpu"))
    triton_planes.share_factors.cache_clear()
    assert factors.dtype == torch.float32


def test_bit_planes_read_the_same_whatever_the_default_dtype():
    quantizer = QUANTIZERS["mixed"].at(10.0)
    z = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 3, 16)
    encoded = quantizer.quantize(z)
    expected = quantizer.dequantize(encoded, 16)
    with default_dtype(torch.bfloat16):
        found, again = quantizer.dequantize(encoded, 16), quantizer.quantize(z)
    assert all(torch.equal(again[name], part) for name, part in encoded.items())
    assert torch.equal(found, expected)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that would be launched, and their tensors. None computes anything."""
    module = pytest.importorskip("gpt2.compression.cache.triton_attention", reason=WITHOUT_TRITON)
    found = []

    class Kernel:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **how: found.append((self.name, [x for x in args if isinstance(x, torch.Tensor)]))

    for where, name in ((module, "attend_tiles"), (module, "merge_splits"), (module.triton_frames, "absorb_frames")):
        monkeypatch.setattr(where, name, Kernel(name))
    return found


@pytest.mark.parametrize("tokens", [200, 400, 700])
def test_partial_results_are_aligned_at_every_number_of_splits(tokens, launched):
    """Else Triton compiles kernels a second time, for seconds, where a cache reaches such a number."""
    from gpt2.compression.cache import triton_attention

    held = filled(Compressor(QUANTIZERS["int8"]), (4, 0), [torch.randn(1, 1, tokens, 16)])
    triton_attention.attend(held, held, torch.randn(1, 3, 1, 16), None, 1.0)
    assert len(launched) == 2 and all(x.data_ptr() % 16 == 0 for _, tensors in launched for x in tensors)


class Operations(TorchDispatchMode):
    """Operations of PyTorch that compute or copy, each of which a GPU would have to be told of."""

    FREE = {"view", "_unsafe_view", "as_strided", "slice", "expand", "select", "transpose", "alias", "detach",
            "empty", "new_empty", "empty_like"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name not in self.FREE:
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("codec", ["int8_channel", "int4 in parts", "framed"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_decode_step_is_its_kernels_alone(codec, mask, launched):
    """Every other operation would take the host's time in each layer."""
    from gpt2.compression.cache import triton_attention

    x = torch.randn(2, 4, 300, 32).bfloat16()
    if codec == "framed":
        E = torch.linalg.qr(torch.randn(1, 128, 128)).Q
        turned = JointTransform(E, E.mT, torch.zeros(1, 128), Rotary(torch.logspace(0, -3, 16)), 64)
        held = filled(Compressor(QUANTIZERS["mixed"], turned), (4, 0), [x])
        k, v = Half(held, 0), Half(held, 1)
    else:
        chunks = [x] if codec == "int8_channel" else list(x.split(100, dim=2))
        k, v = (filled(Compressor(QUANTIZERS[codec.split()[0]]), (4, 0), chunks) for _ in range(2))
    heads = k.sinks.shape[1]
    query, seen = torch.randn(2, 2 * heads, 1, 32).bfloat16(), torch.ones(2, 1, 1, 300, dtype=torch.bool)
    for step in range(2):  # the first makes what later ones share
        launched.clear()
        with torch.no_grad(), Operations() as operations:
            triton_attention.attend(k, v, query, seen if mask else None, 1.0)
        names = [name for name, _ in launched if name != "attend_tiles"]
        assert names == ["absorb_frames"] * (codec == "framed") + ["merge_splits"]
        assert not step or not operations.found


def test_a_kernel_that_does_not_compile_is_left_to_pytorch(monkeypatch, caplog):
    triton_attention = pytest.importorskip("gpt2.compression.cache.triton_attention", reason=WITHOUT_TRITON)
    from triton.runtime.errors import PTXASError

    def fails(*args):
        raise PTXASError("register allocation failed")

    monkeypatch.setattr(triton_attention, "attend_stored", fails)
    monkeypatch.setattr(triton_attention, "without_kernel", set())
    store = TokenStore(Compressor(QUANTIZERS["int8"]), 4, 0)
    x = torch.randn(1, 1, 100, 24)
    store.prepare(x, "test")
    store.append(x)
    for _ in range(2):
        assert triton_attention.attend(store, store, torch.randn(1, 3, 1, 24), None, 1.0) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"], "said once, and not tried again"


def test_quantization_that_does_not_compile_is_left_to_pytorch(monkeypatch, caplog):
    """As on a GPU that is newer than Triton's assembler knows."""
    triton_quantize = pytest.importorskip("gpt2.compression.kernels.triton_quantize", reason=WITHOUT_TRITON)
    from triton.runtime.errors import PTXASError

    def fails(*args):
        raise PTXASError("Value 'sm_999' is not defined")

    encoding, z = QUANTIZERS["int8"].encoding(24), torch.randn(1, 1, 64, 24)
    monkeypatch.setitem(triton_quantize.KERNELS, type(encoding), fails)
    monkeypatch.setattr(triton_quantize, "without_kernel", set())
    monkeypatch.setattr(dispatch, "usable", lambda x: True)
    for _ in range(2):
        found, expected = dispatch.quantize(QUANTIZERS["int8"], z), QUANTIZERS["int8"].quantize(z)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [r.levelname for r in caplog.records] == ["WARNING"], "said once, and not tried again"
