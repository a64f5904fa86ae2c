"""Eraser functions take a diffusers pipeline: with one transformer, or with the two of Wan 2.2 A14B."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from eraser_cases import fingerprint, same, velocity_of
from tiny_models import train_a_little

from fastunlearn import (
    attach_erasers,
    detach_erasers,
    erasers_disabled,
    families,
    load_erasers,
    save_erasers,
    set_eraser_scale,
)
from fastunlearn.erasers import has_erasers

TWO = ("transformer", "transformer_2")


@cache
def made(variant):
    torch.manual_seed(0)
    return families.WAN.tiny_pipelines[variant]()


def pipeline(variant):
    """A tiny Wan pipeline with transformers of its own."""
    shared = made(variant)
    components = {name: copy.deepcopy(part) for name, part in shared.components.items() if name in TWO}
    return type(shared)(**{**shared.components, **components}, boundary_ratio=shared.config.boundary_ratio)


def velocities(pipe):
    return [velocity_of(part) for part in (pipe.transformer, pipe.transformer_2) if part is not None]


def all_equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def none_equal(some, others):
    return not any(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_two_transformers_get_erasers_each(tmp_path):
    pipe = pipeline("wan-2.2")
    plain, before = velocities(pipe), [fingerprint(getattr(pipe, name)) for name in TWO]
    erasers = attach_erasers(pipe, rank=4, name="a")
    assert list(erasers) == [f"{name}.blocks.{block}.attn2" for name in TWO for block in (0, 1)]
    assert erasers["transformer_2.blocks.1.attn2"] is pipe.transformer_2.blocks[1].attn2.erasers["a"]
    train_a_little(erasers)
    erased = velocities(pipe)
    assert none_equal(erased, plain)
    with erasers_disabled(pipe, "a"):
        assert all_equal(velocities(pipe), plain)
    set_eraser_scale(pipe, "a", 0.5)
    half = velocities(pipe)
    assert none_equal(half, plain) and none_equal(half, erased)
    save_erasers(pipe, tmp_path / "erasers", "a", concept="nude")
    assert sorted(path.name for path in (tmp_path / "erasers").iterdir()) == list(TWO)

    fresh = pipeline("wan-2.2")
    loaded = load_erasers(fresh, tmp_path / "erasers")
    assert list(loaded) == list(erasers)
    assert all_equal(velocities(fresh), erased)
    both = load_erasers(fresh, [tmp_path / "erasers"] * 2, names=["b", "c"], scales=[1.0, -2.0])
    assert {name: list(layers) for name, layers in both.items()} == {name: list(erasers) for name in "bc"}
    torch.testing.assert_close(velocities(fresh), plain)
    detach_erasers(fresh, "c")
    assert has_erasers(fresh)
    for each in (pipe, fresh):
        detach_erasers(each)
        assert not has_erasers(each)
        assert all_equal(velocities(each), plain)
        assert all(same(state, fingerprint(getattr(each, name))) for name, state in zip(TWO, before, strict=True))


def test_one_transformer_is_treated_as_if_it_was_given(tmp_path):
    pipe, alone = pipeline("wan"), pipeline("wan").transformer
    for each in (pipe, alone):
        torch.manual_seed(1)
        erasers = attach_erasers(each, rank=4)
        assert list(erasers) == ["blocks.0.attn2", "blocks.1.attn2"]
        train_a_little(erasers)
    assert torch.equal(velocities(pipe)[0], velocity_of(alone))
    save_erasers(pipe, tmp_path / "pipe")
    save_erasers(alone, tmp_path / "alone")
    names = sorted(path.name for path in (tmp_path / "pipe").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert all((tmp_path / "pipe" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes() for name in names)
    fresh = pipeline("wan")
    assert list(load_erasers(fresh, tmp_path / "alone")) == list(erasers)
    assert all_equal(velocities(fresh), velocities(pipe))


def test_erasers_that_training_saved_load_into_the_pipeline(tmp_path):
    from fastunlearn.training.model.loading import load_model

    pipe = pipeline("wan-2.2")
    pipe.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype=torch.float32, device=torch.device("cpu"))
    for seed, erasers in enumerate(model.attach_erasers(rank=4)):
        train_a_little(erasers, seed)
    model.save_erasers(tmp_path / "erasers")
    load_erasers(pipe, tmp_path / "erasers")
    assert all_equal(velocities(pipe), [velocity_of(expert) for expert in model.experts])


def test_folders_for_another_number_of_transformers_are_refused(tmp_path):
    one, two = pipeline("wan"), pipeline("wan-2.2")
    for pipe, folder in ((one, tmp_path / "one"), (two, tmp_path / "two")):
        attach_erasers(pipe, rank=4)
        save_erasers(pipe, folder)
        detach_erasers(pipe)
    with pytest.raises(ValueError, match="one: expected folders transformer and transformer_2.*one transformer"):
        load_erasers(two, tmp_path / "one")
    for model in (one, one.transformer):
        with pytest.raises(ValueError, match="two: expected erasers for one transformer.*the pipeline, or one"):
            load_erasers(model, tmp_path / "two")
    (tmp_path / "two/transformer_2/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="transformer_2: expected config.json"):
        load_erasers(two, tmp_path / "two")
    assert not has_erasers(one) and not has_erasers(two)


def test_two_transformers_get_erasers_both_or_neither(monkeypatch):
    pipe = pipeline("wan-2.2")
    attach_erasers(pipe.transformer_2, rank=4, name="a")
    with pytest.raises(ValueError, match="name that no attached erasers have, got 'a'"):
        attach_erasers(pipe, rank=4, name="a")
    assert not has_erasers(pipe.transformer)
    with pytest.raises(ValueError, match="erasers called 'a' on both transformers .* got none on transformer; give"):
        save_erasers(pipe, "nowhere", "a")
    with pytest.raises(ValueError, match="name of attached erasers, got 'b'"):
        save_erasers(pipe, "nowhere", "b")
    attach_erasers(pipe, rank=4, name="b")
    detach_erasers(pipe, "a")
    detach_erasers(pipe)
    pipe.transformer_2.register_forward_pre_hook = None  # what attaching to the second one needs
    with pytest.raises(TypeError):
        attach_erasers(pipe, rank=4)
    assert not has_erasers(pipe)


def test_a_pipeline_with_erasers_writes_nothing(tmp_path):
    pipe = pipeline("wan-2.2")
    train_a_little(attach_erasers(pipe, rank=4))
    clone = copy.deepcopy(pipe)
    for each in (pipe, clone):
        with pytest.raises(RuntimeError, match="save_erasers.*detach_erasers"):
            each.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    for name in TWO:
        detach_erasers(getattr(pipe, name))  # the guard looks when it is called
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model_index.json").is_file()
    detach_erasers(pipe)
    assert "save_pretrained" not in vars(pipe)


def test_what_is_neither_model_nor_pipeline_is_refused():
    for call in (attach_erasers, detach_erasers, lambda other: load_erasers(other, "nowhere")):
        with pytest.raises(TypeError, match="expected one of .*WanTransformer3DModel, possibly wrapped, got PosixPath"):
            call(Path())
    with pytest.raises(TypeError, match="a torch.nn.Module or a pipeline, got PosixPath"):
        erasers_disabled(Path()).__enter__()
    with pytest.raises(TypeError, match="got WanPipeline; give its transformer"):
        families.find_transformer(pipeline("wan"))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    one, two = pipeline("wan"), pipeline("wan-2.2")
    for pipe, folder, path in ((one, "~/one", "one"), (two, Path("~/two"), "two/transformer_2")):
        train_a_little(attach_erasers(pipe, rank=4))
        save_erasers(pipe, folder)
        assert (tmp_path / path / "config.json").is_file()
        fresh = copy.deepcopy(pipe)
        detach_erasers(fresh)
        load_erasers(fresh, [folder], names=["again"])
        assert all_equal(velocities(fresh), velocities(pipe))
