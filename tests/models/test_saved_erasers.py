"""Erasers saved to a folder and loaded again, and folders that are damaged or not for the model."""

import copy
import hashlib
import io
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from eraser_cases import fingerprint, same, velocity_of
from quantised import Int8Weight
from tiny_models import DIM, FAMILIES, LAYERS, cogvideox, family_of, hunyuan_video, train_a_little
from torch import nn
from torch.distributed.fsdp import fully_shard

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


@pytest.fixture
def trained(tmp_path):
    """A model with erasers that have an effect, the folder they were saved in, and the model's output."""
    model = cogvideox(rope=True)
    train_a_little(attach_erasers(model, rank=4))
    save_erasers(model, tmp_path / "erasers", concept="circle")
    return model, tmp_path / "erasers", velocity_of(model)


def test_saved_erasers_come_back(trained):
    model, folder, expected = trained
    other = cogvideox(rope=True)
    rng = torch.get_rng_state()
    erasers = load_erasers(as_velocity_model(other), folder, name="renamed")
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(erasers) == LAYERS
    assert torch.equal(velocity_of(other), expected)
    assert [name for name, p in other.named_parameters() if p.requires_grad][0].startswith(LAYERS[0])
    erasers[LAYERS[0]].up.bias.data.add_(1)  # a copy: not shared with the model that was saved
    config = json.loads((folder / "config.json").read_text())
    assert (config["rank"], config["dim"], config["backbone"], config["concept"]) == (4, DIM, "cogvideox", "circle")
    assert config["layers"] == LAYERS
    assert config["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="name that no attached erasers have, got 'default'"):
        load_erasers(model, folder)


@every_family
def test_saved_erasers_of_every_family_come_back(family, tmp_path):
    model = family.make()
    train_a_little(attach_erasers(model, rank=4))
    save_erasers(model, tmp_path / "erasers")
    other = family.make()
    erasers = load_erasers(other, tmp_path / "erasers")
    assert list(erasers) == family.layers
    assert torch.equal(velocity_of(other), velocity_of(model))
    stranger = next(f for f in FAMILIES if f.name != family.name).make()
    before = fingerprint(stranger)
    with pytest.raises(ValueError, match=f"expected erasers for {family_of(stranger)}, got erasers for {family.name}"):
        load_erasers(stranger, tmp_path / "erasers")
    assert same(before, fingerprint(stranger))


def with_layer(model, **parameters):
    """Puts parameters into the last layer of the second eraser as no cast of a module would."""
    up = model.get_submodule(f"{LAYERS[1]}.erasers.default.up")
    for name, value in parameters.items():
        setattr(up, name, nn.Parameter(value))


WEIGHT = torch.ones(DIM, 4)


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.get_submodule(f"{LAYERS[1]}.erasers.default.up"))


