"""A wrong config ends in one message that names every mistake, its value, its source and what is right."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlhf
from rlhf.config import config_from_file, load_config, schema
from rlhf.errors import EXIT_USAGE, ConfigError

JARGON = (
    "Input should",
    "pydantic",
    "validation error",
    "Traceback",
    "OmegaConf",
    "full_key",
    "DictConfig",
    "union_tag",
)


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    assert caught.value.exit_code == EXIT_USAGE
    text = str(caught.value)
    assert not [word for word in JARGON if word in text], text
    return text


def experiment(text: str, name: str = "mine.yaml") -> str:
    Path(name).write_text("# @package _global_\n" + text, encoding="utf-8")
    return f"experiment={name}"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        # unknown keys and the nearest right name
        ("ppo.lerning_rate=3e-6", "ppo.lerning_rate = 3e-6  (argument ppo.lerning_rate=3e-6)"),
        ("ppo.lerning_rate=3e-6", "did you mean ppo.learning_rate?"),
        (
            "learning_rate=1",
            "did you mean sft.learning_rate or reward_model.learning_rate or ppo.learning_rate or dpo.learning_rate?",
        ),
        ("--ppo.learning-rate=1", "did you mean ppo.learning_rate?"),
        ("ppo.Learning_Rate=1", "did you mean ppo.learning_rate?"),
        ("pppo.learning_rate=1", "did you mean ppo.learning_rate?"),
        ("ppo.lr=1", "did you mean ppo.learning_rate?"),
        ("kl_coef=1", "did you mean ppo.kl_coefficient?"),
        ("sft.kl_coefficient=1", "did you mean ppo.kl_coefficient?"),
        ("ppo.num_demonstrations=1", "did you mean data.num_demonstrations or evaluate.num_demonstrations?"),
        ("mdel=gpt2", "did you mean model?"),
        ("ppo={'lerning_rate': 1}", "ppo.lerning_rate = 1"),
        ("~ppo.lerning_rate", "did you mean ppo.learning_rate?"),
        ("data.splits.tests=1", "did you mean data.splits.test?"),
        ("xyz=1", "the config has experiment, seed"),
        ("model.xyz=1", "model has path, revision"),
        ("experiment.quickstart=1", "experiment is text"),
        ("seed.x.y=1", "unknown key"),
        ("hydra.verbose=true", "unknown key"),
        # wrong types and ranges
        ("ppo.num_epochs=abc", "expected a whole number, at least 1"),
        ("ppo.num_epochs=1.5", "expected a whole number, at least 1"),
        ("ppo.num_epochs=True", "expected a whole number, at least 1"),
        ("ppo.num_epochs=1e300", "expected a whole number, at least 1"),
        ("seed=", "expected a whole number, at least 0"),
        ("seed=-1", "seed = -1  (argument seed=-1)"),
        ("seed=None", "expected a whole number, at least 0"),
        ("ppo.learning_rate=0", "expected a number, above 0"),
        ("ppo.learning_rate=inf", "expected a number, above 0"),
        ("ppo.gamma=nan", "expected a number, at least 0 and at most 1"),
        ("ppo.clip_low=2", "expected a number, above 0 and below 1"),
        ("ppo.value_clip=x", "expected a number, above 0, or null"),
        ("ppo.whiten_advantages=1", "expected true or false"),
        ("model.scratch.vocab_size=10", "expected a whole number, at least 262"),
        ("zero.stage=7", "expected one of 0, 1, 2, 3"),
        ("zero.stage=true", "expected one of 0, 1, 2, 3"),
        ("tracking.wandb=disable", "did you mean disabled?"),
        ("stages=ppo", "write stages=[ppo]"),
        ("stages=[ppo,evalute]", "did you mean evaluate?"),
        ("stages=[]", "not empty"),
        ("tracking.tags=a,b", "write tracking.tags=[a,b]"),
        ("zero.extra=3", "expected a mapping"),
        ("sft=3", "is a section: set sft.NAME=VALUE"),
        ("sft=None", "is a section: set sft.NAME=VALUE"),
        ("sft=[1]", "is a section"),
        ("ppo={'sampling': {}", "is a section"),
        ("evaluate.judge=gold", "evaluate.judge.type=gold (or classifier, reward_model, language_model)"),
        ("collect={'sampling': 3}", "collect.sampling = 3"),
        # missing values, variants, validators
        ("model=local", "add model.path=FOLDER"),
        ("data.type=files", "data.path"),
        ("data.path=x", "exists for data of types files, hub, labelled_text, here it is embedded: choose data=files"),
        ("data.splits.test=0.1", "data.splits.test = 0.1"),
        ("evaluate.judge.ngram_max=3", "choose evaluate.judge.type=classifier"),
        ("evaluate.judge.type=clasifier", "did you mean classifier?"),
        ("data.type=file", "expected one of embedded, files, hub, labelled_text, parts; did you mean files?"),
        ("zero.offload_optimizer=true", "offload_optimizer needs zero.stage 1, 2 or 3"),
        ("ppo.num_minibatches=3", "num_minibatches (3) must divide batch_size (128)"),
        ("ppo.num_minibatches=3", "ppo.num_minibatches: 3 (argument ppo.num_minibatches=3)"),
        ("ppo.num_minibatches=3", "ppo.batch_size: 128 (default)"),
        ("distributed.num_processes=3", "sft.batch_size (32) and reward_model.batch_size (32)"),
        ("stages=[ppo,sft]", "stages must keep the order"),
        # group choices
        ("model=gtp2", "unknown choice; did you mean gpt2?"),
        ("model=gtp2", "choices: flan-t5-base, flan-t5-small, gemma, "),
        ("experiment=quikstart", "did you mean quickstart?"),
        ("experiment=twin/tdlr", "did you mean twin/tldr?"),
        ("experiment=configs/experiment/quikstart.yaml", "did you mean quickstart?"),
        ("experiment=smoke.yaml", "there is no such file; did you mean smoke?"),
        ("zero=", "unknown choice"),
        ("zero=../zero/none", "unknown choice"),
        ("model=a=b", "unknown choice"),
        # malformed arguments
        ("foo", "expected key=value"),
        ("learning_rate", "did you mean sft.learning_rate=..."),
        ("=x", "expected key=value"),
        ("a..b=1", "names joined by single dots"),
        (".a=1", "names joined by single dots"),
        ("model@x=1", "names joined by single dots"),
        ("", "expected key=value"),
        ("--", "expected key=value"),
        ("~ppo.lam=2", "to set it, write ppo.lam=2"),
        ("run.dir=\ud800", "UTF-8"),
        ("run.dir=${nope}", "Interpolation key 'nope' not found"),
        ("run.dir=${", "cannot be resolved"),
        ("run.dir=${run.dir}", "cannot be resolved"),
    ],
)
def test_each_mistake_has_its_message(argument: str, expected: str) -> None:
    assert expected in message(argument)


def test_all_mistakes_are_named_at_once() -> None:
    mine = experiment(
        "sft:\n  bach_size: 3\nppo:\n  num_epochs: many\n  num_minibatches: 5\nrun: {dir: 123}\npppo: 1\n"
    )
    text = message(mine, "mdel=gpt2", "ppo.gamma=2", "data.path=x", "zero=stage9", "foo", "seed=x", "data.nope=1")
    for expected in (
        "sft.bach_size = 3  (mine.yaml:3)",
        "ppo.num_epochs = many  (mine.yaml:5)",
        "run.dir = 123  (mine.yaml:7)",
        "put it in quotes",
        "pppo = 1  (mine.yaml:8)",
        "mdel = gpt2",
        "ppo.gamma = 2",
        "zero = stage9",
        "foo  (argument)",
        "seed = x",
        "data.nope = 1",
    ):
        assert expected in text
    # What may only follow from the missing zero file is left out: another data type, values that do not fit together.
    assert "data.path" not in text
    assert "must divide" not in text


def test_validators_speak_beside_wrong_values_they_do_not_mention() -> None:
    text = message("ppo.learning_rate=x", "ppo.num_minibatches=3")
    assert "ppo.learning_rate = x" in text
    assert "num_minibatches (3) must divide batch_size (128)" in text


def test_validators_are_silent_about_stand_ins() -> None:
    text = message("ppo.batch_size=x", "ppo.num_minibatches=3", "distributed.num_processes=5")
    assert "must divide" not in text
    assert "sft.batch_size" not in text
    assert "a mistake" in text


def test_a_union_reports_plain_keys() -> None:
    text = message("data=files", "data.format=hhh", "data.splits.test=2", "data.max_prompt_tokens=0")
    for key in ("data.path", "data.format = hhh", "data.splits.test = 2", "data.max_prompt_tokens = 0"):
        assert f"\n  {key}" in text
    assert "data.files" not in text


def test_keys_left_from_another_data_type_can_be_removed() -> None:
    text = message("experiment=smoke", "data=files", "data.path=x")
    assert "data.num_prompts = 64  (configs/experiment/smoke.yaml:" in text
    assert "remove it with ~data.num_prompts" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [\nb: 2", "mine.yaml:3\n      is not valid YAML"),
        ("seed: 1\nseed: 2", "mine.yaml:3\n      is not valid YAML: the key seed appears twice"),
        ("\tseed: 1", "mine.yaml:2\n      is not valid YAML"),
        ("- a", "expected a mapping"),
        ("text", "expected a mapping"),
        (
            "defaults:\n  - override /model: gtp2",
            "model = gtp2  (mine.yaml:3)\n      unknown choice; did you mean gpt2?",
        ),
        ("defaults:\n  - override /modle: gpt2", "mine.yaml\n      cannot be merged"),
        ("defaults: 3", "mine.yaml\n      cannot be merged"),
        ("defaults:\n  - nothere", "experiment = nothere  (mine.yaml:3)"),
        ("seed: ${x", "mine.yaml\n      cannot be merged"),
        ("ppo: 3", "ppo = 3  (mine.yaml:2)\n      expected a section with policy"),
        ("ppo: [1]", "ppo = [1]  (mine.yaml:2)"),
        ("data: 3", "data = 3  (mine.yaml:2)\n      expected a section"),
        ("a: &x [*x]", "mine.yaml"),
        ("ppo:\n  1: 2", "ppo.1 = 2  (mine.yaml:3)"),
        ("seed: 2001-01-01", 'seed = "2001-01-01"  (mine.yaml:2)'),
        ("stages: sft", "stages = sft  (mine.yaml:2)"),
        ("stages: [sft, 3]", "stages = [sft, 3]  (mine.yaml:2)"),
        ("zero: {stage: true}", "zero.stage = true  (mine.yaml:2)"),
        ("experiment: a/b", "experiment = a/b  (mine.yaml:2)"),
        ("experiment: {a: 1}", "experiment  (mine.yaml:2)"),
    ],
)
def test_mistakes_in_a_file_name_file_and_line(content: str, expected: str) -> None:
    text = message(experiment(content), "sft.save_every=x")
    assert expected in text
    # The arguments are judged all the same.
    assert "sft.save_every = x  (argument sft.save_every=x)" in text


def test_an_experiment_without_its_header() -> None:
    Path("bare.yaml").write_text("ppo:\n  num_updates: 3\n")
    assert "bare.yaml:2)\n      an experiment file needs `# @package _global_`" in message("experiment=bare.yaml")


def test_unreadable_files() -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml\n      is not UTF-8" in message("model=binary.yaml")
    Path("configs/model").mkdir(parents=True)
    Path("configs/model/tiny.yaml").write_text("a: [\n")
    assert "./configs/model/tiny.yaml:2\n      is not valid YAML" in message()


def test_config_of_a_run_folder() -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml\n.*no such file"):
        config_from_file("nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config_from_file(".")
    Path("config.yaml").write_text("sed: 1\nppo:\n  gamma: 3\ndata: {type: files}\n")
    with pytest.raises(ConfigError) as caught:
        config_from_file(Path("config.yaml"))
    text = str(caught.value)
    assert "sed = 1  (config.yaml:1)" in text
    assert "ppo.gamma = 3  (config.yaml:3)" in text
    assert "data.path  (config.yaml:4)" in text
    Path("torn.yaml").write_text("ppo:\n  gam")
    with pytest.raises(ConfigError):
        config_from_file("torn.yaml")
    Path("list.yaml").write_text("")
    with pytest.raises(ConfigError, match="expected a mapping"):
        config_from_file("list.yaml")


def test_every_key_is_described_in_plain_words() -> None:
    for candidates in schema.entries().values():
        for entry in candidates:
            if not entry.is_section:
                text = schema.describe(entry.type)
                assert text
                assert "typing" not in text
                assert "<" not in text
                assert entry.field.description or entry.path[-1] == schema.DISCRIMINATOR, entry.key


KEYS = st.sampled_from(
    [*schema.leaf_keys(), "ppo", "data", "model", "zero", "experiment", "data.splits", "zero.extra.a"]
)
VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["null", "None", "[", "{", "[1", "{'a': 1}", "{'type': 'files'}", "???", "${", "${seed}", "${a:b}", "'"]
    ),
    st.floats().map(str),
    st.integers().map(str),
    st.text("[]{}()'\"\\${}:,=.~+-#&* \n0aé\x00\ud800", max_size=20),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.builds("{}={}".format, KEYS, VALUES),
            st.builds("{}{}={}".format, st.sampled_from(["--", "++", "+", "~", ""]), st.text(max_size=10), VALUES),
        ),
        max_size=4,
    )
)
def test_arguments_never_raise_anything_but_a_config_error(arguments: list[str]) -> None:
    try:
        load_config(arguments)
    except ConfigError as error:
        str(error).encode()


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("${seed}"))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
FILES = st.one_of(
    st.text(max_size=60),
    st.text("ab: -[]{}&*!|>'\"\n#?%@`${}", max_size=40),
    st.builds(
        "{}: {}\n".format, st.sampled_from(["seed", "ppo", "data", "defaults", "experiment", "stages"]), TREES.map(repr)
    ),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FILES, st.sampled_from(["experiment", "model", "data"]))
def test_files_never_raise_anything_but_a_config_error(content: str, group: str) -> None:
    Path("fuzz.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    for load in (lambda: load_config([f"{group}=fuzz.yaml"]), lambda: config_from_file("fuzz.yaml")):
        try:
            load()
        except ConfigError as error:
            str(error).encode()


DRIVER = """
import sys
from rlhf.config import load_config
from rlhf.errors import ConfigError
try:
    load_config(sys.argv[1:])
except ConfigError as error:
    heavy = {"torch", "transformers", "deepspeed", "numpy", "wandb", "datasets"} & set(sys.modules)
    print(error, sorted(heavy), sep="\\n")
    sys.exit(error.exit_code)
"""


def test_a_wrong_config_ends_quickly_without_heavy_imports() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(rlhf.__file__).parent.parent)}
    command = [sys.executable, "-c", DRIVER, "experiment=quickstart", "ppo.lerning_rate=3e-6", "model=gtp2"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == EXIT_USAGE, result.stderr
        assert result.stdout.endswith("[]\n"), result.stdout
    # Of processor time: other tests may keep the cores busy.
    assert min(seconds) < 1.5, f"a wrong config takes {seconds} s of processor time to be told"
