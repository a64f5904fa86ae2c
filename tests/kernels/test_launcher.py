"""A launcher asks Triton for machine code once, and calls it with the same arguments from then on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="there are no kernels without Triton")

import triton

from fastunlearn.kernels import launch
from fastunlearn.kernels.launch import Launcher


class Kernel:
    """Stands for a kernel and for what Triton compiles: says how it was launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert grid == (5, 1, 1)

        def by_triton(*args: Any, **kwargs: Any) -> Any:
            self.launches.append(("triton", args, kwargs))
            return {grid: lambda *args, **kwargs: self.launches.append(("directly", args, kwargs))}

        return by_triton


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Triton's driver, on device 0."""
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 70 + device)
    monkeypatch.setattr(launch, "_IS_DIRECT", True)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    return driver


def launcher_of(kernel: Kernel) -> Launcher:
    return Launcher(kernel, (5,), (3, (4, 1)), {"BLOCK": 8}, {"num_warps": 2})


def test_the_second_launch_is_direct_and_has_the_same_arguments(driver: SimpleNamespace) -> None:
    kernel, x, y = Kernel(), torch.zeros(8), torch.zeros(8)
    launcher = launcher_of(kernel)
    launcher((x, None, (x, y)), 0.5)
    launcher((y, None, (y, x)), 2.5)
    a, b = x.data_ptr(), y.data_ptr()
    assert kernel.launches[1:] == [("directly", (b, None, (b, a), 2.5, 3, (4, 1), 8), {"stream": 70})]
    (how, args, keywords) = kernel.launches[0]
    assert (how, args[1], args[3:]) == ("triton", None, (0.5, 3, (4, 1)))
    assert args[0] is x and args[2] == (x, y)
    assert keywords == {"BLOCK": 8, "num_warps": 2}


def test_addresses_that_are_not_divisible_by_16_have_machine_code_of_their_own(driver: SimpleNamespace) -> None:
    kernel, x = Kernel(), torch.zeros(9)
    launcher = launcher_of(kernel)
    odd = x[1:]
    for tensors in [(x, x), (odd, x), (x, odd), (x, (odd,)), ((x, odd),), ((odd, x),)] * 2:
        launcher(tensors)
    assert [how for how, _, _ in kernel.launches] == ["triton"] * 6 + ["directly"] * 6


def test_every_device_has_machine_code_of_its_own(driver: SimpleNamespace) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launcher = launcher_of(kernel)
    launcher((x,))
    driver.get_current_device = lambda: 1
    launcher((x,))
    launcher((x,))
    assert [how for how, _, _ in kernel.launches] == ["triton", "triton", "directly"]
    assert kernel.launches[-1][2] == {"stream": 71}


def test_the_interpreter_launches_by_triton(driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_IS_DIRECT", False)
    kernel, x = Kernel(), torch.zeros(8)
    launcher = launcher_of(kernel)
    launcher((x,))
    launcher((x,))
    assert [how for how, _, _ in kernel.launches] == ["triton", "triton"]


def test_a_second_call_of_a_velocity_loss_makes_no_plan() -> None:
    from fastunlearn.kernels import upstream, velocity
    from fastunlearn.testing.ahead_of_time import recorded_launches

    options: dict[str, Any] = {"loss_type": "l2", "reduction": "mean", "mask_normalization": "all"}
    with recorded_launches() as launches:
        for guidance_scale, weight in ((7.5, 1.0), (3.0, 0.5)):
            x, uncond, cond = (torch.zeros(2, 3, 4, 8, 8) for _ in range(3))
            x.requires_grad_()
            before = [f.cache_info().misses for f in (velocity._plan, upstream._launcher)]
            loss, *_ = velocity.negatively_guided_velocity_loss(
                x,
                uncond,
                cond,
                guidance_scale=guidance_scale,
                weight=weight,
                mask=torch.zeros(2, 4, 4, 4),
                sample_weight=None,
                channel_dim=1,
                **options,
            )
            loss.backward()
    assert [f.cache_info().misses for f in (velocity._plan, upstream._launcher)] == before
    kernels = ["velocity_forward_kernel", "velocity_finish_kernel", "scale_gradients_kernel"]
    assert [x.kernel.__name__ for x in launches] == kernels * 2