def wrap(model):
    eraser = model.get_submodule(f"{LAYERS[1]}.erasers.default")
    eraser.up = nn.ModuleDict({"base_layer": eraser.up})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            partial(with_layer, weight=Int8Weight.quantised(WEIGHT)),
            "up.weight to be a plain tensor, got Int8Weight",
        ),
        (partial(with_layer, weight=WEIGHT.half()), "up.weight in float32, got torch.float16, to which something has"),
        (partial(with_layer, bias=torch.ones(DIM).bfloat16()), "up.bias in float32, got torch.bfloat16"),
        (partial(with_layer, weight=WEIGHT.to(torch.float8_e4m3fn)), r"up.weight in float32, got torch.float8_e4m3fn"),
        (partial(with_layer, weight=torch.ones(DIM, 3)), r"'up.weight': \(64, 4\).*got .*'up.weight': \(64, 3\)"),
        (partial(with_layer, weight=torch.ones(0)), r"'up.weight': \(64, 4\).*got .*'up.weight': \(0,\)"),  # as ZeRO-3
        (
            partial(with_layer, weight=torch.full((DIM, 4), torch.inf)),
            "expected finite numbers in up.weight, got",
        ),
        (parametrize, "expected parameters .*got .*'up.parametrizations.weight.original0'"),
        (wrap, "expected parameters .*got .*'up.base_layer.weight'"),  # as PEFT
    ],
)
def test_erasers_that_could_not_be_loaded_again_are_not_saved(trained, change, message):
    model, folder, _ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(model)
    with pytest.raises(ValueError, match=f"{LAYERS[1]}: {message}" if message[0] == "e" else message):
        save_erasers(model, folder)
    with pytest.raises(ValueError, match=message):
        save_erasers(model, folder / "new")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rounded_erasers_are_saved_once_they_are_float32_again(trained):
    model, folder, _ = trained
    with_layer(model, weight=WEIGHT.half() / 3)
    model.float()
    save_erasers(model, folder)
    erasers = load_erasers(cogvideox(rope=True), folder)
    assert torch.equal(erasers[LAYERS[1]].up.weight, (WEIGHT.half() / 3).float())


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_erasers_are_saved_while_they_are_whole(trained, one_process):
    model, folder, expected = trained
    shutil.rmtree(folder)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    with pytest.raises(ValueError, match=r"plain tensor, got DTensor; .*after fully_shard, call unshard\(\) on every"):
        save_erasers(model, folder)
    assert not folder.exists()
    for block in model.transformer_blocks:
        block.unshard()
    save_erasers(model, folder)
    other = cogvideox(rope=True)
    load_erasers(other, folder)
    assert torch.equal(velocity_of(other), expected)


def upstream(folder, model, layers=LAYERS, **config):
    folder.mkdir()
    states = {f"{layer}.adapter": model.get_submodule(f"{layer}.erasers.default").state_dict() for layer in layers}
    torch.save(states, folder / "eraser_weights.pt")
    (folder / "eraser_config.json").write_text(json.dumps({"eraser_type": "adapter", "eraser_rank": 4} | config))
    return states


def test_upstream_checkpoints_are_read(trained, tmp_path):
    model, _, expected = trained
    upstream(tmp_path / "upstream", model)
    other = cogvideox(rope=True)
    load_erasers(other, tmp_path / "upstream")
    assert torch.equal(velocity_of(other), expected)


def test_upstream_hunyuan_video_checkpoints_are_read_for_all_blocks_or_for_single_blocks_only(tmp_path):
    model = hunyuan_video()
    erasers = attach_erasers(model, rank=4)
    train_a_little(erasers)
    layers = list(erasers)
    upstream(tmp_path / "all", model, layers)
    upstream(tmp_path / "single", model, layers[1:])
    upstream(tmp_path / "one missing", model, layers[2:])
    other = hunyuan_video()
    plain, before = velocity_of(other), fingerprint(other)
    load_erasers(other, tmp_path / "all")
    assert torch.equal(velocity_of(other), velocity_of(model))
    detach_erasers(other)
    with pytest.raises(ValueError, match=r"got none for layers \['single_transformer_blocks\.0\.attn'\]"):
        load_erasers(other, tmp_path / "one missing")
    assert list(load_erasers(other, tmp_path / "single", "single")) == layers[1:]
    only_single = velocity_of(other)
    with torch.no_grad():
        for parameter in erasers[layers[0]].up.parameters():
            parameter.zero_()
    assert torch.equal(only_single, velocity_of(model))
    assert not torch.equal(only_single, plain)
    attach_erasers(other, rank=2, name="everywhere")
    set_eraser_scale(other, "single", 0)
    assert torch.equal(velocity_of(other), plain)
    set_eraser_scale(other, "single", 1)
    save_erasers(other, tmp_path / "saved", "single")
    detach_erasers(other, "single")
    assert list(load_erasers(other, tmp_path / "saved", "again")) == layers[1:]
    assert torch.equal(velocity_of(other), only_single)
    detach_erasers(other)
    assert same(before, fingerprint(other))


