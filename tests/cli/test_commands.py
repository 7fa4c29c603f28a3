"""The commands as a user types them: what they print, where they write, and how they end."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command, photographs
from tests.runs import TINY

SETS = [word for assignment in TINY for word in ("--set", assignment)]


def process(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "carrara", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def test_help_answers_at_once() -> None:
    """Less than half a second of processor time, the best of three: the clock on the wall also counts what other
    tests of a busy machine are doing."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = process("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0
    for command in ("demo", "data", "train", "sample", "evaluate", "recipes"):
        assert command in result.stdout
    assert min(times) < 0.5


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; import carrara.cli.app; import carrara.errors; "
        "print([m for m in ('torch', 'numpy', 'datasets', 'pydantic', 'sklearn', 'PIL', 'yaml') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_train_sample_and_resume(tmp_path: Path, carrara: Command) -> None:
    run = tmp_path / "x"
    first = carrara("train", "digits", "--out", run, *SETS, "--set", "training.steps=5")
    assert first.returncode == 0, first.stderr
    assert "learning rate" in first.stdout
    assert str(run) in first.stdout
    more = carrara("train", "digits", "--out", run, *SETS, "--set", "training.steps=5")
    assert more.returncode == 0
    assert "resuming from the checkpoint of step 5" in more.stdout
    made = carrara(
        "sample", run, "--label", "3", "-l", "7", "--num_inference_steps", "3", "--guidance_scale", "2", "--json"
    )
    assert made.returncode == 0, made.stderr
    printed = json.loads(made.stdout)
    assert printed["labels"] == [3, 7]
    assert printed["steps"] == 3
    assert printed["guidance"] == 2.0
    assert (Path(printed["folder"]) / "samples.npz").exists()


def test_json_lines_are_machine_readable(tmp_path: Path, carrara: Command) -> None:
    result = carrara("train", "digits", "--out", tmp_path / "x", *SETS, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0]["start"]["batch"] == 16
    assert lines[-1]["step"] == 12


def test_a_folder_of_classes_trains_and_says_what_it_chose(tmp_path: Path, carrara: Command) -> None:
    photos = photographs(tmp_path / "photos", 12, classes=3)
    words = ("--set", "training.steps=2", "--set", "network.channels=8", "--set", "sampling.steps=1")
    result = carrara("train", photos, "--out", tmp_path / "run", *words)
    assert result.returncode == 0, result.stderr
    assert "resolution 16×16" in result.stdout
    assert "class-conditional: 3 classes" in result.stdout
    assert "the rest cropped at the centre" in result.stdout
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "kind: labels" in recipe
    assert carrara("sample", tmp_path / "run", "--label", "class2", "--steps", "1").returncode == 0


def test_a_plain_folder_trains_without_labels(tmp_path: Path, carrara: Command, refused: Callable[..., str]) -> None:
    photos = photographs(tmp_path / "photos", 5)
    words = ("--steps", "1", "--set", "network.channels=8", "--set", "sampling.steps=1", "--resolution", "8x16")
    result = carrara("train", photos, "--output_dir", tmp_path / "run", *words)
    assert result.returncode == 0, result.stderr
    assert "3×8×16" in result.stdout
    assert carrara("sample", tmp_path / "run", "--count", "2", "--steps", "1").returncode == 0
    assert "labels" in refused("sample", tmp_path / "run", "--label", "1")


def test_a_mistake_leaves_a_process_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    result = process("train", tmp_path / "missing")
    assert result.returncode == 2
    assert result.stderr.startswith("carrara: ")
    assert "Traceback" not in result.stderr


