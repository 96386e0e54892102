"""`serve`: the reward server of `rlhf serve`. Nothing here changes a run."""

from __future__ import annotations

from pydantic import Field

from rlhf.config.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from rlhf.config.rewards import Rewards


class ServeConfig(Section):
    """What is served, where, and how much at a time. `reward.X=V` of `rlhf serve` is `serve.rewards.reward.X=V`."""

    rewards: Rewards = Field({}, description="rewards to serve, by name; their weighted sum is the score")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 lets other machines in")
    port: int = Field(8010, ge=0, le=65535, description="port to listen on; 0 takes a free one and prints it")
    token_variable: str | None = Field(
        None, description="environment variable with the token that requests must carry; null asks for none"
    )
    max_batch_size: PositiveInt = Field(64, description="responses in one forward pass, of one or several requests")
    max_wait_ms: NonNegativeFloat = Field(5.0, description="longest wait for further requests to share a pass with")
    max_request_rows: PositiveInt = Field(1024, description="most responses in one request")
    max_waiting_rows: PositiveInt = Field(16384, description="responses that may wait; then requests get status 503")
    max_body_mib: PositiveFloat = Field(16.0, description="largest request in MiB")
    stop_seconds: PositiveFloat = Field(25.0, description="what requests under way may take after Ctrl-C or SIGTERM")
