"""CLIP text encoders in two layouts: the same function, there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from carrara.interop import openclip
from tests.errors import refused

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, LAYERS, WORDS, LENGTH, OUT = 16, 2, 3, 40, 12, 8


class Residual(nn.Module):
    """A block as OpenCLIP has it: PyTorch's own attention with its joint projection."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))  # type: ignore[no-any-return]


class Original(nn.Module):
    """OpenCLIP's text encoder, written from its description."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token_embedding = nn.Embedding(WORDS, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Residual() for _ in range(LAYERS))})
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, OUT))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor, layers: int = LAYERS) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        for block in list(self.transformer["resblocks"].children())[:layers]:
            x = block(x, mask)
        x = self.ln_final(x)
        return x, x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


def build(state: dict[str, Tensor], layers: int) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        projection_dim=OUT,
        hidden_act="gelu",
        eos_token_id=WORDS - 1,
    )
    model = transformers.CLIPTextModelWithProjection(config).eval()
    own = {key if key.startswith("text_projection") else f"text_model.{key}": value for key, value in state.items()}
    model.load_state_dict(own)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [LAYERS, LAYERS - 1])
def test_the_same_function(layers: int) -> None:
    original = Original().eval()
    model = build(openclip.to_transformers(original.state_dict(), layers), layers)
    ids = torch.tensor([[1, 5, 7, WORDS - 1, 0], [1, 2, WORDS - 1, 0, 0]])
    hidden, pooled = original(ids, layers)
    found = model(input_ids=ids)
    torch.testing.assert_close(found.last_hidden_state, hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.text_embeds, pooled, atol=1e-5, rtol=1e-5)


def test_there_and_back() -> None:
    state = {key: value for key, value in Original().state_dict().items() if key != "logit_scale"}
    again = openclip.from_transformers(openclip.to_transformers(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_other_weights_are_refused() -> None:
    state = Original().state_dict()
    with refused("unknown", key="more"):
        openclip.to_transformers({**state, "more": torch.zeros(1)})
    with refused("missing", key="ln_final.bias"):
        openclip.to_transformers({key: value for key, value in state.items() if key != "ln_final.bias"})
    with refused("unsupported", key="encoder.layers.0.more.weight"):
        openclip.from_transformers({"encoder.layers.0.more.weight": torch.zeros(1)})
