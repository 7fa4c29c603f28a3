"""A CLIP of random weights with a vocabulary of a few letters, as transformers saves one."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LETTERS = "acdegort"
VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "ca", "cat</w>"]


def save_clip(folder: Path) -> Path:
    """Model and tokenizer into a folder, which is returned."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    vocabulary = {word: i for i, word in enumerate([*VOCABULARY, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    last = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 8,
        "bos_token_id": last - 1,
        "eos_token_id": last,
        "pad_token_id": last,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
