"""What a recipe may say: data, models, training and stages as closed, typed models. Free of torch, so that a bad
recipe is refused in a fraction of a second."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from limbeck.core.options import OptionsBase


def _named(value: Any) -> Any:
    """A bare string is shorthand for `{name: string}`."""
    return {"name": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """One entry is shorthand for a list of one, nothing for an empty list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _listed_or_none(value: Any) -> Any:
    return None if value is None else _listed(value)


class AdapterSpec(OptionsBase):
    """A LoRA adapter: small matrices that are trained in place of a model's own weights, which stay frozen."""

    rank: int = Field(8, ge=1, le=65536, description="rank of each update; the number of trained weights grows with it")
    alpha: float = Field(16, gt=0, le=1e6, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of each update, in training")
    target_modules: Annotated[list[str] | None, BeforeValidator(_listed_or_none)] = Field(
        None,
        description="names or path endings of the layers to adapt, as [q_proj, v_proj]; every linear layer but the "
        "output head if absent",
    )
    exclude_modules: Annotated[list[str], BeforeValidator(_listed)] = Field(
        default_factory=list, description="names or path endings of layers to leave out"
    )
    modules_to_save: Annotated[list[str], BeforeValidator(_listed)] = Field(
        default_factory=list, description="layers that are trained whole and saved with the adapter, such as a new head"
    )
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    decomposed: bool = Field(False, description="train magnitude and direction apart (DoRA)")


class ModelSpec(OptionsBase):
    """Which network: a shipped net, a timm, transformers or diffusers model, a folder, or an earlier stage's result."""

    name: str = Field(
        description="`convnet`, `vit`, `mlp` (shipped); `timm:NAME`; `hf:FOLDER_OR_ID`; `diffusers:FOLDER_OR_ID` (the "
        "denoising network of a pipeline; the argument pretrained: false takes its configuration alone, and further "
        "arguments change fields of it); `config:TYPE` (fresh weights for a transformers type, as `config:llama`, or a "
        "class of diffusers, as `config:UNet2DModel`, whose arguments are its configuration); `run:FOLDER` (a finished "
        "run or an exported student); `stage:NAME` (result of an earlier stage)"
    )
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict, description="keyword arguments of the model's builder"
    )
    seed: int | None = Field(None, ge=0, description="seed of the initial weights; the recipe's seed if absent")
    adapter: AdapterSpec | None = Field(None, description="train this adapter and leave the model's weights frozen")


class TextSpec(OptionsBase):
    """How text becomes token sequences."""

    tokenizer: str = Field(
        "bpe:512", description="`bpe:SIZE` (byte-level BPE trained on this text); or a folder or id of transformers"
    )
    length: int = Field(128, ge=4, le=1 << 20, description="tokens a sequence")
    packing: bool = Field(True, description="fill sequences with several texts; off: one text a sequence, padded")
    prompt_column: str | None = Field(None, description="column of the prompt; its tokens are no targets")
    completion_column: str | None = Field(None, description="column of the completion, or of the whole text")
    chat: bool = Field(False, description="render prompt and completion with the tokenizer's chat template")
    mask_rate: float | None = Field(None, gt=0, lt=1, description="share of tokens to mask, for masked language models")


class EncodingSpec(OptionsBase):
    """Pictures and captions are encoded once, by a diffusion pipeline's own autoencoder and text encoders."""

    pipeline: str = Field(description="folder or hub id of the diffusers pipeline, usually the teacher's")
    cache: str | None = Field(None, description="folder that keeps what is encoded; memory if absent, up to 1 GiB")
    draw: bool = Field(
        False, description="draw latents from the autoencoder's distribution, anew in each epoch; its mean otherwise"
    )


def _encoding(value: Any) -> Any:
    return {"pipeline": value} if isinstance(value, str) else value


