"""Hidden states of every layer beside the predictions, from one forward pass."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.call import logits_of, text_inputs
from limbeck.core.errors import IncompatibleError
from limbeck.language.predictions import Predictions, TokenReader, kept_tokens


class TokenStates(NamedTuple):
    """What one pass of a language model gives.

    Attributes:
        predictions: at the tokens whose target counts.
        states: of each layer the tokens that are no padding (tokens, width), in the order of the layers; the prompt's
            are among them. Outputs of the blocks, the last one as the final norm leaves it; the embedding's is not
            among them. Of an encoder-decoder the encoder's come first.
    """

    predictions: Predictions
    states: list[Tensor]


class StateReader(TokenReader):
    """Reads hidden states of all layers, as transformers counts them, and predictions in the same pass.

    As with its parent the head computes nothing where its logits can be had from what comes into it.

    Args:
        model: a causal, masked or encoder-decoder language model of transformers.
        example: a small batch to check on.

    Raises:
        IncompatibleError: the model is none of transformers, and its layers are unknown.
    """

    def __init__(self, model: nn.Module, example: Batch) -> None:
        if not hasattr(model, "config"):
            raise IncompatibleError(
                f"the hidden states of a {type(model).__name__} are unknown", "take a language model of transformers"
            )
        super().__init__(model, example)

    def read(self, batch: Batch) -> TokenStates:
        """Predictions at `kept_tokens(batch, self.shift)`, and the states of all tokens that are no padding."""
        kept, path = kept_tokens(batch, self.shift), self.head_path
        if path is None:
            output = self._run(batch)
            return TokenStates(Predictions(dense=logits_of(output)[kept]), _states(output, batch))
        head: Any = self.model.get_submodule(path)
        caught: list[Tensor] = []

        def without_tokens(layer: nn.Module, args: Any) -> Any:
            caught.append(args[0])
            return (args[0][..., :0, :], *args[1:])

        handle = head.register_forward_pre_hook(without_tokens)
        try:
            output = self._run(batch)
        finally:
            handle.remove()
        return TokenStates(Predictions(caught[0][kept], head.weight, head.bias), _states(output, batch))

    def _run(self, batch: Batch) -> Any:
        return self.model(**text_inputs(batch), output_hidden_states=True)


def _states(output: Any, batch: Batch) -> list[Tensor]:
    """The states of a model's output, padding dropped, embeddings left out."""
    if getattr(output, "encoder_hidden_states", None) is not None:
        sides = [(output.encoder_hidden_states, "input_ids", "attention_mask")]
        sides.append((output.decoder_hidden_states, "decoder_input_ids", "decoder_attention_mask"))
    else:
        sides = [(output.hidden_states, "input_ids", "attention_mask")]
    found = []
    for states, ids, mask in sides:
        counts = batch[mask].bool() if mask in batch else batch[ids].new_ones(batch[ids].shape).bool()
        found += [state[counts] for state in states[1:]]
    return found
