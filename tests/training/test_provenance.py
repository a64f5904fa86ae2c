"""The digest of a model's weights: of the values themselves, wherever and however they are kept."""

import accelerate
import pytest
import torch
import torch.distributed as dist
from quantised import quantise_linear_layers
from tiny_models import LAYERS
from torch import nn
from training_cases import tiny_model

from fastunlearn.erasers import attach_erasers
from fastunlearn.training.cache.provenance import weights_digest

CPU = torch.device("cpu")
DIGEST = "02184a1d35a45873c051f418d1887045c1b02b04e6832dceaff75e9756ec5347"


def transformer_of(model):
    return model.experts[0].transformer


def test_the_digest_of_plain_weights_is_what_caches_have_recorded():
    model = tiny_model()
    for number, parameter in enumerate(model.experts[0].parameters()):
        parameter.data = (torch.arange(parameter.numel()).reshape(parameter.shape) + number) / 64
    assert weights_digest(model) == DIGEST
    attach_erasers(model.experts[0], rank=4)
    assert weights_digest(model) == DIGEST


@pytest.mark.parametrize(
    "offload",
    [
        lambda model, folder: accelerate.cpu_offload(model, CPU),
        lambda model, folder: accelerate.disk_offload(model, folder, CPU),
        lambda model, folder: model.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=folder),
        lambda model, folder: model.enable_group_offload(
            CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=folder
        ),
    ],
    ids=["sequential", "disk", "leaves to disk", "blocks to disk"],
)
def test_offloaded_weights_have_the_digest_that_they_have_in_memory(offload, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(dtype=dtype)
        expected = weights_digest(model)
        offload(transformer_of(model), str(tmp_path / str(dtype)))
        assert weights_digest(model) == expected


def test_weights_that_are_not_loaded_have_no_digest():
    model = tiny_model()
    transformer_of(model).to("meta")
    with pytest.raises(ValueError, match="patch_embed.proj.weight: expected loaded weights, got a parameter on"):
        weights_digest(model)


def test_the_digest_of_quantised_weights_is_that_of_their_numbers():
    models = [tiny_model() for _ in range(4)]
    for model in models:
        quantise_linear_layers(transformer_of(model))
    first, same, other_scale, other_number = models
    weight = transformer_of(other_scale).get_submodule(LAYERS[1]).to_q.weight
    weight.scale *= 2
    weight = transformer_of(other_number).get_submodule(LAYERS[1]).to_q.weight
    weight.qdata[0, 0] += 1
    assert weights_digest(first) == weights_digest(same)
    assert len({weights_digest(model) for model in (tiny_model(), first, other_scale, other_number)}) == 4


def test_the_digest_of_packed_weights_is_that_of_their_numbers():
    class Packed(nn.Parameter):
        """As of formats that keep a weight in a parameter of another shape, and unpack it when a function uses it."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result

    digests = []
    for value in (1, 1, 2):
        model = tiny_model()
        packed = Packed(torch.full((3, 5), value, dtype=torch.uint8), requires_grad=False)
        transformer_of(model).get_submodule(LAYERS[0]).to_q.weight = packed
        digests.append(weights_digest(model))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo to shard with"
)
def test_sharded_weights_have_no_digest():
    from torch.distributed.tensor import distribute_tensor

    model = tiny_model()
    attention = transformer_of(model).get_submodule(LAYERS[0])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        attention.to_q.weight = nn.Parameter(distribute_tensor(attention.to_q.weight.data, mesh), requires_grad=False)
        with pytest.raises(ValueError, match="attn1.to_q.weight: expected a whole weight, got one that is sharded"):
            weights_digest(model)
    finally:
        dist.destroy_process_group()
