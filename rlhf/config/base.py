"""What every config section is: a frozen, strict pydantic model in which an unknown key is an error."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
# How much of the past an average keeps at each step.
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections. Fields keep their default in the class and are documented in `description`."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", validate_default=True, protected_namespaces=())
