"""Noise schedules, which of their levels training visits, and how much each counts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from carrara.recipe.section import OneOf, Section


class ScheduleSection(Section):
    """A noise schedule (`carrara.process.schedules`)."""

    kind: str

    def spec(self) -> dict[str, Any]:
        """The plain data from which `schedules.build` makes the schedule."""
        return self.model_dump()


class Table(ScheduleSection):
    """A schedule of whole times, t = 1..steps.

    Attributes:
        steps: T, the number of noise levels.
        zero_terminal_snr: shift and scale it so that nothing of the image is left at T (Lin et al. 2023).
    """

    steps: int = Field(1000, ge=2)
    zero_terminal_snr: bool = False

    def spec(self) -> dict[str, Any]:
        spec = self.model_dump(exclude={"zero_terminal_snr"})
        return {"kind": "zero_terminal_snr", "schedule": spec} if self.zero_terminal_snr else spec


class Linear(Table):
    """β from 1e-4 to 0.02, scaled by 1000/T (Ho et al. 2020, §4); at least 21 steps."""

    kind: Literal["linear"]


class ScaledLinear(Table):
    """β linear in its square root (latent diffusion, Stable Diffusion).

    Attributes:
        beta_start: β_1, in (0, 1).
        beta_end: β_T, above `beta_start` and below 1.
    """

    kind: Literal["scaled_linear"]
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)


class Cosine(Table):
    """ᾱ falls along a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""

    kind: Literal["cosine"] = "cosine"


class Sigmoid(Table):
    """ᾱ falls along a sigmoid (Jabri et al. 2022, algorithm 1).

    Attributes:
        start: where on the sigmoid it begins.
        end: where on the sigmoid it ends, above `start`.
        tau: temperature τ of the sigmoid.
    """

    kind: Literal["sigmoid"]
    start: float = -3.0
    end: float = 3.0
    tau: float = Field(1.0, gt=0)


class EDM(ScheduleSection):
    """Time is σ itself (Karras et al. 2022, table 1).

    Attributes:
        sigma_min: smallest σ of a network's evaluation.
        sigma_max: largest σ, above `sigma_min`.
    """

    kind: Literal["edm"]
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)


class Flow(ScheduleSection):
    """The straight path from noise to image (Liu et al. 2022).

    Attributes:
        shift: time shift k (Esser et al. 2024, §5.3.2); 1 is none.
    """

    kind: Literal["rectified_flow"]
    shift: float = Field(1.0, gt=0)


class VP(ScheduleSection):
    """The continuous variance-preserving schedule (Song et al. 2021, eq. 33).

    Attributes:
        beta_min: β at t = 0.
        beta_max: β at t = 1, above `beta_min`.
    """

    kind: Literal["vp_sde"]
    beta_min: float = Field(0.1, gt=0)
    beta_max: float = Field(20.0, gt=0)


AnySchedule = Cosine | Linear | ScaledLinear | Sigmoid | EDM | Flow | VP
Schedule = Annotated[AnySchedule, OneOf.of(AnySchedule)]


class Times(Section):
    """Which noise levels are visited (`carrara.objectives.times`)."""

    kind: str


class Uniform(Times):
    """All alike."""

    kind: Literal["uniform"] = "uniform"


class LogitNormal(Times):
    """More of the middle (Esser et al. 2024, eq. 19).

    Attributes:
        mean: of ln(u/(1 - u)), u = t/final_time.
        std: its standard deviation.
    """

    kind: Literal["logit_normal"]
    mean: float = 0.0
    std: float = Field(1.0, gt=0)


class LogNormal(Times):
    """ln σ is normal (Karras et al. 2022, table 1).

    Attributes:
        mean: of ln σ.
        std: its standard deviation.
    """

    kind: Literal["log_normal"]
    mean: float = -1.2
    std: float = Field(1.2, gt=0)


class LossAware(Times):
    """Levels of large losses more often (Nichol & Dhariwal 2021, §3.3).

    Attributes:
        history: losses that each level remembers.
        uniform: fraction of the visits that is distributed evenly.
    """

    kind: Literal["loss_aware"]
    history: int = Field(10, ge=1)
    uniform: float = Field(0.001, gt=0, le=1)


class Clean(Times):
    """No noise at all: for a classifier that evaluates samples."""

    kind: Literal["clean"]


NoisyTimes = Uniform | LogitNormal | LogNormal | LossAware
AnyTimes = NoisyTimes | Clean


class Weight(Section):
    """How much each noise level counts (`carrara.objectives.Weight`).

    Attributes:
        kind: "uniform" (L_simple), "min_snr", "p2" or "edm".
        gamma: γ of min_snr.
        floor: no level weighs less.
    """

    kind: Literal["uniform", "min_snr", "p2", "edm"] = "uniform"
    gamma: float = Field(5.0, gt=0)
    floor: float = Field(0.0, ge=0)


class ClassifierObjective(Section):
    """What a classifier's cross-entropy is taken at.

    Attributes:
        times: which noise levels are visited; "clean" is no noise at all.
    """

    times: Annotated[AnyTimes, OneOf.of(AnyTimes)] = Uniform()


class Objective(Section):
    """What is minimised.

    Attributes:
        predicts: what the network predicts: "eps", "x0", "v", "flow" or "edm".
        sigma_data: standard deviation of the data that "edm" presumes.
        loss: "simple", the weighted squared error; "vlb", the variational bound; "hybrid", the first plus
            `vlb_weight` times the second, for a network with `network.learned_variance`.
        vlb_weight: factor of the variational bound in the hybrid loss.
        weight: how much each noise level counts.
        times: which noise levels are visited.
    """

    predicts: Literal["eps", "x0", "v", "flow", "edm"] = "eps"
    sigma_data: float = Field(0.5, gt=0)
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    vlb_weight: float = Field(1e-3, gt=0)
    weight: Weight = Weight()
    times: Annotated[NoisyTimes, OneOf.of(NoisyTimes)] = Uniform()