class DataSpec(OptionsBase):
    """Which data, and how they are split, sized and augmented."""

    name: str = Field(
        "digits",
        description="`digits` (embedded); `folder:PATH` (one folder a class); `parquet:PATH` (file or folder); "
        "`datasets:PATH` (saved with save_to_disk); `mnist:PATH` (IDX files); `npz:PATH` (arrays image, label); "
        "`pairs:PATH` (noise and what a sampler made of it); "
        "`pydoc` (embedded text: Python's documentation); `text:PATH` (plain text); `jsonl:PATH` (rows with columns)",
    )
    image_size: int | None = Field(None, ge=4, le=4096, description="side in pixels of the square images")
    image_column: str | None = Field(None, description="column that holds the image; found by type if absent")
    label_column: str | None = Field(None, description="column that holds the label; found by type if absent")
    caption_column: str | None = Field(
        None,
        description="column of the pictures' captions, for encoding; of a folder's `metadata.jsonl`, whose rows name "
        "their pictures in `file_name`",
    )
    encoding: Annotated[EncodingSpec | None, BeforeValidator(_encoding)] = Field(
        None, description="turn pictures into latents and captions into prompt embeddings"
    )
    validation: float = Field(0.2, gt=0, lt=1, description="share held out where the data bring no split of their own")
    limit: int | None = Field(None, ge=2, description="use only the first so many training items")
    augment: list[Literal["flip", "crop", "jitter", "erase"]] = Field(
        default_factory=list, description="augmentations in order, a function of (seed, epoch, item)"
    )
    mean: list[float] | None = Field(None, description="per-channel mean of images in [0, 1]; data's own if absent")
    std: list[float] | None = Field(None, description="per-channel deviation of images in [0, 1]; data's own if absent")
    whiten: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="ZCA: decorrelate the pixels of images in [0, 1], this added to their variances (papers: 0.1), in "
        "place of mean and std; for data-set distillation",
    )
    text: TextSpec = Field(TextSpec(), description="how text is tokenised; for text data only")
    workers: int = Field(0, ge=0, le=256, description="loader processes; 0 loads in the training process")

    @model_validator(mode="after")
    def _consistent(self) -> "DataSpec":
        if self.whiten is not None and (self.mean is not None or self.std is not None or self.encoding is not None):
            raise ValueError("whiten takes the place of mean, std and encoding: leave them out")
        return self


