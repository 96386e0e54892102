"""`distributed`: nodes, processes, device and precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class DistributedConfig(Section):
    """How many processes work on how many hosts, on what, in which precision."""

    num_processes: PositiveInt = Field(1, description="processes on each host, one for each GPU or, on CPU, as asked")
    num_nodes: PositiveInt = Field(1, description="hosts; each runs the same command with a node_rank of its own")
    node_rank: NonNegativeInt | None = Field(None, description="this host's number, from 0; null reads Slurm's")
    rendezvous: str | None = Field(None, description="HOST:PORT of node 0 that all reach; null reads Slurm's node list")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is a GPU")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto is bf16 on CUDA and fp32 on CPU")
    num_threads: PositiveInt | None = Field(None, description="CPU threads a process; null shares the cores out")
    determinism: Literal["default", "strict"] = Field(
        "default", description="strict: the same bits again or an error, slower; one thread a process unless set"
    )
    stop_seconds: PositiveFloat = Field(25, description="what a stage may take to end by SIGTERM before it is killed")
    silent_seconds: float = Field(6, ge=2, allow_inf_nan=False, description="a node unheard for so long is gone")
    timeout_seconds: PositiveInt = Field(600, description="collective operations and nodes that wait longer fail")

    @property
    def world_size(self) -> int:
        """Processes on all hosts together."""
        return self.num_nodes * self.num_processes

    @property
    def fixed_threads(self) -> int | None:
        """CPU threads a process; None leaves them to the machine, which `determinism=strict` does not: it takes one."""
        return 1 if self.num_threads is None and self.determinism == "strict" else self.num_threads

    @field_validator("rendezvous")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @model_validator(mode="after")
    def _rank_is_below_the_number(self) -> DistributedConfig:
        if self.node_rank is not None and self.node_rank >= self.num_nodes:
            raise ValueError(
                f"distributed.node_rank ({self.node_rank}) must be below distributed.num_nodes ({self.num_nodes}): the "
                "nodes are numbered from 0"
            )
        return self


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, an IPv6 host in brackets. Raises `ValueError` for anything else."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    valid_host = bool(host) and (bracketed or ":" not in host) and not any(character.isspace() for character in host)
    if not (colon and valid_host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"expected HOST:PORT with a port from 1 to 65535, such as gpu01:29400, got {address!r}")
    return host.strip("[]"), int(port)
