"""A language model that is asked in words: a local one, or one behind an address. For judges of every kind."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlhf.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

DEFAULT_CACHE = "~/.cache/rlhf/chat"
# What decides how a reply is had, and not what it says: left out of fingerprints and of an annotator's description.
PRACTICAL_FIELDS = frozenset(
    {"api_key_variable", "num_retries", "timeout_seconds", "concurrency", "batch_size", "cache"}
    | {"max_cost", "input_price", "output_price"}
)


class ChatModelConfig(Section):
    """Which model is asked, and how: `model` runs here, `address` is a server with OpenAI's interface."""

    model: str | None = Field(None, description="folder or hub id of a chat model that runs here")
    address: str | None = Field(
        None, description="base address of a server with OpenAI's interface, such as http://localhost:8000/v1"
    )
    model_name: str | None = Field(None, description="name of the model at the address")
    api_key_variable: str | None = Field(
        None, description="environment variable that holds the address's key; the key itself is written nowhere"
    )
    logprobs: bool = Field(
        False, description="ask the address for log-probs of the verdict; a local model has them always"
    )
    temperature: NonNegativeFloat = Field(0.0, description="of the replies; 0 takes the likeliest token")
    max_tokens: PositiveInt = Field(256, description="longest reply")
    num_retries: NonNegativeInt = Field(5, description="further tries after a timeout, status 429 or a server's error")
    timeout_seconds: PositiveFloat = Field(60.0, description="longest wait for one reply of the address")
    concurrency: PositiveInt = Field(8, description="requests under way at the address at a time")
    batch_size: PositiveInt = Field(16, description="requests in one batch of a local model")
    input_price: NonNegativeFloat | None = Field(None, description="price of a million tokens sent")
    output_price: NonNegativeFloat | None = Field(None, description="price of a million tokens received")
    max_cost: NonNegativeFloat | None = Field(
        None, description="nothing is sent that may cost more in all, in the unit of the prices; null: no limit"
    )
    cache: str | None = Field(DEFAULT_CACHE, description="folder that keeps the replies; null: keep none")

    @model_validator(mode="after")
    def _one_model(self) -> ChatModelConfig:
        if (self.model is None) == (self.address is None):
            given = "neither" if self.model is None else "both"
            raise ValueError(f"a judge has either a model (folder or hub id) or an address; {given} is set")
        if self.address is not None:
            if self.model_name is None:
                raise ValueError("an address needs model_name, the name of the model that the server is to use")
            parts = urlsplit(self.address)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"address starts with http:// or https:// and a host, not {self.address!r}")
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError(
                    "address has no user, password or query; a key belongs into the environment, its variable's name "
                    "into api_key_variable"
                )
        else:
            taken = [name for name in ("model_name", "api_key_variable") if getattr(self, name) is not None]
            if taken:
                raise ValueError(f"{taken[0]} belongs to an address; model={self.model} runs here")
        return self

    @model_validator(mode="after")
    def _cost_has_prices(self) -> ChatModelConfig:
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("max_cost needs input_price and output_price, from which the cost is reckoned")
        return self
