"""What a recipe may say of a served teacher; free of torch, so that it can be checked at once."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, ValidationError

from limbeck.core.errors import RecipeError
from limbeck.core.explain import explain
from limbeck.core.options import OptionsBase
from limbeck.core.specs import ModelSpec


class ServedOptions(OptionsBase):
    """How a teacher behind an OpenAI-compatible server is asked."""

    model: str = Field(min_length=1, description="name of the model on the server")
    k: int = Field(20, ge=1, le=1000, description="most probable tokens to ask for; servers limit it")
    shape: Literal["prompt_logprobs", "echo"] = Field(
        "prompt_logprobs", description="of request and answer: vLLM's own, by token id; or the older echo with logprobs"
    )
    max_tokens: Literal[0, 1] = Field(1, description="tokens to generate and throw away; some servers refuse 0")
    key_variable: str | None = Field(None, description="environment variable that holds the server's key")
    timeout: float = Field(60.0, gt=0, le=3600, description="seconds in which an answer has to be there")
    retries: int = Field(5, ge=0, le=100, description="further attempts after a failure that may pass")
    backoff: float = Field(
        1.0, ge=0, le=600, description="seconds before the second attempt; doubled each time, up to 60"
    )
    concurrency: int = Field(8, ge=1, le=256, description="requests at a time, one an item")
    extra: dict[str, JsonValue] = Field(
        default_factory=dict, description="more fields of every request, as return_tokens_as_token_ids: true"
    )


def check_served(spec: ModelSpec, key: str) -> ServedOptions:
    """The arguments of a served teacher.

    Args:
        spec: named `served:URL`.
        key: dotted path of the spec in its recipe, for messages.

    Raises:
        RecipeError: it is no teacher, the address is none, or an argument is unknown or out of range.
    """
    if not key.endswith("teacher") or spec.adapter is not None:
        raise RecipeError(f"{key}.name", "a served model can only be a teacher", "students are trained here")
    address = urlsplit(spec.name.partition(":")[2])
    if address.scheme not in ("http", "https") or not address.hostname:
        raise RecipeError(f"{key}.name", f"'{spec.name}' holds no address", "write served:http://localhost:8000/v1")
    try:
        return ServedOptions.model_validate(spec.arguments)
    except ValidationError as error:
        raise explain(error, ServedOptions, f"{key}.arguments") from None
