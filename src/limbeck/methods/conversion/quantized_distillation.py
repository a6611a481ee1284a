"""Quantised distillation (Polino et al., 2018)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from torch import Tensor

from limbeck.compression.quantized import QuantizedStateDict
from limbeck.compression.quantizers import Gradient, fake_quantize, quantize
from limbeck.core.batch import Batch
from limbeck.core.card import Card
from limbeck.core.method import Update
from limbeck.core.randomness import generator
from limbeck.core.registry import register
from limbeck.methods.conversion.quantization_method import QuantizationMethod


@register
class QuantizedDistillation(QuantizationMethod):
    r"""The student runs with quantised weights, and its full-precision weights take the steps.

    .. math:: w_q = \alpha\,\frac{1}{s-1}\,\mathrm{round}\!\Big((s-1)\,\frac{w - \beta}{\alpha}\Big) + \beta, \qquad
        w \leftarrow w - \eta\,\frac{\partial}{\partial w_q}
        \Big[(1-\lambda)\,\mathrm{CE} + \lambda\,T^2\,\mathrm{KL}\big(\sigma(z_t/T)\,\|\,\sigma(z_s/T)\big)\Big]

    with s levels a weight, and in each bucket :math:`\beta` the least weight and :math:`\alpha` the distance to the
    largest. Momentum and averages live on w; what is taken home are the weights rounded to the nearest level, also
    where training rounds stochastically. Start from a trained or distilled student.

    Unlike in the published code, `first_and_last: false` leaves out the first and last layer with their biases and not
    the first and last tensor of the list of parameters, of which the last is usually a bias.
    """

    card = Card(
        slug="quantized-distillation",
        title="Model Compression via Distillation and Quantization",
        arxiv="1802.05668",
        year=2018,
        family="conversion",
        task="classification",
        needs=("teacher", "student"),
        use="For a student of 1 to 8 bits a weight that keeps most of its accuracy.",
    )

    class Options(QuantizationMethod.Options):
        """Bits, rounding, and the gradient through it."""

        bits: int = Field(4, ge=1, le=8, description="of a weight's index: 2^bits levels")
        rounding: Literal["nearest", "stochastic"] = Field(
            "nearest", description="nearest: half to even; stochastic: right on average"
        )
        gradient: Gradient = Field(
            "none",
            description="none: straight through; truncated: weights are clamped to [-1, 1], with no gradient beyond; "
            "complicated: through the buckets' scales too",
        )

    def step(self, batch: Batch) -> Iterator[Update]:
        yield self.update("student", batch, self.quantized_weights())

    def quantized_weights(self) -> dict[str, Tensor]:
        """Quantised weights by name; their gradient reaches the full-precision ones."""
        return {name: self._fake(name, weights) for name, weights in self.chosen().items()}

    def quantized_state(self) -> QuantizedStateDict:
        """The full-precision weights rounded to the nearest levels."""
        options, truncated = self.options, self.options.gradient == "truncated"
        quantized = {
            name: quantize(
                weights.detach().clamp(-1, 1) if truncated else weights.detach(),
                2**options.bits,
                bucket=options.bucket,
                scaling=options.scaling,
            )
            for name, weights in self.chosen().items()
        }
        return QuantizedStateDict(quantized)

    def _fake(self, name: str, weights: Tensor) -> Tensor:
        options, draws = self.options, None
        if options.rounding == "stochastic":  # the same for all micro-batches and ranks of a step
            draws = generator(self.clock.seed, "rounding", name, device=weights.device)
        return fake_quantize(
            weights,
            2**options.bits,
            bucket=options.bucket,
            scaling=options.scaling,
            gradient=options.gradient,
            generator=draws,
        )
