"""`launcher`: whether a run starts here or becomes a job of a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.base import PositiveInt, Section

# One line of a batch script, or a part of one.
Line = Annotated[str, Field(pattern=r"^[^\r\n]*$")]


class LauncherConfig(Section):
    """`local` runs at once. `slurm` writes a batch script with `distributed.num_nodes` nodes, and may submit it."""

    type: Literal["local", "slurm"] = Field("local", description="local runs here, slurm writes a batch script")
    submit: bool = Field(False, description="slurm: hand the script to sbatch")
    partition: Line | None = Field(None, description="slurm: --partition")
    account: Line | None = Field(None, description="slurm: --account")
    qos: Line | None = Field(None, description="slurm: --qos")
    time_limit: Line | None = Field(None, description="slurm: --time, such as 24:00:00 or 2-00:00:00")
    gpus_per_node: Annotated[int, Field(ge=0)] | None = Field(
        None, description="slurm: --gpus-per-node; null asks for num_processes, none with distributed.device=cpu"
    )
    cpus_per_task: PositiveInt | None = Field(
        None, description="slurm: --cpus-per-task, CPU cores of a node; null asks for num_threads, or 4, a process"
    )
    memory: Line | None = Field(None, description="slurm: --mem, memory of a node, such as 512G; 0 is all of it")
    signal_seconds: PositiveInt = Field(120, description="slurm: SIGTERM so long before the time limit, to save")
    requeue: bool = Field(True, description="slurm: --requeue, start again after a preemption or a node failure")
    extra: tuple[Line, ...] = Field((), description="slurm: further options of sbatch, such as --constraint=a100")
    setup: tuple[Line, ...] = Field((), description="slurm: shell lines before the run, such as module load cuda")
    python: Line | None = Field(None, description="slurm: the Python of the nodes; null is the one that runs now")

    @model_validator(mode="after")
    def _something_to_submit(self) -> LauncherConfig:
        if self.submit and self.type != "slurm":
            raise ValueError(
                f"launcher.submit=true submits a batch script, but launcher.type is {self.type}, which writes none: "
                "write launcher=slurm as well, or launcher.submit=false to run here"
            )
        return self
