"""What only a GPU can show. Run with `pytest -m "gpu or not gpu"`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import cogvideox, inputs
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastunlearn.capture import AttnMapsCapture
from fastunlearn.functional import LowRankOutput, localization_loss, velocity_loss
from fastunlearn.interception import Attention, Interception
from fastunlearn.testing import cases
from fastunlearn.testing.cases import Case
from fastunlearn.velocity_model import as_velocity_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}-{case.dtype}-{case.name}")
def test_grid(case: Case) -> None:
    case.run(torch.device("cuda"), None)


def velocity(x: Tensor) -> Tensor:
    return velocity_loss(x, torch.ones_like(x), weight=0.5).loss


def localization(x: Tensor) -> Tensor:
    mask = (torch.arange(x.shape[1], device=x.device) % 2 == 0).expand(x.shape[0], -1)
    return localization_loss([x, 2 * x], mask).loss


def low_rank_localization(x: Tensor) -> Tensor:
    mask = (torch.arange(x.shape[1], device=x.device) % 2 == 0).expand(x.shape[0], -1)
    weight = torch.ones(2 * x.shape[2], x.shape[2], device=x.device)
    return localization_loss([LowRankOutput(x, weight, weight[:, 0])] * 2, mask).loss


@pytest.mark.parametrize("loss", [velocity, localization, low_rank_localization])
def test_cuda_graphs(loss: object) -> None:
    """A captured step, replayed on other values, gives the same loss and gradient as the step itself."""
    x = torch.randn(2, 256, 64, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(x), x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    expected = loss(x)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("loss", [velocity, localization, low_rank_localization])
def test_the_same_bits_and_no_host_sync(loss: object) -> None:
    x = torch.randn(4, 4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    loss(x).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [loss(x) for _ in range(3)]
        gradients = [torch.autograd.grad(value, x)[0] for value in values]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(values[0], value) for value in values)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_attention_returns_its_log_sum_exp(backend: str, channels: int) -> None:
    query, key = (torch.randn(2, 4, n, channels, device="cuda", dtype=torch.bfloat16) for n in (200, 333))
    kept: list[Attention] = []
    with sdpa_kernel(SDPBackend.__members__[backend]):
        try:
            expected = F.scaled_dot_product_attention(query, key, key)
        except RuntimeError as error:
            pytest.skip(f"this GPU or torch has no {backend}: {error}")
        with Interception(kept.append):
            output = F.scaled_dot_product_attention(query, key, key)
    assert torch.equal(output, expected)
    exact = (query.double() @ key.double().mT * channels**-0.5).logsumexp(3)
    assert kept[0].lse is not None
    torch.testing.assert_close(kept[0].lse, exact.float(), rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:the attention does not return")
def test_a_capture_does_not_make_the_host_wait(recwarn: pytest.WarningsRecorder) -> None:
    model = as_velocity_model(cogvideox().to("cuda", torch.bfloat16))
    x_t, t, cond = (x.to("cuda", torch.bfloat16 if x.is_floating_point() else x.dtype) for x in inputs())

    def waits() -> int:
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(x_t, t, cond)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in recwarn)

    with torch.no_grad():
        model(x_t, t, cond)
        expected = waits()
        with AttnMapsCapture(model, {}, token_indices=[3, 7]):
            model(x_t, t, cond)
            assert waits() == expected


@pytest.mark.parametrize("loss", [velocity, localization, low_rank_localization])
def test_compiled(loss: object) -> None:
    x = torch.randn(2, 256, 64, device="cuda", requires_grad=True)
    value = torch.compile(loss, fullgraph=True)(x)
    torch.testing.assert_close(value, loss(x))
    torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(loss(x), x))


def test_more_than_two_to_the_31_elements() -> None:
    elements = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 10 * elements:
        pytest.skip(f"needs {10 * elements / 2**30:.0f} GiB of GPU memory")
    prediction = torch.zeros(1, elements, dtype=torch.bfloat16, device="cuda")
    prediction[0, -1] = 3
    prediction.requires_grad_()
    target = torch.zeros_like(prediction)
    loss = velocity_loss(prediction, target, mask=torch.ones(1, device="cuda"), reduction="sum").loss
    assert loss == 9
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient[0, -1] == 6
    assert gradient.count_nonzero() == 1


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_memcheck(tmp_path: Path) -> None:
    script = tmp_path / "calls.py"
    script.write_text(
        "import torch\n"
        "from fastunlearn.testing import cases\n"
        "ops = ['velocity_loss', 'localization_loss', 'low_rank_localization_loss', 'concept_attention']\n"
        "for case in cases(ops, [torch.bfloat16]):\n"
        "    case.run(torch.device('cuda'), 'triton')\n"
    )
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
