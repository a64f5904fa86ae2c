"""Pipelines loaded by halves do what whole ones do: prompts, latents, videos; and erasers on every expert."""

import gc
import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DiffusionPipeline
from tiny_models import cogvideox, train_a_little
from transformers import T5EncoderModel

from fastunlearn import detach_erasers, load_erasers
from fastunlearn.families import LatentSpace
from fastunlearn.testing.tiny_pipelines import VARIANTS, save_tiny_pipeline
from fastunlearn.training.model.loading import VideoModel, load_model
from fastunlearn.training.model.text import encode_prompts
from fastunlearn.training.model.video_model import Defaults

SIZE = {"height": 64, "width": 64, "num_frames": 9}
PROMPT = "a nude person in the park"
FP32 = {"dtype": torch.float32, "device": "cpu"}
ONE_OF_EACH = ["cogvideox", "hunyuan_video", "wan-2.2"]
every_family = pytest.mark.parametrize("family", VARIANTS)
one_of_each = pytest.mark.parametrize("family", ONE_OF_EACH)


@pytest.fixture(scope="module")
def whole(tiny_pipeline):
    """The whole pipeline as diffusers loads it."""
    loaded = {}

    def load(family):
        if family not in loaded:
            loaded[family] = DiffusionPipeline.from_pretrained(tiny_pipeline(family))
            loaded[family].set_progress_bar_config(disable=True)
        return loaded[family]

    return load


def noise(model, batch=1, seed=0):
    shape = model.latent_shape(**SIZE)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def batched(encoded):
    return {key: value[None] for key, value in encoded.condition.items()}


# The tiny pipelines themselves


def test_tiny_pipelines_are_reproducible_and_leave_the_random_numbers_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    save_tiny_pipeline("cogvideox", tmp_path / "a")
    assert torch.equal(torch.rand(2), expected)
    save_tiny_pipeline("cogvideox", tmp_path / "b")
    save_tiny_pipeline("cogvideox", tmp_path / "c", seed=1)
    files = [next((tmp_path / name / "transformer").glob("*.safetensors")).read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_a_family_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="variant: expected one of 'cogvideox', .*, got 'mochi'"):
        save_tiny_pipeline("mochi", tmp_path)


@every_family
def test_prompts_matter_to_a_tiny_pipeline(tiny_pipeline, family):
    encoded = encode_prompts(tiny_pipeline(family), [PROMPT, ""], None, **FP32)
    model = load_model(tiny_pipeline(family), **FP32)
    x_t = noise(model)
    for expert in model.experts:
        cond, uncond = (expert(x_t, 500.0, batched(encoded[prompt])) for prompt in (PROMPT, ""))
        assert (cond - uncond).norm() > 0.02 * uncond.norm()


# Encoding


@contextmanager
def recorded_calls(*modules):
    """(index of the module, keyword arguments) of every call of one of `modules`."""
    calls = []

    def record(index):
        return lambda module, args, kwargs: calls.append((index, kwargs))

    handles = [
        module.register_forward_pre_hook(record(index), with_kwargs=True) for index, module in enumerate(modules)
    ]
    yield calls
    for handle in handles:
        handle.remove()


