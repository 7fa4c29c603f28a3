"""Models of other programs, in (`import`) and out (`export`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from carrara.app.events import Event, Metrics, Saved, StepDone
from carrara.app.request import Request, check_file, check_folder


class ImportRequest(Request):
    """What to import, and what its contents do not specify; see `carrara.convert.Hints`.

    Attributes:
        path: a weight file, or a folder of diffusers.
        out: the folder to write; None is PATH without its ending, of a folder PATH-carrara.
        name: which published model it is; None finds it by its shapes.
        arguments: `key=value` assignments to the arguments of the original constructor.
        config: the original's YAML config; None is the one next to PATH, if there is one.
        schedule, diffusion_steps, rescaled_time: the process of a guided-diffusion model described by `arguments`.
        last_weights: take the last weights, not their running mean.
        check: an `.npz` of the original's inputs and outputs to compare with.
    """

    path: Path
    out: Path | None = None
    name: str | None = None
    arguments: tuple[str, ...] = ()
    config: Path | None = None
    schedule: str | None = None
    diffusion_steps: int | None = Field(None, ge=1)
    rescaled_time: bool = False
    last_weights: bool = False
    check: Path | None = None


class ExportRequest(Request):
    """What to export, and how.

    Attributes:
        model: a run, or a model, classifier or codec folder.
        out: the file to write, or without an ending the folder.
        layout: one of `carrara.convert.LAYOUTS`; None is the natural one of the model and of `out`.
    """

    model: Path
    out: Path
    layout: str | None = None


def import_(request: ImportRequest) -> Iterator[Event]:
    """Turn a model of another program into a model, classifier or codec folder.

    Yields:
        the step, `Metrics` "check" where outputs are compared, and the `Saved` "model" with the report.

    Raises:
        UserError: the folder exists, or the checkpoint cannot be read, fits no layout or leaves something open.
    """
    from carrara.convert import Hints, check_outputs, import_model, refuse_taken
    from carrara.recipe import override

    path = request.path.resolve()
    default = path.with_name(f"{path.name}-carrara") if path.is_dir() else request.path.with_suffix("")
    folder = request.out or default
    refuse_taken(folder)  # before a large checkpoint is read
    check_folder(folder, "out")
    names = Hints.__dataclass_fields__.keys() - {"arguments"}
    hints = Hints(arguments=override({}, request.arguments), **{name: getattr(request, name) for name in names})
    yield StepDone("importing", 0, 0)
    imported = import_model(request.path, hints)
    report = imported.report
    if request.check is not None:
        report = {**report, "check": check_outputs(imported.model, request.check)}
        yield Metrics("check", report["check"])
    imported.save(folder)
    yield Saved("model", folder, report)


def export(request: ExportRequest) -> Iterator[Event]:
    """Write a model, classifier or codec as another program reads it, with the config that the program needs.

    Raises:
        UserError: there is no model, no layout can hold it, or a file would be overwritten.
    """
    from carrara.convert import export_model, load

    check_file(request.out, "out") if request.out.suffix else check_folder(request.out, "out")
    yield StepDone("exporting", 0, 0)
    yield Saved("export", request.out, export_model(load(request.model), request.out, request.layout))
