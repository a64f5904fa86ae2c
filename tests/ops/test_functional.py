"""The choice of the backend, and the error messages for bad input."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastunlearn import functional
from fastunlearn.environment import describe
from fastunlearn.functional import (
    LowRankOutput,
    choose_backend,
    concept_attention,
    localization_loss,
    negatively_guided_velocity,
    negatively_guided_velocity_loss,
    velocity_loss,
)
from fastunlearn.ops import dispatch
from fastunlearn.ops.torch_backend import blocks

CPU = torch.device("cpu")


def test_operations_without_a_kernel_run_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTUNLEARN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "KERNELS", dict.fromkeys(dispatch.OPS))
    for op in dispatch.OPS:
        choice = choose_backend(op, CPU)
        assert choice.name == "torch"
        assert f"no Triton kernel exists for {op}" in choice.reason
        assert choose_backend(op, CPU, "compile") == ("compile", "asked for by backend=compile")
        with pytest.raises(ValueError, match=f"backend: .* got 'triton': no Triton kernel exists for {op} in float32"):
            choose_backend(op, CPU, "triton")


def test_kernels_run_on_gpus_and_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTUNLEARN_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels = SimpleNamespace(velocity_loss=lambda *_, **__: (1, 2, 3))
    monkeypatch.setattr(dispatch, "_kernel_module", {"velocity": kernels}.get)
    assert choose_backend("velocity_loss", torch.device("cuda")).name == "triton"
    assert choose_backend("velocity_loss", torch.device("cuda"), "torch").name == "torch"
    assert choose_backend("velocity_loss", CPU).name == "torch"
    with pytest.raises(ValueError, match="not on cpu tensors"):
        choose_backend("velocity_loss", CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("velocity_loss", CPU).name == "torch"
    assert velocity_loss(torch.ones(1), torch.ones(1), backend="triton") == (1, 2, 3)


def test_float64_matrix_products_do_not_run_on_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTUNLEARN_BACKEND", raising=False)
    cuda = torch.device("cuda")
    assert choose_backend("concept_attention", cuda).name == "triton"
    assert choose_backend("concept_attention", cuda, None, torch.float64).name == "torch"
    assert choose_backend("velocity_loss", cuda, None, torch.float64).name == "triton"
    with pytest.raises(ValueError, match="no Triton kernel exists for concept_attention in float64 on cuda tensors"):
        choose_backend("concept_attention", cuda, "triton", torch.float64)


def test_without_triton_the_torch_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch, "_INSTALLATION_OBSTACLE", dispatch._installation_obstacle())
    assert choose_backend("velocity_loss", torch.device("cuda")) == ("torch", "Triton is not installed")
    with pytest.raises(ValueError, match="backend: .* got 'triton': Triton is not installed"):
        choose_backend("velocity_loss", torch.device("cuda"), "triton")


@pytest.fixture
def triton_is(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`triton_is(version, package)`: from now on this Triton is the one that is installed."""

    def pretend(installed: str | None, package: str = "triton") -> None:
        def version(name: str) -> str:
            if installed is None or name != package:
                raise PackageNotFoundError(name)
            return installed

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        monkeypatch.setattr(dispatch, "version", version)
        monkeypatch.setattr(dispatch, "_INSTALLATION_OBSTACLE", dispatch._installation_obstacle())

    monkeypatch.delenv("FASTUNLEARN_BACKEND", raising=False)
    return pretend


