"""Calibrations of models whose layers differ: in shape, in whether they keep K and V, in windows, latent attention."""

import functools
import hashlib
from pathlib import Path

import pytest
import torch
from tiny import windows, word_text, word_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from gpt2.common import tensor_file
from gpt2.common.errors import BadArtefact, PluginError
from gpt2.compression.calibration import fisher
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.file import load_calibration, save_calibration
from gpt2.compression.calibration.fisher import collect_fisher, detect_rotary
from gpt2.compression.calibration.fit import Calibration
from gpt2.compression.calibration.stacks import Stacks
from gpt2.compression.calibration.stand_in import stand_in
from gpt2.compression.calibration.statistics import collect, tapped
from gpt2.compression.codecs import BASES, QUANTIZERS, Compressor, multi_head_bases
from gpt2.compression.settings import Setting, build, compressors_for, uniform
from gpt2.experiments.miniatures import tiny_family
from gpt2.models.attention_function import wrapped_attention
from gpt2.models.geometry import FULL, LINEAR, NOTHING, SLIDING, Geometry, LayerGeometry, Shape
from gpt2.models.loading import LoadedModel, wrap
from gpt2.text.sources import by_position

SINKS = 4
TEXT = by_position("words", "words.txt", word_text(3000))
COMMON = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "tie_word_embeddings": False, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
CONFIGS = {
    # K is a latent of 16 channels, V the rotary key of 8
    "deepseek_v3": {
        "num_hidden_layers": 3, "first_k_dense_replace": 3, "num_key_value_heads": 4, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    # K is wider than V, and some layers have more heads
    "mimo_v2_flash": {
        "num_hidden_layers": 2, "head_dim": 24, "v_head_dim": 16, "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    # The last two layers read K and V of the first two
    "gemma4_text": {
        "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 16, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
    },
}  # fmt: skip
MODELS = ("gemma4_text", "qwen3_next", "inkling_text", "mimo_v2_flash", "deepseek_v3")
ONE_SHAPE = ("gemma4_text", "qwen3_next", "inkling_text")  # K and V of every layer have the same
MIXED = QUANTIZERS["mixed"]


@functools.cache
def model_of(family: str) -> LoadedModel:
    if family not in CONFIGS:
        return wrap(tiny_family(family), word_tokenizer(), family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | CONFIGS[family]))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.2)
    return wrap(model, word_tokenizer(), family)


@functools.cache
def made(family: str) -> Calibration:
    return calibrate(model_of(family), TEXT, rank=4, codec="fisher", samples=3, seq_len=150)


@functools.cache
def vectors(family: str) -> dict[int, tuple[Tensor, Tensor]]:
    """K and V of each layer that has any, [1, H, 128, d] from position 4 on."""
    found = {}

    def record(layer: int, k: Tensor, v: Tensor) -> None:
        found[layer] = k[:, :, SINKS : SINKS + 128], v[:, :, SINKS : SINKS + 128]

    loaded = model_of(family)
    with torch.no_grad():
        loaded.model.base_model(input_ids=windows(1, 140), past_key_values=tapped(loaded.model, record))
    return found


def shapes_of(parts) -> list:
    return [None if part is None else tuple(part.shape) for part in parts]


def same(a, b) -> bool:
    """Whether two records have the same tensors and plain values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


# --- statistics


class Retaining(DynamicCache):
    """transformers' own cache, which notes K and V as it gets them and keeps their gradients."""

    def update(self, k, v, layer_idx, *args, **kwargs):
        self.kept = getattr(self, "kept", {}) | {layer_idx: (k, v)}
        for x in (k, v):
            x.retain_grad()
        return super().update(k, v, layer_idx, *args, **kwargs)


