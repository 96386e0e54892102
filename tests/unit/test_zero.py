"""The DeepSpeed JSON, generated or the user's own: snapshots, contradictions, and what the user adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from rlhf.config import config_from_file, config_to_yaml, load_config
from rlhf.config.zero import ZeroConfig
from rlhf.distributed.zero import check_user_entries, check_with_deepspeed, deepspeed_json
from rlhf.errors import EXIT_USAGE, ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
COMMON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 1000000000,
    "wall_clock_breakdown": False,
}
SHARED_SECTION: dict[str, Any] = {
    "overlap_comm": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 50000000,
    "allgather_bucket_size": 50000000,
}
STAGE_3_SECTION: dict[str, Any] = {
    "stage3_prefetch_bucket_size": 50000000,
    "stage3_param_persistence_threshold": 100000,
    "stage3_max_live_parameters": 1000000000,
    "stage3_max_reuse_distance": 1000000000,
    "stage3_gather_16bit_weights_on_model_save": True,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "stage1": {"stage": 1, **SHARED_SECTION},
    "stage2": {"stage": 2, **SHARED_SECTION},
    "stage3": {"stage": 3, **SHARED_SECTION, **STAGE_3_SECTION},
    "stage3_offload": {
        "stage": 3,
        **SHARED_SECTION,
        **STAGE_3_SECTION,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    },
}


def generated(
    zero: ZeroConfig, precision: Literal["fp32", "bf16"] = "fp32", device_type: Literal["cpu", "cuda"] = "cpu"
) -> dict[str, Any] | None:
    return deepspeed_json(
        zero,
        precision=precision,
        micro_batch_size=4,
        accumulation_steps=2,
        max_grad_norm=0.5,
        device_type=device_type,
    )


def test_stage_0_needs_no_deepspeed() -> None:
    assert generated(ZeroConfig(), "fp32") is None
    assert generated(ZeroConfig(), "bf16") is None


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_preset_on_cpu(preset: str, precision: Literal["fp32", "bf16"]) -> None:
    expected = {**COMMON, "zero_optimization": SECTIONS[preset]}
    if preset == "stage3_offload":
        expected["zero_force_ds_cpu_optimizer"] = False
    if precision == "bf16":
        expected |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    config = generated(ZeroConfig(**PRESETS[preset]), precision)
    assert config == expected
    assert json.loads(json.dumps(config)) == expected


def test_on_cuda_communication_overlaps_and_offloaded_memory_is_pinned() -> None:
    config = generated(ZeroConfig(**PRESETS["stage3_offload"]), "bf16", "cuda")
    assert config is not None
    section = config["zero_optimization"]
    assert section["overlap_comm"] is True
    assert section["offload_optimizer"] == section["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_extra_is_merged_last_and_key_by_key() -> None:
    extra = {
        "zero_optimization": {"reduce_bucket_size": 7, "offload_optimizer": {"buffer_count": 4}},
        "gradient_clipping": "auto",
        "wall_clock_breakdown": True,
        "communication_data_type": "fp32",
    }
    zero = ZeroConfig(stage=2, offload_optimizer=True, extra=extra)
    config, plain = generated(zero), generated(ZeroConfig(stage=2, offload_optimizer=True))
    assert config is not None
    assert plain is not None
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "buffer_count": 4}
    assert config["zero_optimization"]["allgather_bucket_size"] == 50_000_000
    assert config["wall_clock_breakdown"] is True
    assert config["communication_data_type"] == "fp32"
    assert config["gradient_clipping"] == plain["gradient_clipping"] == 0.5
    config["zero_optimization"]["offload_optimizer"]["buffer_count"] = 9
    assert zero.extra["zero_optimization"]["offload_optimizer"]["buffer_count"] == 4  # the frozen config is not shared


# What the documentation of Hugging Face gives people to start from, with what each "auto" here becomes below.
HUGGING_FACE = """
{
  "bf16": {"enabled": "auto"},
  "zero_optimization": {
    "stage": 3,
    "offload_optimizer": {"device": "cpu", "pin_memory": true},
    "offload_param": {"device": "none"},
    "overlap_comm": true,
    "contiguous_gradients": true,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "zero_quantized_weights": "auto",
    "stage3_gather_16bit_weights_on_model_save": "auto"
  },
  "gradient_accumulation_steps": "auto",
  "gradient_clipping": "auto",
  "steps_per_print": 2000,
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "wall_clock_breakdown": true
}
"""
RESOLVED: dict[str, Any] = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 50000000,
        "stage3_prefetch_bucket_size": 50000000,
        "stage3_param_persistence_threshold": 100000,
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "steps_per_print": 2000,
    "train_micro_batch_size_per_gpu": 4,
    "wall_clock_breakdown": True,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own(content: object, **fields: Any) -> ZeroConfig:
    """The section with a file of this content, written into the working folder."""
    Path("mine.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return ZeroConfig.model_validate({"config": "mine.json", **fields})


def test_a_file_of_the_user_s_takes_the_place_of_what_is_generated(folder: Path) -> None:
    zero = own(HUGGING_FACE)
    assert (zero.stage, zero.offload_optimizer, zero.offload_parameters) == (3, True, False)
    assert generated(zero, "bf16") == RESOLVED
    assert generated(zero, "bf16", "cuda") == RESOLVED  # nothing of the generated section is mixed in


def test_a_short_file_gets_what_the_loops_decide_and_no_more(folder: Path) -> None:
    zero = own({"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}, "comms_logger": {"enabled": False}})
    assert generated(zero) == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7},
        "comms_logger": {"enabled": False},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def test_our_keys_fill_in_what_a_file_leaves_open(folder: Path) -> None:
    zero = own({"zero_optimization": {"stage": "auto", "offload_param": "auto"}}, stage=3, offload_parameters=True)
    config = generated(zero)
    assert config is not None
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": False},
        "stage3_gather_16bit_weights_on_model_save": True,
    }


def test_extra_is_merged_last_also_into_a_file(folder: Path) -> None:
    zero = own({"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}, extra={"prescale_gradients": True})
    config = generated(zero)
    assert config is not None
    assert config["prescale_gradients"] is True
    assert zero.content == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (
            {"train_micro_batch_size_per_gpu": 8},
            "zero.config: mine.json has train_micro_batch_size_per_gpu=8, but this stage's micro-batch is 4",
        ),
        ({"gradient_accumulation_steps": 1}, "has gradient_accumulation_steps=1, but this stage's batch_size"),
        ({"gradient_clipping": 1.0}, "has gradient_clipping=1.0, but max_grad_norm of this stage is 0.5"),
        ({"bf16": {"enabled": True}}, "has bf16.enabled=true, but distributed.precision makes it false"),
        ({"zero_allow_untested_optimizer": False}, "has zero_allow_untested_optimizer=false"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            "has zero_optimization.stage3_gather_16bit_weights_on_model_save=false, but publishing the weights needs",
        ),
    ],
)
def test_a_contradiction_names_file_key_and_both_values(entries: dict[str, Any], expected: str, folder: Path) -> None:
    zero = own({"zero_optimization": {"stage": 2}, **entries})
    with pytest.raises(ConfigError) as caught:
        generated(zero)
    assert expected in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE
    assert str(caught.value).endswith('or write "auto" there')


def problem(content: object, *arguments: str) -> str:
    """The message for a run with this file."""
    if content is not None:
        Path("mine.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_config(["zero.config=mine.json", *arguments])
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, [], "mine.json cannot be read (No such file or directory); expected a DeepSpeed JSON file"),
        ('{"a": 1,\n "b": }', [], "mine.json is no JSON: line 2, column 7: Expecting value"),
        ('{"a": 1, "a": 2}', [], 'mine.json has the key "a" twice in one object'),
        ("[]", [], "mine.json must hold a JSON object"),
        ({"zero_optimization": {"stage": 3}}, ["zero.stage=2"], "has zero_optimization.stage=3, but zero.stage is 2"),
        ({"zero_optimization": {"stage": 3}}, ["zero=stage2"], "zero.stage: 2 (configs/zero/stage2.yaml:2)"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            ["zero.offload_parameters=false"],
            'zero_optimization.offload_param={"device": "cpu"}, but zero.offload_parameters is false',
        ),
        ({"zero_optimization": {"stage": 4}}, [], 'must be 0, 1, 2, 3 or "auto", it is 4'),
        ({"zero_optimization": 3}, [], "zero_optimization must be an object, it is 3"),
        ({"zero_optimization": {"stage": 0}}, [], "stage 0 runs without DeepSpeed, so nothing would read the file"),
        ({"gradient_clipping": "auto"}, [], "stage 0 runs without DeepSpeed, so nothing would read the file"),
        ({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}, [], "Leave optimizer out"),
        ({"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}}, [], "Leave scheduler out"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}}, [], "distributed.precision is fp32 or bf16"),
        ({"bf16": True, "zero_optimization": {"stage": 2}}, [], "bf16 must be an object"),
        ({"train_batch_size": 32, "zero_optimization": {"stage": 2}}, [], "has train_batch_size=32, but it is"),
    ],
)
def test_a_wrong_file_is_a_config_error(content: object, arguments: list[str], expected: str, folder: Path) -> None:
    assert expected in problem(content, *arguments)


def test_what_is_refused_may_be_there_when_it_says_nothing(folder: Path) -> None:
    zero = own({"optimizer": "auto", "scheduler": None, "fp16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}})
    config = generated(zero)
    assert config is not None
    assert "optimizer" not in config


def test_the_frozen_config_holds_the_file_whatever_becomes_of_it(folder: Path) -> None:
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    Path("mine.json").write_text(json.dumps(content))
    config = load_config(["zero.config=mine.json"]).config
    assert config.zero.content == content
    Path("frozen.yaml").write_text("# @package _global_\n" + config_to_yaml(config))
    assert load_config(["experiment=frozen.yaml"]).config.zero == config.zero
    Path("mine.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert config_from_file("frozen.yaml").zero == config.zero
    Path("mine.json").unlink()
    kept = config_from_file("frozen.yaml").zero
    assert (kept.content, kept.stage, kept.offload_optimizer) == (content, 3, True)
    with pytest.raises(ConfigError, match=r"mine\.json cannot be read"):
        load_config(["zero.config=mine.json"])


@pytest.mark.parametrize(("choice", "sharded"), [("none", False), ("stage2", False), ("stage3", True)])
def test_frozen_models_are_sharded_with_the_preset_of_stage_3(choice: str, sharded: bool) -> None:
    assert load_config([f"zero={choice}"]).config.zero.shard_frozen is sharded
    assert ZeroConfig(stage=3).shard_frozen is False


@pytest.mark.parametrize(
    ("choice", "extra", "expected"),
    [
        ("none", "{prescale_gradients: true}", "stage 0 runs without DeepSpeed, so nothing would read it"),
        ("stage2", "{zero_optimization: {stage: 3}}", "zero.stage would be 3, but zero.stage is 2. Set zero.stage"),
        ("stage2", "{zero_optimization: {offload_optimizer: {device: cpu}}}", "Set zero.offload_optimizer"),
        ("stage3", "{zero_optimization: {offload_param: {device: nvme}}}", "offload_param"),
        ("stage2", "{fp16: {enabled: true}}", "distributed.precision is fp32 or bf16"),
        ("stage2", "{optimizer: {type: AdamW}}", "the optimiser is that of the stage's section"),
        ("stage2", "{zero_optimization: 3}", "zero_optimization must be an object"),
        ("stage2", "{fp16: true}", "has fp16=true"),
        ("stage2", "{gradient_cliping: 1}", "no entry of a DeepSpeed JSON that rlhf can train with; did you mean"),
        ("stage2", "{tensor_parallel: {autotp_size: 2}}", "has tensor_parallel, which is no entry"),
        ("stage2", "{zero_optimization: {cpu_offload: true}}", "it is offload_optimizer now"),
        ("stage1", "{zero_optimization: {offload_optimizer: {ratio: 0.5}}}", "Leave ratio out"),
    ],
)
def test_extra_entries_that_other_keys_decide_are_refused(choice: str, extra: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([f"zero={choice}", f"zero.extra={extra}"])
    assert "zero.extra" in str(caught.value)
    assert expected in str(caught.value)


def test_extra_must_not_contradict_the_training_either(folder: Path) -> None:
    wanted = r'zero\.extra has gradient_clipping=9\.0, but max_grad_norm of this stage is 0\.5.*or write "auto" there'
    with pytest.raises(ConfigError, match=wanted):
        generated(ZeroConfig(stage=2, extra={"gradient_clipping": 9.0}))
    with pytest.raises(ConfigError, match=r"zero\.extra has bf16\.enabled=true"):
        generated(ZeroConfig(stage=2, extra={"bf16": {"enabled": True}}))
    with pytest.raises(ConfigError, match=r"zero\.extra has gradient_clipping=9\.0"):
        generated(own({"zero_optimization": {"stage": 1}}, extra={"gradient_clipping": 9.0}))


def test_a_stage_is_looked_at_before_anything_has_run(folder: Path) -> None:
    def check(*arguments: str) -> None:
        check_user_entries(load_config(["zero.config=mine.json", *arguments]).config)

    content = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 8}
    Path("mine.json").write_text(json.dumps(content))
    check("stages=[sft]", "sft.batch_size=16", "distributed.num_processes=2")
    check("stages=[sft]", "sft.batch_size=32", "sft.micro_batch_size=8", "ppo.max_grad_norm=0.5")
    with pytest.raises(ConfigError, match=r"stage ppo: .*mine\.json has gradient_clipping=1\.0, but max_grad_norm"):
        check("stages=[sft,ppo]", "sft.batch_size=8", "ppo.micro_batch_size=8", "ppo.max_grad_norm=0.5")
    with pytest.raises(ConfigError, match=r"stage sft: .*train_micro_batch_size_per_gpu=8, but .* micro-batch is 32"):
        check("stages=[sft]", "sft.batch_size=32")
    Path("mine.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    check()  # precision auto may become it
    check("distributed.precision=bf16")
    with pytest.raises(ConfigError, match=r"bf16\.enabled=true, but distributed\.precision makes it false"):
        check("distributed.precision=fp32")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"bucket": 3}, "DeepSpeed refuses zero_optimization.bucket: Extra inputs"),
        ({"reduce_bucket_size": "big"}, "DeepSpeed refuses zero_optimization.reduce_bucket_size"),
    ],
)
def test_what_deepspeed_refuses_is_a_config_error(entries: dict[str, Any], expected: str) -> None:
    check_with_deepspeed(ZeroConfig(stage=2, extra={"zero_optimization": {"reduce_bucket_size": "auto"}}))
    with pytest.raises(ConfigError, match=expected):
        check_with_deepspeed(ZeroConfig(stage=2, extra={"zero_optimization": entries}))


def test_another_file_over_a_frozen_config_is_read(folder: Path) -> None:
    Path("mine.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}))
    frozen = "# @package _global_\n" + config_to_yaml(load_config(["zero.config=mine.json"]).config)
    Path("frozen.yaml").write_text(frozen)
    Path("other.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 9}}))
    other = load_config(["experiment=frozen.yaml", "zero.config=other.json"]).config.zero
    assert other.content["zero_optimization"]["reduce_bucket_size"] == 9
    none = load_config(["experiment=frozen.yaml", "zero.config=null"]).config.zero
    assert (none.content, none.config, none.stage) == ({}, None, 2)
    inline = load_config(["zero.content={zero_optimization: {stage: 1}}"]).config.zero
    assert (inline.stage, inline.content) == (1, {"zero_optimization": {"stage": 1}})


def test_sharding_frozen_models_needs_stage_3() -> None:
    with pytest.raises(ConfigError, match=r"shard_frozen needs zero\.stage 3"):
        load_config(["zero=stage2", "zero.shard_frozen=true"])
