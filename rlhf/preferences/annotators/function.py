"""A Python function of the user's as an annotator of pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.annotators import ANNOTATOR_FUNCTION_INPUTS, FunctionAnnotator
from rlhf.config.rewards import FunctionReward
from rlhf.errors import ConfigError, DataError
from rlhf.preferences.annotators.protocol import Given, ShownTask
from rlhf.preferences.annotators.scoring import file_hash
from rlhf.preferences.annotators.simulated import keyed_uniform
from rlhf.preferences.store import AnnotatorKind, Answer, Choice, Tie
from rlhf.records import prompt_to_json
from rlhf.rewards.functions import load_function
from rlhf.rewards.protocol import columns_by_name, shown

_EXPECTED = '"first", "second", "tie", a probability of the first, or None'


@dataclass(frozen=True)
class FunctionBased:
    """Calls the function with all pairs of a chunk at once: f(prompts, first, second, **columns).

    `prompts` are texts, or lists of messages; `first` and `second` the responses' texts as they are shown. It gets the
    columns and `arguments` that its signature names, or all with `**kwargs`. A probability is drawn from, keyed by the
    task.
    """

    name: str
    config: FunctionAnnotator
    function: Callable[..., Any]
    seed: int
    key: str
    kind: AnnotatorKind = "rule"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The function's name and arguments, the file's content, and the seed."""
        values = self.config.model_dump(mode="json", exclude={"name"})
        return values | {"file": file_hash(self.config.file), "seed": self.seed}

    def prepare(self, tasks: Sequence[ShownTask]) -> str | None:
        """What a function costs, only its author knows. Raises `ConfigError` for tasks that are no pairs."""
        other = next((task.kind for task in tasks if task.kind != "pairwise"), None)
        if other is not None:
            raise ConfigError(f"{self.key}: a function answers pairs, and there are {other} tasks; take another type")
        return None

    def figures(self) -> dict[str, Any]:
        """Nothing but what the store counts."""
        return {}

    def answer(self, tasks: Sequence[ShownTask]) -> list[Given]:
        """What the function says. Raises `DataError` when it raises, or gives anything but a verdict a pair."""
        given = self._inputs(tasks)
        try:
            result = self.function(**given)
        except Exception as error:  # somebody else's code may raise anything: what it was is all there is to say
            raise DataError(
                f"{self.key}.function={self.config.function}: {type(error).__name__}: {error} (--debug shows the "
                "traceback)"
            ) from error
        if not isinstance(result, list | tuple) or len(result) != len(tasks):
            size = f"{len(result)} verdicts" if isinstance(result, list | tuple) else shown(result)
            raise DataError(
                f"{self.key}.function={self.config.function}: expected a list of {len(tasks)} verdicts, one for each "
                f"pair; it returned {size}"
            )
        return [Given(self._answer(task, verdict)) for task, verdict in zip(tasks, result, strict=True)]

    def _inputs(self, tasks: Sequence[ShownTask]) -> dict[str, Any]:
        available: dict[str, Any] = columns_by_name([task.prompt.columns for task in tasks])
        hidden = [name for name in self.config.arguments if name in available]
        if hidden:
            raise DataError(
                f"{self.key}.arguments.{hidden[0]} is a column of the data as well; rename the argument of the function"
            )
        available |= self.config.arguments
        available |= {
            "prompts": [prompt_to_json(task.prompt.prompt) for task in tasks],
            "first": [task.responses[0].text for task in tasks],
            "second": [task.responses[1].text for task in tasks],
        }
        parameters = inspect.signature(self.function).parameters.values()
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return available
        missing = [
            parameter.name
            for parameter in parameters
            if parameter.default is inspect.Parameter.empty and parameter.name not in available
        ]
        if missing:
            columns = [name for name in available if name not in (*ANNOTATOR_FUNCTION_INPUTS, *self.config.arguments)]
            raise DataError(
                f"{self.key}.function={self.config.function} asks for {missing[0]}, which is neither an input "
                f"({', '.join(ANNOTATOR_FUNCTION_INPUTS)}) nor a column ({', '.join(columns) or 'none'}) nor one of "
                "its arguments"
            )
        return {parameter.name: available[parameter.name] for parameter in parameters if parameter.name in available}

    def _answer(self, task: ShownTask, verdict: Any) -> Answer | None:
        first, second = (response.id for response in task.responses)
        if verdict is None:
            return None
        if isinstance(verdict, str) and verdict in ("first", "second", "tie"):
            return Tie() if verdict == "tie" else Choice(first if verdict == "first" else second)
        if type(verdict).__module__ == "numpy" and hasattr(verdict, "item"):
            verdict = verdict.item()
        if isinstance(verdict, int | float) and not isinstance(verdict, bool) and 0 <= verdict <= 1:
            uniform = keyed_uniform(self.seed, self.name, "choice", task.prompt.prompt, task.key)
            return Choice(first if uniform < verdict else second)
        raise DataError(
            f"{self.key}.function={self.config.function} returned {shown(verdict)} for a pair; expected {_EXPECTED}"
        )


def load_annotator_function(config: FunctionAnnotator, name: str, seed: int, key: str) -> FunctionBased:
    """The annotator of a Python file; `key` is the config key. Raises `ConfigError` when the function cannot be had."""
    section, _, last = key.rpartition(".")
    loaded = load_function(FunctionReward(file=config.file, function=config.function), last, section)
    return FunctionBased(name, config, loaded.function, seed, key)
