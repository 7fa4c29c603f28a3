"""What piped output shows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from carrara.app.events import Event, Metrics, Notice, Saved, StepDone
from carrara.cli import console


def silent_work() -> Iterator[Event]:
    yield StepDone("measuring [/b]", 3, 10, "t = 0.5")
    time.sleep(0.4)  # nothing is reported meanwhile
    yield Metrics("all", {"a": 1})


@pytest.mark.parametrize("quiet", [False, True])
def test_piped_output_repeats_itself_while_nothing_moves(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "HEARTBEAT", 0.1)
    assert [type(event) for event in console.show(silent_work(), quiet)] == [Metrics]
    out, err = capsys.readouterr()
    lines = (err if quiet else out).splitlines()
    assert len(lines) >= 2
    assert all("measuring [/b]: 3 of 10  t = 0.5" in line for line in lines)
    assert not quiet or out == ""


def test_a_users_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("[/INST]", "runs/[v2]", "[bold]x", ":smile:", "x" * 300)
    list(console.show(iter([Notice(name) for name in names])))
    for name in names:
        console.console.print(name)
        console.console.print(console.table({name: name}))
    shown = capsys.readouterr().out
    for name in names[:-1]:
        assert shown.count(name) == 4
    assert names[-1] in shown


def test_events_are_plain_data(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for event in (Notice("a"), StepDone("b", 1, 2), Metrics("c", {"d": 1}), Saved("e", tmp_path, {"f": [1]})):
        assert json.loads(json.dumps(event.as_json()))["event"] in ("notice", "step", "metrics", "saved")


def test_work_of_one_step_is_shown_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "HEARTBEAT", 0.1)

    def events() -> Iterator[Event]:
        yield StepDone("importing", 0, 0)
        time.sleep(0.3)

    assert list(console.show(events())) == []
    assert "importing: …" in capsys.readouterr().out


def test_every_command_that_runs_a_network_reports_while_it_works() -> None:
    folder = Path(console.__file__).parent
    for name in ("demo", "train", "sample", "evaluate", "ema", "data", "data_encode", "convert"):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert "show(" in text, name


def test_the_result_goes_to_stdout_though_the_bar_is_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`carrara evaluate … --json > file`, with stderr left on the terminal."""
    monkeypatch.setattr(console, "errors", Console(stderr=True, force_terminal=True))
    events: list[Event] = [StepDone("sampling", 1, 2), Metrics("all", {"a": 1})]
    for event in console.show(events, quiet=True):
        assert isinstance(event, Metrics)
        print(json.dumps(event.values))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert "sampling" in err
