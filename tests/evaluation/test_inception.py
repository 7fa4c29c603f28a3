"""The Inception port against a second implementation: the TensorFlow graph, read off as plain functions.

The second one takes weights under the graph's own names (those of the TorchScript file), so the renaming is
checked with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from carrara.evaluation.features import Inception, preparation
from carrara.evaluation.features.checksum import file_checksum
from carrara.evaluation.features.inception_network import InceptionNetwork
from carrara.evaluation.features.inception_weights import (
    OFFICIAL,
    from_torchscript,
    read_weights,
    torchscript_name,
)
from tests.errors import refused

Weights = dict[str, Tensor]


# ---- the graph ----------------------------------------------------------------------------------------------


def graph_conv(w: Weights, name: str, x: Tensor, stride: int = 1, padding: str = "same") -> Tensor:
    """Convolution, then (x - mean)/√(var + 0.001) + beta, then max(0, ·): the graph has no gamma."""
    y = F.conv2d(x, w[name + ".weight"].double(), stride=stride, padding=padding)
    mean, var, beta = (w[f"{name}.{part}"].double()[:, None, None] for part in ("mean", "var", "beta"))
    return ((y - mean) / (var + 0.001).sqrt() + beta).clamp_min(0)


def graph_average(x: Tensor) -> Tensor:
    """3×3 sums over the pixels that exist, by their number."""
    ones = torch.ones_like(x[:1, :1])
    box = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    sums = F.conv2d(x.flatten(0, 1)[:, None], box, padding=1).reshape(x.shape)
    return sums / F.conv2d(ones, box, padding=1)


def graph_chain(w: Weights, tower: str, x: Tensor, length: int, last_stride: int = 1) -> Tensor:
    for k in range(length):
        stride = last_stride if k == length - 1 else 1
        name = tower + (".conv" if k == 0 else f".conv_{k}")
        x = graph_conv(w, name, x, stride, "same" if stride == 1 else "valid")
    return x


def graph_features(w: Weights, x: Tensor) -> Tensor:
    """[N, 3, 299, 299] -> [N, 2048] in float64."""
    x = graph_conv(w, "layers.conv", x.double(), 2, "valid")
    x = graph_conv(w, "layers.conv_1", x, 1, "valid")
    x = F.max_pool2d(graph_conv(w, "layers.conv_2", x), 3, 2)
    x = graph_conv(w, "layers.conv_3", x)
    x = F.max_pool2d(graph_conv(w, "layers.conv_4", x, 1, "valid"), 3, 2)
    for m in ("layers.mixed", "layers.mixed_1", "layers.mixed_2"):
        pool = graph_conv(w, m + ".tower_2.conv", graph_average(x))
        x = torch.cat(
            [
                graph_conv(w, m + ".conv", x),
                graph_chain(w, m + ".tower", x, 2),
                graph_chain(w, m + ".tower_1", x, 3),
                pool,
            ],
            1,
        )
    m = "layers.mixed_3"
    left = graph_conv(w, m + ".conv", x, 2, "valid")
    x = torch.cat([left, graph_chain(w, m + ".tower", x, 3, 2), F.max_pool2d(x, 3, 2)], 1)
    for m in ("layers.mixed_4", "layers.mixed_5", "layers.mixed_6", "layers.mixed_7"):
        pool = graph_conv(w, m + ".tower_2.conv", graph_average(x))
        x = torch.cat(
            [
                graph_conv(w, m + ".conv", x),
                graph_chain(w, m + ".tower", x, 3),
                graph_chain(w, m + ".tower_1", x, 5),
                pool,
            ],
            1,
        )
    m = "layers.mixed_8"
    x = torch.cat(
        [graph_chain(w, m + ".tower", x, 2, 2), graph_chain(w, m + ".tower_1", x, 4, 2), F.max_pool2d(x, 3, 2)], 1
    )
    for m in ("layers.mixed_9", "layers.mixed_10"):
        a = graph_conv(w, m + ".tower_conv", x)
        b = graph_conv(w, m + ".tower_1_conv_1", graph_conv(w, m + ".tower_1_conv", x))
        pooled = graph_average(x) if m == "layers.mixed_9" else F.max_pool2d(x, 3, 1, 1)
        parts = [graph_conv(w, m + ".conv", x)]
        parts += [graph_conv(w, f"{m}.tower_mixed_{c}", a) for c in ("conv", "conv_1")]
        parts += [graph_conv(w, f"{m}.tower_1_mixed_{c}", b) for c in ("conv", "conv_1")]
        x = torch.cat([*parts, graph_conv(w, m + ".tower_2_conv", pooled)], 1)
    return F.avg_pool2d(x, 8).flatten(1)


def graph_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize of [H, W, C], pixel by pixel as its kernel has it, in float32."""
    height, width, channels = image.shape
    scale_y, scale_x = np.float32(height / size), np.float32(width / size)
    out = np.zeros((size, size, channels), np.float32)
    for i in range(size):
        y = np.float32(i) * scale_y
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(size):
            x = np.float32(j) * scale_x
            left, right = int(x), min(int(x) + 1, width - 1)
            dx, dy = x - np.float32(left), y - np.float32(top)
            upper = image[top, left] + (image[top, right] - image[top, left]) * dx
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[i, j] = upper + (lower - upper) * dy
    return out


