"""Checks a saved pipeline before diffusers and transformers get to see it.

Somebody else's pipeline is data. But model_index.json can name any class of any module, a folder can bring modules of
its own, configurations can name code on the Hub, and a file of 1 kB can ask for a model of any size.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastunlearn.files import check_file, one_line, open_safetensors, read_json, shown, tensor_names

INDEX = "model_index.json"

ARGUMENT = "pretrained_model_name_or_path"
_TRUST = "; if you trust whoever made it, allow its code with trust_remote_code"
_CONFIG_BYTES = 16 << 20
_FILES = 10_000
_HUB_SECONDS = 10  # to wait for an answer
# How often a configuration may repeat a part of a model, and how large its other counts may be.
_MOST_LAYERS, _MOST = 1000, 10_000_000
_QUANTISED_PER_NUMBER = 16  # 2 bits each, in numbers of 32


def local_folder(path: str) -> Path | None:
    """The folder of a pipeline; None if it has to come from the Hub, which has then been found to answer.

    If the Hub cannot be reached, it is the folder of the copy that was downloaded earlier, with a warning.

    Raises:
        FileNotFoundError: there is no such folder, and no such model on the Hub, or the Hub cannot be reached.
    """
    return Path(path) if os.path.isdir(path) else _offline_copy(path)


def read_index(path: str) -> dict[str, Any]:
    """The model_index.json of a folder or of a repository on the Hub.

    Raises:
        FileNotFoundError: there is none, or the Hub cannot be reached.
        ValueError: the file is not a JSON object.
    """
    file = _file(path, INDEX)
    if not file.exists():
        raise FileNotFoundError(
            f"{ARGUMENT}: expected a saved diffusers pipeline, got {shown(path, 300)} ({INDEX} is missing)"
        )
    return read_json(file, most=_CONFIG_BYTES)


def read_config(path: str, name: str, trust_remote_code: bool) -> dict[str, Any]:
    """A configuration of a component, such as "vae/config.json", in a folder or in a repository on the Hub.

    Raises: what `check_config` and `read_json` raise.
    """
    file = _file(path, name)
    content = read_json(file, most=_CONFIG_BYTES)
    check_config(file, content, trust_remote_code)
    return content


def _file(path: str, name: str) -> Path:
    import huggingface_hub

    if (folder := local_folder(path)) is not None:
        return folder / name
    with _hub_errors(path):
        return Path(huggingface_hub.hf_hub_download(path, name))


@cache
def _offline_copy(name: str) -> Path | None:
    """Asks the Hub once, because every download would try to reach it for half a minute."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    with _hub_errors(name):
        try:
            huggingface_hub.HfApi().model_info(name, timeout=_HUB_SECONDS)
        except (RepositoryNotFoundError, HFValidationError):
            raise
        except Exception as error:  # a connection fails in as many ways as there are libraries below
            cached = huggingface_hub.try_to_load_from_cache(name, INDEX)
            if not isinstance(cached, str):
                raise
            folder = Path(cached).parent
            if not isinstance(error, OfflineModeIsEnabled):
                warnings.warn(
                    f"{ARGUMENT}: the Hub cannot be reached ({one_line(error, 120)}); going on with the copy of "
                    f"{shown(name)} that was downloaded earlier, {folder}",
                    stacklevel=2,
                )
            return folder
    return None


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Tells what is wrong with a name on the Hub, or with the way there."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = f"{ARGUMENT}: expected a folder, or the name of a pipeline on the Hugging Face Hub, got {shown(name)}: "
    try:
        yield
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{wanted}there is no such folder, and access to the model on the Hub must be asked for; accept its "
            "conditions on its page there, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{wanted}there is no such folder, and no such model on the Hub, or it is private; check the spelling"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{wanted}that model on the Hub is no pipeline in diffusers' format: {one_line(error, 200)}"
        ) from error
    except Exception as error:
        raise FileNotFoundError(
            f"{wanted}there is no such folder, and the Hub cannot be reached ({one_line(error, 120)}); give a folder "
            "that holds the pipeline, or download it first: it is then found without a network"
        ) from error


