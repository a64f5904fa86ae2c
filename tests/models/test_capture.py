import contextlib

import pytest
import torch
from tiny_models import (
    FAMILIES,
    GRID,
    HEADS,
    LAYERS,
    TEXT,
    VIDEO,
    cogvideox,
    hunyuan_video,
    hunyuan_video_inputs,
    inputs,
    train_a_little,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunlearn import families, interception, localization_loss
from fastunlearn.capture import AttnMapsCapture, EraserOutputsCapture
from fastunlearn.erasers import attach_erasers, erasers_disabled, set_eraser_scale
from fastunlearn.families.base import TransformerSpec
from fastunlearn.masks import average_map, get_mask
from fastunlearn.velocity_model import as_velocity_model

WORDS = [3, 7]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@contextlib.contextmanager
def recorded_attention(monkeypatch):
    """Records query, key and mask of every attention, without any of the library's code."""
    calls, original = [], F.scaled_dot_product_attention

    def record(query, key, value, **kwargs):
        calls.append((query.detach(), key.detach(), kwargs.get("attn_mask")))
        return original(query, key, value, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        yield calls


def softmax(query, key, mask=None, dtype=torch.float64):
    """All attention probabilities, (B, H, Sq, Sk)."""
    logits = query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(dtype)
    return logits.softmax(-1)


def assert_close(actual, exact, eager):
    """The error is at most twice that of eager torch, plus that of torch's own log-sum-exp, which is about 10."""
    allowed = 2 * (eager.double() - exact).abs().max() + 32 * torch.finfo(torch.float32).eps * exact.max()
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    assert exact.std() > 3 * allowed, "the bound must tell maps apart"
    assert (actual.double() - exact).abs().max() <= allowed


def text_attentions(family, calls):
    """Those of `calls` that maps are captured from: not HunyuanVideo's refiner, nor Wan's self-attention."""
    keys = TEXT if family.text == slice(None) else TEXT + VIDEO
    return [call for call in calls if call[1].shape[2] == keys]


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("error:the attention does not return")
def test_maps_are_the_attention_that_runs(family, dtype, monkeypatch):
    words = [3, 7, 12]  # HunyuanVideo's last text has ten tokens, then padding
    model = as_velocity_model(family.make().to(dtype))
    x_t, t, cond = family.inputs(dtype=dtype)
    maps, concept_maps = {}, {}
    with torch.no_grad():
        with recorded_attention(monkeypatch) as calls:
            expected = model(x_t, t, cond)
        with AttnMapsCapture(model, maps):
            assert torch.equal(model(x_t, t, cond), expected)
        with AttnMapsCapture(model, concept_maps, token_indices=words):
            assert torch.equal(model(x_t, t, cond), expected)
    assert list(maps) == list(concept_maps) == family.layers
    # The attention itself computes in the model's dtype, so for half precision, eager computes in it too.
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    for name, call in zip(family.layers, text_attentions(family, calls), strict=True):
        exact = softmax(*call)[:, :, family.video, family.text]
        eager = softmax(*call, dtype=eager_dtype)[:, :, family.video, family.text]
        assert exact.shape == (2, HEADS, VIDEO, TEXT)
        assert_close(maps[name], exact, eager)
        assert_close(concept_maps[name], exact[..., words].sum(-1).mean(1), eager[..., words].float().sum(-1).mean(1))
        if family.name == "hunyuan_video":
            assert not maps[name][1, ..., 10:].any()
            assert maps[name][0, ..., 10:].any()


def test_padding_tokens_get_no_attention():
    model, maps = as_velocity_model(hunyuan_video()), {}
    with torch.no_grad(), AttnMapsCapture(model, maps, token_indices=[12]):
        model(*hunyuan_video_inputs())
    assert len(maps) == 3
    for name in maps:
        assert maps[name][0].all()
        assert not maps[name][1].any()


class ToyAttention(nn.Module):
    """Self-attention over video and text tokens, or attention from video to text, with the mask in `self.mask`."""

    def __init__(self, position):
        super().__init__()
        self.position = position
        self.mask = None

    def forward(self, hidden_states, encoder_hidden_states=None):
        tokens = [hidden_states, encoder_hidden_states]
        both = torch.cat(tokens if self.position == "last" else tokens[::-1], 1)
        query, key = (hidden_states, encoder_hidden_states) if self.position == "cross" else (both, both)
        query, key = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (query, key))
        return F.scaled_dot_product_attention(query, key, key, attn_mask=self.mask)


class ToyTransformer(nn.Module):
    def __init__(self, position):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].attn = ToyAttention(position)

    def forward(self, video, text):
        return self.blocks[0].attn(video, text)


