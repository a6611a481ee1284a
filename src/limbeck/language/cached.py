"""A causal model that reads token by token and can take tokens back: its key-value cache with rollback."""

from typing import Any

from torch import Tensor, nn

from limbeck.core.errors import IncompatibleError


class CachedReader:
    """Reads one growing sequence, computing each token once.

    Args:
        model: a causal language model of transformers whose whole state is its key-value cache.

    Attributes:
        length: tokens read so far.
        vocab: how many token ids can be read.

    Raises:
        IncompatibleError: the model keeps a state of another kind, which cannot be rolled back.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        if getattr(model, "_is_stateful", False):
            raise IncompatibleError(f"a {type(model).__name__} keeps a state that cannot be rolled back")
        self.model: Any = model
        # Without the model's configuration: layers with a sliding window would forget what a rollback asks for. The
        # window itself is in the mask.
        self._cache = DynamicCache()
        self.length = 0
        embeddings: Any = getattr(model, "get_input_embeddings")()  # noqa: B009  # known to transformers alone
        self.vocab: int = embeddings.num_embeddings

    def read(self, ids: Tensor) -> Tensor:
        """Logits (items, tokens, vocab) after each of the next tokens (items, tokens)."""
        self.length += ids.shape[1]
        everything = ids.new_ones(len(ids), self.length)
        output = self.model(input_ids=ids, attention_mask=everything, past_key_values=self._cache, use_cache=True)
        return output.logits

    def take_back(self, length: int) -> None:
        """Forgets every token beyond the first `length`; nothing happens where there are not so many."""
        surplus = self.length - length
        if surplus > 0:
            self._cache.crop(-surplus)
            self.length = length