def check_index(index: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raises ValueError unless every component is a model, tokenizer or scheduler of diffusers or transformers.

    Nothing but these two libraries is imported to find out.
    """
    for name, entry in index.items():
        if isinstance(entry, list) and any(entry) and not trust_remote_code:
            component_class(index, name)


def component_class(index: Mapping[str, Any], name: str) -> type:
    """The class that model_index.json names for a component.

    Raises:
        ValueError: it is not a model, tokenizer or scheduler of diffusers or transformers.
    """
    entry = index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        library, class_name = entry
        if library in ("diffusers", "transformers"):
            module: Any = importlib.import_module(library)
            cls = getattr(module, class_name, None)
            if isinstance(cls, type) and cls.__module__.partition(".")[0] == library:
                is_stand_in = ".dummy_" in cls.__module__  # for a class whose dependency is missing; says so when used
                if is_stand_in or issubclass(cls, _bases(library, module)):
                    return cls
    raise ValueError(
        f"{INDEX}: expected {shown(name)} to be a model, tokenizer or scheduler of diffusers or transformers, got "
        f"{shown(entry)}{_TRUST}"
    )


def _bases(library: str, module: Any) -> tuple[type, ...]:
    if library == "diffusers":
        return module.ModelMixin, module.SchedulerMixin
    return module.PreTrainedModel, module.PreTrainedTokenizerBase


def check_folder(folder: Path, index: Mapping[str, Any], components: Collection[str], trust_remote_code: bool) -> None:
    """Checks what diffusers and transformers will read of some components.

    Args:
        folder: the folder of the pipeline.
        index: its model_index.json.
        components: the components that will be loaded.
        trust_remote_code: whether code in the folder, or named by it, may run.

    Raises:
        FileNotFoundError: a component has no folder.
        ValueError: a file is not a regular file, is code or names code, or a model's configuration asks for more than
            the files of weights hold.
    """
    for name in components:
        place = folder / name
        if not place.is_dir():
            # transformers would silently make a tokenizer without a vocabulary.
            raise FileNotFoundError(f"{ARGUMENT}: expected a folder {name!r} in {str(folder)!r}, got none")
        for file in _files(place):
            check_file(file)
            if not trust_remote_code and (file.suffix == ".py" or file.name == "adapter_config.json"):
                raise ValueError(f"{file}: expected no code and no other model in a pipeline, got this file{_TRUST}")
            if file.name.endswith("config.json"):
                is_tokenizer = file.name == "tokenizer_config.json"
                check_config(file, read_json(file, most=_CONFIG_BYTES), trust_remote_code, counts=not is_tokenizer)
            if file.name.endswith(".index.json"):
                _check_weight_map(file)
        with one_line_errors(f"{place}"):
            _check_parameters(place, index, name)


def _files(folder: Path) -> Iterator[Path]:
    for number, path in enumerate(folder.rglob("*")):
        if number == _FILES:
            raise ValueError(f"{folder}: expected at most {_FILES} files, got more")
        if not path.is_dir() or path.suffix in (".json", ".safetensors"):  # a folder in the place of a file
            yield path


def check_config(file: Path, content: Any, trust_remote_code: bool, *, counts: bool = True) -> None:
    """Raises ValueError if a configuration names code to run, or a number in it is absurdly large.

    Args:
        file: where it is, for the error.
        content: the configuration.
        trust_remote_code: whether it may name code.
        counts: whether its integers are sizes of a model. A tokenizer's may be anything.
    """
    for key, value in _entries(content):
        names_code = key == "auto_map" or (
            # transformers fetches attention kernels from the Hub if this is the name of a repository.
            ("_implementation" in key or "kernel" in key) and isinstance(value, str) and "/" in value
        )
        if names_code and not trust_remote_code:
            raise ValueError(f"{file}: expected no code, got {shown(key)} with {shown(value)}{_TRUST}")
        if counts and isinstance(value, int):
            most = _MOST_LAYERS if re.search("layers|blocks|depth|num_labels", key) else _MOST
            if abs(value) > most:
                raise ValueError(f"{file}: expected at most {most} as {shown(key)}, got {shown(value)}")


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value in nested JSON, with the key that it is under."""
    left = [("", content)]
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, element) for element in value]


def _check_weight_map(file: Path) -> None:
    names = read_json(file).get("weight_map")
    shards = set(map(str, names.values())) if isinstance(names, dict) else {""}
    for shard in shards:
        if Path(shard).name != shard or (file.name.endswith(".safetensors.index.json") and ".safetensors" not in shard):
            raise ValueError(f"{file}: expected the names of .safetensors files beside it, got {shown(shard)}")


def _check_parameters(place: Path, index: Mapping[str, Any], name: str) -> None:
    """Refuses a model with more parameters than its files hold, before any memory is allocated for it."""
    try:
        cls: Any = component_class(index, name)
    except ValueError:
        return  # code that the user trusts
    if not issubclass(cls, nn.Module):
        return
    file = place / "config.json"
    files = list(place.glob("*.safetensors"))
    if not files:
        raise ValueError("expected weights in .safetensors files, got none; pickled weights are not read")
    if not file.exists():
        raise ValueError("expected a config.json, got none")
    config = read_json(file)
    elements = 0
    for weights in files:
        with open_safetensors(weights) as opened:
            for tensor in tensor_names(opened):
                elements += torch.Size(opened.get_slice(tensor).get_shape()).numel()
    model = model_without_weights(cls, config)
    needed = sum(parameter.numel() for parameter in model.parameters())
    # An honest folder may hold fewer numbers than its model has: quantised ones share a number, and an embedding that
    # transformers ties to another is stored once, though a model without weights may have both.
    packed = _QUANTISED_PER_NUMBER if "quantization_config" in config else 1
    tied = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Embedding))
    if needed > packed * elements + min(tied, elements):
        raise ValueError(
            f"expected weights for the {needed} parameters that config.json describes, got {elements} in its "
            ".safetensors files"
        )


def model_without_weights(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """Makes the model that a component's configuration describes, on the meta device: it has shapes but no weights."""
    with torch.device("meta"):
        if hasattr(cls, "config_class"):  # of transformers
            return cls(cls.config_class.from_dict(dict(config)))
        return cls.from_config(dict(config))


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turns whatever a library raises while it reads somebody's pipeline into one line, with what could not be read.

    A lack of memory is not the pipeline's fault, and passes. A missing package stays an ImportError, but says what
    wanted it: a configuration can ask for any.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ImportError(f"{ARGUMENT}: {what} cannot be read: {one_line(error, 300)}") from error
    except Exception as error:
        lacks_memory = any(text in str(error) for text in ("not enough memory", "can't allocate memory"))
        if isinstance(error, RuntimeError) and lacks_memory:
            raise
        raise ValueError(f"{ARGUMENT}: {what} cannot be read: {one_line(error, 300)}") from error