def toy(position):
    place = (("blocks", "attn"),)
    return TransformerSpec(
        name="toy",
        transformer="ToyTransformer",
        erased=place,
        text_attended=place,
        text_position=position,
        channel_dim=1,
        conditions={},
        condition_sizes=lambda config: {},
    )


def attention_mask(mask_kind, batch, rows, columns):
    if mask_kind is None:
        return None
    generator = torch.Generator().manual_seed(3)
    shape = {"key": (batch, 1, 1, columns), "head": (batch, HEADS, rows, columns), "matrix": (rows, columns)}
    if mask_kind == "added":
        return torch.randn(1, HEADS, 1, columns, generator=generator)
    mask = torch.rand(shape[mask_kind], generator=generator) > 0.3
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("position", ["first", "last", "cross"])
@pytest.mark.parametrize("mask_kind", [None, "key", "head", "matrix", "added"])
def test_text_positions_and_masks(position, mask_kind, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, toy(position)))
    monkeypatch.setattr(interception, "_BLOCK_ELEMENTS", 500)  # several blocks of queries, the last one smaller
    model, video, text = ToyTransformer(position), torch.randn(2, 11, 32) * 2, torch.randn(2, 5, 32) * 2
    rows, columns = (11, 5) if position == "cross" else (16, 16)
    model.blocks[0].attn.mask = attention_mask(mask_kind, 2, rows, columns)
    with recorded_attention(monkeypatch) as calls:
        expected = model(video, text)
    maps, concept_maps = {}, {}
    with (
        pytest.warns(UserWarning, match="another capture around this one"),
        AttnMapsCapture(model, maps),
        AttnMapsCapture(model, concept_maps, token_indices=[[1, 4], [0, -1]]),
    ):
        assert torch.equal(model(video, text), expected)
    at = {"first": (slice(5, 16), slice(0, 5)), "last": (slice(0, 11), slice(11, 16)), "cross": (slice(None),) * 2}
    rows, columns = at[position]
    exact, eager = (softmax(*calls[0], dtype=d)[:, :, rows, columns] for d in (torch.float64, torch.float32))
    assert_close(maps["blocks.0.attn"], exact, eager)

    def chosen(p):
        return torch.stack([p[0, ..., [1, 4]].sum(-1).mean(0), p[1, ..., 0].mean(0)])

    assert_close(concept_maps["blocks.0.attn"], chosen(exact), chosen(eager))


@pytest.mark.parametrize("tokens", [None, WORDS])
@pytest.mark.parametrize("mask_kind", [None, "key", "head", "added"])
@pytest.mark.filterwarnings("error")
def test_maps_with_a_returned_log_sum_exp_equal_those_of_another_pass_which_warns_once(mask_kind, tokens, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, toy("first")))
    model, video, text = ToyTransformer("first"), torch.randn(2, 11, 32), torch.randn(2, 9, 32)
    model.blocks[0].attn.mask = attention_mask(mask_kind, 2, 20, 20)
    returned, computed = {}, {}
    with AttnMapsCapture(model, returned, token_indices=tokens):
        expected = model(video, text)
    monkeypatch.setattr(interception, "_attention_and_lse", lambda *_: None)
    with (
        pytest.warns(UserWarning, match="another pass") as warned,
        AttnMapsCapture(model, computed, token_indices=tokens),
    ):
        for _ in range(2):
            assert torch.equal(model(video, text), expected)
    assert len(warned) == 1
    torch.testing.assert_close(returned, computed)


