"""Statistics and gradients: a Fisher metric that is right, from a model left as it was; and rotary positions found."""

import gc
from contextlib import nullcontext

import layer_shapes
import pytest
import torch
from calibrations import SINKS, TEXT, close, direct_gradients
from sampling import covering, sampled
from tiny import FAMILIES, GQA, tiny_loaded, windows
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gpt2.common.errors import PluginError
from gpt2.compression.calibration import fisher
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.fisher import collect_fisher, detect_rotary
from gpt2.compression.calibration.statistics import MultiHeadStatistics, Statistics, collect
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.codecs.metric import output_metric
from gpt2.compression.codecs.moments import Moments
from gpt2.compression.codecs.multi_head import side_by_side
from gpt2.compression.codecs.rope import Rotary, candidates
from gpt2.experiments import miniatures
from gpt2.models.geometry import Geometry
from gpt2.models.loading import LoadedModel, wrap


def model_of(family: str) -> LoadedModel:
    return tiny_loaded(family) if family in FAMILIES else wrap(miniatures.tiny_family(family), None, family)


def fisher_of(loaded: LoadedModel, batches: Tensor, **how) -> tuple[Statistics, MultiHeadStatistics]:
    statistics = collect(loaded, batches, SINKS)
    return statistics, collect_fisher(loaded, batches, statistics, SINKS, multi_head_bases(), **how)["joint"]


LOOPS = ["ctrl", "git", "hrm_text"]


@pytest.mark.parametrize(
    ("family", "seed"), [*covering(["llama", "gpt2", "gemma3_text"], [0, 3]), *((family, 0) for family in LOOPS)]
)
def test_fisher_is_the_gradients_second_moment(family, seed):
    """CTRL and GIT change embedded tokens in place; HRM leaves out the gradients of all loops over its layers but one.

    All loops have K and V of their own, and gradients here.
    """
    loaded, batches = model_of(family), windows(2, 40)
    statistics, _ = fisher_of(loaded, batches, seed=seed)
    if family == "hrm_text":
        config = loaded.model.config
        loaded.model.base_model.L_bp_cycles_padded = [config.L_cycles] * config.H_cycles
    for layer, (_, _, gk, gv) in direct_gradients(loaded, batches, seed).items():
        for side, g in (("k", gk), ("v", gv)):
            expected = g.mT @ g / g.shape[1]
            assert close(getattr(statistics, side).metrics["fisher"][layer], expected) and expected.norm() > 0


