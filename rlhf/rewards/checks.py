"""What can be known of the rewards before torch is imported: mistakes, the files they are made of, their models."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import rlhf
from rlhf.config.data import DataConfig, source_of
from rlhf.config.rewards import (
    FUNCTION_INPUTS,
    ExactAnswerReward,
    FunctionReward,
    GoldReward,
    JudgeReward,
    MathReward,
    ModelReward,
    RemoteReward,
    RewardConfig,
    SentimentReward,
    effective_rewards,
)
from rlhf.errors import ConfigError
from rlhf.rewards.judge_checks import check_judge, judge_values
from rlhf.rewards.remote_client import ask_info

RewardConfigs = Mapping[str, RewardConfig]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def reward_files(rewards: RewardConfigs) -> list[Path]:
    """The Python files of the function rewards, absolute, each once, in the order of the config."""
    configs = (config for config in rewards.values() if isinstance(config, FunctionReward))
    return list(dict.fromkeys(_path(config) for config in configs))


def content_hash(rewards: RewardConfigs, section: str = "ppo.rewards") -> str:
    """SHA-256 of everything about the rewards that decides scores, their models' content aside.

    The configs with their names, and the content of the functions' files in place of where they lie. For a stage's
    fingerprint; the models of `reward_model_paths` are inputs of the stage, hashed as such. The server of a remote
    reward is asked what it serves; raises `ConfigError` that names the key in `section` when it does not say.
    """
    body = []
    for name, config in effective_rewards(dict(rewards)).items():
        values = config.model_dump(mode="json", exclude={"path", "file", "num_workers"})
        if isinstance(config, RemoteReward):
            # Where the server is, and how it is asked, decides nothing; what it serves does.
            served = ask_info(config, f"{section}.{name}").hash
            values = {"type": "remote", "weight": config.weight, "normalize": config.normalize, "served": served}
        if isinstance(config, JudgeReward):
            values = judge_values(config, f"{section}.{name}")
        content = hashlib.sha256(_path(config).read_bytes()).hexdigest() if isinstance(config, FunctionReward) else None
        body.append([name, values, content])
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def needs_reward_model(rewards: RewardConfigs) -> bool:
    """Whether one of the rewards is this run's reward model (also when the config names no reward at all)."""
    configs = effective_rewards(dict(rewards)).values()
    return any(isinstance(config, ModelReward) and config.path is None for config in configs)


def reward_model_paths(rewards: RewardConfigs) -> dict[str, str]:
    """Folder or hub id of each reward model that the config names itself, by the reward's name."""
    return {
        name: os.path.expanduser(config.path)
        for name, config in rewards.items()
        if isinstance(config, ModelReward) and config.path is not None
    }


def preflight(rewards: RewardConfigs, data: DataConfig | None, section: str = "ppo.rewards") -> None:
    """Checks what needs neither torch nor the data: files, functions, servers, rewards that only some data can have.

    `data` is None for a server, whose clients send prompts and columns. Raises `ConfigError` that names the key in
    `section`. What a function returns, and whether its columns are there, is seen when it is called.
    """
    for name, config in rewards.items():
        key = f"{section}.{name}"
        if isinstance(config, FunctionReward):
            _check_function(config, key, data)
        elif isinstance(config, JudgeReward):
            check_judge(config, key)
            if config.reference_column is not None and data is not None and not _may_have_columns(data):
                raise ConfigError(
                    f"{key}.reference_column={config.reference_column}: data.type={data.type} has no columns; a "
                    "reference needs data=files or data=hub with a response in a column, or null to rate without one"
                )
        elif isinstance(config, RemoteReward):
            ask_info(config, key)
        elif data is None:
            continue
        elif isinstance(config, GoldReward | SentimentReward) and data.type != "embedded":
            whose = "whose gold reward it is" if config.type == "gold" else "whose words it knows"
            raise ConfigError(
                f"{key}.type={config.type} needs data=embedded, {whose}; data.type is {data.type}. Remove the "
                f"reward (~{key}), or take another type."
            )
        elif isinstance(config, ExactAnswerReward | MathReward) and not _may_have_columns(data):
            raise ConfigError(
                f"{key}.column={config.column}: data.type={data.type} has no columns; a reward of type {config.type} "
                "needs data=files or data=hub with the right answer in a column"
            )


def check_columns(rewards: RewardConfigs, columns: Collection[str], section: str = "ppo.rewards") -> None:
    """Checks that the data has the columns that the rewards ask for; `columns` are the names it has.

    Raises `ConfigError` that names the first one that is missing, by its key in `section`, and lists those there are.
    """
    for name, config in rewards.items():
        if isinstance(config, ExactAnswerReward | MathReward):
            key, wanted = f"{section}.{name}.column={config.column}", [config.column]
        elif isinstance(config, JudgeReward) and config.reference_column is not None:
            key, wanted = f"{section}.{name}.reference_column={config.reference_column}", [config.reference_column]
        elif isinstance(config, FunctionReward):
            key, wanted = f"{section}.{name}.function={config.function}", _needed_columns(config)
        elif isinstance(config, RemoteReward):
            key = f"{section}.{name}.address={config.address}"
            wanted = list(ask_info(config, f"{section}.{name}").columns or ())
        else:
            continue
        missing = [column for column in wanted if column not in columns]
        if missing:
            listed = ", ".join(sorted(columns)) or "none"
            raise ConfigError(f"{key} needs the column {missing[0]}, which the data lacks; its columns are: {listed}")