def direct(loaded: LoadedModel, batches: Tensor) -> dict[int, list[Tensor]]:
    """k, v and their gradients behind the sinks, [H, T, d] in float64, by layer."""
    found: dict[int, list[list[Tensor]]] = {}
    embeddings = loaded.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    for number, tokens in enumerate(batches):
        generator = torch.Generator().manual_seed(fisher.SEED_STEP * number)
        cache = Retaining(config=loaded.model.config)
        logits = loaded.model(tokens[None], past_key_values=cache, use_cache=True).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        (-logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()).backward()
        for layer, (k, v) in cache.kept.items():
            parts = [x[0, :, SINKS:].detach().double() for x in (k, v, k.grad, v.grad)]
            found.setdefault(layer, []).append(parts)
    hook.remove()
    return {layer: [torch.cat(own, dim=1) for own in zip(*parts, strict=True)] for layer, parts in found.items()}


@pytest.mark.parametrize("family", MODELS)
def test_statistics_are_of_every_layer_in_its_own_shape(family):
    loaded, batches = model_of(family), windows(3, 40)
    statistics = collect(loaded, batches, SINKS)
    gathered = collect_fisher(loaded, batches, statistics, SINKS, {"grouped": BASES["grouped"]})["grouped"]
    expected = direct(loaded, batches)
    assert list(expected) == loaded.geometry.attention
    for side, place in (("k", 0), ("v", 1)):
        moments = getattr(statistics, side)
        shapes = [layer.side(side) for layer in loaded.geometry.layers]
        assert shapes_of(moments.mean) == [shape and (shape.heads, shape.width) for shape in shapes]
        for layer, parts in expected.items():
            x, g = parts[place], parts[place + 2]
            centred = x - x.mean(1, keepdim=True)
            assert moments.count[layer] == 3 * (40 - SINKS)
            assert torch.allclose(moments.mean[layer], x.mean(1), rtol=1e-4, atol=1e-5)
            assert close(moments.scatter[layer], centred.mT @ centred)
            assert close(moments.metrics["fisher"][layer], g.mT @ g / g.shape[1], 1e-3) and g.norm() > 0
            basis = 2 * layer + place
            joined = x.transpose(0, 1).flatten(1)  # all heads of these layers fit into one group
            assert gathered.moments.mean[basis].shape == (1, joined.shape[1])
            assert torch.allclose(gathered.moments.mean[basis][0], joined.mean(0), rtol=1e-4, atol=1e-5)


def test_queries_of_layers_that_read_an_earlier_ones_keys_count_there():
    loaded, batches = model_of("gemma4_text"), windows(2, 40)
    assert [layer.kind for layer in loaded.geometry.layers] == [SLIDING, FULL, NOTHING, NOTHING]
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def tap(attention):
        def attend(module, query, *args, **kwargs):
            seen[module.layer_idx % 2].append(query[0, :, SINKS:].double())
            return attention(module, query, *args, **kwargs)

        return attend

    metric = collect(loaded, batches, SINKS).k.metrics["attention"]
    with torch.no_grad(), wrapped_attention(loaded.model, tap):
        for tokens in batches:
            loaded.model(tokens[None], use_cache=True)
    for layer, queries in seen.items():
        q = torch.cat(queries, dim=1)
        assert len(queries) == 4
        for head in range(2):
            mine = q[2 * head : 2 * head + 2].flatten(0, 1)
            assert close(metric[layer][head], mine.mT @ mine / len(mine))
    assert metric[2:] == [None, None]


def test_latent_attention_has_no_attention_metric_and_says_so():
    found = made("deepseek_v3")
    assert set(found.statistics.k.metrics) == set(found.statistics.v.metrics) == {"fisher"}
    with pytest.raises(PluginError, match="codec attention needs statistics that this calibration doesn't have"):
        found.transform("k", 1, 4, "attention")
    metrics = found.statistics.k.metrics
    with pytest.raises(PluginError, match="layer 1: codec fisher has no metric there"):
        found.statistics.k.metrics = {"fisher": [metrics["fisher"][0], None, metrics["fisher"][2]]}
        BASES["fisher"].fit(found.statistics.k, 1)
    found.statistics.k.metrics = metrics


def test_keys_that_are_wider_than_values_have_an_attention_metric():
    metrics = [getattr(made("mimo_v2_flash").statistics, side).metrics["attention"] for side in "kv"]
    assert [shapes_of(metric) for metric in metrics] == [[(2, 24, 24), (4, 24, 24)], [(2, 16, 16), (4, 16, 16)]]


