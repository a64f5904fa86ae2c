"""Erasers on a model: attached, scaled, disabled, copied, detached."""

import copy
import pickle

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers.hooks import apply_layerwise_casting
from eraser_cases import fingerprint, same, velocity_of
from quantised import adapt_linear_layers, quantise_linear_layers
from tiny_models import FAMILIES, LAYERS, VIDEO, cogvideox, family_of, train_a_little
from torch import nn

from fastunlearn import eraser_files
from fastunlearn.erasers import (
    AdapterEraser,
    attach_erasers,
    detach_erasers,
    erasers_disabled,
    load_erasers,
    save_erasers,
    set_eraser_scale,
)
from fastunlearn.velocity_model import as_velocity_model

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def test_an_eraser_is_linear_gelu_linear():
    eraser = AdapterEraser(6, rank=3)
    assert list(eraser.state_dict()) == ["down.weight", "down.bias", "up.weight", "up.bias"]
    x = torch.randn(2, 5, 6)
    assert not eraser(x).any()
    train_a_little({"": eraser})
    down, up = eraser.down, eraser.up
    hidden = x.double() @ down.weight.double().T + down.bias.double()
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    exact = hidden @ up.weight.double().T + up.bias.double()
    eager = up(nn.functional.gelu(down(x))).double()
    assert (eraser(x).double() - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-7
    with pytest.raises(ValueError, match="rank.*positive.*0"):
        AdapterEraser(6, rank=0)
    with pytest.raises(ValueError, match="dim.*2.5"):
        AdapterEraser(2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_family
def test_fresh_erasers_change_nothing_but_what_is_trainable(dtype, family):
    model = family.make().to(dtype)
    keys, expected = set(model.state_dict()), velocity_of(model, dtype)
    erasers = attach_erasers(as_velocity_model(model), rank=4)
    assert list(erasers) == family.layers
    assert {eraser.up.out_features for eraser in erasers.values()} == {family.dim}
    assert torch.equal(velocity_of(model, dtype), expected)
    assert keys < set(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    expected_names = {f"{layer}.erasers.default.{key}" for layer in family.layers for key in eraser_files.PARAMETERS}
    assert trainable == expected_names
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train_a_little(erasers)
    assert not torch.equal(velocity_of(model, dtype), expected)
    assert velocity_of(model, dtype).dtype == dtype


@every_family
def test_casting_the_model_leaves_the_erasers_in_float32(family):
    model = family.make()
    erasers = attach_erasers(model, rank=4)
    train_a_little(erasers)
    first = erasers[family.layers[0]]
    kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    model.to(torch.bfloat16)
    model.half()
    assert model.dtype == torch.float16
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.state_dict().items())
    as_velocity_model(model)(*family.inputs(dtype=torch.float16)).float().sum().backward()
    assert {p.grad.dtype for eraser in erasers.values() for p in eraser.parameters()} == {torch.float32}
    assert AdapterEraser(4, 2).double().up.weight.dtype == torch.float64


def layerwise_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def layerwise_casting_of_everything(model):
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=None)


def casting_linear_layers(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.float8_e4m3fn).to(torch.float32)


def casting_modules_with_weights(model):
    for module in model.modules():
        if hasattr(module, "weight"):
            module.half().float()


@pytest.mark.parametrize(
    "change",
    [
        layerwise_casting,
        layerwise_casting_of_everything,
        casting_linear_layers,
        casting_modules_with_weights,
        quantise_linear_layers,
        adapt_linear_layers,
    ],
    ids=lambda change: change.__name__,
)
def test_what_is_done_to_linear_layers_is_not_done_to_erasers(change, tmp_path):
    model, changed = cogvideox(), cogvideox()
    erasers = attach_erasers(model, rank=4)
    train_a_little(erasers)
    expected = {name: tensor.clone() for name, tensor in erasers[LAYERS[0]].state_dict().items()}
    change(model)
    change(changed)
    erasers = attach_erasers(changed, rank=4)  # it makes no difference which comes first
    train_a_little(erasers)
    assert torch.equal(velocity_of(model), velocity_of(changed))
    assert not any(isinstance(module, nn.Linear) for eraser in erasers.values() for module in eraser.modules())
    for either in (model, changed):
        state = either.get_submodule(f"{LAYERS[0]}.erasers.default").state_dict()
        assert state.keys() == expected.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value, expected[key]) for key, value in state.items())
        save_erasers(either, tmp_path)
        load_erasers(either, tmp_path, "again", scale=0.0)


