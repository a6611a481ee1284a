"""SparseGPT: a trained network made sparse in one shot, layer by layer (Frantar, Alistarh, 2023)."""

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.compression.masks import Pattern, keep_globally, keep_largest, keep_pattern, sparsity_report
from limbeck.compression.matrices import (
    InputStatistics,
    LayerInput,
    as_matrices,
    from_matrices,
    reached_in_order,
    reconstruction_error,
)
from limbeck.compression.quantized import QuantizedStateDict, note_quantization, quantization_of
from limbeck.compression.saliency import Criterion, saliency
from limbeck.compression.second_order import solve
from limbeck.compression.storage import code_sizes
from limbeck.compression.symmetric import SymmetricGrid
from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.checkpoint import Checkpoint, Checkpoints
from limbeck.core.distributed import World
from limbeck.core.errors import IncompatibleError, Interrupted
from limbeck.core.method import Procedure, ProcedureContext
from limbeck.core.registry import register
from limbeck.core.snapshot import load_module, module_tensors
from limbeck.methods.conversion.calibration import calibration_batches, run_calibration
from limbeck.methods.conversion.layer_choice import LayerOptions, by_block, chosen_layers


@register
class Prune(Procedure):
    r"""Each layer loses the weights that its outputs on a few items miss least, and the others make up for them.

    .. math:: \min_{\hat W} \| (W - \hat W) X \|_F^2, \qquad
        \epsilon_{ij} = \frac{w_{ij}^2}{[H^{-1}]_{jj}}, \qquad
        \delta_{i,j:} = -\frac{w_{ij}}{[H^{-1}]_{jj}} [H^{-1}]_{j,j:}, \qquad H = X X^T + \lambda I

    Columns are settled from left to right; in each block of columns the smallest :math:`\epsilon` become zero and the
    columns to come are changed by :math:`\delta`. Layers follow each other as the network runs them, and X is what
    comes out of those that are pruned already. With `bits` what stays is rounded by the same solver to evenly spaced
    values around zero, whose zeros are exact. Up to 9 bits `limbeck export --to quantized` writes the layers so small,
    but those of GPT-2, whose matrices lie transposed, and those whose inputs are no whole number of groups.

    A denoiser, shipped or of diffusers, is judged at the noisy items and times at which its sampler asks it, with and
    without the condition where it is guided.

    Weights that are zero already stay zero and count, so that a fine-tuned sparse network is rounded with sparsity 0.
    Embeddings, norms and the output head stay dense. The result is an ordinary network of the same class: its zeros
    are its masks. The baselines `magnitude` and `wanda` choose without making up for anything. Of the paper what
    concerns single cards, moving one block at a time to the device, is not here.
    """

    card = Card(
        slug="prune",
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        arxiv="2301.00774",
        year=2023,
        family="conversion",
        task="any",
        needs=("student",),
        use="To make a trained network sparse in minutes: before squarehead trains it on, or instead.",
        tiny={"calibration_items": 8, "batch_size": 4},
    )

    class Options(LayerOptions):
        """How many weights go, which, and what they are judged by; defaults are the paper's."""

        criterion: Criterion = Field(
            "obs", description="what a weight is worth: obs (SparseGPT, with compensation), or wanda or magnitude alone"
        )
        sparsity: float = Field(0.5, ge=0, le=1, description="share of zeros of every layer; a pattern has its own")
        pattern: str = Field(
            "unstructured",
            pattern=r"^(unstructured|[1-9]\d{0,4}:[1-9]\d{0,4})$",
            description="unstructured, or at most so many weights in each run of inputs, as 2:4 or 16:64",
        )
        scope: Literal["auto", "tensor", "row", "global"] = Field(
            "auto",
            description="which weights are compared with each other: a layer's, an output's, all of them; auto: an "
            "output's for wanda, a layer's (for obs those of a block of columns) otherwise",
        )
        calibration_items: int = Field(128, ge=1, le=10**6, description="items of the training data to judge by")
        batch_size: int = Field(8, ge=1, le=10**6, description="items at a time")
        refresh: Literal["layer", "block", "never"] = Field(
            "block",
            description="how often inputs are looked at again: before each layer, before each of the network's blocks, "
            "or once, of the dense network",
        )
        columns: int = Field(128, ge=1, le=10**6, description="columns whose zeros are chosen together (obs)")
        damping: float = Field(0.01, gt=0, le=100, description="added to H, as a share of the mean of its diagonal")
        bits: int | None = Field(None, ge=2, le=16, description="round what stays to so many bits a weight")
        group: int | None = Field(
            None, ge=1, le=10**6, description="inputs that share a step of the rounding; all of an output's if absent"
        )

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            pattern = Pattern.parse(self.pattern)
            if self.scope == "global" and (pattern or self.criterion == "obs"):
                raise ValueError("scope global goes with magnitude or wanda, and no pattern")
            return self

    def run(self, context: ProcedureContext) -> nn.Module:
        device = World().device
        self.student.to(device).eval()
        self.pattern = Pattern.parse(self.options.pattern)
        self.layers = chosen_layers(self.student, self.options)
        self._check()
        drawn = calibration_batches(
            self.student, context.source, context.seed, self.options.calibration_items, self.options.batch_size
        )
        batches = [batch.to(device) for batch in drawn]
        order = self._order(batches[0])
        self.unreached = sorted(self.layers.keys() - set(order))
        self.errors: dict[str, float] = {}
        self.scales: dict[str, Tensor] = {}  # of the rounding, by layer
        states, groups = Checkpoints(context.directory, keep=1), self._groups(order)
        begin = self._restored(states)
        for number, group in enumerate(groups[begin:], begin):
            try:
                context.pause()
            except Interrupted:
                tensors = {"student": module_tensors(self.student), "scales": self.scales}
                states.save(Checkpoint(number, tensors, {"errors": self.errors}))
                raise
            self._prune({path: self.layers[path] for path in group}, batches)
            worst = max(self.errors[path] for path in group)
            context.log({"step": number + 1, "layers": len(self.errors), "reconstruction_error": worst})
        self._note_rounding()
        return self.student

    def figures(self) -> dict[str, Any]:
        """Shares of zeros and errors of the layers' outputs, together and by layer; layers that no item reached;
        what the rounded weights take.
        """
        found = sparsity_report(self.student, [f"{path}.weight" for path in self.layers])
        found["reconstruction_error"] = sum(self.errors.values()) / max(1, len(self.errors))
        found["reconstruction_error_by_layer"] = self.errors
        state = quantization_of(self.student) if self.scales else None
        found |= code_sizes(state) if state is not None else {}
        return found | ({"unreached": self.unreached} if self.unreached else {})

    @torch.no_grad()
    def _prune(self, layers: dict[str, nn.Module], batches: list[Batch]) -> None:
        """Looks at what comes into some layers, and settles them."""
        with InputStatistics(layers) as seen:
            for batch in batches:
                mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
                seen.during(lambda batch=batch: run_calibration(self.student, batch), mask)
        wanted = self._wanted_globally(layers, seen.found) if self.options.scope == "global" else {}
        for path, layer in layers.items():
            weight: Any = layer.weight
            before, products = as_matrices(layer, weight), seen.found[path].products
            after = self._settled(path, before, products, wanted.get(path))
            self.errors[path] = float(reconstruction_error(before, after, products))
            weight.copy_(from_matrices(layer, after))

    def _settled(self, path: str, before: Tensor, products: Tensor, wanted: Tensor | None) -> Tensor:
        """A layer's matrices (groups, outputs, inputs) with their zeros, compensated and rounded as was asked for."""
        options, keep = self.options, before != 0
        if options.criterion != "obs":
            keep = keep & (self._wanted(before, products) if wanted is None else wanted)
            before = torch.where(keep, before, torch.zeros_like(before))
            if options.bits is None:
                return before
        grids: list[SymmetricGrid | None] = [None] * len(before)
        if options.bits is not None:
            made = [SymmetricGrid.of(matrix, options.bits, options.group) for matrix in before]
            self.scales[path], grids = torch.cat([grid.scale for grid in made]), [*made]
        return torch.stack([self._solved(*group) for group in zip(before, products, keep, grids, strict=True)])

    def _solved(self, weight: Tensor, products: Tensor, keep: Tensor, grid: SymmetricGrid | None) -> Tensor:
        options, chosen = self.options, self.options.criterion != "obs"
        return solve(
            weight,
            products,
            sparsity=0.0 if chosen or self.pattern else options.sparsity,
            pattern=None if chosen else self.pattern,
            keep=keep,
            by_row=options.scope == "row",
            rounding=grid,
            block=options.columns,
            damping=options.damping,
        ).weight

    def _note_rounding(self) -> None:
        """Notes on the student which layers lie on a grid that the compact file can hold."""
        found = {}
        for path, scale in self.scales.items():
            weight = self.layers[path].get_parameter("weight")
            size = min(self.options.group or weight.numel(), weight.numel() // len(scale))
            grid = SymmetricGrid(scale.to(weight.device), 2 ** (self.options.bits - 1) - 1, size)
            found[f"{path}.weight"] = grid.quantized(weight)
        fitting = {name: tensor for name, tensor in found.items() if tensor is not None}
        if fitting:
            note_quantization(self.student, QuantizedStateDict(fitting))

    def _wanted(self, weight: Tensor, products: Tensor) -> Tensor:
        scores = saliency(self.options.criterion, weight, products)
        if self.pattern is not None:
            return keep_pattern(scores, self.pattern)
        auto: Literal["row", "tensor"] = "row" if self.options.criterion == "wanda" else "tensor"
        return keep_largest(scores, self.options.sparsity, auto if self.options.scope == "auto" else self.options.scope)

    def _wanted_globally(self, layers: dict[str, nn.Module], seen: dict[str, LayerInput]) -> dict[str, Tensor]:
        matrices = {path: as_matrices(layer, layer.get_parameter("weight")) for path, layer in layers.items()}
        criterion = self.options.criterion
        scores = {path: saliency(criterion, weight, seen[path].products) for path, weight in matrices.items()}
        return keep_globally(scores, self.options.sparsity)

    def _order(self, batch: Batch) -> list[str]:
        order = reached_in_order(self.layers, lambda: run_calibration(self.student, batch))
        if not order:
            raise IncompatibleError("no layer is reached by the data", "see the options layers and exclude")
        return order

    def _groups(self, order: list[str]) -> list[list[str]]:
        """Layers whose inputs are looked at together, in the order of the network."""
        if self.options.refresh == "never" or self.options.scope == "global":
            return [order]
        if self.options.refresh == "layer":
            return [[path] for path in order]
        return by_block(order)

    def _check(self) -> None:
        """Refuses a pattern that does not fit a layer, before any work."""
        for path, layer in self.layers.items():
            inputs = as_matrices(layer, layer.get_parameter("weight")).shape[-1]
            if self.pattern is not None and inputs % self.pattern.run:
                raise IncompatibleError(
                    f"the {inputs} inputs of '{path}' are no whole number of runs of {self.pattern.run}",
                    f"leave it dense: exclude: ['{path}']",
                )

    def _restored(self, states: Checkpoints) -> int:
        """Groups that an interrupted run had settled; its student is in place then."""
        saved = states.load()
        if saved is None:
            return 0
        load_module(self.student, saved.tensors["student"])
        self.errors, self.scales = dict(saved.state["errors"]), dict(saved.tensors["scales"])
        return saved.step
