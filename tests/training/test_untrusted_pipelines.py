"""Somebody else's pipeline runs no code, blocks nothing, takes no memory but for its weights, and fails in a line."""

import json
import os
import shutil
import socket
import sys
import time

import huggingface_hub
import pytest
import safetensors.torch
import torch
from pipeline_cases import FP32, PROMPT, copy_of, edit

from fastunlearn.training.model import pipeline_folder
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
        (
            "wan",
            "transformer/config.json",
            {"quantization_config": {}, "ffn_dim": 900_000},
            "expected weights for the",
        ),
        ("hunyuan_video", "transformer/config.json", {"num_single_layers": 900}, "expected weights for the"),
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


@pytest.fixture(autouse=True)
def nothing_known_of_the_hub():
    pipeline_folder._offline_copy.cache_clear()


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
            r"the Hub cannot be reached \(.*or download it first",
        ),
        (RepositoryNotFoundError("no", response=Response()), "no such model on the Hub, or it is private"),
        (GatedRepoError("no", response=Response()), "access to the model on the Hub must be asked for"),
    ):
        answer(error)
        with pytest.raises(FileNotFoundError, match=f"'some/model': there is no such folder, and {message}") as raised:
            load_model("some/model", **FP32)
        assert "\n" not in str(raised.value)
    assert calls == ["some/model"] * 3


@pytest.fixture
def downloaded(tiny_pipeline, tmp_path, monkeypatch):
    """The Hub's model some/model, downloaded earlier; `downloaded(error)` makes the Hub answer with that error."""
    repository = tmp_path / "hub" / "models--some--model"
    folder = copy_of(tiny_pipeline("cogvideox"), repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    calls = []

    def answer(error):
        def model_info(self, name, **kwargs):
            calls.append(kwargs["timeout"])
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return folder, calls

    return answer


def test_a_downloaded_pipeline_needs_no_network(downloaded):
    folder, calls = downloaded(OSError("Network is unreachable"))
    with pytest.warns(UserWarning, match=r"cannot be reached \(Network.*going on with the copy of 'some/model'"):
        model = load_model("some/model", **FP32, vae=True)
    assert model.path == "some/model" and len(calls) == 1 and calls[0] <= 10
    encoded = encode_prompts("some/model", [PROMPT], "nude", **FP32)[PROMPT]
    expected = encode_prompts(folder, [PROMPT], "nude", **FP32)[PROMPT]
    assert torch.equal(encoded.condition["encoder_hidden_states"], expected.condition["encoder_hidden_states"])
    assert outline_pipeline("some/model") is not None and len(calls) == 1


def test_offline_mode_takes_a_downloaded_pipeline_without_a_word(downloaded, recwarn):
    downloaded(huggingface_hub.errors.OfflineModeIsEnabled("offline"))
    load_model("some/model", **FP32)
    assert not [warning for warning in recwarn if "Hub" in str(warning.message)]


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(pipeline_folder, "_HUB_SECONDS", 0.2)
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match=r"'some/other': .* the Hub cannot be reached \(.*timed out"):
            load_model("some/other", **FP32)
        assert time.monotonic() - start < 5


def test_a_model_on_the_hub_without_an_index_is_no_pipeline(monkeypatch):
    class Response:
        headers, request, status_code, url = {}, None, 404, "https://hub"

    def download(name, file):
        raise huggingface_hub.errors.RemoteEntryNotFoundError(f"no {file}", response=Response())

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(FileNotFoundError, match=r"'some/model': that model on the Hub is no .*no model_index.json"):
        load_model("some/model", **FP32)


def test_a_mistyped_folder_is_no_name_on_the_hub():
    for name in ("my folder/model", "a/b?", "-/-"):
        with pytest.raises(FileNotFoundError, match="there is no such folder, and no such model on the Hub"):
            load_model(name, **FP32)
    for name in ("./none", "/none", "none", "a/b/c", "x" * 10**6):
        with pytest.raises(FileNotFoundError, match="expected a folder or a Hub id like 'owner/name', got") as error:
            load_model(name, **FP32)
        assert len(str(error.value)) < 600


def rewrite_weights(file, change):
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def test_weights_under_another_name_are_missed(tiny_pipeline, tmp_path):
    folder = copy_of(tiny_pipeline("wan"), tmp_path / "pipeline")
    key = "blocks.0.attn2.to_q.weight"
    rewrite_weights(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors.update({"another": tensors.pop(key)}),
    )
    with pytest.raises(ValueError, match=f"expected all weights of transformer in .*, got none for '{key}'"):
        load_model(folder, **FP32)


