import copy
import hashlib
import io
import json
import os
import pickle

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from tiny_models import DIM, LAYERS, cogvideox, inputs, train_a_little
from torch import nn

from fastunlearn import eraser_files
from fastunlearn.backbones import as_velocity_model
from fastunlearn.erasers import (
    AdapterEraser,
    attach_erasers,
    detach_erasers,
    erasers_disabled,
    load_erasers,
    save_erasers,
)


def run(model, dtype=torch.float32):
    with torch.no_grad():
        return as_velocity_model(model)(*inputs(dtype=dtype))


def fingerprint(model):
    """Everything that attaching changes, and every value."""
    modules = [(name, sorted(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return modules, state, [p.requires_grad for p in model.parameters()]


def same(before, after):
    return (
        before[0] == after[0]
        and before[1].keys() == after[1].keys()
        and all(torch.equal(before[1][name], after[1][name]) for name in before[1])
        and before[2] == after[2]
    )


@pytest.fixture
def trained(tmp_path):
    """A model with erasers that do something, where they were saved, and what the model answers."""
    model = cogvideox(rope=True)
    train_a_little(attach_erasers(model, rank=4))
    save_erasers(model, tmp_path / "erasers", concept="circle")
    return model, tmp_path / "erasers", run(model)


def test_an_eraser_is_down_gelu_up():
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
@pytest.mark.parametrize("rope", [False, True], ids=["sincos", "rope"])
def test_fresh_erasers_change_nothing_but_what_is_trainable(dtype, rope):
    model = cogvideox(rope).to(dtype)
    keys, expected = set(model.state_dict()), run(model, dtype)
    erasers = attach_erasers(as_velocity_model(model), rank=4)
    assert list(erasers) == LAYERS
    assert torch.equal(run(model, dtype), expected)
    assert keys < set(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{layer}.erasers.default.{key}" for layer in LAYERS for key in eraser_files.PARAMETERS}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train_a_little(erasers)
    assert not torch.equal(run(model, dtype), expected)
    assert run(model, dtype).dtype == dtype


def test_casting_the_model_leaves_the_erasers_in_float32():
    model = cogvideox()
    erasers = attach_erasers(model, rank=4)
    train_a_little(erasers)
    kept = {name: tensor.clone() for name, tensor in erasers[LAYERS[0]].state_dict().items()}
    model.to(torch.bfloat16)
    model.half()
    assert model.dtype == torch.float16
    assert all(torch.equal(tensor, kept[name]) for name, tensor in erasers[LAYERS[0]].state_dict().items())
    as_velocity_model(model)(*inputs(dtype=torch.float16)).float().sum().backward()
    assert {p.grad.dtype for eraser in erasers.values() for p in eraser.parameters()} == {torch.float32}
    assert AdapterEraser(4, 2).double().up.weight.dtype == torch.float64


def test_erasers_add_up_each_from_the_attention_s_own_output():
    model = cogvideox()
    a = attach_erasers(model, rank=4, name="a")
    b = attach_erasers(model, rank=3, name="b")
    train_a_little(a, seed=3)
    train_a_little(b, seed=4)
    seen = []
    handle = model.get_submodule(LAYERS[0]).register_forward_hook(lambda _, args, output: seen.append(output))
    with erasers_disabled(model):
        run(model)
    run(model)
    handle.remove()
    (plain, text), (video, text_after) = seen
    with torch.no_grad():
        assert torch.equal(video, plain + a[LAYERS[0]](plain) + b[LAYERS[0]](plain))
    assert torch.equal(text, text_after)


def test_names():
    model = cogvideox()
    attach_erasers(model, rank=4)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="'default' already"):
        attach_erasers(model, rank=4)
    for name in ("", "a.b", "a/b", "keys", "forward", "disabled", None):
        with pytest.raises(ValueError, match="name"):
            attach_erasers(model, rank=4, name=name)
    with pytest.raises(ValueError, match="rank"):
        attach_erasers(model, rank=-1, name="other")
    for call in (detach_erasers, lambda m, n: erasers_disabled(m, n).__enter__(), lambda m, n: save_erasers(m, "x", n)):
        with pytest.raises(ValueError, match="no erasers are called 'other'"):
            call(model, "other")
    with pytest.raises(TypeError, match="Linear"):
        attach_erasers(nn.Linear(2, 2))
    assert same(before, fingerprint(model))


def test_detaching_restores_the_model():
    model = cogvideox()
    model.proj_out.requires_grad_(False)
    before, expected = fingerprint(model), run(model)
    detach_erasers(model)
    train_a_little(attach_erasers(model, rank=4, name="a"))
    train_a_little(attach_erasers(model, rank=4, name="b"))
    with_both = run(model)
    detach_erasers(model, "a")
    assert not torch.equal(run(model), with_both)
    assert not any("erasers.a" in name for name in model.state_dict())
    assert not model.patch_embed.proj.weight.requires_grad
    detach_erasers(model, "b")
    assert same(before, fingerprint(model))
    assert torch.equal(run(model), expected)
    train_a_little(attach_erasers(model, rank=4, name="a"))
    detach_erasers(model)
    assert same(before, fingerprint(model))
    attach_erasers(model, rank=4)
    del model.save_pretrained  # whoever lifts the guard can still detach
    detach_erasers(model)
    assert same(before, fingerprint(model))


def test_disabling_nests_and_ends_with_exceptions():
    model = cogvideox()
    plain = run(model)
    train_a_little(attach_erasers(model, rank=4, name="a"))
    only_a = run(model)
    train_a_little(attach_erasers(model, rank=4, name="b"), seed=5)
    both = run(model)
    with erasers_disabled(as_velocity_model(model)):
        assert torch.equal(run(model), plain)
        with pytest.raises(KeyError), erasers_disabled(model, "b"):
            assert torch.equal(run(model), plain)
            raise KeyError
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), both)
    with erasers_disabled(model, "b"):
        assert torch.equal(run(model), only_a)
    assert torch.equal(run(model), both)
    with erasers_disabled(model):
        detach_erasers(model, "b")
    assert torch.equal(run(model), only_a)
    with erasers_disabled(nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match="function"):
        erasers_disabled(lambda x: x).__enter__()


def clones(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_copies_are_independent():
    model = cogvideox()
    plain = run(model)
    train_a_little(attach_erasers(model, rank=4))
    erased = run(model)
    for clone in clones(model):
        with erasers_disabled(model):
            assert torch.equal(run(clone), erased)
            inner = copy.deepcopy(model)
        assert torch.equal(run(inner), erased)
        with erasers_disabled(clone):
            assert torch.equal(run(clone), plain)
            assert torch.equal(run(model), erased)
        with pytest.raises(RuntimeError, match="save_erasers"):
            clone.save_pretrained("nowhere")
        detach_erasers(clone)
        assert torch.equal(run(clone), plain)
        assert torch.equal(run(model), erased)
        assert clone.save_pretrained.__self__ is clone


def test_fused_projections_and_checkpointing_keep_the_erasers():
    results = []
    for change in (lambda m: None, lambda m: m.enable_gradient_checkpointing(), lambda m: m.fuse_qkv_projections()):
        model = cogvideox(rope=True)
        erasers = attach_erasers(model, rank=4)
        train_a_little(erasers)
        with torch.no_grad():
            change(model)
        velocity = as_velocity_model(model)(*inputs())
        velocity.square().mean().backward()
        results.append([velocity, *(p.grad for eraser in erasers.values() for p in eraser.parameters())])
    plain, checkpointed, fused = results
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
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
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "saved" / "transformer")), run(model))