@pytest.mark.parametrize("enable_gqa", [False, True])
def test_enable_gqa_without_grouped_queries_keeps_the_log_sum_exp(enable_gqa):
    query, key, kept = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 5, 8), []
    with interception.Interception(kept.append):
        output = F.scaled_dot_product_attention(query, key, key, enable_gqa=enable_gqa)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, key))
    exact = (query.double() @ key.double().mT * 8**-0.5).logsumexp(3)
    torch.testing.assert_close(kept[0].lse, exact.float())


@pytest.mark.parametrize(("options", "message"), [({"enable_gqa": True}, "grouped"), ({"is_causal": True}, "causal")])
def test_causal_and_grouped_query_attention_is_refused(options, message):
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match=message), interception.Interception(lambda attention: None):
        F.scaled_dot_product_attention(query, key, key, **options)


def test_several_calls_are_averaged_and_a_new_with_starts_again():
    model = as_velocity_model(cogvideox())
    calls = [inputs(seed=seed) for seed in range(3)]
    singles, maps = [], {}
    with torch.no_grad():
        for call in calls:
            with AttnMapsCapture(model, {}, token_indices=WORDS) as capture:
                model(*call)
            singles.append(capture._maps)
        capture = AttnMapsCapture(model, maps, token_indices=WORDS)
        for _ in range(2):
            with capture:
                for call in calls:
                    model(*call)
            for name in LAYERS:
                expected = torch.stack([single[name] for single in singles]).mean(0)
                torch.testing.assert_close(maps[name], expected, rtol=1e-6, atol=0)


def test_calls_in_inference_mode_and_outside_of_it_are_averaged():
    model = as_velocity_model(cogvideox())
    calls, maps, expected = [inputs(seed=seed) for seed in range(2)], {}, {}
    with torch.no_grad(), AttnMapsCapture(model, expected, token_indices=WORDS):
        for call in calls:
            model(*call)
    with AttnMapsCapture(model, maps, token_indices=WORDS):
        for call, mode in zip(calls, (torch.inference_mode, torch.no_grad), strict=True):
            with mode():
                model(*call)
    assert all(torch.equal(maps[name], expected[name]) for name in LAYERS)


@pytest.mark.parametrize("batches", [(2, 1), (1, 2)])
def test_calls_of_different_shapes_are_not_averaged(batches):
    model = as_velocity_model(cogvideox())
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"expected shape \(\d, 48\), as in earlier calls, got \(\d, 48\)"),
        AttnMapsCapture(model, {}, token_indices=WORDS),
    ):
        for batch in batches:
            model(*inputs(batch=batch))


def test_a_guidance_batch_with_different_words_per_sample():
    model = as_velocity_model(cogvideox())
    x_t, t, cond = inputs(batch=2)
    maps, pair = {}, {}
    with torch.no_grad():
        with AttnMapsCapture(model, pair, token_indices=WORDS):
            model(x_t, t, cond)
        with AttnMapsCapture(model, maps, token_indices=torch.tensor([[-1, -1]] * 2 + [WORDS] * 2)):
            model(x_t.repeat(2, 1, 1, 1, 1), t.repeat(2), torch.cat([torch.zeros_like(cond), cond]))
    for name in LAYERS:
        assert not maps[name][:2].any()
        torch.testing.assert_close(maps[name][2:], pair[name], rtol=1e-5, atol=1e-7)


def test_full_maps_and_concept_maps_give_the_same_masks():
    model = as_velocity_model(cogvideox(rope=True))
    maps, concept_maps = {}, {}
    with AttnMapsCapture(model, maps):
        model(*inputs())
    with AttnMapsCapture(model, concept_maps, token_indices=WORDS):
        model(*inputs())
    full = get_mask(maps, WORDS, 0.31, 8, 8, HEADS, TEXT, patch_size=2)
    concept = get_mask(concept_maps, None, 0.31, 8, 8, patch_size=2)
    assert full["average_mask"].shape == (2, *GRID)
    assert 0 < full["average_mask"].mean() < 1
    assert all(torch.equal(full[name], concept[name]) for name in full)


