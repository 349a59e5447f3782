"""The zoo: two architectures of every module file of timm, traced, predicted and assigned."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from timm_ghn import GHN, initialize, load_ghn

DATA = Path(__file__).parent / "data"
# The smallest two of each file, by number of parameters.
SAMPLE = (DATA / "zoo_sample.txt").read_text().split()

@pytest.fixture(scope="module")
def ghn() -> GHN:
    return load_ghn(DATA / "golden" / "ghn2.safetensors")


def test_the_sample_covers_every_file() -> None:
    assert len(SAMPLE) >= 150
    missing = set(timm.list_modules()) - {timm.models._registry._model_to_module[name] for name in SAMPLE}
    assert not missing


@pytest.mark.parametrize("name", SAMPLE)
def test_architecture(name: str, ghn: GHN) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    model.to_empty(device="cpu")  # memory without values: what is not predicted must not matter here
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[-1:] = torch.nan
    report = initialize(model, ghn, head="predict")
    parameters = dict(model.named_parameters())
    assert report.predicted.keys() | report.kept.keys() == parameters.keys()
    unwritten = [key for key in report.predicted if not torch.isfinite(parameters[key].view(-1)[-1])]
    assert not unwritten
    assert report.predicted_fraction > 0.99, report
