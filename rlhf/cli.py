"""The `rlhf` command: it wires the parts together, and nothing imports it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import rlhf
from rlhf.distributed import stopping
from rlhf.errors import EXIT_FAILURE, EXIT_SUCCESS, EXIT_USAGE, ConfigError, UserError
from rlhf.runs.sweep_agent import with_verb
from rlhf.terminal import flush_all, say

# Verbs that run one stage: `rlhf reward-model ...` is `rlhf run ... stages=[reward_model]`.
STAGE_VERBS = {
    "sft": "sft",
    "collect": "collect",
    "reward-model": "reward_model",
    "reward-report": "reward_report",
    "ppo": "ppo",
    "dpo": "dpo",
    "best-of-n": "best_of_n",
    "evaluate": "evaluate",
    "report": "report",
}
VERBS = {
    "run": "run the stages of an experiment, skipping what is finished and resuming what was interrupted",
    "sft": "run stage sft alone: supervised fine-tuning, the warm start",
    "collect": "run stage collect alone: sample pairs of responses and have them labelled",
    "reward-model": "run stage reward_model alone: train on comparisons",
    "reward-report": "report on any reward model, reward_report.reward_model=PATH: comparisons, RewardBench files",
    "ppo": "run stage ppo alone: optimise the policy against the reward model with a KL penalty",
    "dpo": "run stage dpo alone: train the policy on comparisons, without a reward model",
    "best-of-n": "run stage best_of_n alone: the best of n responses by each reward, and what a judge thinks of them",
    "evaluate": "run stage evaluate alone: judge the policy against the baseline on held-out prompts",
    "report": "write report.html from what the run folder holds; report RUN RUN ... compares runs on one page",
    "label": "serve the page on which people label: store=FILE [port=8600] [annotators=[anna,ben]] ...",
    "preferences": "the preference store: import from=FILE, export to=FOLDER, status, check",
    "serve": "serve a reward over HTTP: reward.model=FOLDER, or 'reward={type: ...}'; --json for machines",
    "config": "print the resolved config and where each value came from",
    "plan": "say whether the training stages fit into memory, where it goes and how long they take; --json",
    "diff": "two run folders: differing config, data, packages, code, the first diverging step; --json, --exit-code",
    "replay": "run RUN again, the same code, config, data and seed, and compare step by step",
    "verify": "run an experiment, or take run=FOLDER, and say PASS or FAIL by its expected.json; alone: lists them",
    "sweep": "make a sweep of a W&B sweep file: FILE [name=NAME]; status SWEEP shows it, retry SWEEP: failed trials",
    "agent": "work on a sweep: SWEEP [--count N]; any number of them, on any number of hosts",
    "prove": "prove a full-scale config on a CPU: plan, data adapters and first steps on tiny stand-ins; keep=FOLDER",
    "doctor": "check whether this machine runs it: versions, devices, disk, network, ranks; --json for machines",
}


def usage() -> str:
    """The help text."""
    verbs = "\n".join(f"  {name:<13} {text}" for name, text in VERBS.items())
    return f"""usage: rlhf VERB [group=choice ...] [key=value | --key=value ...] [--debug]

{verbs}

Examples:
  rlhf run experiment=quickstart
  rlhf run experiment=quickstart seed=2 ppo.kl_coefficient=0.1
  rlhf run experiment=quickstart distributed.num_processes=2 zero=stage2
  rlhf run experiment=quickstart stages=[ppo,evaluate,report] ppo.policy=FOLDER
  rlhf config experiment=quickstart

Groups: experiment, model, data, zero, peft, ppo, launcher.
`rlhf config experiment=NAME` lists every key with its value and origin.
The same command again resumes, or finds nothing to do. run.dir=FOLDER chooses the run folder.
Exit codes: 0 success, 2 wrong usage or config, 75 waiting for people's labels, 130 Ctrl-C, 143 SIGTERM, 137 a rank was
killed, 1 anything else.
--debug shows tracebacks; --version prints the version."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `rlhf` command."""
    code = _main(list(sys.argv[1:] if arguments is None else arguments))
    # The end of Python would do it with an exit code of its own where nobody reads any more.
    flush_all()
    sys.exit(code)


def _main(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(usage())
        return EXIT_SUCCESS if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        say(f"rlhf {rlhf.__version__}")
        return EXIT_SUCCESS
    verb, *rest = with_verb(arguments, os.environ)
    if any(argument in ("-h", "--help") for argument in rest):
        say(usage())
        return EXIT_SUCCESS
    try:
        code = _dispatch(verb, rest, debug)
        if sys.stdout is not None:
            sys.stdout.flush()  # a disk that is full is known by now
        return code
    except BrokenPipeError:
        return EXIT_FAILURE  # whoever read our output (`head`, say) has enough of it
    except KeyboardInterrupt as error:
        return stopping.explain_stop(error)
    except (UserError, OSError) as error:
        from rlhf.worker import explain

        return explain(error, None, debug)


def _dispatch(verb: str, arguments: list[str], debug: bool) -> int:
    # For what the launcher does not see: the imports, composing the config, hashing data, writing the report.
    stopping.install()
    if verb not in VERBS:
        near = difflib.get_close_matches(verb.replace("_", "-"), VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown verb {verb!r}{hint} (rlhf --help lists them: {', '.join(VERBS)})")
    from rlhf.config.compose import load_config, render_sources

    if verb == "doctor":
        from rlhf.doctor import run_doctor

        return run_doctor(arguments)
    if verb == "label":
        from rlhf.distributed.launch import die_with_parent
        from rlhf.preferences.page.command import run_label

        die_with_parent()  # started by a run that waits for people
        return run_label(arguments)
    if verb == "preferences":
        from rlhf.preferences.command import run_preferences

        return run_preferences(arguments)
    if verb == "serve":
        from rlhf.serving.command import run_serve

        return run_serve(arguments)
    if verb == "prove":
        from rlhf.proving import run_prove

        return run_prove(arguments)
    if verb == "plan":
        from rlhf.planning.command import run_plan

        return run_plan(arguments)
    if verb == "diff":
        from rlhf.evidence.diff import run_diff

        return run_diff(arguments)
    if verb == "replay":
        from rlhf.evidence.replay import run_replay

        return run_replay(arguments, debug)
    if verb == "verify":
        from rlhf.evidence.verify import run_verify

        return run_verify(arguments, debug)
    if verb in ("sweep", "agent"):
        from rlhf.sweeps.command_line import run_agent, run_sweep

        return run_sweep(arguments) if verb == "sweep" else run_agent(arguments)
    if verb == "report":
        from rlhf.runs.comparison.command import is_comparison, run_report

        if is_comparison(arguments):
            return run_report(arguments)
    if verb in STAGE_VERBS:
        arguments = [*arguments, f"stages=[{STAGE_VERBS[verb]}]"]
    loaded = load_config(arguments)
    if verb == "config":
        print(render_sources(loaded))
        return EXIT_SUCCESS
    from rlhf.supervisor import supervise

    return supervise(loaded.config, command=["rlhf", verb, *arguments, *(["--debug"] if debug else [])], debug=debug)


if __name__ == "__main__":
    main()