@every_family
def test_embeddings_are_the_pipelines_own_to_the_bit(tiny_pipeline, whole, family):
    prompts = [PROMPT, "", "two red circles & a dog, running   fast", PROMPT]
    encoded = encode_prompts(tiny_pipeline(family), prompts, "nude person", **FP32)
    assert list(encoded) == prompts[:3]
    pipeline = whole(family)
    for prompt in encoded:
        with recorded_calls(pipeline.transformer) as calls:
            pipeline(prompt, **SIZE, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
        for key, value in encoded[prompt].condition.items():
            seen = calls[0][1][key]
            assert torch.equal(seen[0], value.to(seen.dtype)), key


@every_family
def test_the_indices_are_those_of_the_concepts_tokens_in_the_text_encoder(tiny_pipeline, whole, family, monkeypatch):
    encoder, tokenizer = type(whole(family).text_encoder), whole(family).tokenizer
    given = []
    original = encoder.forward

    def forward(self, input_ids=None, *args, **kwargs):
        given.append(input_ids[0].tolist())
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(encoder, "forward", forward)
    prompts = [PROMPT, "the video of a zeppelin is a photo of a person; a NUDE & nude dog", "a dog", ""]
    encoded = encode_prompts(tiny_pipeline(family), prompts, "nude", **FP32)
    cropped = 95 if family == "hunyuan_video" else 0
    found = []
    for ids, (positions, length) in zip(
        given, [(e.token_indices, len(e.condition["encoder_hidden_states"])) for e in encoded.values()], strict=True
    ):
        assert len(ids) == cropped + length
        found.append("".join(tokenizer.convert_ids_to_tokens([ids[cropped + i] for i in positions])))
    # Llama's words are whole, and it does not know the loud one.
    loud = "<unk>nude" if family == "hunyuan_video" else "NUDE▁nude"
    assert [tokens.lstrip("▁") for tokens in found] == ["nude", loud, "", ""]


def test_indices_count_in_the_cleaned_prompt(tiny_pipeline):
    """Wan's pipeline mends entities and whitespace."""
    prompt = "a &amp;amp; a \n\n dog"
    assert encode_prompts(tiny_pipeline("wan"), [prompt], "dog", **FP32)[prompt].token_indices == (
        encode_prompts(tiny_pipeline("wan"), ["a & a dog"], "dog", **FP32)["a & a dog"].token_indices
    )


def test_a_concept_missing_where_it_must_be(tiny_pipeline, monkeypatch):
    calls = []
    monkeypatch.setattr(T5EncoderModel, "forward", lambda *args, **kwargs: calls.append(args))
    with pytest.raises(ValueError, match="concept: 'nude' is not in the prompt 'a dog'.*▁a ▁dog </s>"):
        encode_prompts(tiny_pipeline("cogvideox"), [PROMPT, "a dog"], "nude", must_contain=["a dog"], **FP32)
    assert not calls  # nothing was encoded in vain


def test_a_concept_that_is_cut_off(tiny_pipeline):
    prompt = "a dog " * 113 + "nude"
    with pytest.raises(ValueError, match="cut off: 226 tokens"):
        encode_prompts(tiny_pipeline("cogvideox"), [prompt], "nude", **FP32)
    assert encode_prompts(tiny_pipeline("wan"), [prompt], "nude", **FP32)[prompt].token_indices == [226]


def test_mistakes_in_the_arguments_of_encode_prompts(tiny_pipeline):
    with pytest.raises(TypeError, match="prompts: expected a sequence of strings"):
        encode_prompts(tiny_pipeline("cogvideox"), PROMPT, "nude", **FP32)
    with pytest.raises(ValueError, match="concept: expected one or more words"):
        encode_prompts(tiny_pipeline("cogvideox"), [PROMPT], " ", **FP32)


def alive(*types):
    gc.collect()
    return sum(type(x) in types for x in gc.get_objects())


def test_only_what_a_phase_needs_is_in_memory(tiny_pipeline, monkeypatch):
    denoisers, encoders, vaes = [CogVideoXTransformer3DModel], [T5EncoderModel], [AutoencoderKLCogVideoX]
    before = alive(*denoisers, *encoders, *vaes)
    during = []
    original = T5EncoderModel.forward

    def forward(self, *args, **kwargs):
        during.append(alive(*denoisers, *encoders, *vaes) - before)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "forward", forward)
    encode_prompts(tiny_pipeline("cogvideox"), [PROMPT], None, **FP32)
    assert during == [1]
    assert alive(*denoisers, *encoders, *vaes) == before
    model = load_model(tiny_pipeline("cogvideox"), **FP32)
    assert model.vae is None
    assert alive(*denoisers, *encoders, *vaes) == before + 1
    assert load_model(tiny_pipeline("cogvideox"), vae=True, **FP32).vae is not None


# Loading


@every_family
def test_a_loaded_model(tiny_pipeline, whole, family):
    model = load_model(tiny_pipeline(family), **FP32)
    pipeline = whole(family)
    assert len(model.experts) == (2 if family == "wan-2.2" else 1)
    assert type(model.scheduler) is type(pipeline.scheduler)
    assert model.scheduler.config == pipeline.scheduler.config
    assert (model.device, model.dtype, model.path) == (torch.device("cpu"), torch.float32, str(tiny_pipeline(family)))
    for expert, name in zip(model.experts, ("transformer", "transformer_2"), strict=False):
        expected = getattr(pipeline, name).state_dict()
        assert not expert.training
        assert not any(parameter.requires_grad for parameter in expert.parameters())
        for key, value in expert.transformer.state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_experts_are_divided_as_in_the_pipeline(tiny_pipeline, whole):
    model = load_model(tiny_pipeline("wan-2.2"), **FP32)
    assert model.boundary == 875
    assert [model.expert_index(t) for t in (1000, 875.0, 874.9, 0)] == [0, 0, 1, 1]
    assert load_model(tiny_pipeline("wan"), **FP32).expert_index(0) == 0
    pipeline = whole("wan-2.2")
    with recorded_calls(pipeline.transformer, pipeline.transformer_2) as calls:
        pipeline("a dog", **SIZE, guidance_scale=1.0, num_inference_steps=4, output_type="latent")
    used = [(index, kwargs["timestep"][0].item()) for index, kwargs in calls]
    assert {index for index, _ in used} == {0, 1}
    assert all(model.expert_index(t) == index for index, t in used)


