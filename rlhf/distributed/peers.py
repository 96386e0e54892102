"""What a node's launcher and the other nodes of a run tell each other, and how a group of ranks ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class LaunchResult:
    """How a group of ranks ended.

    `exit_code`: 0 when every rank succeeded; else the first failing rank's (128 + n for one ended by signal n, so 137
    for `kill -9`); 128 + n when the supervisor itself was told to end by signal n (130 for Ctrl-C).
    `rank`: the rank that failed first, None on success and after an interruption. `interrupted_by`: the signal the
    supervisor got, if any. `log_tail`: the last lines that rank wrote, empty for rank 0, whose output was inherited.
    `where`: the other node on which the rank ran; empty on this one. `problem`: what is wrong when no rank is to blame.
    After an interruption, `while_stopping` are the ranks that failed instead of ending as they were asked to, and
    `killed` says that some did not end in time, or before a second Ctrl-C.
    """

    exit_code: int
    rank: int | None = None
    interrupted_by: int | None = None
    log_tail: str = ""
    where: str = ""
    problem: str = ""
    while_stopping: tuple[LaunchResult, ...] = ()
    killed: bool = False

    @property
    def culprit(self) -> str:
        """`rank 3`, or `rank 3 on node 1 (gpu02)`."""
        return f"rank {self.rank}" + (f" on {self.where}" if self.where else "")

    def describe(self) -> str:
        """One line for the user."""
        if self.interrupted_by is not None:
            return f"stopped by {signal.Signals(self.interrupted_by).name}"
        if self.rank is None:
            return self.problem or "all ranks succeeded"
        if self.exit_code <= 128:
            return f"{self.culprit} ended with exit code {self.exit_code}"
        number = self.exit_code - 128
        names = {member.value: member.name for member in signal.Signals}
        hint = "; often this means that memory ran out" if number == signal.SIGKILL else ""
        return f"{self.culprit} was ended by signal {number} ({names.get(number, 'unknown')}){hint}"


@dataclass(frozen=True)
class Placement:
    """Where this node's ranks stand among all, and the address at which all ranks meet rank 0.

    `interface`: the network interface on which this node reaches the others, None where it is not known.
    """

    node_rank: int
    num_nodes: int
    address: str
    port: int
    interface: str | None


@dataclass(frozen=True)
class Word:
    """What the other nodes say while the ranks run; an empty one asks to end because a rank elsewhere failed."""

    failure: LaunchResult | None = None
    signal: int | None = None
    at_once: bool = False


class Peers(Protocol):
    """The supervisors of a run's other nodes, as the one that waits for its own ranks sees them."""

    placement: Placement

    def tell_failure(self, failure: LaunchResult) -> None:
        """A rank of this node failed."""

    def tell_signal(self, number: int, at_once: bool) -> None:
        """This node was told to end by a signal, or a second time, by which all ranks are to be killed at once."""

    def poll(self) -> list[Word]:
        """What the others said since the last call."""

    def busy(self) -> bool:
        """Whether ranks of other nodes run for whose end this node waits."""

    def give_up(self) -> None:
        """Stops waiting for nodes that should have ended their ranks by now."""
