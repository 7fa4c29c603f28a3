"""The import contract and the public names."""

from __future__ import annotations

import importlib

import pytest

from tests.shared import ROOT


def test_arrows_point_down_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / ".importlinter"), no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("carrara", "DiffusionModel"),
        (
            "carrara.process",
            "schedules grids Condition GaussianMixture Noise Prediction NetworkDenoiser NoisyClassifier",
        ),
        ("carrara.solvers", "Ancestral DDIM DPMSolver UniPC Euler Heun integrate solve"),
        ("carrara.guidance", "classifier_free classifier_guidance static_threshold dynamic_threshold"),
        ("carrara.networks", "UNet UNetParams EncoderClassifier EncoderClassifierParams"),
        ("carrara.interop", "guided_diffusion"),
        ("carrara.evaluation", "Moments frechet_distance kernel_distance"),
    ],
)
def test_the_names_that_others_type(module: str, names: str) -> None:
    found = importlib.import_module(module)
    for name in names.split():
        assert getattr(found, name) is not None