def function_path(file: str) -> Path:
    """Where a reward's Python file is: here, else in the package's own checkout, whose configs name such files."""
    path = Path(os.path.expanduser(file)).absolute()
    beside = Path(rlhf.__file__).resolve().parent.parent / file
    return beside if not path.exists() and beside.is_file() else path


def _path(config: FunctionReward) -> Path:
    return function_path(config.file)


def _check_function(config: FunctionReward, key: str, data: DataConfig | None) -> None:
    tree = check_python_file(config.file, config.function, key, _path(config))
    function = _definition(tree, config.function)
    if function is not None:
        _check_signature(function, config, key, data)


def check_python_file(file: str, function: str, key: str, path: Path | None = None) -> ast.Module:
    """The syntax tree of a file that defines `function`; `key` is that of the section with `file` and `function`.

    `path` is where the file lies, unless that is as `file` says. Raises `ConfigError` when it does not, or is no Python
    file.
    """
    path = path or Path(os.path.expanduser(file)).absolute()
    if not path.is_file():
        raise ConfigError(f"{key}.file={file}: there is no such file (looked for {path})")
    if path.suffix != ".py":
        raise ConfigError(f"{key}.file={file}: expected a Python file, whose name ends in .py")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{key}.file={file}{line}: is not valid Python: {error}") from error
    except OSError as error:
        raise ConfigError(f"{key}.file={file}: cannot be read: {error.strerror}") from error
    names = _names(tree)
    if function not in names and "*" not in names:
        listed = ", ".join(names) or "no function"
        raise ConfigError(
            f"{key}.function={function}: {file} does not define it; it defines {listed}. Set "
            f"{key}.function to the one that is meant."
        )
    return tree


def _check_signature(function: FunctionNode, config: FunctionReward, key: str, data: DataConfig | None) -> None:
    taken = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    if data is None and "completion_ids" in taken:
        raise ConfigError(
            f"{key}.function={config.function} asks for completion_ids: a server is given texts, and tokens are the "
            "policy's. Leave the argument out."
        )
    if function.args.posonlyargs:
        raise ConfigError(
            f"{key}.function={config.function}: its argument {function.args.posonlyargs[0].arg} is positional-only "
            "(before a `/`); it is called with names, such as prompts=... and completions=..."
        )
    if function.args.kwarg is None:
        unknown = [name for name in config.arguments if name not in taken]
        if unknown:
            raise ConfigError(
                f"{key}.arguments.{unknown[0]}: the function {config.function} takes no argument of that name; it "
                f"takes {', '.join(sorted(taken)) or 'none'}"
            )
    columns = _needed_columns(config)
    if columns and data is not None and not _may_have_columns(data):
        raise ConfigError(
            f"{key}.function={config.function} asks for {columns[0]}; it gets {', '.join(FUNCTION_INPUTS)}, and "
            f"data.type={data.type} has no further columns. Give it a default value, or set {key}.arguments."
            f"{columns[0]}=VALUE."
        )


def _needed_columns(config: FunctionReward) -> list[str]:
    """The arguments of a function without a default that only a column can fill; none where they cannot be read."""
    function = _definition(ast.parse(_path(config).read_bytes()), config.function)
    if function is None:
        return []
    arguments = function.args
    required = [argument.arg for argument in arguments.args[: len(arguments.args) - len(arguments.defaults)]]
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required += [argument.arg for argument, default in keyword_only if default is None]
    return [name for name in required if name not in FUNCTION_INPUTS and name not in config.arguments]


def _names(tree: ast.Module) -> list[str]:
    """What a module defines at its top level: functions first, then other names (`*`: all of another module)."""
    functions, others = [], []
    for node in _statements(tree.body):
        if isinstance(node, FunctionNode):
            functions.append(node.name)
        elif isinstance(node, ast.Assign):
            others += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            others += [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ClassDef):
            others.append(node.name)
    return list(dict.fromkeys([*functions, *others]))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those inside `if`, `try` and the like included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node.body)
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.orelse)
        if isinstance(node, ast.Try):
            yield from _statements([statement for handler in node.handlers for statement in handler.body])


def _definition(tree: ast.Module, name: str) -> FunctionNode | None:
    """The one definition of a function, if nothing decorates it: a decorator may change what it takes."""
    found = [node for node in _statements(tree.body) if isinstance(node, FunctionNode) and node.name == name]
    return found[0] if len(found) == 1 and not found[0].decorator_list else None


def _may_have_columns(data: DataConfig) -> bool:
    source = source_of(data, "prompts")
    return source is not None and source.type in ("files", "hub")
