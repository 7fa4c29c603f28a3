"""`carrara evaluate`: every figure of a model or of finished samples, each with the protocol that it needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.progress import Progress

    from carrara.codecs import Codec
    from carrara.evaluation import Evaluation, Measurements, Pictures, Reference
    from carrara.evaluation.features import Features
    from carrara.evaluation.pictures import Size
    from carrara.evaluation.protocol import Judge as JudgeOf
    from carrara.evaluation.tables import Cell
    from carrara.model import DiffusionModel

Words = str | None
Number = int | None
Real = float | None

Subject = Annotated[
    Words, typer.Argument(metavar="MODEL|SAMPLES", help="A run folder, or images: a folder, npz, data set.")
]
Data = Annotated[Words, Option("--reference", help="Real images: a data set, folder, npz; or a statistics npz.")]
DataSplit = Annotated[str, Option(help="Which part of the reference.")]
Network = Annotated[
    str, Option(help="pixels, inception=FILE (FID with the 2015 weights), clip=, dinov2=, classifier=FOLDER.")
]
Checksum = Annotated[Words, Option(help="The SHA-256 of an Inception file that is not one of 2015's.")]
Count = Annotated[
    Number,
    Option("--n", "-n", help="How many samples; by default all, of a model as many as real images, 10,000 at most."),
]
Split = Annotated[str, Option(help="Which part of SAMPLES.")]
Resolution = Annotated[Words, Option(help="Bring images that are read to N or HxW.")]
Channels = Annotated[Number, Option(help="Bring images that are read to 1, 3 or 4 channels.")]
Resize = Annotated[str, Option(help="adm, bicubic, lanczos, box, nearest.")]
Train = Annotated[Words, Option(help="Training images, for memorisation.")]
TrainSplit = Annotated[str, Option(help="Which part of them.")]
HeldOut = Annotated[Words, Option("--held-out", help="Images a model never saw: their bits per dimension.")]
HeldOutSplit = Annotated[str, Option(help="Which part of them.")]
HeldOutCount = Annotated[Number, Option("--held-out-n", help="How many of them; by default all.")]
Variance = Annotated[Words, Option(help="Of the bound's reverse steps: small, large, learned.")]
Originals = Annotated[
    Words, Option(help="What SAMPLES should be, one by one; of a codec or a latent model, what is taken apart.")
]
OriginalsSplit = Annotated[str, Option(help="Which part of them.")]
Lpips = Annotated[Words, Option(help="Weights of LPIPS on VGG-16, a local file, for --originals.")]
LpipsChecksum = Annotated[Words, Option(help="The SHA-256 that file must have.")]
Captions = Annotated[
    Path | None, Option(help="Lines that say what each of SAMPLES shows, for clip features; a data set has its own.")
]
Judge = Annotated[
    Words, Option(help="Reads the samples' classes: svc learns the reference's; or a trained classifier.")
]
PerClass = Annotated[bool, Option("--per-class", help="The figures of each class, too.")]
Classes = Annotated[
    Words,
    Option(help="Of samples: in turn, or in the shares of the reference, the default where it tells them."),
]
Steps = Annotated[Number, Option("--steps", "--num_inference_steps", help="Solver steps.")]
SolverWord = Annotated[Words, Option("--solver", help="ddpm, ddim, dpm++2m, …")]
Guidance = Annotated[Real, Option("--guidance", "--guidance_scale", help="1: none.")]
Leader = Annotated[Words, Option("--classifier", help="A noisy classifier's run or folder, to lead to the classes.")]
LeaderScale = Annotated[Real, Option("--classifier-scale", "--classifier_scale", help="Its scale; 1 unless said.")]
Eta = Annotated[Real, Option(help="DDIM's η, 0..1.")]
Spacing = Annotated[Words, Option(help="trailing, leading, linspace, …")]
Seed = Annotated[int, Option(help="Of the samples.")]
BatchSize = Annotated[int, Option("--batch-size", help="Samples made at once.", min=1)]
Device = Annotated[str, Option(help="cpu, cuda, …")]
Compare = Annotated[
    tuple[Path, Path] | None, Option("--compare", metavar="A.json B.json", help="Two --out files, nothing else.")
]
Varied = Annotated[list[str] | None, Option(help="What --compare may find different, e.g. sampling.steps. Repeatable.")]
TableWord = Annotated[Words, Option(help="ddim, guidance or solvers: the model in many ways, into the folder --out.")]
ReportFile = Annotated[
    Path | None, Option("--report", help="Write one HTML page: samples, neighbours, classes, curves, tables.")
]
Tables = Annotated[list[Path] | None, Option(help="A folder that --table filled, for --report. Repeatable.")]
Out = Annotated[Path | None, Option("--out", help="Write figures and protocols as JSON; of --table, the folder.")]
Json = Annotated[bool, Option("--json", help="Print them as JSON.")]


@dataclass(frozen=True)
class Options:
    """What the user typed, by the names of `evaluate`."""

    subject: str | None
    reference: str | None
    reference_split: str
    features: str
    checksum: str | None
    n: int | None
    split: str
    resolution: str | None
    channels: int | None
    resize: str
    train: str | None
    train_split: str
    held_out: str | None
    held_out_split: str
    held_out_n: int | None
    variance: str | None
    originals: str | None
    originals_split: str
    lpips: str | None
    lpips_checksum: str | None
    captions: Path | None
    judge: str | None
    per_class: bool
    classes: str | None
    steps: int | None
    solver: str | None
    guidance: float | None
    classifier: str | None
    classifier_scale: float | None
    eta: float | None
    spacing: str | None
    seed: int
    batch_size: int
    device: str
    comparison: tuple[Path, Path] | None
    varied: list[str] | None
    table: str | None
    report: Path | None
    tables: list[Path] | None
    out: Path | None
    json_output: bool

    @property
    def sampling(self) -> dict[str, Any]:
        """What `DiffusionModel.sample` is told."""
        names = ("steps", "solver", "guidance", "eta", "spacing", "seed")
        scale = {} if self.classifier_scale is None else {"classifier_scale": self.classifier_scale}
        return {name: getattr(self, name) for name in names} | scale

    @property
    def size(self) -> Size:
        """To what images that are read are brought."""
        from carrara.cli.data import parse_resolution
        from carrara.evaluation.pictures import Size

        resolution = None if self.resolution is None else parse_resolution(self.resolution)
        return Size(resolution, self.channels, self.resize)


def evaluate(
    context: typer.Context,
    subject: Subject = None,
    reference: Data = None,
    reference_split: DataSplit = "train",
    features: Network = "pixels",
    checksum: Checksum = None,
    n: Count = None,
    split: Split = "train",
    resolution: Resolution = None,
    channels: Channels = None,
    resize: Resize = "adm",
    train: Train = None,
    train_split: TrainSplit = "train",
    held_out: HeldOut = None,
    held_out_split: HeldOutSplit = "test",
    held_out_n: HeldOutCount = None,
    variance: Variance = None,
    originals: Originals = None,
    originals_split: OriginalsSplit = "train",
    lpips: Lpips = None,
    lpips_checksum: LpipsChecksum = None,
    captions: Captions = None,
    judge: Judge = None,
    per_class: PerClass = False,
    classes: Classes = None,
    steps: Steps = None,
    solver: SolverWord = None,
    guidance: Guidance = None,
    classifier: Leader = None,
    classifier_scale: LeaderScale = None,
    eta: Eta = None,
    spacing: Spacing = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = "cpu",
    comparison: Compare = None,
    varied: Varied = None,
    table: TableWord = None,
    report: ReportFile = None,
    tables: Tables = None,
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Measure a model or finished samples; or compare two results if their protocols agree.

    `torchrun` shares the work among several processes; the figures stay the same.
    """
    given = {name for name in context.params if _typed(context, name)}
    run(Options(**context.params), given)


