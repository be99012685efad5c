"""Models: loaded from what is there, measured right, refused with a reason and before the work."""

import json

import pytest
import torch
from tiny import FAMILIES, SHAPE, tiny_loaded, tiny_model, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from gpt2.common.errors import PluginError, UnsupportedModel
from gpt2.models import loading, probe
from gpt2.models.embedded import EMBEDDED
from gpt2.models.geometry import Geometry
from gpt2.models.loading import load, wrap

# Family to layers, KV heads, head_dim
GEOMETRY = {
    "llama": (3, 2, 12),
    "qwen2": (3, 2, 12),
    "qwen3": (3, 2, 16),
    "mistral": (3, 2, 12),
    "gemma3_text": (3, 2, 20),
    "gpt2": (3, 4, 12),
    "phi": (3, 2, 12),
    "opt": (3, 4, 12),
    "gpt_neox": (3, 4, 12),
}


def saved(folder, model=None):
    (tiny_model() if model is None else model).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "Tiny Llama")


# --- loading


def test_a_local_folder(llama_folder):
    loaded, original = load(str(llama_folder)), tiny_loaded("llama")
    assert loaded.spec == str(llama_folder) and loaded.slug == "tiny-llama" and loaded.max_context == 512
    assert loaded.geometry == original.geometry and loaded.fingerprint == original.fingerprint
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    tokens = loaded.tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    assert tokens.tolist() == [[5, 6, 7]] and torch.equal(loaded.model(tokens).logits, original.model(tokens).logits)


def test_a_relative_folder(llama_folder, monkeypatch):
    monkeypatch.chdir(llama_folder.parent)
    assert load("./Tiny Llama").geometry == load("Tiny Llama/").geometry == Geometry.uniform(3, 2, 12)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_the_dtype_is_asked_for(llama_folder, dtype, expected):
    assert load(str(llama_folder), device="cpu", dtype=dtype).model.dtype == expected


@pytest.mark.parametrize("name", ["./empty", "/no/such/folder", "./none", "~/none", ""])
def test_a_folder_without_a_model_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PluginError, match=f"no model in '{name}': expected a folder with a config.json"):
        load(name)


def one_line(spec: str, *words: str) -> None:
    with pytest.raises(PluginError) as error:
        load(spec)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in (spec, *words)), message