def test_rotary_positions_are_those_of_each_layers_width():
    rotary = detect_rotary(model_of("gemma4_text"), windows(1, 100)[0], SINKS)
    assert [2 * len(own.frequencies) for own in rotary[:2]] == [8, 16]
    assert [own.layout for own in rotary[2:]] == ["none"] * 2
    assert [own.layout for own in detect_rotary(model_of("qwen3_next"), windows(1, 100)[0], SINKS)] == [
        "none", "none", "half", "half",
    ]  # fmt: skip


def test_checkpointing_is_refused_where_attention_reads_something_else():
    for family in ("deepseek_v3", "gemma4_text"):
        loaded = model_of(family)
        with pytest.raises(PluginError, match="leave --gradient-checkpointing out"):
            collect_fisher(loaded, windows(1, 40), None, SINKS, {}, checkpointing=True)


def test_checkpointing_beside_recurrent_layers_gives_the_same():
    loaded, batches = model_of("qwen3_next"), windows(2, 40)
    found = []
    for checkpointing in (False, True):
        statistics = collect(loaded, batches, SINKS)
        collect_fisher(loaded, batches, statistics, SINKS, {}, checkpointing=checkpointing)
        found.append(statistics.v.metrics["fisher"][2])
    assert close(*found)


# --- files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("family", MODELS)
def test_what_is_loaded_is_what_was_saved(family, suffix, tmp_path):
    calibration = made(family)
    path = save_calibration(calibration, tmp_path / f"c{suffix}")
    back = load_calibration(path)
    assert back.geometry == calibration.geometry == model_of(family).geometry
    assert same(tensor_file.read(save_calibration(back, tmp_path / f"again{suffix}")), tensor_file.read(path))
    assert list(back.multi_head) == (["joint", "grouped", "framed"] if family in ONE_SHAPE else ["grouped"])
    for layer in calibration.geometry.attention:
        for side in "kv":
            for codec in ("pca", "fisher", *back.multi_head):
                one, other = (c.transform(side, layer, codec=codec) for c in (calibration, back))
                assert torch.equal(one.E, other.E) and torch.equal(one.D, other.D) and torch.equal(one.mean, other.mean)
                bits = {c.quantizer(MIXED.at(3.0), side, layer, codec).bits for c in (calibration, back)}
                assert len(bits) == 1


@pytest.mark.parametrize("family", MODELS)
def test_a_compact_calibration_has_half_the_bytes_of_its_basis(family, tmp_path):
    whole = made(family)
    compact = calibrate(model_of(family), TEXT, rank=4, codec="grouped", samples=3, seq_len=150, compact=True)
    back = load_calibration(save_calibration(compact, tmp_path / "c.pt"))
    assert back.geometry == whole.geometry and back.statistics is None and list(back.multi_head) == ["grouped"]
    assert {E.dtype for E in tensor_file.read(tmp_path / "c.pt")["grouped"]["E"]} == {torch.float16}
    energies = back.energies()
    for layer, (keys, values) in vectors(family).items():
        assert close(back.transform("k", layer).E, whole.transform("k", layer, codec="grouped").E, 1e-2)
        k, v = compressors_for("kv", 8, None, back, quantizer="mixed")
        assert lost(k[layer], keys) < 0.06 and lost(v[layer], values) < 0.06
        assert torch.allclose(energies["v"][layer][..., -1], torch.ones(()).double())
    assert [own is None for own in energies["k"]] == [not layer.attends for layer in back.geometry.layers]