def test_saved_erasers_come_back(trained):
    model, folder, expected = trained
    other = cogvideox(rope=True)
    rng = torch.get_rng_state()
    erasers = load_erasers(as_velocity_model(other), folder, name="renamed")
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(erasers) == LAYERS
    assert torch.equal(run(other), expected)
    assert [name for name, p in other.named_parameters() if p.requires_grad][0].startswith(LAYERS[0])
    erasers[LAYERS[0]].up.bias.data.add_(1)  # the weights are the model's own
    config = json.loads((folder / "config.json").read_text())
    assert (config["rank"], config["dim"], config["backbone"], config["concept"]) == (4, DIM, "cogvideox", "circle")
    assert config["layers"] == LAYERS
    assert config["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="'default' already"):
        load_erasers(model, folder)


def upstream(folder, model, **config):
    folder.mkdir()
    states = {f"{layer}.adapter": model.get_submodule(f"{layer}.erasers.default").state_dict() for layer in LAYERS}
    torch.save(states, folder / "eraser_weights.pt")
    (folder / "eraser_config.json").write_text(json.dumps({"eraser_type": "adapter", "eraser_rank": 4} | config))
    return states


def test_upstream_checkpoints_are_read(trained, tmp_path):
    model, _, expected = trained
    upstream(tmp_path / "upstream", model)
    other = cogvideox(rope=True)
    load_erasers(other, tmp_path / "upstream")
    assert torch.equal(run(other), expected)


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4])
def test_a_crash_while_saving_leaves_the_old_or_the_new(trained, monkeypatch, crash_at):
    model, folder, old = trained
    train_a_little({"": model.get_submodule(f"{LAYERS[0]}.erasers.default")}, seed=9)
    new, steps = run(model), []

    def crashing(function):
        def step(*args):
            steps.append(function)
            if len(steps) == crash_at:
                raise OSError("power cut")
            return function(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crashing(os.fsync))
        patch.setattr(os, "replace", crashing(os.replace))
        with pytest.raises(OSError, match="power cut"):
            save_erasers(model, folder)
    other = cogvideox(rope=True)
    load_erasers(other, folder)
    assert torch.equal(run(other), old)
    save_erasers(model, folder)
    detach_erasers(other)
    load_erasers(other, folder)
    assert torch.equal(run(other), new)
    assert len(list(folder.glob("*.safetensors*"))) == 1