@pytest.fixture
def folders(tmp_path):
    """The erasers of two concepts, trained separately, with different ranks."""
    for seed, concept in enumerate(("nudity", "car"), 3):
        model = cogvideox()
        train_a_little(attach_erasers(model, rank=seed), seed=seed)
        save_erasers(model, tmp_path / concept)
    return [tmp_path / "nudity", str(tmp_path / "car")]


def test_erasers_of_several_folders_are_attached_together(folders):
    model, one_by_one = cogvideox(), cogvideox()
    plain, before = velocity_of(model), fingerprint(model)
    erasers = load_erasers(model, folders, names=["nudity", "car"], scales=[1.0, 0.5])
    assert list(erasers) == ["nudity", "car"]
    assert [list(by_layer) for by_layer in erasers.values()] == [LAYERS, LAYERS]
    assert [by_layer[LAYERS[0]].up.in_features for by_layer in erasers.values()] == [3, 4]
    load_erasers(one_by_one, folders[0], "nudity")
    load_erasers(one_by_one, folders[1], "car", scale=0.5)
    assert torch.equal(velocity_of(model), velocity_of(one_by_one))
    set_eraser_scale(one_by_one, "car", 1.0)
    assert not torch.equal(velocity_of(model), velocity_of(one_by_one))
    with erasers_disabled(model):
        assert torch.equal(velocity_of(model), plain)
    detach_erasers(model)
    assert load_erasers(model, [], names=[]) == {}
    assert same(before, fingerprint(model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "names: expected a name .* each of 2 folders, got None"),
        ({"names": ["a"]}, ValueError, r"names.*2 folders, got \['a'\]"),
        ({"names": ["a", "a"]}, ValueError, "names.*of its own"),
        ({"names": "ab"}, ValueError, "names.*got 'ab'"),
        ({"names": ["a", "b.c"]}, ValueError, "name: expected letters.*'b.c'"),
        ({"names": ["a", "taken"]}, ValueError, "name that no attached erasers have, got 'taken'"),
        ({"names": ["a", "b"], "scales": [1.0]}, ValueError, r"scales.*2 folders, got \[1.0\]"),
        ({"names": ["a", "b"], "scales": [1.0, "2"]}, TypeError, "scale.*number.*str"),
        ({"names": ["a", "b"], "scales": [1.0, torch.inf]}, ValueError, "scale.*finite.*inf"),
        ({"names": ["a", "b"], "scale": 2.0}, TypeError, "scale: expected None with several folders, got 2.0"),
        ({"names": ["a", "b"], "name": "c"}, TypeError, "name: expected None with several folders, got 'c'"),
        ({"names": ["a", "b"], "damage": True}, ValueError, "checksum"),
        ({"one": True, "names": ["a"]}, TypeError, "names: expected None with one folder"),
        ({"one": True, "scales": [1.0]}, TypeError, "scales: expected None with one folder"),
        ({"one": True, "scale": torch.nan}, ValueError, "scale.*nan"),
    ],
)
def test_nothing_is_attached_unless_everything_fits(folders, options, error, message):
    options = dict(options)
    model = cogvideox()
    attach_erasers(model, rank=2, name="taken")
    before = fingerprint(model)
    if options.pop("damage", False):
        cut(weights_of(Path(folders[1])))
    folder = folders[0] if options.pop("one", False) else folders
    with pytest.raises(error, match=message):
        load_erasers(model, folder, **options)
    assert same(before, fingerprint(model))


