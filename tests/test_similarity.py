"""PSNR and SSIM: by hand, and against torchmetrics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from carrara.similarity import psnr, ssim
from tests.errors import refused


def pair(size: int = 32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, size, size, generator=draw) * 2 - 1
    noise = torch.randn(x.shape, generator=draw) * torch.tensor([0.01, 0.05, 0.2, 0.5]).reshape(4, 1, 1, 1)
    return (x + noise).clamp(-1, 1), x


def test_a_constant_error_has_a_known_psnr() -> None:
    x = torch.zeros(2, 1, 4, 4)
    shifted = x + torch.tensor([0.2, 0.02]).reshape(2, 1, 1, 1)
    # 20·log₁₀(2 / 0.2) = 20 dB, and 40; 0.2 is a float32.
    torch.testing.assert_close(psnr(shifted, x), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert psnr(x, x).tolist() == [100, 100]


def test_psnr_equals_torchmetrics_per_image() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = pair()
    theirs = peak_signal_noise_ratio(x.double(), y.double(), data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))
    # theirs takes the logarithm of the peak in float32
    torch.testing.assert_close(psnr(x, y), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [11, 32, 64])
def test_ssim_equals_torchmetrics_where_the_window_fits(size: int) -> None:
    """torchmetrics mirrors the border and averages over it too; the paper's program stays inside."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = pair(size)
    _, everywhere = structural_similarity_index_measure(
        x.double(), y.double(), data_range=2.0, reduction="none", return_full_image=True
    )
    assert isinstance(everywhere, Tensor)
    inside = everywhere[..., 5 : size - 5, 5 : size - 5].mean((1, 2, 3))
    torch.testing.assert_close(ssim(x, y), inside, rtol=1e-9, atol=1e-12)


def test_ssim_of_equals_is_one_and_falls_with_noise_on_digits_too() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(100, 1, 8, 8, generator=draw) * 2 - 1
    noise = torch.randn(x.shape, generator=draw)
    scores = [float(ssim(x + scale * noise, x).mean()) for scale in (0.0, 0.05, 0.2, 0.8)]
    assert scores[0] == pytest.approx(1, abs=1e-12)
    assert scores == sorted(scores, reverse=True)


def test_unequal_shapes_are_told() -> None:
    with refused("shape", "targets"):
        psnr(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))
    with refused("shape", "targets"):
        ssim(torch.zeros(0, 1, 4, 4), torch.zeros(0, 1, 4, 4))