@every_family
@pytest.mark.parametrize("tokens", [WORDS, None], ids=["concept maps", "all maps"])
def test_masks_of_captured_maps_know_their_grid(family, tokens):
    model, maps = as_velocity_model(family.make()), {}
    with torch.no_grad(), AttnMapsCapture(model, maps, token_indices=tokens):
        model(*family.inputs())
    words = None if tokens else WORDS
    masks, expected = get_mask(maps, words, 0.31), get_mask(maps, words, 0.31, 8, 8, patch_size=2)
    assert masks["average_mask"].shape == (2, *GRID)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert torch.equal(average_map(maps, words), average_map(maps, words, *GRID[1:]))
    with pytest.raises(ValueError, match="frames: expected 3 frames for 48 tokens of 4 x 4 per frame, got 13"):
        get_mask(maps, words, 0.31, frames=13)


@pytest.mark.parametrize("capture_compiled", [False, True])
def test_a_patch_size_that_was_forgotten_is_an_error_for_captured_maps(capture_compiled):
    """Eight latent frames of 10 x 10 have 8 x 5 x 5 tokens, which 10 x 10 divides into two frames."""
    model, maps = as_velocity_model(cogvideox()), {}
    _, t, cond = inputs(batch=1)
    x_t = torch.randn(1, 8, 4, 10, 10)
    call = torch.compile(model, backend="eager") if capture_compiled else model
    with torch.no_grad(), AttnMapsCapture(model, maps, token_indices=WORDS):
        call(x_t, t, cond)
    torch.compiler.reset()
    assert get_mask(maps, None, 0.5)["average_mask"].shape == (1, 8, 5, 5)
    message = r"height, width: expected 5 x 5 tokens per frame.* got 10 x 10 tokens per frame \(.*patch_size=1\)"
    with pytest.raises(ValueError, match=message):
        get_mask(maps, None, 0.5, 10, 10)
    with pytest.raises(ValueError, match="expected the size of the latents"):  # a copy does not know
        get_mask({name: attn_map.clone() for name, attn_map in maps.items()}, None, 0.5)


def test_two_frames_a_token_are_part_of_the_grid():
    """CogVideoX 1.5."""
    model, maps = as_velocity_model(cogvideox(rope=True, patch_size_t=2, patch_bias=False)), {}
    _, t, cond = inputs(batch=1)
    with torch.no_grad(), AttnMapsCapture(model, maps, token_indices=WORDS):
        model(torch.randn(1, 2, 4, 8, 8), t, cond)
    assert get_mask(maps, None, 0.5)["average_mask"].shape == (1, 1, 4, 4)


def test_calls_of_other_grids_with_as_many_tokens_are_not_averaged():
    model = as_velocity_model(cogvideox(rope=True))
    x_t, t, cond = inputs(batch=1)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"expected latents of \(3, 4, 4\) .* tokens, .* got \(3, 2, 8\)"),
        AttnMapsCapture(model, {}, token_indices=WORDS),
    ):
        model(x_t, t, cond)
        model(x_t.reshape(1, 3, 4, 4, 16), t, cond)


def gradients(erasers):
    return [p.grad.clone() for eraser in erasers.values() for p in eraser.parameters()]


@every_family
@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradient_checkpointing_changes_nothing(family, backward_inside):
    results = []
    for checkpointing in (False, True):
        transformer = family.make()
        erasers = attach_erasers(transformer, rank=4)
        train_a_little(erasers)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        model, maps, outputs = as_velocity_model(transformer), {}, {}
        with contextlib.ExitStack() as captures:
            captures.enter_context(AttnMapsCapture(model, maps, token_indices=WORDS))
            captures.enter_context(EraserOutputsCapture(model, erasers, outputs))
            velocity = model(*family.inputs())
            loss = velocity.square().mean() + sum(o.square().sum() for o in outputs.values())
            kept = dict(outputs)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert all(outputs[name] is kept[name] for name in family.layers), "recomputation must not replace outputs"
        results.append((velocity, *maps.values(), *outputs.values(), *gradients(erasers)))
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert results[0][-1].any()


