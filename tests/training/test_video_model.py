"""A loaded model does what the whole pipeline does: experts, latents, videos, noise; and it carries erasers."""

import copy
import json
import shutil

import accelerate
import pytest
import torch
from pipeline_cases import FP32, PROMPT, SIZE, batched, every_family, noise, one_of_each, recorded_calls
from tiny_models import cogvideox, train_a_little
from training_cases import tiny_model

from fastunlearn import detach_erasers, load_erasers
from fastunlearn.families import LatentSpace
from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.model.video_model import Defaults, VideoModel, VideoSize

DEFAULTS = Defaults(6.0, 8, 8, 3, 8)


def test_given_sizes_and_guidance_replace_the_defaults():
    defaults = Defaults(guidance_scale=6.0, height=480, width=720, num_frames=49, fps=8)
    assert defaults.size() == VideoSize(480, 720, 49)
    assert defaults.size(width=64, num_frames=9) == VideoSize(480, 64, 9)
    assert [defaults.guidance(scale) for scale in (None, 0.0, 1.0)] == [6.0, 0.0, 1.0]


def test_each_timestep_uses_the_same_expert_as_in_the_pipeline(loaded_model, diffusers_pipeline):
    model = loaded_model("wan-2.2")
    assert model.boundary == 875
    assert [model.expert_index(t) for t in (1000, 875.0, 874.9, 0)] == [0, 0, 1, 1]
    assert loaded_model("wan").expert_index(0) == 0
    pipeline = diffusers_pipeline("wan-2.2")
    with recorded_calls(pipeline.transformer, pipeline.transformer_2) as calls:
        pipeline("a dog", **SIZE, guidance_scale=1.0, num_inference_steps=4, output_type="latent")
    used = [(index, kwargs["timestep"][0].item()) for index, kwargs in calls]
    assert {index for index, _ in used} == {0, 1}
    assert all(model.expert_index(t) == index for index, t in used)


def test_the_device_is_where_the_model_computes():
    model = tiny_model()
    assert model.device == torch.device("cpu")
    accelerate.cpu_offload(model.experts[0].transformer, torch.device("cpu"))
    assert next(model.experts[0].parameters()).is_meta and model.device == torch.device("cpu")


# Latents and videos


@every_family
def test_latents_have_the_pipelines_shape(loaded_model, diffusers_pipeline, family):
    model = loaded_model(family)
    size = {"height": 32, "width": 48, "num_frames": 13}
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    latents = diffusers_pipeline(family)("a dog", **size, **settings).frames
    assert model.latent_shape(**size) == latents.shape[1:]
    assert model.token_grid(model.latent_shape(**size)) == (4, 2, 3)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 60}, "height: expected a positive multiple of 16, got 60"),
        ({"width": 0}, "width: expected a positive multiple of 16, got 0"),
        ({"num_frames": 8}, "num_frames: expected 1 more than a multiple of 4, got 8"),
        ({"num_frames": -3}, "num_frames: expected 1 more than"),
    ],
)
def test_sizes_that_do_not_divide_into_tokens_are_refused(loaded_model, size, message):
    with pytest.raises(ValueError, match=message):
        loaded_model("wan").latent_shape(**SIZE | size)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 528}, "height: expected at most 512, which this transformer has positions for; got 528"),
        ({"width": 1024}, "width: expected at most 512, .*; got 1024"),
        ({"num_frames": 129}, "num_frames: expected at most 125, .*; got 129"),
    ],
)
def test_sizes_beyond_wan_s_positions_are_refused(loaded_model, size, message):
    model = loaded_model("wan")  # rope_max_seq_len 32
    with pytest.raises(ValueError, match=message):
        model.latent_shape(**SIZE | size)
    model.latent_shape(512, 512, 125)
    latents = torch.zeros(1, *model.latent_shape(512, 16, 1))
    assert model.experts[0](latents, 500, torch.zeros(1, 16, 32)).shape == latents.shape


def test_sizes_beyond_the_trained_one_are_refused_for_cogvideox_1_5_alone(loaded_model):
    loaded = loaded_model("cogvideox")
    loaded.latent_shape(80, 96, 9)
    model = VideoModel(
        [cogvideox(patch_size_t=2, patch_bias=False, rope=True)],
        loaded.scheduler,
        latent_space=loaded.latent_space,
        defaults=DEFAULTS,
    )
    for name, size in (("height", 80), ("width", 96)):
        with pytest.raises(ValueError, match=f"{name}: expected at most 64, .*; got {size}"):
            model.latent_shape(**SIZE | {name: size})
    model.latent_shape(48, 64, 97)