def test_saving_refuses_what_would_do_harm(trained, tmp_path):
    model, folder, expected = trained
    cogvideox().save_pretrained(tmp_path / "transformer")
    with pytest.raises(FileExistsError, match="config.json belongs to something else"):
        save_erasers(model, tmp_path / "transformer")
    with pytest.raises(TypeError, match="concept.*int"):
        save_erasers(model, tmp_path / "new", concept=3)
    assert not (tmp_path / "new").exists()
    mine = folder / "erasers-0123456789ab.safetensors.bak"
    mine.touch()
    save_erasers(model, folder)
    assert mine.exists()
    model.get_submodule(f"{LAYERS[1]}.erasers.default").up.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1.*up\.bias.*NaN"):
        save_erasers(model, folder)
    other = cogvideox(rope=True)
    load_erasers(other, folder)
    assert torch.equal(run(other), expected)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-pickle-was-run",)


def set_config(**entries):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return change


def set_weights(change):
    """Other tensors, with a checksum that is right for them."""

    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        states = eraser_files.read(folder).states
        change(states)
        eraser_files.write(folder, states, {key: config[key] for key in ("backbone", "rank", "dim")})

    return apply


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def sign(folder, content):
    """Any content, with a checksum that is right for it."""
    weights_of(folder).write_bytes(content)
    set_config(sha256=hashlib.sha256(content).hexdigest())(folder)


NATIVE_DAMAGE = {
    "no folder": (lambda f: os.rename(f, f.with_name("gone")), FileNotFoundError, "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "no weights": (lambda f: weights_of(f).unlink(), FileNotFoundError, "safetensors is missing"),
    "cut weights": (lambda f: cut(weights_of(f)), ValueError, "safetensors.*checksum"),
    "cut config": (lambda f: cut(f / "config.json"), ValueError, "config.json: not valid JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), ValueError, "not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "JSON object, got list"),
    "foreign": (set_config(format="other"), ValueError, "not the configuration"),
    "future": (set_config(format_version=99), ValueError, "format_version 1, got 99"),
    "family": (set_config(backbone="wan"), ValueError, "erasers for wan.*model is cogvideox"),
    "rank": (set_config(rank="4"), ValueError, "rank, got '4'"),
    "wrong rank": (set_config(rank=5), ValueError, r"blocks\.0.*expected.*\(5, 64\).*got.*\(4, 64\)"),
    "escape": (set_config(weights="../x.safetensors"), ValueError, "same folder"),
    "unlisted": (set_config(layers=LAYERS[:1]), ValueError, r"no layer.*blocks\.1"),
    "missing layer": (set_weights(lambda s: s.pop(LAYERS[1])), ValueError, r"missing for layers.*blocks\.1"),
    "extra layer": (
        set_weights(lambda s: s.update({"x.attn1": copy.deepcopy(s[LAYERS[0]])})),
        ValueError,
        "unknown.*x.attn1",
    ),
    "no bias": (set_weights(lambda s: s[LAYERS[1]].pop("up.bias")), ValueError, r"blocks\.1.*expected.*up\.bias"),
    "nan": (set_weights(lambda s: s[LAYERS[1]]["up.bias"].fill_(torch.nan)), ValueError, r"blocks\.1.*up\.bias"),
    "broken weights": (lambda f: sign(f, b"garbage" * 20), ValueError, "erasers-.*safetensors: not a readable"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 200_000), ValueError, "config.json: not valid JSON"),
    "huge rank": (set_config(rank=10**30), ValueError, r"blocks\.0.*expected.*got.*\(4, 64\)"),
    "infinity": (
        set_weights(lambda s: s[LAYERS[1]].update({"up.bias": torch.full((64,), 1e300, dtype=torch.float64)})),
        ValueError,
        r"blocks\.1.*up\.bias.*infinity",
    ),
    "integers": (
        set_weights(lambda s: s[LAYERS[1]].update({"up.bias": torch.zeros(64, dtype=torch.int64)})),
        ValueError,
        "floating",
    ),
}