def test_nothing_is_attached_if_the_device_is_full(folders, monkeypatch):
    model = cogvideox()
    before, moves = fingerprint(model), []

    def full(self, *args):
        moves.append(args)
        if len(moves) == 2 * len(LAYERS):
            raise torch.OutOfMemoryError("full")
        return self

    monkeypatch.setattr(AdapterEraser, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_erasers(model, folders, names=["a", "b"])
    assert same(before, fingerprint(model))


@pytest.mark.parametrize("crash_at", [1, 2, 3, 4])
def test_a_crash_while_saving_leaves_the_old_or_the_new_erasers(trained, monkeypatch, crash_at):
    model, folder, old = trained
    train_a_little({"": model.get_submodule(f"{LAYERS[0]}.erasers.default")}, seed=9)
    new, steps = velocity_of(model), []

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
    assert torch.equal(velocity_of(other), old)
    save_erasers(model, folder)
    detach_erasers(other)
    load_erasers(other, folder)
    assert torch.equal(velocity_of(other), new)
    assert len(list(folder.glob("*.safetensors*"))) == 1


def test_saving_refuses_to_do_harm(trained, tmp_path):
    model, folder, expected = trained
    cogvideox().save_pretrained(tmp_path / "transformer")
    with pytest.raises(
        FileExistsError, match="config.json: expected the configuration of saved erasers, got another file"
    ):
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
    assert torch.equal(velocity_of(other), expected)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile-pickle-was-run",)


def set_config(**entries):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return change


def set_weights(change):
    """Changes the stored tensors and corrects the checksum."""

    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        states = eraser_files.read(folder).states
        change(states)
        eraser_files.write(folder, "", states, {key: config[key] for key in ("backbone", "rank", "dim")})

    return apply


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def cut(path, keep=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def sign(folder, content):
    """Replaces the weights file by any content and corrects the checksum."""
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
    "foreign": (set_config(format="other"), ValueError, "expected the configuration of saved erasers"),
    "future": (set_config(format_version=99), ValueError, "format_version 1, got 99"),
    "family": (set_config(backbone="wan"), ValueError, "expected erasers for cogvideox, got erasers for wan"),
    "rank": (set_config(rank="4"), ValueError, "rank, got '4'"),
    "wrong rank": (set_config(rank=5), ValueError, r"blocks\.0.*expected.*\(5, 64\).*got.*\(4, 64\)"),
    "escape": (set_config(weights="../x.safetensors"), ValueError, "same folder"),
    "unlisted": (set_config(layers=LAYERS[:1]), ValueError, r"others too.*blocks\.1"),
    "missing layer": (set_weights(lambda s: s.pop(LAYERS[1])), ValueError, r"none for layers.*blocks\.1"),
    "extra layer": (
        set_weights(lambda s: s.update({"x.attn1": copy.deepcopy(s[LAYERS[0]])})),
        ValueError,
        "unknown.*x.attn1",
    ),
    "no bias": (set_weights(lambda s: s[LAYERS[1]].pop("up.bias")), ValueError, r"blocks\.1.*expected.*up\.bias"),
    "nan": (set_weights(lambda s: s[LAYERS[1]]["up.bias"].fill_(torch.nan)), ValueError, r"blocks\.1.*up\.bias"),
    "broken weights": (
        lambda f: sign(f, b"garbage" * 20),
        ValueError,
        "erasers-.*safetensors: expected .* cannot be read",
    ),
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
        (pickle.dumps(Hostile(), protocol=2), {}, ValueError, "eraser_weights.pt: expected .* fails to load"),
        (archive({"x": Hostile()}), {}, ValueError, "eraser_weights.pt: expected .* fails to load"),
        (archive([1]), {}, ValueError, "expected a dict"),
        (archive({"x.adapter": {"down.weight": 1}}), {}, ValueError, "got none for layers"),
        (archive({f"{name}.adapter": {"down.weight": 1} for name in LAYERS}), {}, ValueError, "expected parameters"),
        (b"", {}, ValueError, "eraser_weights.pt: expected .* fails to load"),
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
def test_upstream_tensors_that_are_not_dense_floats_are_named(trained, tmp_path, change):
    states = upstream(tmp_path / "upstream", trained[0])
    state = dict(states[f"{LAYERS[1]}.adapter"])
    state["up.weight"] = change(state["up.weight"])
    torch.save(states | {f"{LAYERS[1]}.adapter": state}, tmp_path / "upstream" / "eraser_weights.pt")
    model = cogvideox(rope=True)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"blocks\.1.*up\.weight.*dense floating-point|cannot be read"):
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