@pytest.mark.parametrize("spec", ["nobody/no-such-model", "a b/c", "a/b/c"])
def test_an_unknown_hub_id_is_one_line(spec):
    one_line(spec, f"can't load model '{spec}': ", EMBEDDED, "a local folder", "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("typo", ["smollm2-135", "SmolLM2-135M", "smolm2-135m"])
def test_a_typo_of_the_embedded_name_suggests_it(typo):
    one_line(typo, f"Did you mean {EMBEDDED!r}?")


def test_a_folder_that_hides_a_hub_id_is_named(tmp_path, monkeypatch):
    """In a checkout `gpt2` is the package's folder, and transformers looks there before it asks the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    one_line("gpt2", "can't load model 'gpt2'", "A folder named gpt2 hides a hub id of that name")


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGE = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "config is not JSON": write("config.json", b"{"),
    "config is empty": write("config.json", b"{}"),
    "unknown architecture": change_config(model_type="zzz"),
    "tokenizer is not JSON": write("tokenizer.json", b"{"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "weights cut off": write("model.safetensors", b"\x10\0\0\0\0\0\0\0{}"),
    "weights of another shape": change_config(hidden_size=96),
    "config of a wrong type": change_config(num_hidden_layers="3"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_line(tmp_path, case):
    DAMAGE[case](saved(tmp_path))
    one_line(str(tmp_path), "can't load model", *(["no file named model.safetensors"] if case == "no weights" else []))


@pytest.mark.parametrize("device", ["tpu", "", "cuda:x", "gpu", "cpu:cpu"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(PluginError, match=f"unknown device '{device}': use auto, cpu, cuda or cuda:N"):
        load("never looked at", device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_on_a_machine_without_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(PluginError, match=rf"device '{device}' is not there \(0 CUDA devices found\): use auto or cpu"):
        load("never looked at", device=device)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_is_not_supported_is_refused(device):
    with pytest.raises(PluginError, match="use auto, cpu, cuda or cuda:N"):
        loading.resolve_device(device)


@pytest.mark.parametrize("available", [True, False])
def test_auto_takes_cuda_where_there_is_one(available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    device = loading.resolve_device("auto")
    assert device.type == ("cuda" if available else "cpu")
    assert loading.resolve_dtype("auto", device) == ("auto" if available else torch.float32)


def test_an_unknown_dtype_lists_those_that_exist(llama_folder):
    with pytest.raises(PluginError, match="unknown dtype 'int8': use auto, float32, float16, bfloat16"):
        load(str(llama_folder), dtype="int8")


def test_a_context_longer_than_trained_is_refused():
    loaded = tiny_loaded("llama")
    loaded.require_context(512)
    with pytest.raises(PluginError, match="513 tokens is longer than the 512 that tiny-llama .* --seq-len 512"):
        loaded.require_context(513)


# --- geometry and fingerprint


def test_every_family_is_expected():
    assert set(GEOMETRY) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry(family):
    """Read off the cache: grouped queries, and a head_dim that isn't hidden / heads."""
    geometry = tiny_loaded(family).geometry
    assert geometry == Geometry.uniform(*GEOMETRY[family])
    L, H, d = GEOMETRY[family]
    assert geometry.bytes_per_token() == 2 * L * H * d * 2 and geometry.bytes_per_token(4) == 2 * L * H * d * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_and_reloaded_model_has_the_same_fingerprint(family, tmp_path):
    model = tiny_model(family)
    back = load(str(saved(tmp_path, model)))
    assert back.fingerprint == probe.fingerprint(model) and back.geometry == Geometry.uniform(*GEOMETRY[family])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fingerprint_depends_on_weights_but_not_on_dtype(dtype):
    """A fine-tune has its base model's config: taken for it, it would get the other's calibration and figures."""
    a, b = tiny_loaded("llama"), tiny_loaded("llama", seed=1)
    assert a.fingerprint != b.fingerprint
    assert a.fingerprint == wrap(a.model.to(dtype), a.tokenizer, "x").fingerprint


CHANGES = [
    {"num_hidden_layers": 2}, {"hidden_size": 96}, {"num_attention_heads": 2}, {"num_key_value_heads": 1},
    {"num_key_value_heads": 4}, {"intermediate_size": 32}, {"vocab_size": 98}, {"head_dim": 16},
]  # fmt: skip


def test_another_shape_has_another_fingerprint():
    different = [tiny_model("llama", **change) for change in ({}, *CHANGES)] + [
        tiny_model("qwen2"),
        tiny_model("mistral"),
    ]
    assert len({probe.fingerprint(model) for model in different}) == len(different)


# --- refusals

UNSUPPORTED = {
    "t5": ({"d_model": 48, "d_kv": 12, "num_heads": 4}, "encoder-decoder"),
    "deepseek_v3": (SHAPE | {"kv_lora_rank": 8, "qk_rope_head_dim": 8}, "multi-head latent attention"),
    "minicpm3": (SHAPE, "multi-head latent attention"),
    "mamba": ({"hidden_size": 48, "num_hidden_layers": 2}, "without a plain KV cache"),
    "qwen3_next": (SHAPE, r"without a plain KV cache \(linear_attention\)"),
    "lfm2": (SHAPE | {"layer_types": ["conv", "full_attention", "conv"]}, r"without a plain KV cache \(conv\)"),
    "gemma3n_text": (SHAPE, "layers share one another's KV cache"),
    "vit": ({}, "no causal language model"),
    "llama": (SHAPE | {"use_cache": False}, "Model doesn't have past_key_values"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_models_are_refused_before_any_weight(family, tmp_path):
    """There is nothing but a config in the folder: weights that were looked for would be missed."""
    settings, reason = UNSUPPORTED[family]
    AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModel, match=rf"\({family}\) can't be compressed: .*{reason}.*; supported: decoder-only"
    ):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("bert", SHAPE, "bert returned no cache"),
        ("rwkv", {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2}, "rwkv's forward takes none"),
        ("openai-gpt", {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 4}, "openai-gpt's forward takes none"),
    ],
)
def test_what_only_the_model_tells_is_refused_when_it_is_there(family, settings, reason):
    """Their configs are registered as causal language models."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with pytest.raises(UnsupportedModel, match=f"Model doesn't have past_key_values: {reason}"):
        wrap(model, word_tokenizer(), family)


def test_use_cache_false_is_refused_in_memory_too():
    model = tiny_model("llama", use_cache=False)
    with pytest.raises(UnsupportedModel, match="use_cache is False"):
        wrap(model, word_tokenizer(), "mine")


def test_weights_that_are_not_in_the_files_are_not_made_up(tmp_path):
    """transformers fills missing layers with noise: half a model must not be measured as one."""
    change_config(num_hidden_layers=5)(saved(tmp_path))
    one_line(str(tmp_path), "its files lack", "model.layers.3.", "config.json")


def test_code_of_a_model_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    change_config(model_type="zzz", auto_map={"AutoConfig": "evil.Config"})(saved(tmp_path))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    one_line(str(tmp_path), "can't load model")
