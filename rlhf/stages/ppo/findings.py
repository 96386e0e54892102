"""What the self-test of stage ppo reports: failed checks with evidence, cause and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf.errors import UserError

CheckName = Literal["first ratio", "KL to the reference", "scores", "sampling log-probs"]


class Cause(NamedTuple):
    """What went wrong, as far as the numbers tell, and what to do about it."""

    cause: str
    remedy: str


@dataclass(frozen=True)
class Finding:
    """One failed check: its name, the numbers, and the cause that fits them best."""

    check: CheckName
    evidence: str
    cause: str
    remedy: str


class SelfTestError(UserError):
    """The first rollout cannot be right; `findings` are the failed checks in their order."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        self.findings = findings
        checks = "1 check" if len(findings) == 1 else f"{len(findings)} checks"
        lines = [f"the first rollout fails {checks} of PPO's self-test; nothing was trained"]
        for finding in findings:
            lines.append(f"  {finding.check}: {finding.evidence}")
            lines.append(f"    likely cause: {finding.cause}")
            lines.append(f"    what to do: {finding.remedy}")
        lines.append("ppo.self_test=false trains on it all the same")
        super().__init__("\n".join(lines))
