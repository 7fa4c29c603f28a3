"""The safety net of a refactoring: digests of weights, optimiser states, logs and samples of every kind of run, tiny.

    python -m benchmarks.digests --out before.json
    python -m benchmarks.digests --against before.json

It uses nothing but the command line, so it runs on any version (`PYTHONPATH=OTHER/src python …/digests.py`). Digests
belong to one machine and one PyTorch: compare two versions in one place.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

STEPS = 30
CODEC = {"channels": 8, "channel_mult": [1, 2], "blocks_per_level": 1, "latent_channels": 2, "norm_groups": 4}
UNET = {"channels": 8, "channel_mult": [1, 1], "blocks_per_level": 1, "attention": [2], "head_channels": 8}
LATENT = {**UNET, "channel_mult": [1], "attention": [1]}
CLASSES = {"conditioning": {"kind": "labels", "dropout": 0.1}}
PREDICTS_V = {"objective": {"predicts": "v"}}

RUNS: dict[str, dict[str, Any]] = {
    "pixel": {"kind": "diffusion", "network": UNET, **CLASSES, **PREDICTS_V},
    "hybrid": {
        "kind": "diffusion",
        "network": {**UNET, "learned_variance": True, "dropout": 0.1},
        **CLASSES,
        "objective": {"predicts": "eps", "loss": "hybrid", "times": {"kind": "loss_aware"}},
    },
    "classifier": {"kind": "classifier", "network": UNET},
    "kl": {"kind": "codec", "codec": {"kind": "kl", **CODEC}, "loss": {"perceptual": 0, "adversarial": 0}},
    "vq": {"kind": "codec", "codec": {"kind": "vq", **CODEC, "codes": 32}},
    "vqgan": {
        "kind": "codec",
        "codec": {"kind": "vqgan", **CODEC, "codes": 32},
        "loss": {"perceptual": 0, "adversarial": 0.5},
        "discriminator": {"layers": 1, "channels": 8},
    },
    "latent": {"kind": "diffusion", "codec": {"path": "kl"}, "network": LATENT, **CLASSES, **PREDICTS_V},
    "upsampler": {"kind": "diffusion", "network": UNET, "upsampling": {"factor": 2, "noise": 0.3}, **PREDICTS_V},
}
"""In an order in which each finds what it needs."""

SAMPLES: dict[str, list[str]] = {
    **{
        f"pixel {solver}": ["pixel", "--guidance", "2", "--solver", solver, "--steps", "5"]
        for solver in ("ddpm", "ddim", "euler-ancestral", "heun", "dpm++2m", "dpm++3m", "dpm++2m-sde", "unipc", "plms")
    },
    "pixel ddim, eta 0.5, quadratic": ["pixel", "--solver", "ddim", "--eta", "0.5", "--spacing", "quadratic"],
    "pixel, rescaled": ["pixel", "--guidance", "3", "--rescale", "0.7"],
    "pixel, classifier": ["pixel", "--guidance", "1.5", "--classifier", "classifier", "--classifier-scale", "3"],
    "pixel, classifier, ancestral": ["pixel", "--classifier", "classifier", "--solver", "ddpm"],
    "hybrid, ancestral": ["hybrid", "--solver", "ddpm", "--steps", "7"],
    "latent": ["latent", "--guidance", "2"],
    "latent, classifier-free 0": ["latent", "--guidance", "0", "--solver", "ddim"],
    "upsampler": ["upsampler", "--small", "small", "--small-noise", "0.2"],
}


def main() -> None:
    """Make the digests, and compare them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the digests are written")
    parser.add_argument("--against", type=Path, help="digests to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = dict(digests(Path(folder)))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.against:
        known = json.loads(options.against.read_text())
        different = sorted(key for key in known.keys() | found.keys() if known.get(key) != found.get(key))
        for key in different:
            print("differs:", key)
        print(f"{len(known) - len(different)} of {len(known)} digests are equal")
        sys.exit(1 if different else 0)


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of everything, made in an empty folder."""
    pictures(folder / "small")
    for name, recipe in RUNS.items():
        train(folder, name, recipe)
        yield from run_digests(name, folder / name)
    halves = {**RUNS["pixel"], "name": "halves"}
    train(folder, "halves", halves, steps=STEPS // 2)
    train(folder, "halves", halves)
    yield from run_digests("resumed", folder / "halves")
    train(folder, "two", RUNS["pixel"], processes=2)
    yield from run_digests("two processes", folder / "two")
    for number, (name, words) in enumerate(SAMPLES.items()):
        out = folder / f"samples-{number}"
        labels = [] if words[0] == "upsampler" else ["--label", "3", "--label", "7", "--count", "4"]
        command(folder, "sample", *words, *labels, "--seed", "5", "--batch-size", "3", "--out", str(out))
        with np.load(out / "samples.npz") as archive:
            yield f"samples: {name}", hashlib.sha256(archive["arr_0"].tobytes()).hexdigest()[:16]


def train(folder: Path, name: str, recipe: Mapping[str, Any], steps: int = STEPS, processes: int = 1) -> None:
    """One run of a few steps, with a checkpoint in the middle and at the end."""
    defaults = {
        "name": name,
        "data": {"path": "digits", "resolution": 8, "channels": 1},
        "training": {
            "steps": steps,
            "batch_size": 16,
            "warmup": 5,
            "log_every": 5,
            "checkpoint_every": STEPS // 2,
            "sample_every": STEPS,
            "ema": [0.9, 0.99],
            "tracker": "none",
        },
    }
    if recipe["kind"] != "classifier":
        defaults["sampling"] = {"count": 4}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**defaults, **recipe, "name": name}))
    command(folder, "train", str(path), "--out", str(folder / name), processes=processes)


def command(folder: Path, *words: str, processes: int = 1) -> None:
    """Run the command line, with one thread for each process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = [sys.executable, *(launcher if processes > 1 else []), "-m", "carrara", *words]
    done = subprocess.run(start, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def run_digests(name: str, run: Path) -> Iterator[tuple[str, str]]:
    """The digests of a run's weights, of its last checkpoint's optimisers, and of its log."""
    for path in sorted((run / "model").rglob("*.safetensors")):
        yield f"{name}: {path.relative_to(run / 'model')}", digest(load_file(path))
    state = torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "state.pt", weights_only=True)
    yield f"{name}: optimisers", digest(state["optimisers"])
    yield f"{name}: objective", digest(state["objective"])
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    yield f"{name}: log", digest([{k: v for k, v in line.items() if k != "timing"} for line in lines])


def digest(value: Any) -> str:
    """16 hexadecimal digits over nested data, the bits of its tensors and numbers included."""
    whole = hashlib.sha256()
    for part in _parts(value):
        whole.update(part)
    return whole.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield str((value.dtype, tuple(value.shape))).encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


def pictures(folder: Path) -> None:
    """Three small gray pictures, the same each time."""
    folder.mkdir()
    pixels = np.random.Generator(np.random.Philox(1)).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")


if __name__ == "__main__":
    main()