@one_of_each
def test_half_precision(tiny_pipeline, family):
    encoded = encode_prompts(tiny_pipeline(family), [PROMPT], None, dtype=torch.bfloat16, device="cpu")[PROMPT]
    assert encoded.condition["encoder_hidden_states"].dtype == torch.bfloat16
    model = load_model(tiny_pipeline(family), dtype=torch.bfloat16, device="cpu", vae=True)
    model.attach_erasers(4)
    assert model.dtype == torch.bfloat16
    assert next(model.vae.parameters()).dtype == (torch.float32 if family == "wan-2.2" else torch.bfloat16)
    velocity = model.experts[0](noise(model).bfloat16(), 500.0, batched(encoded))
    assert velocity.isfinite().all()
    assert model.decode(velocity).isfinite().all()


def test_defaults_are_the_pipelines(tiny_pipeline):
    loaded = {family: load_model(tiny_pipeline(family), **FP32).defaults for family in ONE_OF_EACH}
    assert loaded["cogvideox"] == Defaults(6.0, 64, 64, 9, 8)
    assert loaded["hunyuan_video"] == Defaults(1.0, 720, 1280, 129, 15)
    assert loaded["wan-2.2"] == Defaults(5.0, 480, 832, 81, 16)


def test_what_is_no_pipeline(tmp_path, monkeypatch):
    for path in (tmp_path / "none", "./none", "none", "a/b/c"):
        with pytest.raises(
            FileNotFoundError, match=r"pretrained_model_name_or_path: no folder '.*none|a/b/c'"
        ) as error:
            load_model(path, **FP32)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="expected a saved diffusers pipeline") as error:
        load_model(tmp_path, **FP32)
    assert "\n" not in str(error.value)

    def unreachable(*args, **kwargs):
        raise OSError("cannot reach the Hub\nsecond line")

    monkeypatch.setattr(DiffusionPipeline, "load_config", unreachable)
    with pytest.raises(FileNotFoundError, match=r"got 'some/model' \(cannot reach the Hub\)$"):
        encode_prompts("some/model", [PROMPT], None, **FP32)


@pytest.mark.parametrize(
    "class_name", ["StableDiffusionPipeline", "WanImageToVideoPipeline", ["mine", "Pipeline"], None]
)
def test_pipelines_of_other_classes_are_refused_by_name(tmp_path, class_name):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    with pytest.raises(ValueError, match="a CogVideoXPipeline or HunyuanVideoPipeline or WanPipeline, but"):
        load_model(tmp_path, **FP32)
    with pytest.raises(ValueError, match="holds a"):
        encode_prompts(tmp_path, [PROMPT], None, **FP32)


def test_a_timestep_for_every_token_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "expand_timesteps": True}))
    with pytest.raises(ValueError, match="expand_timesteps"):
        load_model(tmp_path, **FP32)


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