@pytest.mark.parametrize("low_rank", [False, True])
def test_reentrant_checkpointing_is_refused(low_rank):
    transformer = cogvideox()
    erasers = attach_erasers(transformer, rank=4)
    transformer.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)
    )
    capture = EraserOutputsCapture(transformer, erasers, {}, low_rank=low_rank)
    x_t, t, cond = inputs()
    with pytest.raises(RuntimeError, match="use_reentrant=False"), capture:
        as_velocity_model(transformer)(x_t.requires_grad_(), t, cond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
@every_family
def test_low_rank_outputs_give_the_localization_loss_of_the_outputs(family, dtype, checkpointing):
    results = []
    for low_rank in (False, True):
        transformer = family.make().to(dtype)
        erasers = attach_erasers(transformer, rank=4)
        train_a_little(erasers)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        model, outputs = as_velocity_model(transformer), {}
        with EraserOutputsCapture(model, erasers, outputs, low_rank=low_rank):
            velocity = model(*family.inputs(dtype=dtype))
        if low_rank:
            kept = outputs[family.layers[0]]
            assert kept.hidden.shape == (2, VIDEO, 4)
            assert kept.hidden.dtype == dtype
            assert kept.weight is erasers[family.layers[0]].up.weight
        mask = torch.rand(2, VIDEO, generator=torch.Generator().manual_seed(0))
        loss = localization_loss(outputs, mask).loss + 0 * velocity.sum()
        loss.backward()
        results.append((loss, *gradients(erasers)))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(*results, **tolerance)
    assert results[0][-1].any()


def test_low_rank_outputs_of_other_erasers_are_refused():
    transformer = cogvideox()
    erasers = {name: torch.nn.Identity() for name in attach_erasers(transformer, rank=4)}
    with pytest.raises(ValueError, match="Linear called up"):
        EraserOutputsCapture(transformer, erasers, {}, low_rank=True)


def test_low_rank_outputs_of_a_compiled_model():
    transformer = cogvideox(num_layers=1)
    erasers = attach_erasers(transformer, rank=4)
    train_a_little(erasers)
    expected, outputs = {}, {}
    with EraserOutputsCapture(transformer, erasers, expected, low_rank=True):
        as_velocity_model(transformer)(*inputs())
    torch.compiler.reset()
    with EraserOutputsCapture(transformer, erasers, outputs, low_rank=True):
        torch.compile(as_velocity_model(transformer), backend="aot_eager")(*inputs())
    torch.testing.assert_close(outputs, expected)


@every_family
def test_eraser_outputs_are_what_is_added_to_the_attentions(family):
    transformer, layer = family.make(), family.layers[0]
    erasers = attach_erasers(transformer, rank=4)
    train_a_little(erasers)
    model, outputs, seen = as_velocity_model(transformer), {}, {}
    for name in family.layers:
        transformer.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
        )
    with EraserOutputsCapture(model, erasers, outputs):
        model(*family.inputs(seed=5))
        model(*family.inputs())
    assert list(outputs) == family.layers
    first, with_erasers = outputs[layer], seen[layer]
    assert first.shape == (2, VIDEO, family.dim)
    with erasers_disabled(model):
        model(*family.inputs())
    torch.testing.assert_close(first, with_erasers - seen[layer], rtol=1e-4, atol=1e-5)
    first.sum().backward()
    assert erasers[layer].up.weight.grad.any()


