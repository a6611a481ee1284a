"""InstaFlow: reflow, then distillation of the straightened flow into one step (Liu et al., 2023)."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.core.warm_start import start_from
from limbeck.data.pairs import pair_noise, teacher_condition
from limbeck.diffusion.consistency import pseudo_huber
from limbeck.diffusion.decoding import decoder_of
from limbeck.diffusion.denoiser import Condition, Process, Sampling, process_of, usual_time_scale
from limbeck.diffusion.pairs import PairBank, PairSampling, PairSolver, endpoints
from limbeck.diffusion.parameterisations import Direct
from limbeck.diffusion.ports import is_own
from limbeck.diffusion.rectified import TauMode, draw_taus, flow_errors, interpolate, transport_cost
from limbeck.diffusion.schedules import FlowMatching
from limbeck.diffusion.stacked import Stacked
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod, without_condition
from limbeck.methods.trajectory.perceptual import lpips

Distance = Literal["l2", "pseudo-huber", "lpips", "lpips+l2"]


@register
class InstaFlow(DiffusionMethod):
    r"""A student learns straight paths between each noise and what its teacher makes of it, and then their first step.

    .. math::
        X_1 = \mathrm{ODE}[v_{\text{teacher}}](X_0 \mid c), \quad X_\tau = \tau X_1 + (1 - \tau) X_0, \\
        L_{\text{reflow}} = \mathbb{E}_{X_0, c, \tau}\, \bigl\| X_1 - X_0 - v_\theta(X_\tau, \tau \mid c) \bigr\|^2,
        \quad L_{\text{distil}} = \mathbb{E}_{X_0, c}\, D\bigl( X_0 + v_\theta(X_0, 0 \mid c),\; X_1 \bigr)

    One stage is one phase: `reflow` with a diffusion teacher makes 2-rectified flow, again with its own result as
    teacher 3-rectified flow, and so on; `distil` with the last flow as teacher makes the one-step generator. The
    student may be a diffusion model's network: its head is trained anew for the velocity. Pairs are a function of the
    run's seed and the item, made when it first comes by; data that bring their own `noise` (see `limbeck.data.pairs`)
    are pairs already. A stacked student (`limbeck.diffusion.stacked`) starts with the teacher's weights in both halves.

    tau counts from noise to data; the student's process is flow matching's with t = 1 - tau and velocity -v, as
    diffusers' FlowMatchEuler has it. Fine-tunes of the diffusion model carry over to its rectified flow by
    `limbeck.models.weight_transfer.merged_delta`. LPIPS looks at images: note a latent model's decoder with
    `limbeck.diffusion.decoding.note_decoder`. The paper's learning rates and batch sizes are not known to us.
    """

    card = Card(
        slug="instaflow",
        title="InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
        arxiv="2309.06380",
        year=2023,
        family="trajectory",
        task="generation",
        needs=("teacher", "student"),
        use="One-step generators by way of straight flows, and reflow or pair distillation in general.",
        tiny={"solver_steps": 4, "initialise": "none", "pairs_per_item": 2},
    )

    class Options(OptionsBase):
        """Phase, pairs and loss; what is absent is the phase's own."""

        phase: Literal["reflow", "distil"] = Field(
            "reflow", description="straighten the teacher, or learn its endpoint"
        )
        times: Literal["uniform", "t0"] | Annotated[int, Field(ge=1, le=1000)] | None = Field(
            None, description="tau that are trained: all (reflow), the first (distil), or the starts of k steps"
        )
        eps: float | None = Field(None, ge=0, le=0.5, description="the smallest tau; 0.001 in reflow, 0 in distil")
        distance: Distance = Field("l2", description="of velocities; lpips is of endpoints, for times t0")
        later_distance: Distance | None = Field(
            None, description="distance of the second part of training; lpips in the paper's distillation"
        )
        later_from: float = Field(0.5, ge=0, le=1, description="share of the steps after which it is taken")
        reduction: Literal["mean", "half-sum"] = Field("mean", description="of an item's squared errors, in l2")
        huber_c: float | None = Field(
            None, gt=0, le=1000, description="c of the pseudo-Huber distance; 0.00054 sqrt(numbers an item) if absent"
        )
        lpips_network: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="whose features LPIPS compares")
        solver: PairSolver | None = Field(
            None, description="makes pairs: euler of flows, dpmpp_2m of other teachers; rk45 is adaptive"
        )
        solver_steps: int = Field(25, ge=1, le=10000, description="of that solver")
        guidance: float | None = Field(
            None,
            ge=0,
            le=100,
            description="scale g of the pairs: 6 in reflow, 1.5 in distil; 1 of teachers that need their condition",
        )
        tolerance: float = Field(1e-5, gt=0, le=0.1, description="of rk45, absolute and relative")
        compat: bool = Field(False, description="make pairs by the authors' Euler: steps of 1/N over a span of 1 - eps")
        pairs: Literal["kept", "fresh"] = Field(
            "kept", description="one fixed set of pairs, kept in memory; or new noise at each step"
        )
        pairs_per_item: int = Field(1, ge=1, le=100_000, description="noises that are paired with each item, if kept")
        condition_dropout: float = Field(
            0.1, ge=0, le=1, description="share of items that reflow trains without their condition"
        )
        initialise: Literal["teacher", "none"] = Field("teacher", description="where the student's weights come from")
        sampling_steps: int | None = Field(
            None, ge=1, le=10000, description="of the student; 25 after reflow, 1 after distil, k where times is k"
        )

        @model_validator(mode="after")
        def _of_endpoints(self) -> "InstaFlow.Options":
            perceptual = any("lpips" in (one or "") for one in (self.distance, self.later_distance))
            if perceptual and self.trained_times() not in ("t0", 1):
                raise ValueError("lpips compares endpoints: it goes with times: t0")
            return self

        def trained_times(self) -> TauMode:
            """The tau that are trained, in this phase."""
            return self.times or ("uniform" if self.phase == "reflow" else "t0")

        def least_tau(self) -> float:
            """The smallest tau, in this phase."""
            return self.eps if self.eps is not None else (1e-3 if self.phase == "reflow" else 0.0)

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        super().__init__(options, student=student, teacher=teacher, data=data)
        self.bank: PairBank | None = None
        if "noise" not in data.example and self.options.pairs == "kept":
            if "index" not in data.example:
                raise IncompatibleError("the data do not number their items", "add the tensor index, or pairs: fresh")
            self.bank = PairBank(data.items * self.options.pairs_per_item, data.example["image"])
        if self.options.initialise == "teacher":
            for network in (student.first, student.second) if isinstance(student, Stacked) else (student,):
                start_from(network, self._teacher_model())

    def student_process(self, own: Process | None) -> Process:
        options, schedule = self.options, FlowMatching()
        student = self.student
        scale = student.time_scale if isinstance(student, Stacked) else usual_time_scale(student, schedule)
        if own is not None and isinstance(own.schedule, FlowMatching) and isinstance(own.parameterisation, Direct):
            scale = own.parameterisation.time_scale
        known = own or process_of(self._teacher_model())
        null = known.null_label if known is not None else None
        if null is None and is_own(student):
            null = self.data.classes or None
        times = options.trained_times()
        steps = options.sampling_steps or (times if isinstance(times, int) else 25 if times == "uniform" else 1)
        # The network is asked where it was trained: from t = 1 - eps down, and the last step ends in clean data.
        grid = torch.linspace(1 - options.least_tau(), 0, steps + 1, dtype=torch.float64)
        guided = own is not None and own.guidance_input
        sampling = Sampling("euler", steps, self._usual_guidance() if guided else 1.0, tuple(map(float, grid)))
        return Process(schedule, Direct("velocity", scale), sampling, null, guided)

    def step(self, batch: Batch) -> Iterator[Update]:
        _, condition = self.read(batch)
        noise, data = self.couple(batch)
        draws, options = self.draws(batch), self.options
        if options.phase == "reflow":
            condition = without_condition(
                self.denoiser, condition, options.condition_dropout, draws.uniform("condition")
            )
        if self.denoiser.guidance_input:
            condition = {**condition, "guidance": noise.new_full((batch.size,), self.denoiser.sampling.guidance)}
        tau = draw_taus(options.trained_times(), draws.uniform("time"), options.least_tau())
        x_tau = interpolate(noise, data, tau)
        velocity = -self.denoiser(x_tau, 1 - tau, condition).velocity
        loss = self.errors(velocity, noise, data).mean()
        yield Update("student", loss, batch.size, {"transport_cost": transport_cost(noise, data)})

    def couple(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(X0, X1), each (items, ...): the pairs of a batch, made where they are not known yet."""
        if "noise" in batch:
            return batch["noise"], batch["image"]
        draws, image = self.draws(batch), batch["image"]
        if self.bank is None:
            noise = draws.normal("noise", image)
            return noise, self._endpoints(batch, noise)
        per_item = self.options.pairs_per_item
        pairs = batch["index"] * per_item + draws.integers("pair", per_item)
        noise = pair_noise(self.clock.run_seed, pairs, image)
        rows = self.bank.missing(pairs)
        if len(rows):
            self.bank.store(pairs[rows], self._endpoints(batch.select(rows), noise[rows]))
        return noise, self.bank.recall(pairs)

    def errors(self, velocity: Tensor, noise: Tensor, data: Tensor) -> Tensor:
        """Distance (items,) of the velocity, or of where it leads in one step, from what it should be."""
        options = self.options
        later = options.later_distance is not None and self.clock.progress >= options.later_from
        distance = options.later_distance if later else options.distance
        if distance == "l2":
            return flow_errors(velocity, noise, data, options.reduction)
        if distance == "pseudo-huber":
            return pseudo_huber(velocity, data - noise, options.huber_c)
        decode = decoder_of(self.student, getattr(self.teacher, "model", None))
        far = lpips(decode(noise + velocity), decode(data), options.lpips_network)
        return far + flow_errors(velocity, noise, data, options.reduction) if distance == "lpips+l2" else far

    def _endpoints(self, batch: Batch, noise: Tensor) -> Tensor:
        teacher, options = self.teacher_denoiser, self.options
        usual: PairSolver = "euler" if isinstance(teacher.schedule, FlowMatching) else "dpmpp_2m"
        condition = teacher_condition(batch, teacher, self.data.classes)
        how = PairSampling(
            solver=options.solver or usual,
            steps=options.solver_steps,
            guidance=self._guidance(condition),
            eps=options.eps if options.eps is not None else 1e-3,
            compat=options.compat,
            tolerance=options.tolerance,
        )
        return endpoints(teacher, noise, condition, how).to(noise.dtype)

    def _guidance(self, condition: Condition) -> float:
        """The scale g of pairs under a condition."""
        if self.options.guidance is not None:
            return self.options.guidance
        try:
            self.teacher_denoiser.null(condition)
        except ValueError:
            return 1.0
        return 6.0 if self.options.phase == "reflow" else 1.5

    def _usual_guidance(self) -> float:
        """The scale g of the pairs, which a student with that input is told."""
        return self._guidance(teacher_condition(self.data.example, self.teacher_denoiser, self.data.classes))
