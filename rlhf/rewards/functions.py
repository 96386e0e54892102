"""Rewards that are Python functions with TRL's signature: f(prompts, completions, **columns) -> list[float | None]."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf.config.rewards import FUNCTION_INPUTS, FunctionReward
from rlhf.errors import ConfigError
from rlhf.records import PromptContent, prompt_to_json
from rlhf.rewards.checks import function_path
from rlhf.rewards.protocol import RewardBatch, RewardError, shown

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# A name of our own, so that no module called like the file is hidden.
_MODULE_PREFIX = "rlhf_reward_file_"


# Beyond this a number is infinite in float32.
_LARGEST = 3.0e38


@dataclass(frozen=True)
class FunctionScorer:
    """A function as a reward: it gets every response of a batch at once and gives a number, or None, for each.

    It is called by keyword with what its signature takes (all of it, if it takes `**kwargs`):

    - `prompts` and `completions`: texts; for a conversation its messages, and the response as a list of one message;
    - `completion_ids`: the token ids of each response;
    - each data column by its name, and `arguments`.

    None means that the reward does not apply to a response.
    """

    function: Callable[..., Any]
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    may_abstain: ClassVar[bool] = True

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (B,), NaN for None.

        Raises `RewardError` when the function raises, asks for what is not there, or gives anything but a list of B
        finite numbers and Nones.
        """
        given = self._inputs(batch)
        try:
            result = self.function(**given)
            if inspect.isawaitable(result):
                result = _run_to_end(result)
        except Exception as error:  # somebody else's code may raise anything: where and what is all there is to say
            raise RewardError(f"reward {self.name}: {self._failure(error)}") from error
        return torch.tensor(self._checked(result, batch), dtype=torch.float32)

    def _inputs(self, batch: RewardBatch) -> dict[str, Any]:
        hidden = [name for name in self.arguments if name in batch.columns]
        if hidden:
            raise RewardError(
                f"reward {self.name}: {hidden[0]} is both an argument of the function and a column of the data; "
                "rename the argument"
            )
        available: dict[str, Any] = {name: list(values) for name, values in batch.columns.items()}
        available |= self.arguments
        available["prompts"] = [prompt_to_json(prompt) for prompt in batch.prompts]
        available["completions"] = [_plain_response(p, r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
        available["completion_ids"] = batch.response_tokens()
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            # Some built-in functions have no signature.
            return available
        for parameter in parameters:
            needed = parameter.default is inspect.Parameter.empty and parameter.kind not in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            )
            if needed and (parameter.kind not in _NAMED or parameter.name not in available):
                raise RewardError(
                    f"reward {self.name}: the function asks for {parameter.name}, which is neither an input "
                    f"({', '.join(FUNCTION_INPUTS)}) nor a column of the data ({', '.join(batch.columns) or 'none'}) "
                    "nor one of its arguments"
                )
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return available
        taken = {parameter.name for parameter in parameters if parameter.kind in _NAMED}
        return {name: value for name, value in available.items() if name in taken}

    def _failure(self, error: Exception) -> str:
        """The exception, and the last line of the function's own file that led to it."""
        function = inspect.unwrap(self.function)
        code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)[1:]
        own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
        place = (own or frames)[-1] if frames else None
        what = f"{type(error).__name__}: {error}"
        if place is None:
            return f"the function cannot be called: {what}"
        return f"{place.filename}, line {place.lineno}, in {place.name}: {what} (--debug shows the traceback)"

    def _checked(self, result: Any, batch: RewardBatch) -> list[float]:
        if isinstance(result, Tensor) or type(result).__module__ == "numpy":
            result = result.tolist()
        if not isinstance(result, list | tuple):
            raise RewardError(
                f"reward {self.name}: the function must return a list of {len(batch)} numbers, one for each "
                f"completion; it returned {_described(result)}"
            )
        if len(result) != len(batch):
            raise RewardError(
                f"reward {self.name}: the function returned {len(result)} numbers for {len(batch)} completions"
            )
        return [self._number(value, batch.responses[row]) for row, value in enumerate(result)]

    def _number(self, value: Any, response: str) -> float:
        if value is None:
            return math.nan
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if type(value).__module__ == "numpy" and hasattr(value, "item"):
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise RewardError(
                f"reward {self.name}: the function returned {_described(value)} for the response {shown(response)}; "
                "expected a number, or None where the reward does not apply"
            )
        number = _as_float(value)
        if not math.isfinite(number) or abs(number) > _LARGEST:
            raise RewardError(
                f"reward {self.name}: the function returned {number} for the response {shown(response)}; "
                "expected a finite number, or None where the reward does not apply"
            )
        return number


def _as_float(value: Any) -> float:
    """The number as a float; infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def load_function(config: FunctionReward, name: str, section: str = "ppo.rewards") -> FunctionScorer:
    """The function of a file. `name` is the reward's, below the config key `section`, for errors.

    The file is run as a module of its own: it may import installed packages, and nothing beside it. Raises
    `ConfigError` when it cannot be run or does not define the function.
    """
    key = f"{section}.{name}"
    path = function_path(config.file).resolve()
    module_name = _MODULE_PREFIX + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    specification = importlib.util.spec_from_file_location(module_name, path)
    if specification is None or specification.loader is None:
        raise ConfigError(f"{key}.file={config.file}: expected a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses and pickles look their module up.
    sys.modules[module_name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # running somebody else's file may raise anything, `SyntaxError` included
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = own[-1].lineno if own else getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise ConfigError(f"{key}.file={config.file}{place}: {type(error).__name__}: {error}") from error
    function = getattr(module, config.function, None)
    if not callable(function):
        raise ConfigError(f"{key}.function={config.function}: {path} defines no function of that name")
    return FunctionScorer(function, name, config.arguments)


def _run_to_end(result: Any) -> Any:
    """What an awaitable gives, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaited(result))
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(lambda: asyncio.run(_awaited(result))).result()


async def _awaited(result: Any) -> Any:
    return await result


def _plain_response(prompt: PromptContent, response: str) -> Any:
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def _described(value: Any) -> str:
    return "None" if value is None else f"{shown(value)} ({type(value).__name__})"
