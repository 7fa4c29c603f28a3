"""EfficientNet-Lite0: its padding, its names, and, where the package is installed, what it sees."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.errors import UserError
from carrara.interop import efficientnet
from carrara.networks.efficientnet import EfficientNetLite0, SameConvolution
from carrara.packages import locate
from tests.errors import refused
from tests.shared import shared


def original() -> dict[str, torch.Tensor]:
    """Random weights under the original's names."""
    torch.manual_seed(0)
    theirs = {ours: their for their, ours in efficientnet._IN_BLOCK.items()}
    top = {ours: their for their, ours in efficientnet._TOP.items()}
    found = {}
    for name, value in EfficientNetLite0().state_dict().items():
        block = re.fullmatch(r"blocks\.(\d+)\.(\w+\.\w+)\.(\w+)", name)
        if block:
            found[f"_blocks.{block[1]}.{theirs[block[2]]}.{block[3]}"] = value
        else:
            part, _, last = name.rpartition(".")
            found[f"{top[part]}.{last}"] = value
    return found


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_the_same_padding_is_tensorflow_s(kernel: int, stride: int, size: int) -> None:
    layer = SameConvolution(1, 1, kernel, stride)
    x = torch.randn(1, 1, size, size)
    found = layer(x)
    rows = -(-size // stride)
    assert found.shape[2:] == (rows, rows)
    # output (i, j) sees the rows from i·stride - before on
    before = max((rows - 1) * stride + kernel - size, 0) // 2
    wide = torch.zeros(1, 1, size + 8, size + 8)
    wide[..., 4 : 4 + size, 4 : 4 + size] = x
    start = 4 - before
    window = wide[0, 0, start + stride : start + stride + kernel, start : start + kernel]
    torch.testing.assert_close(found[0, 0, 1, 0], (window * layer.weight[0, 0]).sum())


def test_every_weight_has_a_place() -> None:
    weights = original()
    assert len(weights) == 296
    network = efficientnet.load(weights)
    assert network(torch.zeros(2, 3, 64, 48)).shape == (2, 1000)
    name = "_blocks.3._expand_conv.weight"
    with refused("mismatch", key="blocks.3.expand.convolution.weight"):
        efficientnet.load({key: value for key, value in weights.items() if key != name})
    with refused("mismatch", key=name):
        efficientnet.load({**weights, name: torch.zeros(1)})
    with refused("unknown", key="_blocks.3._more.weight"):
        efficientnet.load({**weights, "_blocks.3._more.weight": torch.zeros(1)})


@pytest.mark.parametrize(("name", "label"), [("kodim21", 437), ("coffee", 967), ("kodim23", 88)])
def test_the_packaged_weights_know_a_photograph(name: str, label: int) -> None:
    """A lighthouse, an espresso, a macaw."""
    import pyarrow.parquet as pq

    try:
        weights = torch.load(locate("efficientnet-lite0"), weights_only=True)
    except UserError as error:
        pytest.skip(str(error))
    rows = pq.read_table(shared("data", "editing") / "test.parquet").to_pylist()
    picture = next(row["image"]["bytes"] for row in rows if row["name"] == name)
    pixels = np.array(Image.open(io.BytesIO(picture)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    found = efficientnet.load(weights)(image).softmax(1)[0]
    assert int(found.argmax()) == label
    assert float(found.max()) > 0.9


def test_packaged_weights_are_found_by_a_known_word() -> None:
    with refused("unknown", key="resnet"):
        locate("resnet")