def test_eraser_outputs_are_captured_unscaled():
    transformer = cogvideox()
    erasers = attach_erasers(transformer, rank=4)
    train_a_little(erasers)
    results = []
    for scale in (1.0, 0.25):
        set_eraser_scale(transformer, "default", scale)
        outputs = {}
        with EraserOutputsCapture(transformer, erasers, outputs):
            velocity = as_velocity_model(transformer)(*inputs())
        results.append((outputs[LAYERS[0]], velocity))
    (output, velocity), (output_scaled, velocity_scaled) = results
    assert torch.equal(output, output_scaled)
    assert not torch.equal(velocity, velocity_scaled)


def test_only_the_given_erasers_are_captured():
    transformer = cogvideox()
    attach_erasers(transformer, rank=4, name="other")
    erasers = attach_erasers(transformer, rank=4)
    outputs = {}
    with EraserOutputsCapture(transformer, {LAYERS[1]: erasers[LAYERS[1]]}, outputs):
        as_velocity_model(transformer)(*inputs())
    assert list(outputs) == LAYERS[1:]


class NoNativeAttention:
    """An attention processor that does not call torch's attention, like those of attention libraries."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        return hidden_states, encoder_hidden_states


def test_capturing_nothing_is_an_error():
    transformer = cogvideox()
    erasers = attach_erasers(transformer, rank=4)
    model = as_velocity_model(transformer)
    for capture in (AttnMapsCapture(model, {}), EraserOutputsCapture(model, erasers, {})):
        with pytest.raises(RuntimeError, match="captured nothing.*not called"), capture:
            pass
        with pytest.raises(KeyError), capture:  # the first error is the one that is raised
            raise KeyError
    with (
        pytest.raises(RuntimeError, match="disabled"),
        EraserOutputsCapture(model, erasers, {}),
        erasers_disabled(model),
    ):
        model(*inputs())
    transformer.set_attn_processor(NoNativeAttention())
    with pytest.raises(RuntimeError, match="native attention backend"), AttnMapsCapture(model, {}):
        model(*inputs())


def hooks_and_attributes(model):
    return [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for name, m in model.named_modules()
    ]


def test_captures_leave_no_trace_even_after_an_error():
    transformer = cogvideox()
    erasers = attach_erasers(transformer, rank=4)
    before = hooks_and_attributes(transformer)
    maps, outputs = AttnMapsCapture(transformer, {}), EraserOutputsCapture(transformer, erasers, {})
    with pytest.raises(RuntimeError, match="mat1"), maps, outputs:
        as_velocity_model(transformer)(*inputs()[:2], torch.zeros(2, TEXT, 33))
    assert hooks_and_attributes(transformer) == before
    assert not torch.overrides._get_current_function_mode_stack()
    with maps, outputs, pytest.raises(RuntimeError, match="active already"):
        as_velocity_model(transformer)(*inputs())
        maps.__enter__()
    assert hooks_and_attributes(transformer) == before


@pytest.mark.parametrize(
    "token_indices", [[], [0.5], [True], [TEXT], [-2], [[1], [1, 2]], "ab", torch.zeros(3, 1).int()]
)
def test_wrong_token_indices_are_named(token_indices):
    transformer = cogvideox()
    with pytest.raises((TypeError, ValueError), match="token_indices"):  # noqa: SIM117
        with AttnMapsCapture(transformer, {}, token_indices=token_indices):
            as_velocity_model(transformer)(*inputs())


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_as_large_as_tokens_times_tokens_is_made():
    model = as_velocity_model(cogvideox(rope=True))
    x_t, t, cond = torch.randn(1, 3, 4, 16, 24), torch.tensor([100]), torch.randn(1, TEXT, 32)
    tokens = 3 * 8 * 12 + TEXT
    maps = {}
    with torch.no_grad(), LargestTensor() as largest:
        with AttnMapsCapture(model, maps, token_indices=WORDS):
            model(x_t, t, cond)
        assert maps[LAYERS[0]].shape == (1, tokens - TEXT)
        assert largest.elements < tokens * tokens
        softmax(*torch.zeros(2, 1, 1, tokens, 16))
        assert largest.elements == tokens * tokens, "the meter works"


def test_autocast_applies_to_the_model_and_not_to_the_maps(monkeypatch):
    model = as_velocity_model(cogvideox(rope=True))
    maps = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with recorded_attention(monkeypatch) as calls:
            expected = model(*inputs())
        with AttnMapsCapture(model, maps, token_indices=WORDS):
            assert torch.equal(model(*inputs()), expected)
    query, key, _ = calls[0]
    query, key = query.bfloat16(), key.bfloat16()
    exact, eager = (softmax(query, key, dtype=d)[:, :, TEXT:, WORDS] for d in (torch.float64, torch.bfloat16))
    assert_close(maps[LAYERS[0]], exact.sum(-1).mean(1), eager.float().sum(-1).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_kind", [None, "key", "added"])
def test_autocast_casts_as_the_attention_does(dtype, mask_kind):
    query, key, kept = torch.randn(2, HEADS, 6, 16).to(dtype), torch.randn(2, HEADS, 5, 16).to(dtype), []
    mask = attention_mask(mask_kind, 2, 6, 5)
    if mask_kind == "added" and dtype == torch.float64:
        mask = mask.double()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        with interception.Interception(kept.append):
            output = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    assert output.dtype == expected.dtype
    assert torch.equal(output, expected)
    cast = query.dtype if dtype == torch.float64 else torch.bfloat16
    if mask_kind == "added":
        mask = mask.to(cast)
    exact, eager = (softmax(query.to(cast), key.to(cast), mask, dtype=d) for d in (torch.float64, cast))
    assert_close(kept[0].with_lse().probabilities(), exact, eager)


@pytest.mark.parametrize("lse_is_returned", [True, False])
def test_queries_whose_keys_are_all_masked_attend_to_nothing(lse_is_returned, monkeypatch):
    if not lse_is_returned:
        monkeypatch.setattr(interception, "_attention_and_lse", lambda *_: None)
    query, key, kept = torch.randn(2, HEADS, 6, 16), torch.randn(2, HEADS, 5, 16), []
    mask = attention_mask("head", 2, 6, 5)
    mask[0, :, 3] = False
    with interception.Interception(kept.append):
        F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    exact = softmax(query, key, mask).nan_to_num(0)
    assert exact[0, :, 3].eq(0).all()
    torch.testing.assert_close(kept[0].with_lse().probabilities(), exact.float())


def captured(model, erasers, call):
    """The maps and eraser outputs of one call."""
    maps, outputs = {}, {}
    with AttnMapsCapture(model, maps, token_indices=WORDS), EraserOutputsCapture(model, erasers, outputs):
        model(*call)
    return [*maps.values(), *outputs.values()]


@pytest.mark.parametrize(
    ("family", "configuration"),
    [
        pytest.param(FAMILIES[0], {"num_layers": 1}, id="text first"),
        pytest.param(FAMILIES[1], {"num_single_layers": 1}, id="text last, a block of either kind"),
    ],
)
def test_a_model_compiled_inside_the_capture(family, configuration):
    transformer = family.make(**configuration)
    erasers = attach_erasers(transformer, rank=4)
    train_a_little(erasers)
    model = as_velocity_model(transformer)
    eager = captured(model, erasers, family.inputs())
    compiled = captured(torch.compile(model, backend="aot_eager"), erasers, family.inputs())
    torch.compiler.reset()
    assert len(compiled) == 2 * len(erasers)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_wrong_mappings_are_named():
    transformer = cogvideox()
    erasers = attach_erasers(transformer, rank=4)
    for make, name in (
        (lambda: AttnMapsCapture(transformer, None), "attn_maps.*NoneType"),
        (lambda: EraserOutputsCapture(transformer, erasers, []), "eraser_outputs.*list"),
        (lambda: EraserOutputsCapture(transformer, list(erasers.values()), {}), "erasers.*list"),
        (lambda: EraserOutputsCapture(transformer, {"layer": 1}, {}), r"erasers\['layer'\].*int"),
    ):
        with pytest.raises(TypeError, match=name):
            make()


class Operations(TorchDispatchMode):
    """Records the names of operations, and which of them make the host wait: copies between devices, reading values."""

    def __init__(self):
        super().__init__()
        self.names, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        devices = {x.device for x in tree_leaves([args, kwargs, result]) if isinstance(x, torch.Tensor)}
        self.names.append(name)
        if name in ("_local_scalar_dense", "nonzero") or (name in ("_to_copy", "copy_") and len(devices) > 1):
            self.waits.append(name)
        return result


@pytest.mark.parametrize("tokens", [[1, 4], [[1, 4], [0, -1]], None])
@pytest.mark.parametrize("position", ["first", "cross"])
@pytest.mark.parametrize(
    ("mask_kind", "returns_lse"), [(None, True), (None, False), ("key", True), ("key", False), ("added", False)]
)
@pytest.mark.filterwarnings("ignore:the attention does not return")
def test_the_host_waits_for_the_device_once_a_capture(position, mask_kind, returns_lse, tokens, monkeypatch):
    """The device is "meta": a copy to it shows, and reading a value from it raises."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, toy(position)))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which meta tensors do not have
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())

    def attention_and_lse(query, key, value, mask, scale):
        return torch.empty_like(query), query.new_empty(query.shape[:3])

    monkeypatch.setattr(interception, "_attention_and_lse", attention_and_lse if returns_lse else lambda *_: None)
    model, (video, text) = ToyTransformer(position), (torch.empty(2, n, 32, device="meta") for n in (11, 5))
    model.blocks.append(model.blocks[0])
    rows, columns = (11, 5) if position == "cross" else (16, 16)
    mask = attention_mask(mask_kind, 2, rows, columns)
    model.blocks[0].attn.mask = None if mask is None else mask.to("meta")
    capture = AttnMapsCapture(model, {}, token_indices=tokens)
    for _ in range(2):
        with capture:
            calls = []
            for _ in range(3):
                with Operations() as operations:
                    model(video, text)
                calls.append(operations.waits)
        assert calls[0].count("_to_copy") == (tokens is not None)
        assert calls[1:] == [[], []]