@pytest.mark.parametrize("damage", NATIVE_DAMAGE)
def test_damaged_folders_are_named_and_the_model_is_left_alone(trained, damage):
    _, folder, _ = trained
    change, error, message = NATIVE_DAMAGE[damage]
    change(folder)
    model = cogvideox(rope=True)
    before = fingerprint(model)
    with pytest.raises(error, match=f"(?s){message}"):
        load_erasers(model, folder)
    assert same(before, fingerprint(model))


def archive(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("weights", "config", "error", "message"),
    [
        (pickle.dumps(Hostile(), protocol=2), {}, ValueError, "eraser_weights.pt: not a readable"),
        (archive({"x": Hostile()}), {}, ValueError, "eraser_weights.pt: not a readable"),
        (archive([1]), {}, ValueError, "expected a dict"),
        (archive({"x.adapter": {"down.weight": 1}}), {}, ValueError, "missing for layers"),
        (archive({f"{name}.adapter": {"down.weight": 1} for name in LAYERS}), {}, ValueError, "expected parameters"),
        (b"", {}, ValueError, "eraser_weights.pt: not a readable"),
        (None, {}, FileNotFoundError, "eraser_weights.pt is missing"),
        (b"", {"eraser_type": "lora"}, ValueError, "eraser_type 'adapter', got 'lora'"),
    ],
    ids=["hostile", "hostile archive", "a list", "foreign", "numbers", "empty", "missing", "lora"],
)
def test_damaged_upstream_folders_are_named(trained, tmp_path, monkeypatch, weights, config, error, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "upstream"
    upstream(folder, trained[0], **config)
    (folder / "eraser_weights.pt").unlink()
    if weights is not None:
        (folder / "eraser_weights.pt").write_bytes(weights)
    model = cogvideox(rope=True)
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        load_erasers(model, folder)
    assert same(before, fingerprint(model))
    assert not (tmp_path / "hostile-pickle-was-run").exists()


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors)")
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex64),
        lambda x: torch.nested.nested_tensor([torch.zeros(4)] * 64),
    ],
    ids=["sparse", "csr", "meta", "complex", "nested"],
)
def test_upstream_tensors_of_another_kind_are_named(trained, tmp_path, change):
    states = upstream(tmp_path / "upstream", trained[0])
    state = dict(states[f"{LAYERS[1]}.adapter"])
    state["up.weight"] = change(state["up.weight"])
    torch.save(states | {f"{LAYERS[1]}.adapter": state}, tmp_path / "upstream" / "eraser_weights.pt")
    model = cogvideox(rope=True)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"blocks\.1.*up\.weight.*dense floating-point|not a readable"):
        load_erasers(model, tmp_path / "upstream")
    assert same(before, fingerprint(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_narrow_weights_are_read_as_float32(trained, dtype):
    _, folder, _ = trained
    set_weights(lambda s: s[LAYERS[0]].update({"up.bias": torch.ones(64).to(dtype)}))(folder)
    model = cogvideox(rope=True)
    bias = load_erasers(model, folder)[LAYERS[0]].up.bias
    assert bias.dtype == torch.float32
    assert (bias == 1).all()