@pytest.mark.parametrize(
    ("family", "name", "key"),
    [
        ("cogvideox", "text_encoder", "encoder.final_layer_norm.weight"),
        ("wan", "text_encoder", "encoder.final_layer_norm.weight"),
        ("hunyuan_video", "text_encoder", "layers.0.input_layernorm.weight"),
        ("hunyuan_video", "text_encoder_2", "final_layer_norm.weight"),
    ],
)
def test_weights_of_a_text_encoder_under_another_name_are_missed(tiny_pipeline, tmp_path, family, name, key):
    """transformers would fill them with random numbers, and encode each prompt differently in each process."""
    folder = copy_of(tiny_pipeline(family), tmp_path / "pipeline")
    rewrite_weights(
        folder / name / "model.safetensors",
        lambda tensors: tensors.update({"another": tensors.pop(next(k for k in tensors if k.endswith(key)))}),
    )
    with pytest.raises(ValueError, match=f"expected all weights of {name} in .*, got none for '{key}'"):
        encode_prompts(folder, ["a circle"], "circle", **FP32)


@pytest.mark.parametrize("family", ["cogvideox", "wan", "hunyuan_video"])
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_an_embedding_may_be_stored_once_or_twice(tiny_pipeline, tmp_path, family, stored):
    """Published T5 encoders differ in whether they store the embedding of tokens again, under its other name."""
    folder = copy_of(tiny_pipeline(family), tmp_path / "pipeline")
    file = folder / "text_encoder" / "model.safetensors"
    first, second = "shared.weight", "encoder.embed_tokens.weight"

    def change(tensors):
        if first in tensors:
            tensors[second] = tensors[first].clone()
            if stored == "once":
                del tensors[second]

    rewrite_weights(file, change)
    expected = encode_prompts(tiny_pipeline(family), [PROMPT], None, **FP32)[PROMPT].condition
    condition = encode_prompts(folder, [PROMPT], None, **FP32)[PROMPT].condition
    assert all(torch.equal(value, expected[name]) for name, value in condition.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_in_half_precision_and_in_several_files_are_enough(tiny_pipeline, tmp_path, sharded):
    import diffusers

    folder = copy_of(tiny_pipeline("wan"), tmp_path / "pipeline")
    pipeline = diffusers.WanPipeline.from_pretrained(str(folder)).to(torch.float16)
    shutil.rmtree(folder)
    pipeline.save_pretrained(folder, max_shard_size="20KB" if sharded else "10GB")
    assert (len(list(folder.glob("*/*.safetensors"))) > 3) is sharded
    assert json.loads((folder / "model_index.json").read_text())["transformer_2"] == [None, None]
    load_model(folder, **FP32, vae=True)
    encode_prompts(folder, [PROMPT], None, **FP32)


PUBLISHED = {  # parameters of the published files: their size over that of a number
    ("T5EncoderModel", 4_762_310_656): {
        "d_ff": 10240, "d_kv": 64, "d_model": 4096, "feed_forward_proj": "gated-gelu", "num_heads": 64,
        "num_layers": 24, "vocab_size": 32128, "tie_word_embeddings": False,
    },
    ("UMT5EncoderModel", 5_680_910_336): {
        "d_ff": 10240, "d_kv": 64, "d_model": 4096, "feed_forward_proj": "gated-gelu", "num_heads": 64,
        "num_layers": 24, "vocab_size": 256384, "tie_word_embeddings": False,
    },
    ("CLIPTextModel", 123_060_480): {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 49408, "projection_dim": 768,
    },
    ("LlamaModel", 7_505_186_816): {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128320,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), list(PUBLISHED), ids=[name for name, _ in PUBLISHED])
def test_published_text_encoders_need_no_more_than_their_files_hold(name, parameters):
    import transformers

    model = pipeline_folder.model_without_weights(getattr(transformers, name), PUBLISHED[name, parameters])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'x'"), ImportError("y is needed\nfor z")])
def test_a_package_that_a_configuration_asks_for_is_not_taken_for_ours(tiny_pipeline, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipeline_folder, "model_without_weights", fail)
    with pytest.raises(
        ImportError, match="transformer cannot be read: (No module named 'x'|y is needed for z)$"
    ) as got:
        load_model(tiny_pipeline("wan"), **FP32)
    assert not isinstance(got.value, ModuleNotFoundError)  # of which the command line says that the extra is missing