def test_a_new_eraser_has_the_weights_of_new_linear_layers():
    torch.manual_seed(3)
    eraser = AdapterEraser(6, rank=3)
    after = torch.rand(())
    torch.manual_seed(3)
    linear = nn.Linear(6, 3)
    nn.Linear(3, 6)
    assert torch.equal(torch.rand(()), after)
    assert torch.equal(eraser.down.weight, linear.weight) and torch.equal(eraser.down.bias, linear.bias)


def attention_outputs(model, layer):
    """What the attention returns when the model runs: (video tokens, text tokens or None)."""
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, args, output: seen.append(output))
    velocity_of(model)
    handle.remove()
    return seen[0] if isinstance(seen[0], tuple) else (seen[0], None)


@every_family
def test_erasers_add_up_and_each_reads_the_attention_s_own_output(family):
    model, layer = family.make(), family.layers[0]
    a = attach_erasers(model, rank=4, name="a")
    b = attach_erasers(model, rank=3, name="b")
    train_a_little(a, seed=3)
    train_a_little(b, seed=4)
    with erasers_disabled(model):
        plain, text = attention_outputs(model, layer)
    video, text_after = attention_outputs(model, layer)
    assert video.shape == (2, VIDEO, family.dim)
    with torch.no_grad():
        assert torch.equal(video, plain + a[layer](plain) + b[layer](plain))
    if text is None:
        assert text_after is None
    else:
        assert torch.equal(text, text_after)


def test_a_scale_multiplies_the_output_of_an_eraser():
    model, layer = cogvideox(), LAYERS[0]
    a = attach_erasers(model, rank=4, name="a")
    b = attach_erasers(model, rank=3, name="b")
    train_a_little(a, seed=3)
    train_a_little(b, seed=4)
    as_trained = velocity_of(model)
    with erasers_disabled(model):
        plain, _ = attention_outputs(model, layer)
    with erasers_disabled(model, "b"):
        only_a = velocity_of(model)
    set_eraser_scale(as_velocity_model(model), "b", 0.3)
    with torch.no_grad():
        assert torch.equal(attention_outputs(model, layer)[0], plain + a[layer](plain) + b[layer](plain) * 0.3)
    clone = copy.deepcopy(model)
    set_eraser_scale(model, "b", 0)
    assert torch.equal(velocity_of(model), only_a)
    assert not torch.equal(velocity_of(clone), only_a)
    set_eraser_scale(model, "b", 1.0)
    assert torch.equal(velocity_of(model), as_trained)
    set_eraser_scale(model, "b", 0.3)
    detach_erasers(model, "b")
    train_a_little(attach_erasers(model, rank=3, name="b"), seed=4)
    assert torch.equal(velocity_of(model), as_trained), "a scale leaves with its erasers"
    for name, scale, error, message in (
        ("c", 1.0, ValueError, "expected the name of attached erasers, got 'c'"),
        ("b", torch.nan, ValueError, "scale.*nan"),
        ("b", torch.ones(()), TypeError, "scale.*Tensor"),
    ):
        with pytest.raises(error, match=message):
            set_eraser_scale(model, name, scale)
    assert torch.equal(velocity_of(model), as_trained)


def test_wrong_names_are_refused():
    model = cogvideox()
    attach_erasers(model, rank=4)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="name that no attached erasers have, got 'default'"):
        attach_erasers(model, rank=4)
    for name in ("", "a.b", "a/b", "keys", "forward", "disabled", None):
        with pytest.raises(ValueError, match="name"):
            attach_erasers(model, rank=4, name=name)
    with pytest.raises(ValueError, match="rank"):
        attach_erasers(model, rank=-1, name="other")
    for call in (detach_erasers, lambda m, n: erasers_disabled(m, n).__enter__(), lambda m, n: save_erasers(m, "x", n)):
        with pytest.raises(ValueError, match="expected the name of attached erasers, got 'other'"):
            call(model, "other")
    with pytest.raises(TypeError, match="Linear"):
        attach_erasers(nn.Linear(2, 2))
    assert same(before, fingerprint(model))