def test_a_file_has_a_stack_for_each_shape():
    """Its structure doesn't grow with the number of layers: readers reject files of much structure."""
    small, large = Shape(2, 8), Shape(1, 16)
    layers = [LayerGeometry(FULL, large, large), LayerGeometry(LINEAR), *[LayerGeometry(SLIDING, small, small, 8)] * 60]
    stacks = Stacks(Geometry(tuple(layers)))
    parts = [layer.k and torch.randn(layer.k.heads, layer.k.width) for layer in layers]
    stacked = stacks.stacked(parts)
    assert shapes_of(stacked) == [(1, 1, 16), (60, 2, 8)]
    assert same(stacks.apart(stacked), parts)
    holes = [*parts[:-1], None]
    assert stacks.stacked(stacks.whole(holes))[1] is None and stacks.whole(holes)[0] is parts[0]
    assert Stacks(Geometry.uniform(3, 2, 8)).stacked([torch.zeros(2, 8)] * 3).shape == (3, 2, 8), "as files had it"


LATENT, KEY = Shape(1, 16), Shape(1, 8)
RECORD = Geometry((LayerGeometry(FULL, LATENT, KEY),) * 3).record()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (RECORD[:2], "expected 3 layers, as num_layers says, found 2"),
        (RECORD + RECORD, "expected 3 layers"),
        ([RECORD[0] | {"v": None}, *RECORD[1:]], "layer 0: expected shapes of K and V for full_attention"),
        ([*RECORD[:2], RECORD[0] | {"type": "linear_attention"}], "layer 2: expected no shapes for linear_attention"),
        ([{"type": "dummy"}] * 3, "expected a layer that keeps K and V, found none"),
        ([record | {"k": [1, 12]} for record in RECORD], "expected head_dim 16"),
        ([record | {"k": [2, 16]} for record in RECORD], "expected num_kv_heads 1"),
        ([record | {"v": [1, 16]} for record in RECORD], "expected"),
        ([record | {"k": [1, 4096]} for record in RECORD], "expected a whole number from 1 to 1024"),
        ([{**RECORD[0], "type": "else"}] * 3, "expected 'full_attention' or"),
        ([{}] * 3, "expected"),
        (3, "expected a list"),
        (None, "expected a list"),
    ],
)
def test_layers_that_dont_fit_the_rest_of_a_file(layers, message, tmp_path):
    record = tensor_file.read(save_calibration(made("deepseek_v3"), tmp_path / "c.pt"))
    record["meta"]["layers"] = layers
    path = tensor_file.write(tmp_path / "bad.pt", record)
    with pytest.raises(BadArtefact, match=message) as error:
        load_calibration(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_stacks_that_dont_fit_the_layers(tmp_path):
    record = tensor_file.read(save_calibration(made("gemma4_text"), tmp_path / "c.pt"))
    own = record["statistics"]["k_mean"]
    for wrong in (own[:1], own[::-1], own[0], [own[0], None], [own[0], own[1] * float("nan")], [*own, own[0]]):
        path = tensor_file.write(tmp_path / "bad.pt", record | {"statistics": record["statistics"] | {"k_mean": wrong}})
        with pytest.raises(BadArtefact, match="field 'statistics.k_mean"):
            load_calibration(path)
    own = record["joint"]["E"]
    path = tensor_file.write(tmp_path / "bad.pt", record | {"joint": record["joint"] | {"E": own[::-1]}})
    with pytest.raises(BadArtefact, match=r"field 'joint.E\[0\]'"):
        load_calibration(path)


def test_a_joint_basis_in_a_file_of_latent_layers_is_rejected(tmp_path):
    record = tensor_file.read(save_calibration(made("deepseek_v3"), tmp_path / "c.pt"))
    path = tensor_file.write(tmp_path / "bad.pt", record | {"joint": record["grouped"]})
    with pytest.raises(BadArtefact, match="layer 0: codec joint needs K and V of one shape, got 1 x 16 and 1 x 8"):
        load_calibration(path)


# Of matrices, means and rotations as files of the first version have them
BUILT_IN = {
    "kv_grouped_smollm2-135m.pt": "793720620bf681da4967e1d56b66cb0f5bf2d955829d077560ebc0a1da72807b",
    "kv_joint_smollm2-135m.pt": "5527e966360b3d49b6a0d41f6d46626b5821ea8b8723e147eea325f018a50bd0",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_files_from_before_layers_could_differ(name, tmp_path):
    """Transforms are the same, and what is written is what that version wrote and reads."""
    path = Path(__file__).parents[3] / "results" / "calibrations" / name
    calibration = load_calibration(path)
    assert calibration.geometry == Geometry.uniform(30, 3, 64)
    digest = hashlib.sha256()
    for layer in range(30):
        for side in "kv":
            transform = calibration.transform(side, layer)
            parts = [transform.E, transform.mean]
            parts += [transform.rotary.frequencies] if transform.joint else []
            for part in parts:
                digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest() == BUILT_IN[name]
    again = save_calibration(calibration, tmp_path / "again.pt")
    assert same(tensor_file.read(again), tensor_file.read(path))


# --- compressors


def lost(compressor: Compressor, x: Tensor) -> float:
    """Relative error of x [1, H, T, d] compressed and reconstructed."""
    back = compressor.reconstruct(compressor.compress(x, SINKS), x.shape[-1], x.dtype, SINKS)
    assert back.shape == x.shape
    return float((back - x).norm() / x.norm())


SETTINGS = {
    "rotated": (Setting("pca", 1024), 1e-4),
    "pca, 8 bits": (Setting("pca", None, 8), 0.05),
    "hadamard, 8 bits": (Setting("hadamard", None, 8, "int8_channel"), 0.02),
    "identity, 8 bits": (Setting(bits=8), 0.02),
    "grouped": (Setting("grouped"), 1e-3),
    "grouped, 8 bits": (Setting("grouped", None, 8, "mixed"), 0.06),
    "grouped, 8 bits, fixed": (Setting("grouped", None, 8, "mixed_fixed"), 0.1),
    "joint": (Setting("joint"), 1e-3),
    "joint, 8 bits": (Setting("joint", None, 8, "mixed"), 0.06),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", SETTINGS)
def test_compressors_of_every_layer(family, name, tmp_path):
    calibration = load_calibration(save_calibration(made(family), tmp_path / "c.pt"))
    geometry, (setting, most) = calibration.geometry, SETTINGS[name]
    if setting.codec in multi_head_bases() and setting.codec not in calibration.multi_head:
        with pytest.raises(PluginError, match=r"layer 0: codec joint needs K and V of one shape, got .*: use grouped"):
            compressors_for("kv", setting.bits, None, calibration, codec="joint", quantizer=setting.quantizer)
        return
    calibration.meta["rank"] = 1024  # all coordinates of every layer
    rank = None if setting.rank == 1024 else setting.rank
    k, v = compressors_for(
        "kv", setting.bits, None, calibration, rank=rank, codec=setting.codec, quantizer=setting.quantizer
    )
    assert [c is None for c in k] == [c is None for c in v] == [not layer.attends for layer in geometry.layers]
    for layer, (keys, values) in vectors(family).items():
        if k[layer].joint:
            assert k[layer] is v[layer] and lost(k[layer], torch.cat((keys, values), dim=1)) < most
        else:
            assert lost(k[layer], keys) < most and lost(v[layer], values) < most
            assert k[layer].rank(keys.shape[-1]) % keys.shape[-1] == 0, "all coordinates of its own width"


def test_only_layers_with_k_and_v_have_settings():
    geometry = model_of("qwen3_next").geometry
    setting = Setting(bits=8)
    assert uniform("kv", geometry, setting) == {side: [None, None, setting, setting] for side in "kv"}
    assert uniform("v", 2, setting) == {"k": [None, None], "v": [setting, setting]}
    k, v = build({"k": [None] * 4, "v": [None] * 4}, geometry)
    assert k[:2] == v[:2] == [None, None] and all(c.exact for c in (*k[2:], *v[2:]))
    with pytest.raises(PluginError, match=r"layer 1: it keeps no K and V \(linear_attention\)"):
        build({"k": [None] * 4, "v": [None, setting, None, None]}, geometry)
    with pytest.raises(PluginError, match="the plan has 2 and 2 settings of K and V, but the cache has 4 layers"):
        build({"k": [None] * 2, "v": [None] * 2}, geometry)


def test_a_rank_that_a_layer_is_too_narrow_for_is_named():
    calibration = made("gemma4_text")
    with pytest.raises(PluginError, match="layer 0, K: rank 16 is out of range: codec pca has 8 coordinates there"):
        compressors_for("kv", 16, None, calibration, rank=16, codec="pca")
    k, _ = compressors_for("kv", 16, None, calibration, rank=16, codec="pca", layers=[1])
    assert k[0].exact and k[1].transform.rank == 16
    with pytest.raises(PluginError, match="layer 0, V: rank 9 is out of range: codec hadamard"):
        build(uniform("v", calibration.geometry, Setting("hadamard", 9)), calibration.geometry)


def test_layers_of_one_width_share_a_fixed_transform():
    layers = [LayerGeometry(FULL, Shape(2, width), Shape(2, width)) for width in (8, 16, 8)]
    k, v = build(uniform("kv", geometry := Geometry(tuple(layers)), Setting("hadamard", None, 8)), geometry)
    assert k[0] is k[2] is v[0] and k[1] is v[1] and k[1].transform.rank == 16


def test_joint_where_k_and_v_differ_is_rejected_layer_by_layer():
    calibration = made("deepseek_v3")
    message = "layer 0: codec joint needs K and V of one shape, got 1 x 16 and 1 x 8: use grouped"
    with pytest.raises(PluginError, match=message):
        calibrate(model_of("deepseek_v3"), TEXT, rank=4, codec="joint", samples=2, seq_len=80)
    with pytest.raises(PluginError, match=message):
        calibration.transform("k", 2, None, "joint")
    with pytest.raises(PluginError, match=message.replace("layer 0", "layer 2")):
        build(uniform("kv", calibration.geometry, Setting("joint"), layers=[2]), calibration.geometry, calibration)


def test_calibrations_on_noise_for_models_without_weights():
    for family in MODELS:
        calibration = stand_in(model_of(family))
        assert calibration.geometry == model_of(family).geometry
        for codec in ("pca", *calibration.multi_head):
            k, v = compressors_for("kv", 16, None, calibration, codec=codec)
            for layer, (keys, values) in vectors(family).items():
                if k[layer].joint:
                    assert lost(k[layer], torch.cat((keys, values), dim=1)) < 1e-3
                else:
                    assert lost(k[layer], keys) < 1e-3 and lost(v[layer], values) < 1e-3
        bits = [own.quantizer(MIXED.at(3.0), layer).bits for own in calibration.multi_head.values()
                for layer in calibration.geometry.attention]  # fmt: skip
        assert all(1 < b < 5 for b in bits)


def test_groups_of_heads_are_chosen_layer_by_layer():
    layers = (LayerGeometry(FULL, Shape(4, 192), Shape(4, 128)), LayerGeometry(LINEAR),
              LayerGeometry(FULL, Shape(1, 512), Shape(1, 64)))  # fmt: skip
    bases = BASES["grouped"].shape(Geometry(layers)).layers
    assert [base.k for base in bases] == [
        Shape(4, 192), Shape(2, 256), None, None, Shape(1, 512), Shape(1, 64),
    ]  # fmt: skip
    assert BASES["joint"].shape(Geometry.uniform(2, 8, 128)) == Geometry.uniform(2, 4, 512)


# --- bits where they count


def test_windowed_layers_get_more_bits_at_a_context_length():
    calibration = made("mimo_v2_flash")
    assert [layer.window for layer in calibration.geometry.layers] == [None, 16]

    def bits(context_length: int | None) -> list[float]:
        k, v = compressors_for(
            "kv", 3, None, calibration, codec="grouped", quantizer="mixed", context_length=context_length
        )
        return [c.quantizer.bits for layer in (0, 1) for c in (k[layer], v[layer])]

    alike, short, long = bits(None), bits(10), bits(2000)
    assert alike == short, "no layer has forgotten a token"
    assert sum(long[2:]) > sum(alike[2:]) and sum(long[:2]) <= sum(alike[:2]) + 1e-9