def test_token_indices_are_read_again_when_a_capture_begins():
    model, tokens, maps = as_velocity_model(cogvideox()), torch.tensor([3, 7]), {}
    capture = AttnMapsCapture(model, maps, token_indices=tokens)
    with torch.no_grad():
        with capture:
            model(*inputs())
        first = maps[LAYERS[0]]
        tokens.copy_(torch.tensor([1, 2]))
        with capture:
            model(*inputs())
        expected = {}
        with AttnMapsCapture(model, expected, token_indices=[1, 2]):
            model(*inputs())
    assert torch.equal(maps[LAYERS[0]], expected[LAYERS[0]])
    assert not torch.equal(maps[LAYERS[0]], first)


def test_calls_of_texts_of_other_lengths_check_the_token_indices_again(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, toy("cross")))
    model, video = ToyTransformer("cross"), torch.randn(1, 11, 32)
    with (
        pytest.raises(ValueError, match="token_indices: expected -1 to 3, the last key, got 4"),
        AttnMapsCapture(model, {}, token_indices=[4]),
    ):
        model(video, torch.randn(1, 5, 32))
        model(video, torch.randn(1, 4, 32))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_the_log_sum_exp_is_taken_from_the_attention_that_torch_chooses_on_a_gpu(backend, scale, monkeypatch):
    """With tensors that have a shape and no values, on a GPU that is not there."""
    choice = SDPBackend.__members__[f"{backend.upper()}_ATTENTION"].value
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: choice)
    kept = []
    with FakeTensorMode(), Operations() as operations, interception.Interception(kept.append):
        query, key = (torch.empty(2, HEADS, n, 16, device="cuda") for n in (6, 5))
        output = F.scaled_dot_product_attention(query, key, key, scale=scale)
    assert f"_scaled_dot_product_{backend}_attention" in operations.names
    assert output.shape == query.shape
    assert kept[0].lse.shape == query.shape[:3]
    assert kept[0].lse.dtype == torch.float32
