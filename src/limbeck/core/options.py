"""Options: frozen, closed pydantic models whose every field says its range and meaning."""

from pydantic import BaseModel, ConfigDict


class OptionsBase(BaseModel):
    """Base of all options: immutable, unknown keys refused, infinities and NaN refused, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