@pytest.mark.parametrize("package", ["triton", "pytorch-triton-rocm", "pytorch-triton-xpu"])
@pytest.mark.parametrize("installed", ["3.3.1", "3.2.0+git35c6c7c6", "2.10.0"])
def test_an_old_triton_is_named_as_the_obstacle(
    installed: str, package: str, triton_is: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_is(installed, package)
    reason = f"the kernels need Triton 3.4 or newer, and {installed} is installed"
    assert choose_backend("velocity_loss", torch.device("cuda")) == ("torch", reason)
    with pytest.raises(ValueError, match=f"backend: .* got 'triton': {re.escape(reason)}"):
        choose_backend("velocity_loss", torch.device("cuda"), "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="need Triton 3.4 or newer"):
        choose_backend("velocity_loss", CPU, "triton")


@pytest.mark.parametrize("installed", ["3.4.0", "3.10.0", "3.4.0+git8ed1ca2e", "4.0.0", "unreleased", None])
def test_a_triton_that_is_new_enough_or_does_not_say_runs_the_kernels(
    installed: str | None, triton_is: Callable[..., None]
) -> None:
    triton_is(installed)
    assert choose_backend("velocity_loss", torch.device("cuda")).name == "triton"


def test_the_bounds_of_the_package_are_those_of_the_kernels() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"triton>={".".join(map(str, dispatch.OLDEST_TRITON))}; ' in text


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`a_gpu(major, minor)`: from now on torch sees a GPU of this compute capability."""

    def pretend(major: int, minor: int) -> None:
        properties = SimpleNamespace(major=major, minor=minor, name="Some GPU", total_memory=16 * 2**30)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    monkeypatch.delenv("FASTUNLEARN_BACKEND", raising=False)
    return pretend


def test_a_gpu_that_is_too_old_runs_the_reference_and_env_says_why(a_gpu: Callable[[int, int], None]) -> None:
    a_gpu(7, 5)
    reason = "the kernels need a GPU of sm_80 or newer, and Some GPU is sm_75"
    assert choose_backend("concept_attention", torch.device("cuda", 0)) == ("torch", reason)
    with pytest.raises(ValueError, match=f"backend: .* got 'triton': {reason}"):
        choose_backend("concept_attention", torch.device("cuda", 0), "triton")
    described = describe()
    assert "cuda:0: Some GPU, sm_75, 16 GiB" in described
    assert re.search(rf"^  velocity_loss +torch +{reason}$", described, re.MULTILINE)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 1)])
def test_newer_gpus_run_the_kernels(capability: tuple[int, int], a_gpu: Callable[[int, int], None]) -> None:
    a_gpu(*capability)
    assert choose_backend("velocity_loss", torch.device("cuda")).name == "triton"


def test_an_amd_gpu_is_not_judged_by_nvidias_numbers(
    a_gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_gpu(7, 5)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_backend("velocity_loss", torch.device("cuda")).name == "triton"


def test_environment_variable_does_not_apply_to_operations_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "triton")
    monkeypatch.setattr(dispatch, "KERNELS", dict.fromkeys(dispatch.OPS))
    assert choose_backend("concept_attention", torch.device("cuda")).name == "torch"


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "compile")
    assert choose_backend("velocity_loss", CPU) == ("compile", "asked for by FASTUNLEARN_BACKEND=compile")
    assert choose_backend("velocity_loss", CPU, "torch").name == "torch"
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTUNLEARN_BACKEND: expected one of 'torch', 'compile', 'triton', got 'cu"):
        velocity_loss(torch.ones(1), torch.ones(1))


def test_compile_backend_needs_a_compiler(tmp_path: Path) -> None:
    code = "import torch, fastunlearn as f; f.velocity_loss(torch.ones(2), torch.ones(2), backend='compile')"
    environment = {
        "PATH": "",
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "HOME": str(tmp_path),
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "compiler" in result.stderr.lower()


@pytest.mark.parametrize("loss_type", ["l2", "l1"])
def test_compile_backend_compiles_one_pass(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_eagerly(make: Callable[..., Callable[..., Any]], *constants: Any) -> Callable[..., Any]:
        compiled.append(make.__module__.rpartition(".")[2])
        return torch.compile(make(*constants), backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(blocks, "_compiled", compile_eagerly)
    v, u, c = (torch.randn(2, 3, 4, 6).requires_grad_() for _ in range(3))
    tokens, hidden, up, bias = (torch.randn(s).requires_grad_() for s in ((2, 24, 5), (2, 24, 3), (7, 3), (7,)))
    mask = torch.rand(2, 4, 6)
    mask[:, :2], mask[:, 2] = 1, 0
    sample_weight = torch.tensor([0.5, 2.0])
    low_rank = [LowRankOutput(hidden, up, bias), LowRankOutput(hidden, up, None), tokens]

    def losses(backend: str) -> list[torch.Tensor]:
        loss = {"loss_type": loss_type, "backend": backend}
        weighted = {"mask": mask, "sample_weight": sample_weight, "mask_normalization": "mask"}
        return [
            negatively_guided_velocity_loss(v, u, c, **loss).loss,
            negatively_guided_velocity_loss(v, u, c, **weighted, **loss).loss,
            velocity_loss(v, u.detach(), reduction="none", **loss).loss.sum(),
            localization_loss(low_rank, mask, normalization="background_mean", **loss).loss,
        ]

    for actual, expected in zip(losses("compile"), losses("torch"), strict=True):
        torch.testing.assert_close(actual, expected)
        inputs = (v, u, c, tokens, hidden, up, bias)
        gradients = torch.autograd.grad(actual, inputs, allow_unused=True)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, allow_unused=True))
    assert set(compiled) == {"velocity", "localization"} | ({"low_rank"} if loss_type == "l2" else set())


def test_signatures() -> None:
    assert str(inspect.signature(negatively_guided_velocity).parameters["guidance_scale"].default) == "7.5"
    common = {
        "mask": None,
        "sample_weight": None,
        "channel_dim": 1,
        "loss_type": "l2",
        "reduction": "mean",
        "mask_normalization": "all",
        "weight": 1.0,
        "backend": None,
        "group": None,
    }
    expected = {
        "velocity_loss": common,
        "negatively_guided_velocity_loss": {"guidance_scale": 7.5, **common},
        "localization_loss": {
            "loss_type": "l2",
            "normalization": "sum",
            "weight": 1.0,
            "backend": None,
            "group": None,
        },
        "concept_attention": {"scale": None, "key_mask": None, "lse": None, "backend": None},
    }
    for name, keywords in expected.items():
        parameters = inspect.signature(getattr(functional, name)).parameters.values()
        assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == keywords


V = torch.zeros(2, 3, 4, 5)
TOKENS = torch.zeros(2, 20, 3)
Q = torch.zeros(2, 3, 7, 4)
MASK = torch.zeros(2, 4, 5)
Call = Callable[[], Any]


def velocity(**options: Any) -> Call:
    return lambda: velocity_loss(V, V, **options)


def localization(outputs: Any, mask: Any = MASK, **options: Any) -> Call:
    return lambda: localization_loss(outputs, mask, **options)


def attention(query: Tensor = Q, key: Tensor = Q, indices: Any = (0,), **options: Any) -> Call:
    return lambda: concept_attention(query, key, indices, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: velocity_loss([1.0], V), TypeError, "prediction: expected a tensor, got list"),
        (lambda: velocity_loss(V.long(), V), TypeError, "prediction: expected one of the dtypes float16.*got int64"),
        (lambda: velocity_loss(V, V[:1]), ValueError, r"target: expected shape \(2, 3, 4, 5\).*got \(1, 3, 4, 5\)"),
        (lambda: velocity_loss(V, V.to("meta")), ValueError, "target: expected a tensor on cpu.*got one on meta"),
        (lambda: velocity_loss(V[0, 0, 0, 0], V[0, 0, 0, 0]), ValueError, "prediction: expected at least a batch dim"),
        (lambda: negatively_guided_velocity_loss(V, V[:, :1], V), ValueError, "uncond: expected shape"),
        (lambda: negatively_guided_velocity_loss(V, V, V[:, :1]), ValueError, "cond: expected shape"),
        (
            lambda: negatively_guided_velocity_loss(V, V, V, guidance_scale=torch.ones(1)),
            TypeError,
            "guidance_scale: expected a number, got Tensor",
        ),
        (lambda: negatively_guided_velocity(V, V[0]), ValueError, "cond: expected shape"),
        (velocity(mask=MASK, channel_dim=True), ValueError, "channel_dim: expected an integer from 1 to 3, got True"),
        (velocity(loss_type="huber"), ValueError, "loss_type: expected one of 'l2', 'l1', got 'huber'"),
        (velocity(reduction="avg"), ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        (velocity(mask_normalization="sum"), ValueError, "mask_normalization: expected one of 'all', 'mask'"),
        (velocity(weight="1"), TypeError, "weight: expected a number, got str"),
        (velocity(backend="cuda"), ValueError, "backend: expected one of 'torch', 'compile', 'triton', got 'cuda'"),
        (velocity(group=object()), TypeError, "group: expected a torch.distributed.ProcessGroup, got object"),
        (velocity(mask=MASK.to(torch.complex64)), TypeError, "mask: expected one of the dtypes bool.*got complex64"),
        (velocity(mask=MASK[0]), ValueError, r"mask: expected \(B or 1, \*spatial\).*\(2, 4, 5\), got \(4, 5\)"),
        (velocity(mask=torch.zeros(3, 4, 5)), ValueError, r"mask: expected.*got \(3, 4, 5\)"),
        (velocity(mask=torch.zeros(2, 3, 4, 5)), ValueError, r"size 1 at dim 1.*got \(2, 3, 4, 5\)"),
        (velocity(mask=torch.zeros(2, 0, 5)), ValueError, r"mask: expected.*got \(2, 0, 5\)"),
        (velocity(mask=MASK, channel_dim=4), ValueError, "channel_dim: expected an integer from 1 to 3, got 4"),
        (velocity(sample_weight=torch.ones(3)), ValueError, r"sample_weight: expected shape \(2,\).*got \(3,\)"),
        (localization(TOKENS), TypeError, "eraser_outputs: expected a sequence or mapping of tensors, got Tensor"),
        (localization([None]), TypeError, r"eraser_outputs\[0\]: expected a tensor, got NoneType"),
        (localization([TOKENS[0]]), ValueError, r"eraser_outputs\[0\]: expected tokens.*got \(20, 3\)"),
        (localization([TOKENS], MASK[:, :3]), ValueError, r"mask of layer 0: .*20 positions.*got \(2, 3, 5\)"),
        (localization([V], MASK[0]), ValueError, "mask of layer 0: expected"),
        (localization({"a": TOKENS}, {"b": MASK}), ValueError, "mask: expected an entry for every.*got none for 'a'"),
        (localization([TOKENS], {"b": MASK}), TypeError, "eraser_outputs in a sequence, got a mapping"),
        (localization([TOKENS], None), TypeError, "mask of layer 0: expected a tensor, got NoneType"),
        (localization([TOKENS], normalization="max"), ValueError, "normalization: expected one of 'sum', 'mean', 'ba"),
        (localization([TOKENS], group=1), TypeError, "group: expected a torch.distributed.ProcessGroup, got int"),
        (attention(query=Q[0]), ValueError, r"query: expected shape \(B, H, Sq, d\), got \(3, 7, 4\)"),
        (attention(key=Q[:, :2]), ValueError, r"key: expected shape \(2, 3, Sk, 4\).*got \(2, 2, 7, 4\)"),
        (attention(key=Q[:, :, :0]), ValueError, "at least one head, key"),
        (attention(indices=[7]), ValueError, "token_indices: expected -1 to 6.*got 7"),
        (attention(indices=[-2]), ValueError, "token_indices: expected -1 to 6.*got -2"),
        (attention(indices=torch.zeros(3, 1).long()), ValueError, r"token_indices: expected shape \(T,\) or \(2, T\)"),
        (attention(indices=torch.zeros(1)), TypeError, "token_indices: expected one of the dtypes.*got float32"),
        (attention(key_mask=torch.ones(2, 7)), TypeError, "key_mask: expected one of the dtypes bool"),
        (attention(key_mask=torch.ones(2, 6).bool()), ValueError, r"key_mask: expected shape \(2, 7\), \(B, Sk\)"),
        (attention(lse=torch.ones(2, 3)), ValueError, r"lse: expected shape \(2, 3, 7\), \(B, H, Sq\)"),
        (attention(scale=torch.ones(1)), TypeError, "scale: expected a number, got Tensor"),
    ],
)
def test_bad_input_raises_a_clear_error(call: Call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