@every_family
def test_decoding_equals_the_pipelines(loaded_model, diffusers_pipeline, family):
    model = loaded_model(family, vae=True)
    calls = {
        output: diffusers_pipeline(family)(
            ["a dog", "a cat"],
            **SIZE,
            guidance_scale=1.0,
            num_inference_steps=2,
            output_type=output,
            generator=torch.Generator().manual_seed(0),
        ).frames
        for output in ("latent", "pt")
    }
    decoded = model.decode(calls["latent"])
    assert decoded.shape == (2, 9, 3, 64, 64)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, calls["pt"], rtol=0, atol=1e-5)
    assert calls["pt"].std() > 0.05  # not one grey, which anything would match


@every_family
def test_encoding_normalises_latents_as_decoding_expects_them(loaded_model, diffusers_pipeline, family):
    """Checks the scaling of latents only: a random VAE does not invert its own encoding."""
    model = loaded_model(family, vae=True)
    video = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = model.encode_video(video)
    assert latents.shape == (2, *model.latent_shape(32, 32, 5))
    vae = diffusers_pipeline(family).vae
    with torch.no_grad():
        z = vae.encode(video.movedim(2, 1) * 2 - 1).latent_dist.mode()
        expected = (vae.decode(z).sample.movedim(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(latents), expected, rtol=0, atol=1e-5)

    def drawn(seed):
        return model.encode_video(video, sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(model.encode_video(video), latents)


def test_videos_of_a_wrong_shape_or_size_are_refused(loaded_model):
    model = loaded_model("cogvideox", vae=True)
    for video in (torch.rand(9, 3, 64, 64), torch.rand(1, 3, 9, 64, 64), torch.zeros(1, 9, 3, 64, 64).byte()):
        with pytest.raises(ValueError, match=r"frames: expected \(B, F, 3, H, W\) in \[0, 1\]"):
            model.encode_video(video)
    with pytest.raises(ValueError, match="height: expected"):
        model.encode_video(torch.rand(1, 9, 3, 40, 64))


def test_decoding_and_encoding_need_the_vae(loaded_model):
    model = loaded_model("cogvideox")
    with pytest.raises(RuntimeError, match=r"load_model\(..., vae=True\)"):
        model.decode(noise(model))
    with pytest.raises(RuntimeError, match="got a model loaded without it"):
        model.encode_video(torch.rand(1, 9, 3, 64, 64))


class Identity:
    """A VAE whose latents are the pixels themselves."""

    class Distribution:
        def __init__(self, mean):
            self.mean = mean

        def mode(self):
            return self.mean

    class Output:
        def __init__(self, mean):
            self.latent_dist = Identity.Distribution(mean)

    def encode(self, video):
        return self.Output(video)

    def decode(self, latents, return_dict):
        return (latents,)


def test_a_model_can_be_made_of_a_custom_transformer_and_vae(loaded_model):
    transformer = cogvideox(in_channels=3, out_channels=3)
    scheduler = loaded_model("cogvideox").scheduler
    model = VideoModel([transformer], scheduler, latent_space=LatentSpace(1, 1), defaults=DEFAULTS, vae=Identity())
    assert model.latent_shape(8, 6, 3) == (3, 3, 8, 6)
    video = torch.rand(2, 3, 3, 8, 6)
    torch.testing.assert_close(model.decode(model.encode_video(video)), video)


def test_latent_frames_are_filled_up_to_whole_tokens(loaded_model):
    """As in CogVideoX 1.5, whose tokens cover 2 latent frames: 9 frames make 3, and get a fourth in front."""
    transformer = cogvideox(patch_size_t=2, patch_bias=False, rope=True, ofs_embed_dim=None)
    loaded = loaded_model("cogvideox", vae=True)
    model = VideoModel(
        [transformer], loaded.scheduler, latent_space=loaded.latent_space, defaults=DEFAULTS, vae=loaded.vae
    )
    assert model.latent_shape(64, 64, 13) == model.latent_shape(64, 64, 9) == (4, 4, 8, 8)
    assert model.token_grid((4, 4, 8, 8)) == (2, 4, 4)
    video = torch.rand(1, 9, 3, 64, 64)
    latents = model.encode_video(video)
    assert latents.shape[1:] == (4, 4, 8, 8)
    assert torch.equal(latents[:, :1], latents[:, 1:2])
    assert torch.equal(latents[:, 1:], loaded.encode_video(video))
    assert torch.equal(model.decode(latents, num_frames=9), loaded.decode(latents[:, 1:]))
    assert model.experts[0](latents, 500, torch.randn(1, 16, 32)).shape == latents.shape


def test_transformers_that_do_not_belong_together_are_refused(loaded_model):
    loaded = loaded_model("wan-2.2")
    components = {"scheduler": loaded.scheduler, "latent_space": loaded.latent_space, "defaults": DEFAULTS}
    one, two = (expert.transformer for expert in loaded.experts)
    for transformers in ([], [one, two, one], [one, cogvideox()]):
        with pytest.raises(ValueError, match="transformers: expected one or two of one family, got"):
            VideoModel(transformers, **components)
    with pytest.raises(ValueError, match="boundary: expected .* got None for 2"):
        VideoModel([one, two], **components)
    with pytest.raises(ValueError, match="boundary: expected .* got 500 for 1"):
        VideoModel([one], boundary=500, **components)


# Noise


@pytest.mark.parametrize("family", ["cogvideox", "cogvideox-rope"])
def test_noise_is_added_as_the_scheduler_adds_it(loaded_model, family):
    model = loaded_model(family)
    x_0, eps, t = noise(model, 3, 0), noise(model, 3, 1), torch.tensor([0, 400, 999])
    expected = model.scheduler.add_noise(x_0.double(), eps.double(), t)
    torch.testing.assert_close(model.add_noise(x_0, eps, t), expected.float())
    assert torch.equal(model.add_noise(x_0, eps, t.float()), model.add_noise(x_0, eps, t))
    assert torch.equal(model.add_noise(x_0, eps, t)[2], eps[2])  # zero terminal signal
    with pytest.raises(TypeError, match="whole timesteps for cogvideox"):
        model.add_noise(x_0, eps, t + 0.5)


def test_flow_matching_mixes_video_and_noise_linearly(loaded_model):
    model = loaded_model("hunyuan_video")
    x_0, eps = noise(model, 3, 0), noise(model, 3, 1)
    x_t = model.add_noise(x_0, eps, torch.tensor([0.0, 250.5, 1000.0]))
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[2], eps[2])
    torch.testing.assert_close(x_t[1], 0.7495 * x_0[1] + 0.2505 * eps[1])
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[[1, 2, 3]]
    torch.testing.assert_close(model.add_noise(x_0, eps, t), scheduler.scale_noise(x_0, t, eps))
    assert model.add_noise(x_0.bfloat16(), eps.bfloat16(), t).dtype == torch.bfloat16


@one_of_each
def test_timesteps_of_a_wrong_shape_or_range_are_refused(loaded_model, family):
    model = loaded_model(family)
    x_0 = noise(model, 2)
    with pytest.raises(ValueError, match=r"t: expected shape \(2,\)"):
        model.add_noise(x_0, x_0, torch.tensor(3))
    for t in (-1, 1001):
        with pytest.raises(ValueError, match="t"):
            model.add_noise(x_0, x_0, torch.tensor([3, t]))


# Erasers


def velocities(model, encoded):
    return [expert(noise(model), 500.0, batched(encoded)) for expert in model.experts]


@pytest.fixture
def encoded(tiny_pipeline, family):
    return encode_prompts(tiny_pipeline(family), [PROMPT], None, **FP32)[PROMPT]


@one_of_each
def test_erasers_of_every_expert_are_saved_and_loaded(tiny_pipeline, tmp_path, family, encoded):
    model = load_model(tiny_pipeline(family), **FP32)
    plain = velocities(model, encoded)
    attached = model.attach_erasers(4, "mine")
    assert len(attached) == len(model.experts)
    assert all(torch.equal(a, b) for a, b in zip(velocities(model, encoded), plain, strict=True))
    for seed, erasers in enumerate(attached):
        train_a_little(erasers, seed)
    erased = velocities(model, encoded)
    assert not any(torch.equal(a, b) for a, b in zip(erased, plain, strict=True))
    model.save_erasers(tmp_path, "mine", concept="nude")
    folders = ["transformer", "transformer_2"] if family == "wan-2.2" else ["."]
    for folder in folders:
        assert json.loads((tmp_path / folder / "config.json").read_text())["concept"] == "nude"

    fresh = load_model(tiny_pipeline(family), **FP32)
    loaded = fresh.load_erasers(tmp_path)
    assert list(loaded) == ["default"]
    assert [list(erasers) for erasers in loaded["default"]] == [list(erasers) for erasers in attached]
    assert all(torch.equal(a, b) for a, b in zip(velocities(fresh, encoded), erased, strict=True))


@pytest.mark.parametrize("family", ["cogvideox"])
def test_erasers_of_several_concepts_add_up_with_a_scale_each(tiny_pipeline, tmp_path, family, encoded):
    for seed, name in enumerate(("first", "second")):
        model = load_model(tiny_pipeline(family), **FP32)
        train_a_little(model.attach_erasers(4)[0], seed)
        model.save_erasers(tmp_path / name)
    expected = load_model(tiny_pipeline(family), **FP32).experts[0]
    for name, scale in (("first", 0.5), ("second", -1.0)):
        for eraser in load_erasers(expected, tmp_path / name, name).values():
            eraser.up.weight.data.mul_(scale)
            eraser.up.bias.data.mul_(scale)
    model = load_model(tiny_pipeline(family), **FP32)
    loaded = model.load_erasers([tmp_path / "first", tmp_path / "second"], scales=[0.5, -1.0])
    assert list(loaded) == ["first", "second"]
    x_t = noise(model)
    torch.testing.assert_close(model.experts[0](x_t, 500.0, batched(encoded)), expected(x_t, 500.0, batched(encoded)))
    other = load_model(tiny_pipeline(family), **FP32)
    assert list(other.load_erasers([tmp_path / "first"], names=["a"])) == ["a"]


def test_either_all_erasers_are_saved_or_none(tiny_pipeline, tmp_path):
    model = load_model(tiny_pipeline("wan-2.2"), **FP32)
    erasers = model.attach_erasers(4)
    model.save_erasers(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for by_layer in erasers:
        train_a_little(by_layer)
    next(iter(erasers[1].values())).up.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="expected finite numbers in up.bias, got NaN or infinity"):
        model.save_erasers(tmp_path)
    assert len(before) == 4 and before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_either_all_erasers_are_loaded_or_none(tiny_pipeline, tmp_path):
    model = load_model(tiny_pipeline("wan-2.2"), **FP32)
    model.attach_erasers(4)
    for name in ("good", "lacking", "damaged"):
        model.save_erasers(tmp_path / name)
    shutil.rmtree(tmp_path / "lacking" / "transformer_2")
    next((tmp_path / "damaged" / "transformer_2").glob("*.safetensors")).write_bytes(b"")
    fresh = load_model(tiny_pipeline("wan-2.2"), **FP32)
    with pytest.raises(
        FileNotFoundError, match="transformer_2: expected a folder of erasers for wan with two transformers, got"
    ):
        fresh.load_erasers([tmp_path / "good", tmp_path / "lacking"])
    with pytest.raises(ValueError, match="transformer_2.*checksum"):
        fresh.load_erasers([tmp_path / "good", tmp_path / "damaged"])
    for expert in fresh.experts:
        with pytest.raises(ValueError, match="expected the name of attached erasers, got 'good'"):
            detach_erasers(expert, "good")
    assert list(fresh.load_erasers(tmp_path / "good")) == ["default"]


def test_names_and_scales_must_be_as_many_as_folders(tiny_pipeline, tmp_path):
    model = load_model(tiny_pipeline("cogvideox"), **FP32)
    with pytest.raises(ValueError, match="names: expected a name of its own for each of 2 folders, got \\['a'\\]"):
        model.load_erasers([tmp_path, tmp_path], names=["a"])
    with pytest.raises(ValueError, match="scales: expected a number for each of 1 folders"):
        model.load_erasers(tmp_path, scales=[1.0, 2.0])


@one_of_each
def test_gradient_checkpointing_does_not_change_gradients(tiny_pipeline, family, encoded):
    model = load_model(tiny_pipeline(family), **FP32)
    attached = model.attach_erasers(4)
    for erasers in attached:
        train_a_little(erasers)
    parameters = [parameter for erasers in attached for e in erasers.values() for parameter in e.parameters()]

    def gradients():
        return torch.autograd.grad(sum(v.square().sum() for v in velocities(model, encoded)), parameters)

    expected = gradients()
    model.enable_gradient_checkpointing()
    assert all(expert.transformer.gradient_checkpointing for expert in model.experts)
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want)
