"""The problem of the study `closed_form`: a tiny model, prompts, a table of rewards, and where a policy stands."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, PreTrainedTokenizerFast

from rlhf.config.closed_form import ClosedFormConfig
from rlhf.evaluation.closed_form import (
    Response,
    Standing,
    enumerate_responses,
    optimum,
    response_table,
    right_padded,
    standing,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EOS = "<|eos|>"
EOS_ID = 0
MAX_POSITIONS = 64
# What keys the random numbers of the model and of the reward table, besides the seed.
_MODEL_STREAM, _REWARD_STREAM = 11, 12


@dataclass(frozen=True)
class Problem:
    """Everything of the study that all algorithms share.

    `rewards` and `reference_logprobs` have shape (P, N) float64, in the order of `prompts` and `responses`.
    """

    prompts: tuple[str, ...]
    prompt_ids: tuple[Response, ...]
    responses: tuple[Response, ...]
    rewards: Tensor
    reference_logprobs: Tensor
    tokenizer: PreTrainedTokenizerFast
    config: ClosedFormConfig
    seed: int
    _rows: dict[str, int] = field(repr=False)
    _columns: dict[Response, int] = field(repr=False)

    def new_model(self) -> PreTrainedModel:
        """The model that every algorithm starts from and that is the reference of the KL; equal at each call."""
        return _new_model(self.config, self.seed)

    def reward_of(self, prompt: str, response: Sequence[int]) -> float:
        """The reward of a response, EOS included where it stopped. Raises `KeyError` for what cannot be sampled."""
        return float(self.rewards[self._rows[prompt], self._columns[tuple(response)]])

    def score(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
        """The reward as a function with TRL's signature, which every algorithm is given."""
        return [self.reward_of(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    def optimum(self, beta: float) -> Standing:
        """Where the optimal policy stands."""
        logprobs, _ = optimum(reference_logprobs=self.reference_logprobs, rewards=self.rewards, beta=beta)
        return standing(logprobs=logprobs, reference_logprobs=self.reference_logprobs, rewards=self.rewards, beta=beta)

    def standing(self, policy: nn.Module, beta: float) -> Standing:
        """Where the policy stands, exactly."""
        logprobs = response_table(policy, self.prompt_ids, self.responses, pad_id=EOS_ID)
        return standing(logprobs=logprobs, reference_logprobs=self.reference_logprobs, rewards=self.rewards, beta=beta)


def make_problem(config: ClosedFormConfig, seed: int) -> Problem:
    """The problem of a seed: its model, prompts and rewards follow from the arguments alone."""
    tokenizer = _tokenizer(config.num_tokens)
    ids = _prompt_ids(config)
    prompts = tuple(str(tokenizer.decode(list(one))) for one in ids)
    responses = tuple(enumerate_responses(config.num_tokens, EOS_ID, config.max_response_tokens))
    rewards = _rewards(config, responses, seed)
    return Problem(
        prompts=prompts,
        prompt_ids=ids,
        responses=responses,
        rewards=rewards.double(),
        reference_logprobs=response_table(_new_model(config, seed), ids, responses, pad_id=EOS_ID),
        tokenizer=tokenizer,
        config=config,
        seed=seed,
        _rows={prompt: row for row, prompt in enumerate(prompts)},
        _columns={response: column for column, response in enumerate(responses)},
    )


def _rewards(config: ClosedFormConfig, responses: Sequence[Response], seed: int) -> Tensor:
    """Random rewards (P, N) of standard deviation `reward_scale` for each prompt, float64 of float32 values.

    With u, v independent and normal: sqrt(1 - s) * (sum over places t of u[prompt, t, token t]), standardised over the
    responses, + sqrt(s) * v[prompt, response]. A place behind the end has a term of its own.
    """
    generator = torch.Generator().manual_seed(seed * 1_000 + _REWARD_STREAM)
    num_prompts, places = config.num_prompts, config.max_response_tokens
    terms = torch.randn(num_prompts, places, config.num_tokens + 1, generator=generator)
    ids, mask = right_padded(responses, pad_id=0)
    tokens = torch.where(mask, ids, config.num_tokens)
    additive = torch.stack([terms[:, place, tokens[:, place]] for place in range(places)]).sum(0)
    additive = (additive - additive.mean(1, keepdim=True)) / additive.std(1, keepdim=True)
    whole = torch.randn(num_prompts, len(responses), generator=generator)
    share = config.interaction_share
    # float32 numbers, so that a reward is the same number wherever it goes.
    rewards: Tensor = config.reward_scale * ((1.0 - share) ** 0.5 * additive + share**0.5 * whole)
    return rewards.double()


def _prompt_ids(config: ClosedFormConfig) -> tuple[Response, ...]:
    """One word each: `a`, `b`, `c`, ..."""
    return tuple((1 + first,) for first in range(config.num_prompts))


@functools.cache
def _tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    """EOS and the first letters of the alphabet as words. There is no token for padding: EOS pads."""
    letters = "abcdefghijklmnopqrstuvwxyz"[: num_tokens - 1]
    vocabulary = {EOS: EOS_ID, **{letter: index for index, letter in enumerate(letters, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _new_model(config: ClosedFormConfig, seed: int) -> PreTrainedModel:
    # Learned positions: with rotary ones alone, `a` after `a a` and after `a` would be the same to the model.
    model_config = GPT2Config(
        vocab_size=config.num_tokens,
        n_embd=config.hidden_size,
        n_inner=4 * config.hidden_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_positions=MAX_POSITIONS,
        initializer_range=config.initializer_range,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000 + _MODEL_STREAM)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
        # The last norm gives states of standard deviation 1, so this is the spread of the logits.
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            head.normal_(0.0, config.reference_scale / config.hidden_size**0.5)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=EOS_ID, pad_token_id=EOS_ID)
    return cast("PreTrainedModel", model.eval())