def test_mistakes_end_with_one_sentence_and_code_2(tmp_path: Path, tiny_run: Path, refused: Callable[..., str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    few = photographs(tmp_path / "few", 3)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    assert "missing" in refused("train", tmp_path / "missing")
    assert str(empty) in refused("train", empty)
    assert "64" in refused("train", few, "--train_batch_size", "64")
    assert "did you mean 'steps'" in refused("train", "digits", "--set", "training.step=3")
    assert "9×9" in refused("train", "digits", "--resolution", "9")
    assert "other" in refused("train", "digits", "--out", other)
    assert "'latest'" in refused("train", "digits", "--resume_from_checkpoint", "step-5")
    assert "differs in seed: 0 → 5" in refused("train", "digits", "--out", tiny_run, *SETS, "--seed", "5")
    assert "missing" in refused("sample", tmp_path / "missing")
    assert "10" in refused("sample", tiny_run, "--label", "10")
    assert "steps" in refused("sample", tiny_run, "--steps", "0")
    assert "1000" in refused("sample", tiny_run, "--steps", "1001")
    assert "magic" in refused("sample", tiny_run, "--solver", "magic")
    assert "count must be at least 1" in refused("sample", tiny_run, "--count", "0")
    assert "nothing" in refused("recipes", "nothing")


def test_recipes_are_listed_and_printed(carrara: Command) -> None:
    assert "cifar10" in carrara("recipes").stdout
    assert "learning_rate" in carrara("recipes", "digits").stdout


def test_a_killed_process_resumes_where_its_checkpoint_was(tmp_path: Path, tiny_run: Path, carrara: Command) -> None:
    """SIGKILL at a random moment of a real process, then the same command again: the bits of the undisturbed run."""
    run = tmp_path / "x"
    command = [sys.executable, "-m", "carrara", "train", "digits", "--out", str(run), *SETS, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    for line in child.stdout:
        if '"step": 8' in line:
            child.kill()
            break
    child.wait()
    assert carrara("train", "digits", "--out", run, *SETS).returncode == 0
    mine, theirs = (folder / "model" / "network.safetensors" for folder in (run, tiny_run))
    assert mine.read_bytes() == theirs.read_bytes()


def test_version(carrara: Command) -> None:
    import carrara as package

    assert carrara("--version").stdout.strip() == package.__version__


@pytest.mark.parametrize("command", ["demo", "train", "sample", "evaluate", "ema", "recipes", "data"])
def test_every_command_explains_itself(command: str, carrara: Command) -> None:
    result = carrara(command, "--help")
    assert result.returncode == 0
    assert len(result.stdout) > 200


def test_options_of_other_programs_work_and_help_shows_one_spelling(
    tmp_path: Path, carrara: Command, refused: Callable[..., str]
) -> None:
    words = ("--max_train_steps=2", "--train_batch_size", "8", "--resume_from_checkpoint", "latest")
    more = ("--mixed_precision", "fp32", "--output_dir", tmp_path / "x", "--learning_rate", "1e-3")
    sets = [word for a in TINY if not a.startswith(("training.steps", "training.batch")) for word in ("--set", a)]
    result = carrara("train", "digits", *sets, *words, *more, "--json")
    assert result.returncode == 0, result.stderr
    start = json.loads(result.stdout.splitlines()[0])["start"]
    assert (start["batch"], start["steps"], start["learning rate"]) == (8, 2, 1e-3)
    assert "train_batch_size" not in carrara("train", "--help").stdout
    assert "no_such" in carrara("train", "digits", "--no_such", "1").stderr.replace("-", "_")


@pytest.mark.parametrize(("option", "word"), [("--device", "moon"), ("--device", "cuda:99"), ("--precision", "fp8")])
def test_devices_and_precisions_that_are_not_there_are_refused(
    option: str, word: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert word in refused("train", "digits", "--out", tmp_path / "x", option, word)
    assert not (tmp_path / "x").exists()


def test_auto_trains_in_fp32_on_a_cpu(tmp_path: Path, carrara: Command) -> None:
    words = ("--device", "cpu", "--precision", "auto", "--set", "training.steps=1", "--json")
    first = carrara("train", "digits", "--out", tmp_path / "x", *SETS, *words).stdout.splitlines()[0]
    assert json.loads(first)["start"]["precision"] == "fp32"
    assert json.loads(first)["start"]["device"] == "cpu"


def test_self_tests_end_with_their_verdict(carrara: Command) -> None:
    profile = carrara("train", "digits", *SETS, "--profile", "--json")
    assert profile.returncode == 0, profile.stderr
    assert json.loads(profile.stdout)["profile"]["images_per_s"] > 0
    hopeless = carrara("train", "digits", *SETS, "--overfit-one-batch", "--learning-rate", "1e-9", "--json")
    assert hopeless.returncode == 1
    assert json.loads(hopeless.stdout)["overfit"]["passed"] is False


@pytest.mark.parametrize(
    "words",
    [
        ("import", "PLACE/x.pt", "--set", "image_size=64", "--diffusion-steps", "0"),
        ("import", "PLACE/x.pt", "--set", "image_size=64", "--diffusion_steps", "-3"),
        ("train", "digits", "--out", "PLACE/run", "--steps", "0"),
        ("data", "check", "digits", "--steps", "0"),
        ("data", "check", "digits", "--train_batch_size", "0"),
        ("sample", "PLACE", "--count", "0"),
        ("evaluate", "PLACE", "--reference", "digits", "--n", "0"),
        ("evaluate", "PLACE", "--held-out", "digits", "--held-out-n", "0"),
    ],
)
def test_a_count_of_none_is_refused_and_never_replaced(
    words: tuple[str, ...], tmp_path: Path, refused: Callable[..., str]
) -> None:
    sentence = refused(*(word.replace("PLACE", str(tmp_path)) for word in words))
    assert "1" in sentence
    assert not (tmp_path / "run").exists()


def test_contradictions_and_folders_of_other_files_are_refused(
    tmp_path: Path, tiny_run: Path, refused: Callable[..., str]
) -> None:
    both = refused("train", "digits", "--steps", "5", "--set", "training.steps=4", "--out", tmp_path / "run")
    assert "training.steps" in both
    assert "--schema" in refused("recipes", "digits", "--schema")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "holiday.png").write_bytes(b"mine")
    for more in ((), ("--overwrite",)):
        assert "photos" in refused("sample", tiny_run, "--label", "1", "--steps", "1", "--out", photos, *more)
    assert [path.name for path in photos.iterdir()] == ["holiday.png"]