def test_states_that_modules_keep_themselves_belong_to_one_window():
    loaded, batches = model_of("recurrent_gemma"), windows(2, 40)
    found, _ = fisher_of(loaded, batches)
    layers = loaded.geometry.attention
    assert layers and all(found.k.metrics["fisher"][layer].norm() > 0 for layer in layers)
    kept = [value for module in loaded.model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    assert kept and all(value.grad_fn is None for value in kept)


def test_the_reservoir_has_whole_blocks_of_real_vectors(llama):
    """Blocks begin where frames do, with copies of the first token in the places of sinks, as a cache has them."""
    batches, bases = windows(2, 64 * 2 + SINKS + 9), multi_head_bases()
    gathered = collect_fisher(llama, batches, None, SINKS, bases)
    k, v, _, _ = (x[None, :, : len(batches[0]) - SINKS] for x in direct_gradients(llama, batches)[1])
    for name in ("joint", "framed"):
        found, frame = gathered[name], bases[name].frame
        assert [(own.shape, own.dtype) for own in found.blocks] == [((1, 2 * 2 * 64, 48), torch.float16)] * 3
        own = side_by_side(found.rotary[1].unrotate(k, SINKS, frame), v, 1)[0]
        expected = torch.cat((own[:, :1].expand(-1, SINKS % frame, -1), own), dim=1)[:, :128]
        assert (found.blocks[1][:, :128] - expected).abs().max() < 2e-3 * expected.abs().max()


def test_the_reservoir_is_bounded_and_drawn_from_all_windows(llama, monkeypatch):
    monkeypatch.setattr(fisher, "SAMPLED_BLOCKS", 3)
    batches = windows(2, 64 * 4 + SINKS)
    _, joint = fisher_of(llama, batches, seed=1)
    assert [blocks.shape[1] for blocks in joint.blocks] == [3 * 64] * 3, "two blocks of each window would be four"
    _, other = fisher_of(llama, batches, seed=2)
    assert not torch.equal(joint.blocks[0], other.blocks[0])


# --- checkpointing


@pytest.mark.parametrize("family", sampled(["llama", "gpt2", "gemma3_text", "opt"], 2))
def test_checkpointing_gives_the_same_and_keeps_fewer_activations(family):
    """Each layer is computed twice. opt's layers drop out by their own training flag, which checkpointing asks for."""
    loaded, batches, calls, saved, found = tiny_loaded(family), windows(2, 100), [], [], []
    attention = next(module for module in loaded.model.modules() if getattr(module, "layer_idx", None) == 1)

    def pack(t: Tensor) -> Tensor:
        saved[-1] += t.nbytes
        return t

    def watched(batches):
        hook = attention.register_forward_hook(lambda *_: calls.append(1))
        yield from batches
        hook.remove()
        calls.append(0)

    for checkpointing in (False, True):
        saved.append(0)  # bytes that autograd saves
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found.append(fisher_of(loaded, batches, checkpointing=checkpointing, progress=watched))
    assert calls == [1, 1, 0, 1, 1, 1, 1, 0] and saved[1] < saved[0] / 2
    (plain, joint), (same, same_joint) = found
    for side in ("k", "v"):
        assert all(map(close, *(getattr(s, side).metrics["fisher"] for s in (same, plain))))
    assert all(map(close, same_joint.moments.metrics["fisher"], joint.moments.metrics["fisher"]))
    assert all(map(close, same_joint.moments.scatter, joint.moments.scatter)) and (joint.moments.count == 2 * 96).all()
    assert all(map(torch.equal, same_joint.blocks, joint.blocks))


@pytest.mark.parametrize("family", sampled(["bloom", "falcon"], 1))
def test_checkpointing_is_rejected_where_attention_is_hard_wired_and_where_there_is_none(family, llama, monkeypatch):
    monkeypatch.setattr(type(llama.model), "supports_gradient_checkpointing", False)
    with pytest.raises(PluginError, match="LlamaForCausalLM has no gradient checkpointing"):
        fisher_of(llama, windows(1, 20), checkpointing=True)
    loaded = model_of(family)
    statistics = collect(loaded, windows(1, 20), SINKS)
    with pytest.raises(PluginError, match="hard-wired: .*leave --gradient-checkpointing out"):
        collect_fisher(loaded, windows(1, 20), statistics, SINKS, {}, checkpointing=True)
    collect_fisher(loaded, windows(1, 20), statistics, SINKS, {})
    assert statistics.k.metrics["fisher"][0].norm() > 0


# --- what is left behind


def state(model: nn.Module) -> dict:
    """All that a pass could leave changed."""
    found = {"attention": model.config._attn_implementation, "grad": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        flags = {key: value for key, value in vars(module).items() if "training" in key or "checkpoint" in key}
        found[name] = flags | {"hooks": len(module._forward_hooks) + len(module._forward_pre_hooks)}
    return found | {f"p.{name}": (p.requires_grad, p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("implementation", "checkpointing", "interrupted"),
    covering(["eager", "sdpa"], [False, True], [True, False], times=2),
)
def test_the_model_is_left_as_it_was(llama, implementation, checkpointing, interrupted):
    """By the pass for statistics and by that for gradients; both see the same queries in every implementation."""
    loaded, tokens = tiny_loaded("llama"), windows(2, 20)
    loaded.model.set_attn_implementation(implementation)
    loaded.model.model.layers[0].gradient_checkpointing = True
    wanted = [p for name, p in loaded.model.named_parameters() if "v_proj" in name]
    for parameter in wanted:
        parameter.requires_grad_(True)
    before, logits = state(loaded.model), loaded.model(tokens).logits.detach()
    statistics = collect(loaded, tokens, SINKS)
    expected = collect(llama, tokens, SINKS).k.metrics["attention"]
    assert torch.allclose(*map(torch.stack, (statistics.k.metrics["attention"], expected)), rtol=1e-4, atol=1e-4)

    def stopped(batches):
        yield batches[0]
        if interrupted:
            raise KeyboardInterrupt

    for one_pass in (
        lambda: collect(loaded, stopped(tokens), SINKS),
        lambda: collect_fisher(loaded, tokens, statistics, SINKS, {}, checkpointing=checkpointing, progress=stopped),
    ):
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            one_pass()
        assert state(loaded.model) == before and all(p.requires_grad for p in wanted)
        assert torch.equal(loaded.model(tokens).logits, logits)


@pytest.mark.parametrize("how", ["forward", "backward", "checkpointed"])
def test_nothing_is_kept_beyond_sums_and_the_reservoir(llama, how, monkeypatch):
    """Live bytes don't grow with the segments once the reservoir is full; also without the cycle collector."""
    monkeypatch.setattr(fisher, "SAMPLED_BLOCKS", 2)
    batches, alive = windows(6, 72), []
    statistics = collect(llama, batches, SINKS)
    sums = [
        own for side in (statistics.k, statistics.v) for own in (*side.mean, *side.scatter, *side.metrics["attention"])
    ]
    assert sum(own.untyped_storage().nbytes() for own in sums) == 8 * 3 * 2 * 12 * (2 + 4 * 12), "no larger storages"

    def counted(batches):
        for window in batches:
            live = (found for found in gc.get_objects() if type(found) is Tensor)
            alive.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in live}.values()))
            yield window

    gc.collect()
    gc.freeze()  # what lived before isn't looked at
    gc.disable()
    try:
        if how == "forward":
            collect(llama, counted(batches), SINKS)
        else:
            options = {"checkpointing": how == "checkpointed", "progress": counted}
            collect_fisher(llama, batches, statistics, SINKS, multi_head_bases(), **options)
    finally:
        gc.enable()
        gc.unfreeze()
    assert len(set(alive[3:])) == 1, alive


