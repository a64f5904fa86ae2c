"""Prompts are encoded as the pipeline itself encodes them, and the concept's tokens are found."""

import gc
import json
import shutil
import warnings

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from pipeline_cases import FP32, PROMPT, SIZE, every_family, recorded_calls
from transformers import T5EncoderModel

from fastunlearn.training.model.loading import load_model
from fastunlearn.training.model.text import encode_prompts


@every_family
def test_embeddings_equal_the_pipelines_own(tiny_pipeline, diffusers_pipeline, family):
    prompts = [PROMPT, "", "two red circles & a dog, running   fast", PROMPT]
    encoded = encode_prompts(tiny_pipeline(family), prompts, "nude person", **FP32)
    assert list(encoded) == prompts[:3]
    pipeline = diffusers_pipeline(family)
    for prompt in encoded:
        with recorded_calls(pipeline.transformer) as calls:
            pipeline(prompt, **SIZE, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
        for key, value in encoded[prompt].condition.items():
            seen = calls[0][1][key]
            assert torch.equal(seen[0], value.to(seen.dtype)), key


@every_family
def test_token_indices_point_at_the_concepts_tokens_of_the_encoder(
    tiny_pipeline, diffusers_pipeline, family, monkeypatch
):
    encoder, tokenizer = type(diffusers_pipeline(family).text_encoder), diffusers_pipeline(family).tokenizer
    encoder_inputs = []
    original = encoder.forward

    def forward(self, input_ids=None, *args, **kwargs):
        encoder_inputs.append(input_ids[0].tolist())
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(encoder, "forward", forward)
    prompts = [PROMPT, "the video of a zeppelin is a photo of a person; a NUDE & nude dog", "a dog", ""]
    encoded = encode_prompts(tiny_pipeline(family), prompts, "nude", **FP32)
    crop_start = 95 if family == "hunyuan_video" else 0
    concept_tokens = []
    for ids, (indices, length) in zip(
        encoder_inputs,
        [(e.token_indices, len(e.condition["encoder_hidden_states"])) for e in encoded.values()],
        strict=True,
    ):
        assert len(ids) == crop_start + length
        concept_tokens.append("".join(tokenizer.convert_ids_to_tokens([ids[crop_start + i] for i in indices])))
    # The tiny Llama tokenizer has whole words, and none in capitals.
    capitals = "<unk>nude" if family == "hunyuan_video" else "NUDE▁nude"
    assert [tokens.lstrip("▁") for tokens in concept_tokens] == ["nude", capitals, "", ""]


def test_token_indices_refer_to_the_cleaned_prompt(tiny_pipeline):
    """Wan's pipeline unescapes HTML entities and collapses whitespace."""
    prompt = "a &amp;amp; a \n\n dog"
    assert encode_prompts(tiny_pipeline("wan"), [prompt], "dog", **FP32)[prompt].token_indices == (
        encode_prompts(tiny_pipeline("wan"), ["a & a dog"], "dog", **FP32)["a & a dog"].token_indices
    )


@pytest.mark.parametrize(
    ("prompt", "concept", "clean_prompt", "clean_concept"),
    [
        ("l’homme nu", "l’homme", "l'homme nu", "l'homme"),
        ("a dog &amp; a cat", "dog &amp; a", "a dog & a cat", "dog & a"),
        ("a nude&nbsp;person", "nude person", "a nude person", "nude person"),
    ],
)
def test_the_concept_is_cleaned_as_wan_cleans_its_prompts(tiny_pipeline, prompt, concept, clean_prompt, clean_concept):
    folder = tiny_pipeline("wan")
    got = encode_prompts(folder, [prompt], concept, must_contain=[prompt], **FP32)[prompt]
    expected = encode_prompts(folder, [clean_prompt], clean_concept, **FP32)[clean_prompt]
    assert got.token_indices == expected.token_indices != []


def test_a_prompt_that_has_the_concept_only_once_it_is_cleaned_is_not_kept(tiny_pipeline):
    message = r"concept: expected 'nude person' in no prompt but .*'a nude&nbsp;person', which .* 'a nude person'$"
    more = {"must_not_contain": ["a nude&nbsp;person"], **FP32}
    with pytest.raises(ValueError, match=message):
        encode_prompts(tiny_pipeline("wan"), more["must_not_contain"], "nude person", **more)
    assert encode_prompts(tiny_pipeline("cogvideox"), more["must_not_contain"], "nude person", **more)


@pytest.mark.parametrize(("family", "length"), [("cogvideox", 226), ("hunyuan_video", 256), ("wan", 512)])
def test_a_prompt_that_is_cut_off_is_a_warning(tiny_pipeline, family, length):
    fits = " ".join(["dog"] * (length - 1))  # and the token at the end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(tiny_pipeline(family), [fits], "dog", **FP32)
    with pytest.warns(UserWarning) as caught:
        encoded = encode_prompts(tiny_pipeline(family), [fits + " cat", "cat " + fits], "dog", **FP32)
    (message,) = [str(w.message) for w in caught if str(w.message).startswith("prompts:")]
    assert message.startswith(f"prompts: expected at most {length} tokens, which is all that the model reads, got ")
    assert message.endswith("; the rest is cut off, and 1 other prompts are too long")
    assert len(encoded) == 2


def test_a_prompt_that_must_contain_the_concept_but_does_not_is_refused(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded an encoder"))
    with pytest.raises(ValueError, match="concept: .* words of the prompt 'a dog', got 'nude'.*▁a ▁dog </s>"):
        encode_prompts(tiny_pipeline("cogvideox"), [PROMPT, "a dog"], "nude", must_contain=["a dog"], **FP32)


def test_a_concept_beyond_the_text_length_is_refused(tiny_pipeline):
    prompt = "a dog " * 113 + "nude"
    with pytest.raises(ValueError, match="in the first 226 tokens of the prompt .*which is cut off"):
        encode_prompts(tiny_pipeline("cogvideox"), [prompt], "nude", **FP32)
    assert encode_prompts(tiny_pipeline("wan"), [prompt], "nude", **FP32)[prompt].token_indices == [226]


def test_mistakes_in_the_arguments_of_encode_prompts(tiny_pipeline):
    with pytest.raises(TypeError, match="prompts: expected a sequence of strings"):
        encode_prompts(tiny_pipeline("cogvideox"), PROMPT, "nude", **FP32)
    with pytest.raises(ValueError, match="concept: expected one or more words"):
        encode_prompts(tiny_pipeline("cogvideox"), [PROMPT], " ", **FP32)


def alive(*types):
    """How many objects of these types exist."""
    gc.collect()
    return sum(type(x) in types for x in gc.get_objects())


def test_only_what_a_phase_needs_is_in_memory(tiny_pipeline, monkeypatch):
    folder = tiny_pipeline("cogvideox")
    denoisers, encoders, vaes = [CogVideoXTransformer3DModel], [T5EncoderModel], [AutoencoderKLCogVideoX]
    before = alive(*denoisers, *encoders, *vaes)
    during = []
    original = T5EncoderModel.forward

    def forward(self, *args, **kwargs):
        during.append(alive(*denoisers, *encoders, *vaes) - before)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "forward", forward)
    encode_prompts(folder, [PROMPT], None, **FP32)
    assert during == [1]
    assert alive(*denoisers, *encoders, *vaes) == before
    model = load_model(folder, **FP32)
    assert model.vae is None
    assert alive(*denoisers, *encoders, *vaes) == before + 1
    assert load_model(folder, vae=True, **FP32).vae is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_max_length": "long"}, "the tokenizer of .* cannot be read"), ({"pad_token": "new"}, "a text encoder of")],
)
def test_a_tokenizer_that_does_not_fit_is_named(tiny_pipeline, tmp_path, change, message):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline("hunyuan_video"), folder)
    path = folder / "tokenizer/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as info:
        encode_prompts(folder, ["a circle"], "circle", **FP32)
    assert len(str(info.value)) < 1000
