"""Somebody else's pipeline runs no code, blocks nothing, takes no memory but for its weights, and fails in a line."""

import json
import os
import sys

import huggingface_hub
import pytest
from pipeline_cases import FP32, PROMPT, copy_of, edit

from fastunlearn.training.model.loading import load_model, outline_pipeline
from fastunlearn.training.model.text import encode_prompts

EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Evil:\n    pass\n"


@pytest.fixture
def attacked(tiny_pipeline, tmp_path, monkeypatch):
    """A pipeline with the module `evil` in every folder of it and on the path; no way to load it may run that."""
    folder = copy_of(tiny_pipeline("cogvideox"), tmp_path / "pipeline")
    source = EVIL.format(mark=str(tmp_path / "ran"))
    for place in (folder, tmp_path):
        (place / "evil.py").write_text(source)
        (place / "diffusers_evil.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder, source
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules and "diffusers_evil" not in sys.modules


def refused(folder, match):
    for load in (
        lambda: load_model(folder, **FP32, vae=True),
        lambda: encode_prompts(folder, [PROMPT], None, **FP32),
        lambda: outline_pipeline(folder),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
            load()
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("component", ["transformer", "scheduler", "vae", "text_encoder", "tokenizer", "another"])
@pytest.mark.parametrize(
    "entry",
    [
        ["evil", "Evil"],
        ["diffusers_evil", "Evil"],
        ["diffusers.pipelines.evil", "Evil"],
        ["os", "system"],
        ["diffusers", "os"],
        ["diffusers", "DiffusionPipeline"],
        ["transformers", "AutoModel"],
        ["transformers", "AutoTokenizer"],
        ["transformers", "__loader__"],
        ["wan", "WanPipeline"],
        ["diffusers", ["evil", "Evil"]],
        ["evil"],
    ],
    ids=str,
)
def test_components_of_other_classes_are_refused(attacked, component, entry):
    folder, _ = attacked
    edit(folder / "model_index.json", **{component: entry})
    refused(folder, rf"model_index.json: expected '{component}' to be a model, tokenizer or scheduler .*trust_rem")


@pytest.mark.parametrize(
    ("library", "class_name"),
    [
        ("transformers", "T5TokenizerFast"),
        ("transformers", "LlamaTokenizerFast"),
        ("transformers", "CLIPTokenizer"),
        ("transformers", "UMT5EncoderModel"),
        ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_the_classes_of_published_pipelines_are_accepted(library, class_name):
    from fastunlearn.training.model.pipeline_folder import check_index

    check_index({"component": [library, class_name], "absent": [None, None]}, trust_remote_code=False)


def test_a_module_in_the_folder_of_a_component_is_refused(attacked):
    folder, source = attacked
    for component, name in (("transformer", "diffusers"), ("text_encoder", "transformers")):
        (folder / component / f"{name}.py").write_text(source)
    with pytest.raises(ValueError, match=r"diffusers.py: expected no code .*trust_remote_code"):
        load_model(folder, **FP32)
    with pytest.raises(ValueError, match=r"transformers.py: expected no code .*trust_remote_code"):
        encode_prompts(folder, [PROMPT], None, **FP32)


@pytest.mark.parametrize(
    "entries",
    [{"auto_map": {"AutoModel": "evil.Evil"}}, {"nested": [{"auto_map": {}}]}, {"attn_implementation": "evil/kernel"}],
)
@pytest.mark.parametrize(
    "file", ["text_encoder/config.json", "transformer/config.json", "tokenizer/tokenizer_config.json"]
)
def test_configurations_that_name_code_are_refused(attacked, file, entries):
    folder, _ = attacked
    edit(folder / file, **entries)
    with pytest.raises(ValueError, match=r"config.json: expected no code, got '(auto|attn).*trust_remote_code"):
        load_model(folder, **FP32)
        encode_prompts(folder, [PROMPT], None, **FP32)


def test_trusted_code_runs(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("cogvideox"), tmp_path / "pipeline")
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    code += "from diffusers import CogVideoXDDIMScheduler as Mine\n"
    (folder / "scheduler" / "mine.py").write_text(code)
    edit(folder / "model_index.json", scheduler=["mine", "Mine"])
    refused(folder, "expected 'scheduler' to be")
    assert not (tmp_path / "ran").exists()
    load_model(folder, **FP32, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    "file", ["transformer/config.json", "transformer/more.safetensors", "vae/config.json", "model_index.json"]
)
def test_named_pipes_do_not_block(tiny_pipeline, tmp_path, file):
    folder = copy_of(tiny_pipeline("cogvideox"), tmp_path / "pipeline")
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(ValueError, match=f"{file}: expected a file, got a named pipe"):
        load_model(folder, **FP32)


@pytest.mark.parametrize(
    ("family", "file", "entries", "message"),
    [
        (
            "cogvideox",
            "transformer/config.json",
            {"num_layers": 10**9},
            "at most 1000 as 'num_layers'",
        ),
        (
            "wan",
            "transformer/config.json",
            {"rope_max_seq_len": 10**12},
            "at most 10000000 as 'rope",
        ),
        ("wan", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "'num_train_timesteps'"),
        ("wan", "transformer/config.json", {"ffn_dim": 9_000_000}, "expected weights for the .* config.json describes"),
        ("wan", "transformer/config.json", {"num_layers": 40}, "expected weights for the .* config.json describes"),
        ("wan", "transformer/config.json", {"num_layers": "many"}, "transformer cannot be read"),
        ("wan", "transformer/config.json", {"patch_size": None}, "transformer cannot be read"),
        ("wan", "scheduler/scheduler_config.json", {"beta_schedule": "none"}, "cannot be read"),
        ("wan", "vae/config.json", {"latents_mean": 3}, "configuration of .* cannot be read"),
        (
            "cogvideox",
            "transformer/config.json",
            {"x": "y" * 3_000_000, "num_layers": []},
            "transformer cannot be read",
        ),
    ],
)
def test_mistakes_in_configurations_are_one_line(tiny_pipeline, tmp_path, family, file, entries, message):
    folder = copy_of(tiny_pipeline(family), tmp_path / "pipeline")
    edit(folder / file, **entries)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder, **FP32)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_list_of_weights_does_not_lead_out_of_the_folder(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("wan"), tmp_path / "pipeline")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for shard in ("../vae/diffusion_pytorch_model.safetensors", "/dev/zero", "weights.bin"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ValueError, match="expected the names of .safetensors files beside it, got"):
            load_model(folder, **FP32)


def test_the_hub_is_asked_once_and_the_answer_is_told(monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    calls = []

    def answer(error):
        def model_info(self, name, **kwargs):
            calls.append(name)
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)

    class Response:
        headers, request, status_code, url = {}, None, 404, "https://hub"

    for error, message in (
        (
            OSError("[Errno -2] Name or service not known\nand more"),
            r"the Hub cannot be reached \(.*HF_HUB_OFF",
        ),
        (RepositoryNotFoundError("no", response=Response()), "no such model on the Hub, or it is private"),
        (GatedRepoError("no", response=Response()), "access to the model on the Hub must be asked for"),
    ):
        answer(error)
        with pytest.raises(FileNotFoundError, match=f"'some/model': there is no such folder, and {message}") as raised:
            load_model("some/model", **FP32)
        assert "\n" not in str(raised.value)
    assert calls == ["some/model"] * 3
