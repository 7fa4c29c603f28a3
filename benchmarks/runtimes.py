"""The U-Net on a CPU against what else one can run it with: diffusers eager, ONNX Runtime and OpenVINO.

    python -m benchmarks.runtimes [--rounds 20] [--threads 2] [--busy 1] [--batch 16] [--only carrara onnxruntime]

One forward pass of the 6.8-million-parameter U-Net of `benchmarks.unet` (32×32), float32. The runtimes get our
network, exported once. Each contestant has a process of its own with the same number of threads, so that no thread
pool disturbs another's, and they take turns: only the medians of the paired ratios, the shortest times and, of one
thread, the processor time are claims. `--busy N` keeps N other processes computing on the first core. Contestants whose
packages are not installed are left out (`pip install onnxruntime openvino onnx onnxscript`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unet import PARAMS, SIZE, Contestant, peer
from carrara.cli import keep_freed_memory
from carrara.networks import UNet
from carrara.networks.packed import packed_weights

CLI = {"GOMP_SPINCOUNT": "1000"}
"""What the command line sets, before PyTorch is loaded."""


PAUSE = 0.2
"""Seconds before each turn, in which the threads of the contestant before go to sleep."""


class Named(nn.Module):
    """Our network with tensors alone as its inputs, for the exporter."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t)  # type: ignore[no-any-return]


def network() -> nn.Module:
    """Ours, with numbers in place of the zeros that its last convolutions start from."""
    torch.manual_seed(0)
    found = UNet(PARAMS).eval()
    with torch.no_grad():
        for weight in found.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(0, 0.02)
    return found


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, PARAMS.in_channels, SIZE, SIZE, generator=generator), torch.full((size,), 500.0)


def export(path: Path, size: int) -> None:
    torch.onnx.export(
        Named(network()), batch(size), path, dynamo=True, input_names=["x", "t"], output_names=["raw"], verbose=False
    )


# ---- the contestants, each `(x, t) -> raw` -----------------------------------------------------------------------


def ours(path: Path) -> Callable[[Tensor, Tensor], Any]:
    """As `carrara sample` computes it."""
    keep_freed_memory()
    return in_run(network())


def plain(path: Path) -> Callable[[Tensor, Tensor], Any]:
    """As a training program's own loop computes it."""
    return network()


def in_run(found: nn.Module) -> Callable[[Tensor, Tensor], Any]:
    """A network inside of a sampling run, for as long as the process lives."""
    packed_weights().__enter__()
    return found


def ours_bf16(path: Path) -> Callable[[Tensor, Tensor], Any]:
    from carrara.devices import compute_in

    keep_freed_memory()
    found = network()
    compute_in(found, "bf16", torch.device("cpu"))
    return found


def diffusers(path: Path) -> Callable[[Tensor, Tensor], Any]:
    return Contestant(peer().eval(), channels_last=False)


def onnxruntime(path: Path) -> Callable[[Tensor, Tensor], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x, t: torch.from_numpy(session.run(None, {"x": x.numpy(), "t": t.numpy()})[0])


def openvino(path: Path) -> Callable[[Tensor, Tensor], Any]:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    return lambda x, t: torch.from_numpy(request.infer({"x": x.numpy(), "t": t.numpy()})[0])


CONTESTANTS: dict[str, tuple[Callable[[Path], Callable[[Tensor, Tensor], Any]], dict[str, str]]] = {
    "carrara": (ours, CLI),
    "carrara, bf16": (ours_bf16, CLI),
    "carrara, unpacked": (plain, {}),
    "diffusers": (diffusers, {}),
    "onnxruntime": (onnxruntime, {}),
    "openvino": (openvino, {}),
}
"""Each with the environment of its process; the first is the one that claims are made for."""


# ---- taking turns ------------------------------------------------------------------------------------------------


def serve(name: str, path: Path, size: int) -> None:
    """One forward pass for each line of the input; its wall and processor seconds, in a line of the output.

    The first line of the output is the largest difference from our network in float32.
    """
    x, t = batch(size)
    with torch.no_grad():
        run = CONTESTANTS[name][0](path)
        first = run(x, t)
        print(float((first - plain(path)(x, t)).abs().max()), flush=True)
        for _ in sys.stdin:
            wall, own = time.perf_counter(), time.process_time()
            run(x, t)
            print(time.perf_counter() - wall, time.process_time() - own, flush=True)


def start(name: str, path: Path, threads: int, size: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **CONTESTANTS[name][1]}
    command = [sys.executable, "-m", "benchmarks.runtimes", "--serve", name, "--file", str(path), "--batch", str(size)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )


def answer(process: subprocess.Popen[str]) -> list[float]:
    assert process.stdout is not None
    return [float(word) for word in process.stdout.readline().split()]


def question(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Other programs on the first core."""
    code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def measure(names: list[str], path: Path, options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """[wall, processor] seconds of every round, by contestant."""
    processes = {name: start(name, path, options.threads, options.batch) for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    try:
        for name, process in processes.items():
            print(f"  {name}: largest difference from ours {answer(process)[0]:.1g}")
        with busy(options.busy):
            end = time.perf_counter() + options.seconds
            for turn in range(options.rounds + 1):
                if time.perf_counter() > end:
                    break
                first = turn % len(names)  # nobody always follows the same one
                for name in names[first:] + names[:first]:
                    time.sleep(PAUSE)
                    question(processes[name])
                    seconds = answer(processes[name])
                    if turn:  # the first round warms up
                        times[name].append(seconds)
    finally:
        for process in processes.values():
            process.kill()
    return times


def report(times: dict[str, list[list[float]]]) -> None:
    first = next(iter(times.values()))
    print(f"  {len(first)} rounds")
    print(f"  {'':20} {'wall: median':>12} {'least':>9} {'ratio (quartiles)':>24} {'CPU: median':>13} {'ratio':>7}")
    for name, values in times.items():
        wall, own = ([1000 * value[kind] for value in values] for kind in (0, 1))
        ratios = sorted(b[0] / a[0] for a, b in zip(first, values, strict=True))
        of_own = statistics.median(b[1] / a[1] for a, b in zip(first, values, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        print(
            f"  {name:20} {statistics.median(wall):9.1f} ms {min(wall):6.1f} ms "
            f"{statistics.median(ratios):8.3f} ({low:.2f} to {high:.2f}) "
            f"{statistics.median(own):10.1f} ms {of_own:7.3f}"
        )


def installed(name: str) -> bool:
    """Whether the package that a contestant is named after is there; ours is."""
    return name.startswith("carrara") or importlib.util.find_spec(name) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600.0, help="no new round starts after so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute on the first core")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--serve", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help="where the exported network is, or goes")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.file, options.batch)
        return
    names = [name for name in options.only if installed(name)]
    with tempfile.TemporaryDirectory() as folder:
        path = options.file or Path(folder) / "network.onnx"
        if {"onnxruntime", "openvino"} & set(names) and not path.exists():
            export(path, options.batch)
        print(f"torch {torch.__version__}, {options.threads} threads, batch {options.batch}, {options.rounds} rounds")
        report(measure(names, path, options))


if __name__ == "__main__":
    main()
