"""Gradients: a Fisher metric that is right, from a model left as it was; and rotary positions found."""

import gc
import math

import pytest
import torch
from tiny import tiny_loaded, windows, word_text
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gpt2.common.errors import PluginError
from gpt2.compression.calibration import fisher
from gpt2.compression.calibration.calibrate import calibrate
from gpt2.compression.calibration.fisher import CROSS_HEAD_SHARE, collect_fisher, detect_rotary
from gpt2.compression.calibration.statistics import MultiHeadStatistics, Statistics, collect
from gpt2.compression.codecs import multi_head_bases
from gpt2.compression.codecs.metric import output_metric
from gpt2.compression.codecs.multi_head import side_by_side
from gpt2.compression.codecs.rope import Rotary, best_fit, candidates
from gpt2.experiments import miniatures
from gpt2.models.loading import LoadedModel, wrap
from gpt2.text.sources import by_position

SINKS = 4
TEXT = by_position("words", "words.txt", word_text(3000))


@pytest.fixture(scope="module")
def llama():
    return tiny_loaded("llama")


def fisher_of(loaded: LoadedModel, batches: Tensor, **how) -> tuple[Statistics, MultiHeadStatistics]:
    statistics = collect(loaded, batches, SINKS)
    return statistics, collect_fisher(loaded, batches, statistics, SINKS, multi_head_bases(), **how)["joint"]


class Retaining(DynamicCache):
    """Keeps every layer's K and V with their gradients."""

    def update(self, k, v, layer_idx, *args, **kwargs):
        self.kept = getattr(self, "kept", []) + [(k, v)]
        for x in (k, v):
            x.retain_grad()
        return k, v