def run(options: Options, given: set[str]) -> None:
    """What the command does.

    Args:
        given: the names of the options that were typed.
    """
    from carrara import distributed
    from carrara.cli import evaluate_show
    from carrara.cli.evaluate_refusals import refuse

    refuse(options, given)
    if options.comparison is not None:
        evaluate_show.comparison(options.comparison, options.varied or [], options.json_output)
        return
    first = distributed.start().first
    with evaluate_show.bar(quiet=options.json_output or not first) as shown:
        work = Work(options, shown)
        if options.table is not None:
            work.table()
        figures = work.figures() if options.table is None else {}
    if first and figures:
        evaluate_show.figures(figures, options.out, options.json_output)
    distributed.finish()


def _typed(context: typer.Context, name: str) -> bool:
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


class Work:
    """What the options ask for, opened and measured; the bar shows how far it is."""

    def __init__(self, options: Options, bar: Progress) -> None:
        from carrara import codecs
        from carrara.classifier import Classifier
        from carrara.cli.evaluate_refusals import codec_folder, is_model
        from carrara.evaluation.features import open_features
        from carrara.model import DiffusionModel

        self.options, self.bar = options, bar
        assert options.subject is not None  # refused before
        self.subject: str = options.subject
        self.model: DiffusionModel | None = None
        self.codec: Codec | None = None
        if (folder := codec_folder(self.subject)) is not None:
            self.codec = codecs.load(folder, options.device)
        elif is_model(self.subject):
            self.model = DiffusionModel.load(self.subject, options.device)
            self.codec = self.model.codec
        self.judge = self._judge(options.judge)
        self.leader = None if options.classifier is None else Classifier.load(options.classifier, options.device)
        self.features: Features = open_features(options.features, options.device, checksum=options.checksum)
        self.real: Reference | None = None
        self.known: Reference | None = None
        if options.reference is not None:
            self.real = self._reference(options.reference)
            self.known = None if options.train is None else self._training(options.train)

    # ---- what is done ----------------------------------------------------------------------------------------

    def figures(self) -> Measurements:
        """Every figure that was asked for; the report, too, where it was."""
        from carrara.cli.evaluate_show import write_report

        options = self.options
        figures: Measurements = {}
        found: Evaluation | None = None
        if self.real is not None:
            found = self._measured(self._samples(self.real))
            figures |= found.figures
        if options.held_out is not None:
            figures |= self._held_out(options.held_out)
        if options.originals is not None:
            figures |= self._reconstruction(options.originals)
        if options.report is not None and found is not None and self.real is not None:
            everything = replace(found, figures=figures)
            write_report(options.report, self.subject, everything, self.real, self.known, options.tables or [])
        return figures

    def table(self) -> None:
        """The model measured in every way of the table, each cell kept in `--out` as soon as it is known."""
        from carrara.cli.evaluate_show import write_table
        from carrara.evaluation import tables
        from carrara.evaluation.features.checksum import tensors_checksum

        options, model, real = self.options, self.model, self.real
        assert model is not None  # all three refused before
        assert real is not None
        assert options.table is not None
        assert options.out is not None
        count = samples_wanted(options.n, real)
        free = options.sampling.keys() - tables.TABLES[options.table]
        typed = {name: options.sampling[name] for name in sorted(free) if options.sampling[name] is not None}
        own = {**tables.DEFAULTS.get(options.table, {}), **typed}
        shares = self._shares(model, real)
        about = {"model": tensors_checksum(model.network.state_dict()), "n": count, **own, **self._protocol(real)}
        about["classes"] = "turn" if shares is None else "reference"
        if self.leader is not None:
            about["classifier"] = tensors_checksum(self.leader.network.state_dict())
        null = any(c.dropout > 0 for c in model.conditioners)
        plan = tables.cells(options.table, model.schedule, self.leader is not None, null)

        def measure(cell: Cell) -> Evaluation:
            return self._measured(self._drawn(model, cell.stem, count, shares, {**own, **cell.choices}))

        filled = tables.fill(options.out, options.table, plan, about, measure)
        write_table(filled, self.bar.console)

    def _protocol(self, real: Reference) -> dict[str, str | bool | None]:
        """What decides the figures besides the samples."""
        from carrara.evaluation.protocol import features_of

        known = None if self.known is None else self.known.content
        judge = self.options.judge
        return features_of(self.features) | {"reference": real.content, "train": known, "judge": judge}

    def _measured(self, samples: Pictures) -> Evaluation:
        from carrara.evaluation.protocol import evaluate as measure

        assert self.real is not None
        progress = self._progress("samples", samples.count)
        return measure(samples, self.real, self.features, self.known, self.judge, self.options.per_class, progress)

    def _judge(self, word: str | None) -> JudgeOf | None:
        """An SVC, or the classifier in a folder."""
        from carrara.classifier import Classifier

        if word is None or word == "svc":
            return word  # type: ignore[return-value]
        return Classifier.load(word, self.options.device)

    def _held_out(self, path: str) -> Measurements:
        from carrara.evaluation.held_out import measure_held_out
        from carrara.evaluation.pictures import data_pictures

        options, model = self.options, self.model
        assert model is not None  # refused before
        pictures = data_pictures(
            path, options.held_out_split, options.held_out_n, options.size, options.batch_size, rounded=False
        )
        progress = self._progress("held-out images", pictures.count)
        variance: Any = options.variance
        return measure_held_out(model, pictures, variance=variance, seed=options.seed, progress=progress)

    def _reconstruction(self, path: str) -> Measurements:
        from carrara.codecs import LearnedCodec
        from carrara.codecs.perceptual import LPIPS
        from carrara.errors import UserError
        from carrara.evaluation.features.checksum import file_checksum
        from carrara.evaluation.latents import measure_latents
        from carrara.evaluation.pictures import data_pictures, decoded_pictures
        from carrara.evaluation.protocol import reconstruction

        options = self.options
        perceptual, checksum = None, ""
        if options.lpips is not None:
            perceptual = LPIPS.load(options.lpips, options.lpips_checksum)
            checksum = file_checksum(options.lpips)
        originals = data_pictures(path, options.originals_split, options.n, options.size)
        if self.codec is not None and self.codec.bounded:
            raise UserError(f"{self.subject} works on the pixels themselves: it has no codec to take images apart.")
        if self.codec is None:
            pictures = data_pictures(self.subject, options.split, options.n, options.size)
        else:
            pictures = decoded_pictures(self.codec, originals, self.subject, options.device)
        progress = self._progress("pairs", originals.count)
        figures = reconstruction(pictures, originals, perceptual, checksum, progress)
        if isinstance(self.codec, LearnedCodec):
            figures |= measure_latents(self.codec, originals, figures["psnr"].stamp, options.device)
        return figures

    # ---- what is opened --------------------------------------------------------------------------------------

    def _reference(self, path: str) -> Reference:
        """What the samples are measured against, read."""
        from carrara.evaluation import protocol
        from carrara.evaluation.pictures import data_pictures

        statistics = protocol.holds_statistics(path)
        if statistics and not protocol.holds_images(path):
            found = protocol.statistics_reference(path, self.features)
        else:
            pictures = data_pictures(path, self.options.reference_split, size=self.options.size)
            progress = self._progress("reference", pictures.count)
            if statistics:
                found = protocol.statistics_reference(path, self.features, pictures, progress)
            else:
                found = protocol.collected_reference(pictures, self.features, progress=progress)
        for notice in found.notices:
            self.bar.console.print(notice, highlight=False, markup=False)
        return found

    def _training(self, path: str) -> Reference:
        """The training images, every one of them kept: a copy may be of any."""
        from carrara.evaluation.pictures import data_pictures
        from carrara.evaluation.protocol import collected_reference

        pictures = data_pictures(path, self.options.train_split, size=self.options.size)
        progress = self._progress("training images", pictures.count)
        return collected_reference(pictures, self.features, pictures.count, progress)

    def _samples(self, real: Reference) -> Pictures:
        """A model's samples, by default as many as there are real images (10,000 at most), what a codec leaves of the
        originals, or finished ones."""
        from carrara.cli.evaluate_refusals import lines_for
        from carrara.evaluation.pictures import data_pictures, decoded_pictures

        options = self.options
        if self.model is None and self.codec is not None:
            assert options.originals is not None  # refused before
            originals = data_pictures(options.originals, options.originals_split, options.n, options.size)
            found = decoded_pictures(self.codec, originals, self.subject, options.device)
        elif self.model is None:
            found = data_pictures(self.subject, options.split, options.n, options.size)
        else:
            count = samples_wanted(options.n, real)
            found = self._drawn(self.model, self.subject, count, self._shares(self.model, real), options.sampling)
        if options.captions is not None:
            found = replace(found, captions=lines_for(found, options.captions))
        return found

    def _drawn(
        self, model: DiffusionModel, name: str, count: int, shares: Mapping[str, int] | None, choices: dict[str, Any]
    ) -> Pictures:
        """Samples of the model, led by the classifier where there is one."""
        from carrara.evaluation.pictures import model_pictures

        batch = self.options.batch_size
        return model_pictures(model, name, count, batch, classifier=self.leader, shares=shares, **choices)

    def _shares(self, model: DiffusionModel, real: Reference) -> Mapping[str, int] | None:
        """How many pictures of each class the reference holds, for samples to take the classes in these shares; None
        takes them in turn.

        Raises:
            UserError: the shares were asked for, and the reference tells no classes.
        """
        from carrara.errors import UserError

        asked = self.options.classes
        labels = None if real.pictures is None else real.pictures.labels
        if asked == "reference" and labels is None:
            raise UserError(f"--classes reference: {real.name} tells no classes; say --classes turn.")
        if asked == "turn" or labels is None:
            return None
        shares = Counter(labels)
        return shares if asked == "reference" or shares.keys() <= set(model.class_names(self.leader) or ()) else None

    def _progress(self, what: str, total: int) -> Callable[[int], None]:
        task = self.bar.add_task(what, total=total, note="")
        return lambda count: self.bar.advance(task, count)


def samples_wanted(n: int | None, reference: Reference) -> int:
    """How many samples a model makes: `n`, or as many as there are real images, 10,000 at most."""
    from carrara.evaluation.collect import ROWS

    return min(reference.count or ROWS, ROWS) if n is None else n