@every_family
def test_detaching_restores_the_model(family):
    model = family.make()
    model.proj_out.requires_grad_(False)
    before, expected = fingerprint(model), velocity_of(model)
    detach_erasers(model)
    train_a_little(attach_erasers(model, rank=4, name="a"))
    train_a_little(attach_erasers(model, rank=4, name="b"))
    with_both = velocity_of(model)
    detach_erasers(model, "a")
    assert not torch.equal(velocity_of(model), with_both)
    assert not any("erasers.a" in name for name in model.state_dict())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "erasers.b" not in name)
    detach_erasers(model, "b")
    assert same(before, fingerprint(model))
    assert torch.equal(velocity_of(model), expected)
    train_a_little(attach_erasers(model, rank=4, name="a"))
    detach_erasers(model)
    assert same(before, fingerprint(model))
    attach_erasers(model, rank=4)
    del model.save_pretrained  # detaching works even if the user removed the guard
    detach_erasers(model)
    assert same(before, fingerprint(model))


@every_family
def test_disabling_nests_and_ends_with_exceptions(family):
    model = family.make()
    plain = velocity_of(model)
    train_a_little(attach_erasers(model, rank=4, name="a"))
    only_a = velocity_of(model)
    train_a_little(attach_erasers(model, rank=4, name="b"), seed=5)
    both = velocity_of(model)
    with erasers_disabled(as_velocity_model(model)):
        assert torch.equal(velocity_of(model), plain)
        with pytest.raises(KeyError), erasers_disabled(model, "b"):
            assert torch.equal(velocity_of(model), plain)
            raise KeyError
        assert torch.equal(velocity_of(model), plain)
    assert torch.equal(velocity_of(model), both)
    with erasers_disabled(model, "b"):
        assert torch.equal(velocity_of(model), only_a)
    assert torch.equal(velocity_of(model), both)
    with erasers_disabled(model):
        detach_erasers(model, "b")
    assert torch.equal(velocity_of(model), only_a)
    with erasers_disabled(nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match="function"):
        erasers_disabled(lambda x: x).__enter__()


def clones(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


@every_family
def test_copies_are_independent(family):
    model = family.make()
    plain = velocity_of(model)
    train_a_little(attach_erasers(model, rank=4))
    erased = velocity_of(model)
    for clone in clones(model):
        with erasers_disabled(model):
            assert torch.equal(velocity_of(clone), erased)
            inner = copy.deepcopy(model)
        assert torch.equal(velocity_of(inner), erased)
        with erasers_disabled(clone):
            assert torch.equal(velocity_of(clone), plain)
            assert torch.equal(velocity_of(model), erased)
        with pytest.raises(RuntimeError, match="save_erasers"):
            clone.save_pretrained("nowhere")
        detach_erasers(clone)
        assert torch.equal(velocity_of(clone), plain)
        assert torch.equal(velocity_of(model), erased)
        assert clone.save_pretrained.__self__ is clone


def velocity_and_gradients(model, change):
    erasers = attach_erasers(model, rank=4)
    train_a_little(erasers)
    with torch.no_grad():
        change(model)
    velocity = as_velocity_model(model)(*family_of(model).inputs())
    velocity.square().mean().backward()
    return [velocity, *(p.grad for eraser in erasers.values() for p in eraser.parameters())]


@every_family
def test_checkpointing_keeps_the_erasers(family):
    plain = velocity_and_gradients(family.make(), lambda m: None)
    checkpointed = velocity_and_gradients(family.make(), lambda m: m.enable_gradient_checkpointing())
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "hunyuan_video"], ids=str)  # cannot fuse
def test_fused_projections_keep_the_erasers(family):
    plain = velocity_and_gradients(family.make(), lambda m: None)
    fused = velocity_and_gradients(family.make(), lambda m: m.fuse_qkv_projections())
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_a_model_with_erasers_is_not_saved_without_them(tmp_path):
    model = cogvideox()
    pipeline = CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler())
    attach_erasers(model, rank=4)
    compiled = torch.compile(model, backend="eager")
    for save in (model.save_pretrained, compiled.save_pretrained, pipeline.save_pretrained):
        with pytest.raises(RuntimeError, match="save_erasers.*detach_erasers"):
            save(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))
    again = cogvideox(seed=1)
    attach_erasers(again, rank=4)
    again.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="erasers.default"):
        cogvideox().load_state_dict(model.state_dict())
    detach_erasers(model)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(velocity_of(type(model).from_pretrained(tmp_path / "saved" / "transformer")), velocity_of(model))