def edit(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_pickled_weights_are_not_read(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("cogvideox"), tmp_path / "pipeline")
    weights = next((folder / "transformer").glob("*.safetensors"))
    torch.save(cogvideox().state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(folder, **FP32)


def test_a_pipeline_that_is_not_whole(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("cogvideox"), tmp_path / "pipeline")
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="weights in '.*pipeline' are truncated or damaged"):
        encode_prompts(folder, [PROMPT], None, **FP32)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(FileNotFoundError, match="pipeline' lacks the folder 'tokenizer'"):
        encode_prompts(folder, [PROMPT], None, **FP32)
    load_model(folder, **FP32)  # which needs neither
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a None"):
        load_model(folder, **FP32)


def test_two_transformers_need_a_boundary(tiny_pipeline, tmp_path):
    without_ratio = copy_of(tiny_pipeline("wan-2.2"), tmp_path / "a")
    edit(without_ratio / "model_index.json", boundary_ratio=None)
    assert len(load_model(without_ratio, **FP32).experts) == 1  # the pipeline would not use the second either
    without_second = copy_of(tiny_pipeline("wan"), tmp_path / "b")
    edit(without_second / "model_index.json", boundary_ratio=0.5)
    with pytest.raises(
        ValueError, match="expected transformer and transformer_2 in a pipeline with boundary_ratio 0.5"
    ):
        load_model(without_second, **FP32)


def test_entries_that_an_old_vae_configuration_lacks_have_their_defaults(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("wan"), tmp_path / "pipeline")
    config = json.loads((folder / "vae" / "config.json").read_text())
    for entry in ("scale_factor_temporal", "scale_factor_spatial"):
        del config[entry]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    assert load_model(folder, **FP32).latent_space == load_model(tiny_pipeline("wan"), **FP32).latent_space


# Latents and videos


@every_family
def test_latents_have_the_pipelines_shape(tiny_pipeline, whole, family):
    model = load_model(tiny_pipeline(family), **FP32)
    size = {"height": 32, "width": 48, "num_frames": 13}
    latents = whole(family)("a dog", **size, num_inference_steps=1, guidance_scale=1.0, output_type="latent").frames
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
def test_sizes_that_do_not_divide(tiny_pipeline, size, message):
    with pytest.raises(ValueError, match=message):
        load_model(tiny_pipeline("wan"), **FP32).latent_shape(**SIZE | size)


@every_family
def test_decoding_is_the_pipelines(tiny_pipeline, whole, family):
    model = load_model(tiny_pipeline(family), vae=True, **FP32)
    calls = {
        output: whole(family)(
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
    assert calls["pt"].std() > 0.05  # not a grey that anything would equal


@every_family
def test_encoding_a_video_is_the_inverse_of_decoding_on_the_scale(tiny_pipeline, whole, family):
    """A random VAE inverts nothing, so: its mode, brought to the latents' scale, comes back as its mode."""
    model = load_model(tiny_pipeline(family), vae=True, **FP32)
    video = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = model.encode_video(video)
    assert latents.shape == (2, *model.latent_shape(32, 32, 5))
    vae = whole(family).vae
    with torch.no_grad():
        z = vae.encode(video.movedim(2, 1) * 2 - 1).latent_dist.mode()
        expected = (vae.decode(z).sample.movedim(1, 2) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(latents), expected, rtol=0, atol=1e-5)

    def drawn(seed):
        return model.encode_video(video, sample=True, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(model.encode_video(video), latents)


def test_videos_that_cannot_be_encoded(tiny_pipeline):
    model = load_model(tiny_pipeline("cogvideox"), vae=True, **FP32)
    for video in (torch.rand(9, 3, 64, 64), torch.rand(1, 3, 9, 64, 64), torch.zeros(1, 9, 3, 64, 64).byte()):
        with pytest.raises(ValueError, match=r"frames: expected \(B, F, 3, H, W\) in \[0, 1\]"):
            model.encode_video(video)
    with pytest.raises(ValueError, match="height: expected"):
        model.encode_video(torch.rand(1, 9, 3, 40, 64))


def test_without_a_vae_nothing_is_decoded(tiny_pipeline):
    model = load_model(tiny_pipeline("cogvideox"), **FP32)
    with pytest.raises(RuntimeError, match=r"load_model\(..., vae=True\)"):
        model.decode(noise(model))
    with pytest.raises(RuntimeError, match="without its VAE"):
        model.encode_video(torch.rand(1, 9, 3, 64, 64))


class Identity:
    """Pixels as latents."""

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


DEFAULTS = Defaults(6.0, 8, 8, 3, 8)


def test_a_model_of_parts_with_pixels_as_latents(tiny_pipeline):
    transformer = cogvideox(in_channels=3, out_channels=3)
    scheduler = load_model(tiny_pipeline("cogvideox"), **FP32).scheduler
    model = VideoModel([transformer], scheduler, latent_space=LatentSpace(1, 1), defaults=DEFAULTS, vae=Identity())
    assert model.latent_shape(8, 6, 3) == (3, 3, 8, 6)
    video = torch.rand(2, 3, 3, 8, 6)
    torch.testing.assert_close(model.decode(model.encode_video(video)), video)


def test_tokens_of_several_frames_get_whole_ones(tiny_pipeline):
    """As CogVideoX 1.5: 13 frames are 4 latent ones, which fit; 9 are 3, which get a fourth at the front."""
    transformer = cogvideox(patch_size_t=2, patch_bias=False, rope=True, ofs_embed_dim=None)
    loaded = load_model(tiny_pipeline("cogvideox"), vae=True, **FP32)
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


def test_parts_that_do_not_go_together(tiny_pipeline):
    loaded = load_model(tiny_pipeline("wan-2.2"), **FP32)
    parts = {"scheduler": loaded.scheduler, "latent_space": loaded.latent_space, "defaults": DEFAULTS}
    one, two = (expert.transformer for expert in loaded.experts)
    for transformers in ([], [one, two, one], [one, cogvideox()]):
        with pytest.raises(ValueError, match="transformers: expected one or two of a family, got"):
            VideoModel(transformers, **parts)
    with pytest.raises(ValueError, match="boundary: expected .* got None for 2"):
        VideoModel([one, two], **parts)
    with pytest.raises(ValueError, match="boundary: expected .* got 500 for 1"):
        VideoModel([one], boundary=500, **parts)


# Noise


@pytest.mark.parametrize("family", ["cogvideox", "cogvideox-rope"])
def test_noise_is_added_as_the_scheduler_adds_it(tiny_pipeline, family):
    model = load_model(tiny_pipeline(family), **FP32)
    x_0, eps, t = noise(model, 3, 0), noise(model, 3, 1), torch.tensor([0, 400, 999])
    expected = model.scheduler.add_noise(x_0.double(), eps.double(), t)
    torch.testing.assert_close(model.add_noise(x_0, eps, t), expected.float())
    assert torch.equal(model.add_noise(x_0, eps, t.float()), model.add_noise(x_0, eps, t))
    assert torch.equal(model.add_noise(x_0, eps, t)[2], eps[2])  # zero terminal signal
    with pytest.raises(TypeError, match="whole timesteps for cogvideox"):
        model.add_noise(x_0, eps, t + 0.5)


def test_noise_is_added_along_straight_lines_by_flow_matching(tiny_pipeline):
    model = load_model(tiny_pipeline("hunyuan_video"), **FP32)
    x_0, eps = noise(model, 3, 0), noise(model, 3, 1)
    x_t = model.add_noise(x_0, eps, torch.tensor([0.0, 250.5, 1000.0]))
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[2], eps[2])
    torch.testing.assert_close(x_t[1], 0.7495 * x_0[1] + 0.2505 * eps[1])
    scheduler = model.scheduler
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[[1, 2, 3]]
    torch.testing.assert_close(model.add_noise(x_0, eps, t), scheduler.scale_noise(x_0, t, eps))
    assert model.add_noise(x_0.bfloat16(), eps.bfloat16(), t).dtype == torch.bfloat16


@one_of_each
def test_timesteps_that_do_not_fit(tiny_pipeline, family):
    model = load_model(tiny_pipeline(family), **FP32)
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
def test_erasers_go_to_disk_and_back_on_every_expert(tiny_pipeline, tmp_path, family, encoded):
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
    parts = ["transformer", "transformer_2"] if family == "wan-2.2" else ["."]
    for part in parts:
        assert json.loads((tmp_path / part / "config.json").read_text())["concept"] == "nude"

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


def test_either_all_erasers_are_loaded_or_none(tiny_pipeline, tmp_path):
    model = load_model(tiny_pipeline("wan-2.2"), **FP32)
    model.attach_erasers(4)
    for name in ("good", "lacking", "damaged"):
        model.save_erasers(tmp_path / name)
    shutil.rmtree(tmp_path / "lacking" / "transformer_2")
    next((tmp_path / "damaged" / "transformer_2").glob("*.safetensors")).write_bytes(b"")
    fresh = load_model(tiny_pipeline("wan-2.2"), **FP32)
    with pytest.raises(FileNotFoundError, match="transformer_2: no such folder; erasers of wan with two transformers"):
        fresh.load_erasers([tmp_path / "good", tmp_path / "lacking"])
    with pytest.raises(ValueError, match="transformer_2.*checksum"):
        fresh.load_erasers([tmp_path / "good", tmp_path / "damaged"])
    for expert in fresh.experts:
        with pytest.raises(ValueError, match="no erasers are called 'good'"):
            detach_erasers(expert, "good")
    assert list(fresh.load_erasers(tmp_path / "good")) == ["default"]


def test_names_and_scales_are_as_many_as_folders(tiny_pipeline, tmp_path):
    model = load_model(tiny_pipeline("cogvideox"), **FP32)
    with pytest.raises(ValueError, match="names: expected a name of its own for each of 2 folders, got \\['a'\\]"):
        model.load_erasers([tmp_path, tmp_path], names=["a"])
    with pytest.raises(ValueError, match="scales: expected a number for each of 1 folders"):
        model.load_erasers(tmp_path, scales=[1.0, 2.0])


@one_of_each
def test_gradients_are_the_same_with_checkpointing(tiny_pipeline, family, encoded):
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