# ---- random weights under both names ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> InceptionNetwork:
    """Random weights that keep every layer alive, norms included."""
    draw = torch.Generator().manual_seed(0)
    network = InceptionNetwork().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.normal_(0, (2 / fan) ** 0.5, generator=draw)
            elif isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(0, 0.1, generator=draw)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1, generator=draw)
                module.running_var.uniform_(0.5, 1.5, generator=draw)
        network.fc.weight.normal_(0, 0.05, generator=draw)
        network.fc.bias.normal_(0, 1, generator=draw)
    return network


@pytest.fixture(scope="module")
def graph(network: InceptionNetwork) -> Weights:
    """The same weights under the graph's names."""
    state = network.state_dict()
    weights = {"output.weight": state["fc.weight"], "output.bias": state["fc.bias"]}
    for convolution in {key.rsplit(".", 2)[0] for key in state if key.startswith(("Conv", "Mixed"))}:
        name = torchscript_name(convolution)
        weights[name + ".weight"] = state[convolution + ".conv.weight"]
        weights[name + ".beta"] = state[convolution + ".bn.bias"]
        weights[name + ".mean"] = state[convolution + ".bn.running_mean"]
        weights[name + ".var"] = state[convolution + ".bn.running_var"]
    return weights


@pytest.mark.parametrize(("height", "width"), [(32, 32), (299, 299), (512, 512), (40, 64)])
def test_features_and_logits_equal_the_graph(
    network: InceptionNetwork, graph: Weights, height: int, width: int
) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1
    whole = ((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    if (height, width) != (299, 299):
        whole = np.stack([graph_resize(image, 299) for image in whole])
    expected = graph_features(graph, (torch.tensor(whole).permute(0, 3, 1, 2) - 128) / 128)
    inception = Inception(network, "0", official=False)
    features = inception(images)
    # float32 over about 50 layers against float64: 1e-6 of the largest feature; a wrong pool moves 1e-2 of it.
    tolerance = 5e-6 * float(expected.abs().max())
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=tolerance)
    logits = expected @ graph["output.weight"].double().T  # no bias
    torch.testing.assert_close(
        inception.logits(features).double(), logits, rtol=0, atol=5e-6 * float(logits.abs().max())
    )
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)


def test_resize_is_tensorflows_bit_for_bit() -> None:
    for height, width in [(32, 32), (8, 8), (300, 20), (512, 512)]:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.float32)
        ours = preparation.tensorflow_bilinear(torch.tensor(image).permute(2, 0, 1)[None], 299)
        assert np.array_equal(ours[0].permute(1, 2, 0).numpy(), graph_resize(image, 299))


def test_clean_fid_resize_is_pillows_bicubic_in_floating_point() -> None:
    for size in (32, 512):
        image = np.random.default_rng(1).integers(0, 256, (size, size)).astype(np.float32)
        pillow = np.asarray(Image.fromarray(image, mode="F").resize((299, 299), Image.Resampling.BICUBIC))
        gray = torch.tensor(image)[None, None] / 127.5 - 1
        ours = preparation.inception_input(gray, "clean-fid")[0, 0].numpy() * 128 + 128
        # torch takes the filter's weights in float32, Pillow in float64: 1e-5 of the range of 255.
        assert np.abs(ours - pillow).max() < 5e-3


