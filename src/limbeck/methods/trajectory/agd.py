"""AGD: adapters on a frozen network learn its guidance, on the states that guided sampling passes (Jensen, 2025)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.errors import IncompatibleError
from limbeck.core.method import DataInfo, Update
from limbeck.core.options import OptionsBase
from limbeck.core.randomness import derive
from limbeck.core.registry import register
from limbeck.core.teacher import Teacher
from limbeck.core.warm_start import start_from
from limbeck.data.noise import ItemNoise
from limbeck.diffusion.denoiser import Condition, Process, note_process, process_of
from limbeck.diffusion.grids import usual_times
from limbeck.diffusion.guidance_adapted import GuidanceAdapted, own_embeddings, usual_blocks
from limbeck.diffusion.guidance_adapters import AdapterConfig, Kind, Source
from limbeck.diffusion.ports import takes_guidance
from limbeck.diffusion.predictions import Prediction
from limbeck.diffusion.schedules import along
from limbeck.methods.trajectory.diffusion_method import DiffusionMethod
from limbeck.methods.trajectory.guided_paths import Lesson, PathBank, error_weight, walk, whole_prediction

Scale = Annotated[float, Field(ge=0, le=100)]


@register
class AGD(DiffusionMethod):
    r"""Adapters around a frozen network's attention learn what guidance makes of its prediction, told the scale.

    .. math:: \epsilon_g = \epsilon_T(x_t, t) + g\, \bigl[\epsilon_T(x_t, t, c) - \epsilon_T(x_t, t)\bigr], \qquad
        L = \mathbb{E}_{(c, g),\, t}\; w\, \bigl\| \epsilon_\psi(x_t, t, c, g) - \epsilon_g \bigr\|^2

    where x_t are the states of the teacher's own guided sampling with scale g, so that adapters are trained where they
    will be asked, and no data are needed: of a batch its conditions alone are read. Each item has one path, with its
    noise and scale, made when it first comes by; `data.limit` bounds how many there are. The error is taken in what the
    network predicts, be it eps, v or velocity, and in the variance where it has learned one, whose target is the
    conditional one. Weights w: 1 (mse), :math:`\tfrac12 (1 - \cos(\epsilon_c, \epsilon_g))` (cos), :math:`\sigma_t`
    (noise); l1 is the mean absolute error.

    The student is the network under the adapters (`limbeck.diffusion.guidance_adapted`), by default with the teacher's
    weights; only adapters are trained. They are saved beside it and fit other checkpoints of the same base:
    `limbeck.models.guidance_files`. A student that has adapters goes on with them. The library's own DenoisingMLP has
    no attention: its residual layers are adapted instead. The paper's optimizer: AdamW at 1e-4 without weight decay,
    5,000 steps of 64, the first tenth of them as warm-up.
    """

    card = Card(
        slug="agd",
        title="Efficient Distillation of Classifier-Free Guidance using Adapters",
        arxiv="2503.07274",
        year=2025,
        family="trajectory",
        task="generation",
        needs=("teacher", "student"),
        use="To halve the cost of guided sampling by training few weights, which come off again, with the scale free.",
        tiny={"path_steps": 4, "hidden": 8, "initialise": "none", "solver": "ddim"},
    )

    class Options(OptionsBase):
        """Adapters, paths and loss."""

        adapter: Kind = Field("attention", description="tokens attend to the conditions, or one vector is added")
        blocks: list[str] | None = Field(
            None, description="module paths or globs of the adapted blocks; those usual for the network if absent"
        )
        hidden: int = Field(256, ge=2, le=65536, multiple_of=2, description="width of an adapter; 320 for U-Nets")
        heads: int = Field(1, ge=1, le=256, description="of the attention adapter; divides hidden")
        time: Source = Field("base", description="the time from the network's embedding, an own encoder, or nowhere")
        label: Source = Field("base", description="the class from the network's embedding, an own table, or nowhere")
        prompt: bool = Field(True, description="adapters see the prompt, where data have one")
        dropout: float = Field(0.0, ge=0, lt=1, description="within the offset adapter's layers")
        scale_factor: float = Field(1000.0, gt=0, le=1e6, description="times g, in the offset adapter's encoder")
        silent: bool = Field(True, description="adapters add nothing at first")
        data: Literal["trajectories", "forward-noised"] = Field(
            "trajectories", description="guided paths, or noised data as in other distillation of guidance"
        )
        guidance_min: Scale = Field(1.0, description="smallest scale g")
        guidance_max: Scale = Field(6.0, description="largest scale g; 12 for Stable Diffusion")
        guidance: Scale | None = Field(
            None, description="scale g that samples are drawn with; the teacher's if in range, else the middle"
        )
        solver: Literal["ancestral", "ddim"] = Field("ancestral", description="of the paths: DDPM's steps, or DDIM's")
        path_steps: int = Field(1000, ge=1, le=10000, description="of each path, all of which are kept")
        half: bool = Field(True, description="keep paths in float16")
        folder: str | None = Field(None, description="keep paths in files there; in memory and checkpoints if absent")
        loss: Literal["mse", "l1", "cos", "noise"] = Field("mse", description="kind of error, or weight of the squared")
        variance: bool = Field(True, description="teach the learned variance too, where the networks have one")
        initialise: Literal["teacher", "none"] = Field(
            "teacher", description="the network has the teacher's weights, by name; none keeps the student's own"
        )

        @model_validator(mode="after")
        def _agree(self) -> "AGD.Options":
            if self.guidance_max < self.guidance_min:
                raise ValueError("guidance_max must not lie below guidance_min")
            if self.hidden % self.heads:
                raise ValueError("heads must divide hidden")
            return self

    def __init__(
        self, options: OptionsBase, *, student: nn.Module, teacher: Teacher | None = None, data: DataInfo
    ) -> None:
        chosen: Any = options
        if chosen.initialise == "teacher" and teacher is not None:
            start_from(getattr(student, "network", student), getattr(teacher, "model", student))
        if not isinstance(student, GuidanceAdapted):
            student = _adapted(student, chosen, data)
        super().__init__(options, student=student.requires_grad_(True), teacher=teacher, data=data)
        ours, theirs = self.denoiser, self.teacher_denoiser
        if ours.schedule.config() != theirs.schedule.config():
            raise IncompatibleError("student and teacher have different noise schedules", "give both the same")
        if theirs.guidance_input:
            raise IncompatibleError("the teacher takes the scale itself", "take one that is guided by two calls")
        image, condition = self.read(data.example)
        try:
            self.times = usual_times(ours.schedule, chosen.path_steps)
            theirs.null(condition)
        except ValueError as error:
            hint = "lower path_steps, or train the teacher with condition_dropout above 0"
            raise IncompatibleError(f"no guided paths can be made: {error}", hint) from None
        if not condition:
            raise IncompatibleError("there is nothing to be guided to", "take data with classes or prompts")
        t = self.times[:1].expand(len(image)).to(image.device)
        with torch.no_grad():
            said, variance = whole_prediction(ours, image, t, condition)
        self.kind, self.variance = said.kind, chosen.variance and variance is not None
        self.bank: PathBank | None = None
        if chosen.data == "trajectories" and "index" not in data.example:
            raise IncompatibleError("the data do not number their items", "add the tensor index")
        if chosen.data == "trajectories" and chosen.folder is None:
            self.bank = self._make_bank(image, t, condition)

    def student_process(self, own: Process | None) -> Process:
        options, base = self.options, super().student_process(own)
        note_process(self.student.get_submodule("network"), replace(base, guidance_input=False))
        theirs = self.teacher_denoiser.sampling.guidance
        scale, low, high = options.guidance, options.guidance_min, options.guidance_max
        if scale is None:
            scale = theirs if low <= theirs <= high else (low + high) / 2
        return replace(base.sampled(guidance=float(scale)), guidance_input=True)

    def step(self, batch: Batch) -> Iterator[Update]:
        draws = self.draws(batch)
        place = draws.integers("place", self.options.path_steps)
        t = self.times.to(place.device)[place]
        x0, condition = self.read(batch)
        if self.options.data == "trajectories":
            scale, lesson = self._on_path(batch, x0, place, condition)
        else:
            scale = self._scale(draws)
            x_t = self.denoiser.schedule.add_noise(x0, draws.normal("noise", x0), t)
            lesson = self.teach(x_t, t, condition, scale)[1]
        prediction, variance = whole_prediction(self.denoiser, lesson.states, t, {**condition, "guidance": scale})
        said = prediction.value
        if self.variance and variance is not None:
            said = torch.cat([said, variance], 1)
        gap = (said - lesson.targets).flatten(1)
        errors = gap.abs().mean(1) if self.options.loss == "l1" else gap.square().mean(1)
        yield Update("student", (lesson.weights * errors).mean(), batch.size)

    @torch.no_grad()
    def teach(self, x_t: Tensor, t: Tensor, condition: Condition, scale: Tensor) -> tuple[Prediction, Lesson]:
        """The teacher's guided prediction at (x_t, t), and what the student is to learn from it."""
        teacher = self.teacher_denoiser
        null = teacher.null(condition)
        both = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
        asked, variance = whole_prediction(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        conditional, free = asked.value.chunk(2)
        near = Prediction(conditional, asked.kind, x_t, t, teacher.schedule)
        guided = near.with_value(free + along(scale, free) * (conditional - free))
        targets = guided.as_kind(self.kind)
        if self.variance and variance is not None:
            targets = torch.cat([targets, variance.chunk(2)[0]], 1)
        return guided, Lesson(x_t, targets, error_weight(self.options.loss, near, guided))

    def _scale(self, draws: ItemNoise) -> Tensor:
        low, high = self.options.guidance_min, self.options.guidance_max
        return low + (high - low) * draws.uniform("guidance")

    def _on_path(self, batch: Batch, like: Tensor, place: Tensor, condition: Condition) -> tuple[Tensor, Lesson]:
        """Each item's scale, and the lesson at one place of its path, which is made where it is missing."""
        index, seed = batch["index"], derive(self.clock.run_seed, "guided paths")
        if self.bank is None:
            t = self.times[:1].to(like.device).expand(len(like))
            self.bank = self._make_bank(like, t, condition)
        rows = self.bank.missing(index)
        if len(rows):
            fixed, x = ItemNoise(seed, index[rows]), like[rows]
            asked = {name: value[rows] for name, value in condition.items()}
            noise, scale = fixed.normal("start", x) * self.denoiser.schedule.noise_scale, self._scale(fixed)

            def fresh(step: int) -> Tensor:
                return fixed.normal(f"step {step}", x)

            def taught(x_t: Tensor, t: Tensor) -> tuple[Prediction, Lesson]:
                return self.teach(x_t, t, asked, scale)

            drawn = fresh if self.options.solver == "ancestral" else None
            self.bank.store(index[rows], walk(taught, noise, self.times.to(x.device), drawn))
        return self._scale(ItemNoise(seed, index)), self.bank.recall(index, place, like)

    def _make_bank(self, image: Tensor, t: Tensor, condition: Condition) -> PathBank:
        options, lesson = self.options, self.teach(image, t, condition, torch.ones_like(t))[1]
        if options.folder is None:
            return PathBank(self.data.items, options.path_steps, lesson, options.half, None, {})
        names = ("solver", "path_steps", "guidance_min", "guidance_max", "loss", "variance")
        about = {name: getattr(options, name) for name in names} | {"seed": self.clock.run_seed, "kind": self.kind}
        about["teacher"] = getattr(self.teacher, "fingerprint", None)
        return PathBank(
            self.data.items, options.path_steps, lesson, options.half, Path(options.folder).expanduser(), about
        )


def _adapted(network: nn.Module, options: Any, data: DataInfo) -> GuidanceAdapted:
    """The network with fresh adapters, as the options have them and as far as network and data know conditions."""
    if takes_guidance(network):
        raise IncompatibleError("the student takes the guidance scale itself", "build it without that input")
    prompt = data.example["prompt"].shape[-1] if options.prompt and "prompt" in data.example else 0
    time, label = own_embeddings(network)
    null = getattr(process_of(network), "null_label", None) or 0
    try:
        config = AdapterConfig(
            options.adapter,
            usual_blocks(network, options.blocks),
            options.hidden,
            options.heads,
            options.time if time or options.time != "base" else "own",
            options.label if data.classes and (label or options.label != "base") else "none",
            labels=max(data.classes, null) + 1,
            prompt=prompt,
            dropout=options.dropout,
            scale_factor=options.scale_factor,
            silent=options.silent,
            time_module=time,
            label_module=label,
        )
        return GuidanceAdapted(network, config)
    except ValueError as error:
        raise IncompatibleError(str(error), "choose other blocks or adapters") from None