# --- what stops it


def test_moments_reject_what_is_not_finite():
    x, moments = torch.zeros(1, 2, 5, 6), Moments.zeros(Geometry.uniform(2, 2, 6))
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        x[0, 1, 3, 2] = value
        with pytest.raises(PluginError, match="layer 1: NaN or infinite"):
            moments.update(1, x)
        assert not moments.count.any() and not any(own.any() for own in moments.scatter), "and are left as they were"


def test_windows_that_are_all_sinks(llama):
    """They add nothing, and all windows can't be such ones."""
    for sinks in (20, 50):
        with pytest.raises(PluginError, match=f"longer than the {sinks} sink tokens"):
            collect(llama, windows(2, 20), sinks)
    short, long = windows(1, SINKS)[0], windows(1, 20)[0]
    found = collect(llama, [short, long], SINKS)
    assert all(map(torch.equal, found.k.mean, collect(llama, [long], SINKS).k.mean))


def test_logits_and_gradients_that_are_not_finite_or_not_there_are_rejected(llama, monkeypatch):
    """No statistics of K, V and Q show what overflows behind the last attention."""
    loaded, tokens = tiny_loaded("llama"), windows(1, 20)
    loaded.model.lm_head.weight[3, 3] = float("inf")
    statistics = collect(loaded, tokens, SINKS)
    with pytest.raises(PluginError, match="NaN or infinite logits.*--dtype float32"):
        collect_fisher(loaded, tokens, statistics, SINKS, {})
    rotate = Rotary.rotate
    with monkeypatch.context() as patch, pytest.raises(PluginError, match="layer 2: NaN or infinite"):
        patch.setattr(Rotary, "rotate", lambda *args: rotate(*args) * float("nan"))
        fisher_of(llama, tokens)
    attention = type(llama.model.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(
        attention, "forward", lambda self, hidden_states=None, **how: forward(self, hidden_states.detach(), **how)
    )
    with pytest.raises(PluginError, match="no gradients reached K and V of every layer.*--metric pca or attention"):
        fisher_of(llama, tokens)


def test_segments_shorter_than_a_block_have_a_metric_but_no_joint_codec(llama):
    short = {"rank": 9, "samples": 2, "seq_len": 64 + SINKS - 1, "sink_tokens": SINKS}
    made = calibrate(llama, TEXT, codec="fisher", **short)
    assert not made.multi_head and made.transform("k", 0).rank == 9 and made.meta["metric"] == "fisher"
    with pytest.raises(PluginError, match="blocks of 64 tokens behind the sinks.* 67 is too short, give 68"):
        calibrate(llama, TEXT, codec="joint", **short)
    with pytest.raises(PluginError, match="codec joint is not in this calibration"):
        made.compact("joint")
    assert calibrate(llama, TEXT, codec="joint", **short | {"seq_len": 64 + SINKS}).multi_head


# --- the attention metric


@pytest.mark.parametrize("family", sampled(["llama", "gpt_neox", "phi", "gpt2", "opt"], 3))
def test_the_attention_metric_of_values_is_what_they_do_to_the_output(family):
    """|Δ W_o|² of an error of one head's values, for every query head that reads it."""
    loaded = tiny_loaded(family)
    H, d = loaded.geometry.num_kv_heads, loaded.geometry.head_dim
    metric = output_metric(loaded.model, loaded.geometry)
    names = ("o_proj", "out_proj", "dense", "c_proj")
    attentions = [module for module in loaded.model.modules() if hasattr(module, "layer_idx")]
    outputs = [next(getattr(module, name) for name in names if hasattr(module, name)) for module in attentions]
    assert [own.shape for own in metric] == [(H, d, d)] * 3 and len(outputs) == 3
    generator = torch.Generator().manual_seed(0)
    for layer, projection in enumerate(outputs):
        for head in range(H):
            delta = torch.randn(d, generator=generator)
            expected, shared = 0.0, 4 // H
            for query_head in range(head * shared, (head + 1) * shared):
                x = torch.zeros(4, d)
                x[query_head] = delta
                expected += (projection(x.flatten()[None]) - projection(torch.zeros(1, 4 * d))).square().sum()
            found = float(delta.double() @ metric[layer][head] @ delta.double())
            assert found == pytest.approx(float(expected), rel=1e-3)
    if family == "llama":
        for attention in attentions:
            codes = attention.o_proj.weight.to(torch.int8)
            attention.o_proj.weight = torch.nn.Parameter(codes, requires_grad=False)
        assert output_metric(loaded.model, loaded.geometry) == [None] * 3, "where weights have scales elsewhere"
        for attention in attentions:
            attention.elsewhere = attention.o_proj
            del attention.o_proj
        assert output_metric(loaded.model, loaded.geometry) == [None] * 3, "where no output projection is found"


# --- rotary positions


@pytest.mark.parametrize(
    ("family", "layout", "channels"),
    [("llama", "half", 12), ("cohere", "interleaved", 16), ("gpt_neox", "half", 4), ("opt", "none", 0),
     *sampled([("gpt2", "none", 0), ("qwen3", "half", 16), ("mistral", "half", 12), ("phi", "half", 6),
               ("stablelm", "half", 4), ("bloom", "none", 0)], 2)],
)  # fmt: skip
def test_rotary_positions_are_found(family, layout, channels):
    loaded = model_of(family)
    found = detect_rotary(loaded, windows(1, 200)[0], SINKS)
    assert {rotary.layout for rotary in found} == {layout} and len(found) == loaded.geometry.num_layers
    assert {2 * len(rotary.frequencies) for rotary in found} == {channels}


def test_each_layer_has_a_rotation_of_its_own():
    """Gemma 3 has a larger base in layers that see everything, others have layers of different widths or without."""
    loaded = tiny_loaded("gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    found = [rotary.frequencies for rotary in detect_rotary(loaded, windows(1, 300)[0], SINKS)]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert found[1][-1] < found[0][-1]
    for family, channels in (("gemma4_text", [8, 16, 0, 0]), ("qwen3_next", [0, 0, 4, 4])):
        found = detect_rotary(layer_shapes.model_of(family), windows(1, 100)[0], SINKS)
        assert [2 * len(rotary.frequencies) for rotary in found] == channels
        assert [rotary.layout for rotary in found] == ["half" if own else "none" for own in channels]


def test_frequencies_are_those_of_the_text_and_stay_so():
    """longrope: the model overwrites its buffer where a text is longer or shorter than the original context."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    config = AutoConfig.for_model("phi3", **GQA, rope_parameters=rope, original_max_position_embeddings=64)
    loaded = wrap(AutoModelForCausalLM.from_config(config), None, "phi3")
    found = {}
    for tokens in (60, 200, 60):
        rotary = detect_rotary(loaded, windows(1, tokens)[0], SINKS)[0]
        assert torch.equal(rotary.frequencies, loaded.model.model.rotary_emb.inv_freq)
        found.setdefault(tokens, rotary.frequencies)
    torch.testing.assert_close(found[200], found[60] / 4)


@pytest.mark.parametrize("start", [0, 5, 3000])
def test_rotating_is_the_models_own_rotation(llama, start):
    k = torch.randn(2, 2, 30, 12, generator=torch.Generator().manual_seed(0))
    cos, sin = llama.model.model.rotary_emb(k, torch.arange(start, start + 30)[None])
    expected, _ = apply_rotary_pos_emb(k, k, cos, sin)
    rotary = candidates(llama.model, 12)[1]
    assert rotary.layout == "half"
    torch.testing.assert_close(rotary.rotate(k, start), expected, atol=1e-5, rtol=1e-5)