class OptimizerSpec(OptionsBase):
    """One player's optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adam", "radam", "sgd"] = Field("adamw", description="optimizer of torch.optim")
    lr: float = Field(1e-3, gt=0, le=100, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, le=10, description="decoupled for adamw, L2 otherwise")
    decay_norms: bool = Field(True, description="apply weight decay to biases and norms (tensors of one dimension) too")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adam, adamw and radam only")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    nesterov: bool = Field(False, description="sgd only")
    schedule: Literal["constant", "cosine", "linear", "step"] = Field("cosine", description="shape after the warm-up")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    final: float = Field(0.0, ge=0, le=1, description="share of the peak rate left at the end (cosine, linear)")
    milestones: list[float] = Field(default_factory=list, description="shares of the run at which `step` decays")
    gamma: float = Field(0.1, gt=0, le=1, description="factor of `step` at each milestone")
    lr_multipliers: dict[str, Annotated[float, Field(ge=0, le=1000)]] = Field(
        default_factory=dict,
        description="factors on the rate by module path or glob, as {stages.0: 0.1, 'stages.[12]': 0.2}; the first "
        "that fits a parameter counts, and parameters that none fits keep the rate",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerSpec":
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones, e.g. [0.5, 0.75]")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class TrainSpec(OptionsBase):
    """How a stage is trained."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; give either steps or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; give either steps or epochs")
    batch_size: int = Field(64, ge=1, description="items a step, over all processes and micro-batches")
    accumulate: int = Field(1, ge=1, description="micro-batches a step in each process; divides batch_size")
    optimizer: OptimizerSpec = Field(OptimizerSpec(), description="optimizer of every player")
    players: dict[str, OptimizerSpec] = Field(default_factory=dict, description="optimizers of single players")
    clip_norm: float | None = Field(None, gt=0, description="largest global norm of a player's gradient")
    ema: float | None = Field(None, ge=0, lt=1, description="decay a step of an average of the result's weights")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="autocast precision; weights stay float32")
    non_finite: Literal["raise", "skip", "rewind"] = Field("raise", description="what to do at a NaN or infinity")
    max_non_finite: int = Field(10, ge=1, description="skips in a row, or rewinds in all, before giving up")
    evaluate_every: int | None = Field(None, ge=1, description="steps between measurements on the validation data")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints; a tenth of all if absent")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the latest whole checkpoints stay on disk")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSpec":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        return self

    def total_steps(self, items: int) -> int:
        """Optimizer steps for a data set of `items`."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * items / self.batch_size))


class CacheSpec(OptionsBase):
    """Teachers' outputs stored on disk by `limbeck cache` and read in place of running the teachers."""

    folder: str = Field(description="folder of the cache")
    kind: Literal["dense", "top-k", "hidden", "features"] = Field(
        "dense",
        description="what is stored: logits; the k most probable tokens with the tail's mass; hidden states at the "
        "tokens that count, with the head once; outputs of named layers, with the logits",
    )
    k: int = Field(50, ge=1, le=4096, description="tokens or classes an entry, for top-k")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of what is stored, but for top-k")
    layers: Annotated[list[str], BeforeValidator(_listed)] = Field(
        default_factory=list, description="module paths or globs in the teacher, for features"
    )
    epochs: int | None = Field(
        None, ge=1, description="epochs whose augmented items are stored; as many as training takes if absent"
    )
    check_teacher: bool = Field(
        True, description="build the teacher once to compare its hash; off: the cache's word is taken for it"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "CacheSpec":
        if (self.kind == "features") != bool(self.layers):
            raise ValueError("layers go with kind features, which needs them")
        return self


Named = Annotated[ModelSpec, BeforeValidator(_named)]


class StageSpec(OptionsBase):
    """One stage: a method, its models and how it is trained."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$", description="name of the stage; later stages refer to it")
    method: str = Field(description="slug of the method")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="options of the method")
    student: Named = Field(description="what is fitted")
    teacher: Annotated[list[Named], BeforeValidator(_listed)] = Field(
        default_factory=list, description="what is matched; several make an ensemble"
    )
    data: str | None = Field(
        None,
        pattern=r"^stage:[a-z][a-z0-9_-]{0,39}$",
        description="`stage:NAME` trains on the synthetic set that an earlier stage made; the recipe's data if absent",
    )
    cache: CacheSpec | None = Field(None, description="read the teachers' outputs from a cache; see `limbeck cache`")
    train: TrainSpec | None = Field(None, description="absent for methods that do not train by gradient")

    @property
    def earlier(self) -> list[str]:
        """Names of the stages whose results this one works with."""
        parts = [
            name.partition(":") for name in (self.student.name, *(one.name for one in self.teacher), self.data or "")
        ]
        return [name for kind, _, name in parts if kind == "stage"]


class Recipe(OptionsBase):
    """A whole experiment: seed, data and stages in the order in which they run."""

    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    data: Annotated[DataSpec, BeforeValidator(_named)] = Field(DataSpec(), description="training data")
    track: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(
        default_factory=list, description="trackers that receive the metrics too, besides metrics.jsonl"
    )
    stages: list[StageSpec] = Field(min_length=1, max_length=64, description="stages in the order in which they run")

    @model_validator(mode="after")
    def _stages_connect(self) -> "Recipe":
        seen: list[str] = []
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called '{stage.name}'")
            for name in stage.earlier:
                if name not in seen:
                    raise ValueError(f"stage '{stage.name}' uses stage '{name}', which does not come before it")
            seen.append(stage.name)
        return self