def direct(loaded: LoadedModel, batches: Tensor, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Per layer k, v and their gradients behind the sinks, [H, T, d] in float64, by another way than the tested one.

    The labels are those that the model draws, with the same dice.
    """
    found = []
    for number, tokens in enumerate(batches):
        generator = torch.Generator().manual_seed(seed + fisher.SEED_STEP * number)
        cache = Retaining()
        embedded = loaded.model.get_input_embeddings()(tokens[None]).requires_grad_()
        logits = loaded.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        (-logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()).backward()
        found.append([[x[0, :, SINKS:].detach().double() for x in (k, v, k.grad, v.grad)] for k, v in cache.kept])
    return [tuple(torch.cat(parts, dim=1) for parts in zip(*layer, strict=True)) for layer in zip(*found, strict=True)]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-4 * b.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("seed", [0, 3])
def test_fisher_is_the_gradients_second_moment(family, seed):
    loaded, batches = tiny_loaded(family), windows(3, 40)
    statistics, _ = fisher_of(loaded, batches, seed=seed)
    for layer, (_, _, gk, gv) in enumerate(direct(loaded, batches, seed)):
        for side, g in (("k", gk), ("v", gv)):
            expected = g.mT @ g / g.shape[1]
            assert close(getattr(statistics, side).metrics["fisher"][layer], expected) and expected.norm() > 0


def test_labels_are_drawn_by_the_seed(llama):
    one, other = (fisher_of(llama, windows(2, 40), seed=seed)[0].k.metrics["fisher"][0] for seed in (0, 1))
    assert not close(one, other)
    assert torch.equal(one, fisher_of(llama, windows(2, 40), seed=0)[0].k.metrics["fisher"][0])


@pytest.mark.parametrize("most", [512, 24], ids=["one group", "a group for each head"])
def test_joint_statistics_are_of_keys_without_positions(llama, most, monkeypatch):
    monkeypatch.setattr("gpt2.compression.codecs.multi_head.MOST_CHANNELS", most)
    groups, batches = 1 if most == 512 else 2, windows(3, 40)
    _, joint = fisher_of(llama, batches)
    length = 40 - SINKS
    for layer, (k, v, gk, gv) in enumerate(direct(llama, batches)):
        turned = [
            torch.cat([joint.rotary[layer].unrotate(part, SINKS) for part in x.split(length, dim=1)], dim=1)
            for x in (k, gk)
        ]
        x, g = side_by_side(turned[0][None], v[None], groups)[0], side_by_side(turned[1][None], gv[None], groups)[0]
        assert close(joint.moments.mean[layer], x.mean(1))
        centred = x - x.mean(1, keepdim=True)
        assert close(joint.moments.scatter[layer], centred.mT @ centred)
        # Between different heads a share of it is kept
        within = torch.block_diag(*[torch.ones(k.shape[-1], k.shape[-1])] * (g.shape[-1] // k.shape[-1])) > 0
        shares = torch.where(within, 1.0, CROSS_HEAD_SHARE)
        assert close(joint.moments.metrics["fisher"][layer], shares * (g.mT @ g / g.shape[1]))
    assert (joint.moments.count == 3 * length).all()


def test_the_reservoir_has_whole_blocks_of_real_vectors(llama):
    batches = windows(2, 64 * 2 + SINKS + 9)
    _, joint = fisher_of(llama, batches)
    assert {(blocks.shape, blocks.dtype) for blocks in joint.blocks} == {((1, 2 * 2 * 64, 48), torch.float16)}
    k, v, _, _ = direct(llama, batches)[1]
    first, own = k[:, : len(batches[0]) - SINKS], v[:, : len(batches[0]) - SINKS]
    expected = side_by_side(joint.rotary[1].unrotate(first, SINKS)[None], own[None], 1)[0, :, :128]
    assert (joint.blocks[1][:, :128] - expected).abs().max() < 2e-3 * expected.abs().max()


def test_the_reservoir_is_bounded_and_drawn_from_all_windows(llama, monkeypatch):
    monkeypatch.setattr(fisher, "SAMPLED_BLOCKS", 3)
    batches = windows(2, 64 * 4 + SINKS)
    _, joint = fisher_of(llama, batches, seed=1)
    assert joint.blocks[0].shape[1] == 3 * 64, "two blocks of each window would be four"
    _, other = fisher_of(llama, batches, seed=2)
    assert not torch.equal(joint.blocks[0], other.blocks[0])


# --- checkpointing


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_checkpointing_gives_the_same(family):
    """opt's layers drop out by their own training flag, which checkpointing asks for."""
    loaded, batches = tiny_loaded(family), windows(2, 100)
    (plain, joint), (same, same_joint) = (fisher_of(loaded, batches, checkpointing=on) for on in (False, True))
    for side in ("k", "v"):
        assert all(map(close, *(getattr(s, side).metrics["fisher"] for s in (same, plain))))
    assert all(map(close, same_joint.moments.metrics["fisher"], joint.moments.metrics["fisher"]))
    assert all(map(close, same_joint.moments.scatter, joint.moments.scatter)) and (joint.moments.count == 2 * 96).all()
    assert all(map(torch.equal, same_joint.blocks, joint.blocks))


@pytest.mark.parametrize(("checkpointing", "calls"), [(False, 2), (True, 4)])
def test_checkpointing_recomputes_each_layer_once(llama, checkpointing, calls):
    statistics, seen = collect(llama, windows(2, 20), SINKS), []

    def watched(batches):
        hook = llama.model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
        yield from batches
        hook.remove()

    collect_fisher(llama, windows(2, 20), statistics, SINKS, {}, checkpointing=checkpointing, progress=watched)
    assert len(seen) == calls


def test_checkpointing_keeps_fewer_activations(llama):
    """Bytes that autograd saves in the forward pass."""
    saved = {}
    for checkpointing in (False, True):
        sizes = []

        def pack(t, sizes=sizes):
            sizes.append(t.nbytes)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model, tap = llama.model, fisher._checkpointed if checkpointing else fisher.watched_cache
            with fisher.without_parameter_gradients(model), tap(model, lambda *_: None) as run:
                run(windows(1, 64))
        saved[checkpointing] = sum(sizes)
    assert saved[True] < saved[False] / 2


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_checkpointing_is_refused_where_attention_is_hard_wired(family):
    loaded = wrap(miniatures.tiny_family(family), None, family)
    statistics = collect(loaded, windows(1, 20), SINKS)
    with pytest.raises(PluginError, match="hard-wired: leave --gradient-checkpointing out"):
        collect_fisher(loaded, windows(1, 20), statistics, SINKS, {}, checkpointing=True)
    collect_fisher(loaded, windows(1, 20), statistics, SINKS, {})
    assert statistics.k.metrics["fisher"][0].norm() > 0


def test_checkpointing_is_refused_where_a_model_has_none(llama, monkeypatch):
    monkeypatch.setattr(type(llama.model), "supports_gradient_checkpointing", False)
    with pytest.raises(PluginError, match="LlamaForCausalLM has no gradient checkpointing"):
        fisher_of(llama, windows(1, 20), checkpointing=True)


# --- what is left behind


def state(model: nn.Module) -> dict:
    """All that a pass could leave changed."""
    found = {"attention": model.config._attn_implementation, "grad": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        flags = {key: value for key, value in vars(module).items() if "training" in key or "checkpoint" in key}
        found[name] = flags | {"hooks": len(module._forward_hooks) + len(module._forward_pre_hooks)}
    return found | {f"p.{name}": (p.requires_grad, p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_is_left_as_it_was(implementation, checkpointing, interrupted):
    loaded = tiny_loaded("llama")
    loaded.model.set_attn_implementation(implementation)
    wanted = [p for name, p in loaded.model.named_parameters() if "v_proj" in name]
    for parameter in wanted:
        parameter.requires_grad_(True)
    statistics, before = collect(loaded, windows(2, 20), SINKS), state(loaded.model)
    logits = loaded.model(windows(1, 20)).logits.detach()

    def stopped(batches):
        yield batches[0]
        if interrupted:
            raise KeyboardInterrupt

    how = {"checkpointing": checkpointing, "progress": stopped}
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            collect_fisher(loaded, windows(2, 20), statistics, SINKS, {}, **how)
    else:
        collect_fisher(loaded, windows(2, 20), statistics, SINKS, {}, **how)
    assert state(loaded.model) == before and all(p.requires_grad for p in wanted)
    assert torch.equal(loaded.model(windows(1, 20)).logits, logits)


def test_a_models_own_checkpointing_stays_on():
    loaded = tiny_loaded("llama")
    statistics = collect(loaded, windows(1, 20), SINKS)
    loaded.model.model.layers[0].gradient_checkpointing = True
    before = state(loaded.model)
    collect_fisher(loaded, windows(1, 20), statistics, SINKS, {}, checkpointing=True)
    assert state(loaded.model) == before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_kept_beyond_the_reservoir(llama, checkpointing, monkeypatch):
    """Live bytes don't grow with the windows once the reservoir is full; also without the cycle collector."""
    monkeypatch.setattr(fisher, "SAMPLED_BLOCKS", 2)
    batches, alive = windows(7, 80), []
    statistics = collect(llama, batches, SINKS)

    def counted(batches):
        for window in batches:
            alive.append(sum({t.data_ptr(): t.untyped_storage().nbytes() for t in live_tensors()}.values()))
            yield window

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        collect_fisher(
            llama, batches, statistics, SINKS, multi_head_bases(), checkpointing=checkpointing, progress=counted
        )
    finally:
        gc.enable()
        gc.unfreeze()
    assert len(set(alive[3:])) == 1, alive


def live_tensors() -> list[Tensor]:
    return [found for found in gc.get_objects() if type(found) is Tensor]


# --- what stops it


def test_logits_that_are_not_finite_are_refused():
    """No statistics of K, V and Q show what overflows behind the last attention."""
    loaded, tokens = tiny_loaded("llama"), windows(1, 20)
    loaded.model.lm_head.weight[3, 3] = float("inf")
    statistics = collect(loaded, tokens, SINKS)
    with pytest.raises(PluginError, match="NaN or infinite logits.*--dtype float32"):
        collect_fisher(loaded, tokens, statistics, SINKS, {})


def test_gradients_that_are_not_finite_are_refused(llama, monkeypatch):
    rotate = Rotary.rotate
    monkeypatch.setattr(Rotary, "rotate", lambda *args: rotate(*args) * float("nan"))
    with pytest.raises(PluginError, match="layer 2: NaN or infinite"):
        fisher_of(llama, windows(1, 20))


def test_a_model_that_gradients_do_not_reach_is_told(llama, monkeypatch):
    statistics = collect(llama, windows(1, 20), SINKS)
    attention = type(llama.model.model.layers[0].self_attn)
    forward = attention.forward

    def cut(self, hidden_states, **kwargs):
        return forward(self, hidden_states.detach(), **kwargs)

    monkeypatch.setattr(attention, "forward", lambda self, hidden_states=None, **kw: cut(self, hidden_states, **kw))
    with pytest.raises(PluginError, match="no gradients reached K and V of every layer.*--metric pca or attention"):
        collect_fisher(llama, windows(1, 20), statistics, SINKS, {})


def test_windows_shorter_than_a_block_have_a_metric_but_no_joint_codec(llama):
    short = {"rank": 9, "samples": 2, "seq_len": 64 + SINKS - 1, "sink_tokens": SINKS}
    made = calibrate(llama, TEXT, codec="fisher", **short)
    assert not made.multi_head and made.transform("k", 0).rank == 9 and made.meta["metric"] == "fisher"
    with pytest.raises(PluginError, match="blocks of 64 tokens behind the sinks.* 67 is too short, give 68"):
        calibrate(llama, TEXT, codec="joint", **short)
    with pytest.raises(PluginError, match="codec joint is not in this calibration"):
        made.compact("joint")
    assert calibrate(llama, TEXT, codec="joint", **short | {"seq_len": 64 + SINKS}).multi_head


# --- the attention metric


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi", "opt"])
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
            felt, shared = 0.0, 4 // H
            for query_head in range(head * shared, (head + 1) * shared):
                x = torch.zeros(4, d)
                x[query_head] = delta
                felt += (projection(x.flatten()[None]) - projection(torch.zeros(1, 4 * d))).square().sum()
            assert float(delta.double() @ metric[layer][head] @ delta.double()) == pytest.approx(float(felt), rel=1e-3)


def test_a_model_whose_output_projection_is_not_found_has_no_metric_for_values(llama):
    broken = tiny_loaded("llama")
    for layer in broken.model.model.layers:
        layer.self_attn.elsewhere = layer.self_attn._modules.pop("o_proj")
    assert output_metric(broken.model, broken.geometry) == [None] * 3


# --- rotary positions


def model_of(family: str) -> LoadedModel:
    in_tiny = family in ("llama", "gpt2", "opt", "gpt_neox", "phi", "gemma3_text", "qwen3", "mistral")
    return tiny_loaded(family) if in_tiny else wrap(miniatures.tiny_family(family), None, family)


@pytest.mark.parametrize(
    ("family", "layout", "channels"),
    [("llama", "half", 12), ("qwen3", "half", 16), ("mistral", "half", 12), ("cohere", "interleaved", 16),
     ("gpt2", "none", 0), ("opt", "none", 0), ("gpt_neox", "half", 4), ("phi", "half", 6),
     ("stablelm", "half", 4), ("bloom", "none", 0)],
)  # fmt: skip
def test_rotary_positions_are_found(family, layout, channels):
    loaded = model_of(family)
    found = detect_rotary(loaded, windows(1, 200)[0], SINKS)
    assert {rotary.layout for rotary in found} == {layout} and len(found) == loaded.geometry.num_layers
    assert {2 * len(rotary.frequencies) for rotary in found} == {channels}


def test_each_kind_of_layer_has_a_rotation_of_its_own():
    """Gemma 3: slower turns in layers that see everything."""
    loaded = tiny_loaded("gemma3_text", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    found = [rotary.frequencies for rotary in detect_rotary(loaded, windows(1, 300)[0], SINKS)]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert found[1][-1] < found[0][-1], "the larger base turns slower"


@pytest.mark.parametrize("start", [0, 5, 3000])
def test_a_turn_is_the_models_own(llama, start):
    k = torch.randn(2, 2, 30, 12, generator=torch.Generator().manual_seed(0))
    cos, sin = llama.model.model.rotary_emb(k, torch.arange(start, start + 30)[None])
    expected, _ = apply_rotary_pos_emb(k, k, cos, sin)
    rotary = candidates(llama.model, 12)[1]
    assert rotary.layout == "half"
    torch.testing.assert_close(rotary.rotate(k, start), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["none", "half", "interleaved"])
@pytest.mark.parametrize("channels", [0, 4, 12])
@pytest.mark.parametrize("start", [0, 77, 100_000])
def test_forward_and_back_is_the_identity(layout, channels, start):
    rotary = Rotary(torch.logspace(0, -3, channels // 2), layout)
    x = torch.randn(2, 3, 20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotary.rotate(x, start)
    torch.testing.assert_close(rotary.unrotate(turned, start), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., channels:], x[..., channels:])
    assert torch.equal(turned, x) == (layout == "none" or not channels)
    assert torch.equal(turned[..., 7:, :], rotary.rotate(x[..., 7:, :], start + 7)), "by position, not by place"


@pytest.mark.parametrize(("layout", "pair"), [("half", (1, 4)), ("interleaved", (2, 3))])
def test_which_channels_turn_together(layout, pair):
    x = torch.zeros(1, 6)
    x[0, pair[0]] = 1
    turned = Rotary(torch.tensor([0.0, math.pi / 2, 0.0]), layout).rotate(x, 1)[0]
    assert turned[pair[1]] == pytest.approx(1) and turned.abs().sum() == pytest.approx(1, abs=1e-6)


def test_the_rotation_that_compresses_best_is_taken():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 400, 12, generator=generator) * 0.1 + 3 * torch.randn(2, 1, 12, generator=generator)
    right = Rotary(torch.logspace(0, -2, 6), "interleaved")
    others = [Rotary(torch.zeros(0), "none"), Rotary(right.frequencies, "half"), Rotary(torch.logspace(0, -4, 6))]
    assert best_fit(right.rotate(keys, 9), 9, [*others, right]) is right
    assert best_fit(keys, 9, [*others, right]) is others[0]