def test_preparations_differ_and_unknown_ones_are_told() -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = [preparation.inception_input(images, name) for name in preparation.INCEPTION]
    assert all(x.shape == (1, 3, 299, 299) for x in inputs)
    assert all((inputs[i] - inputs[j]).abs().max() > 0.05 for i in range(3) for j in range(i))
    with refused("unknown", "preparation"):
        preparation.inception_input(images, "cleanfid")


def test_images_are_rounded_to_levels_as_a_png_would() -> None:
    values = torch.tensor([-1.2, -1.0, -0.9961, 0.0, 0.999, 1.5]).reshape(1, 1, 2, 3)
    assert preparation.levels(values)[0, 0].flatten().tolist() == [0, 0, 0, 128, 255, 255]
    assert preparation.levels(values).shape == (1, 3, 2, 3)
    with refused("shape", "channels"):
        preparation.levels(torch.zeros(1, 4, 8, 8))


# ---- weights from files ---------------------------------------------------------------------------------------


def scripted(weights: Weights) -> torch.jit.ScriptModule:
    """A TorchScript module that holds the weights in the graph's tree of names."""
    root = nn.Module()
    for name, value in weights.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, value.clone())
    script: torch.jit.ScriptModule = torch.jit.script(root)
    return script


def test_pytorch_fids_file_is_read_and_all_its_keys_are_used(network: InceptionNetwork, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    weights, checksum = read_weights(path, file_checksum(path)[:8])
    assert len(weights) == 566  # 94 convolutions of 6 tensors, and the last layer's 2
    assert checksum == file_checksum(path)
    loaded = Inception.load(path, checksum)
    assert (loaded.name, loaded.checksum) == ("inception", checksum)
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(loaded(images), Inception(network, "0", official=False)(images))


def test_counters_may_be_missing(network: InceptionNetwork, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, path)
    assert len(read_weights(path, file_checksum(path))[0]) == 566


def test_torchscript_form_gives_the_same_weights(network: InceptionNetwork, graph: Weights, tmp_path: Path) -> None:
    path = tmp_path / "inception.pt"
    torch.jit.save(scripted(graph), str(path))
    weights, _ = read_weights(path, file_checksum(path))
    state = network.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[key], state[key]) for key in state)


def test_no_tensor_of_the_graph_is_left_over_or_missing(network: InceptionNetwork, graph: Weights) -> None:
    assert len(graph) == 94 * 4 + 2
    counters = {key for key in network.state_dict() if key.endswith("num_batches_tracked")}
    assert from_torchscript(graph).keys() | counters == network.state_dict().keys()


def test_a_wrong_checksum_is_refused_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"half a download")
    with refused("mismatch"):
        Inception.load(path)
    with refused("mismatch"):
        Inception.load(path, checksum="abcdef")


def test_another_network_is_refused(network: InceptionNetwork, tmp_path: Path) -> None:
    state = network.state_dict()
    path = tmp_path / "weights.pth"
    torch.save({**state, "AuxLogits.conv0.conv.weight": torch.zeros(1)}, path)
    with refused("mismatch"):
        read_weights(path, file_checksum(path))
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, path)
    with refused("mismatch"):
        read_weights(path, file_checksum(path))


def test_a_missing_file_says_what_to_put_there() -> None:
    with refused("missing", "nowhere.pth"):
        Inception.load("nowhere.pth")


def test_only_the_published_checksums_bear_the_name() -> None:
    assert [digest[:8] for digest in OFFICIAL] == ["6726825d", "f58cb9b6"]
    assert all(len(digest) == 64 for digest in OFFICIAL)


def test_a_name_of_the_graph_for_every_kind_of_branch() -> None:
    assert torchscript_name("Conv2d_4a_3x3") == "layers.conv_4"
    assert torchscript_name("Mixed_5b.branch5x5_2") == "layers.mixed.tower.conv_1"
    assert torchscript_name("Mixed_6e.branch7x7dbl_5") == "layers.mixed_7.tower_1.conv_4"
    assert torchscript_name("Mixed_7c.branch3x3dbl_3b") == "layers.mixed_10.tower_1_mixed_conv_1"
