"""Models that give every token a number: reward models and critics, as sequence classifiers with one label."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.errors import ArtifactError
from rlhf.models.loading import (
    PAD_TOKENS,
    attention_arguments,
    check_no_missing_weights,
    hub_arguments,
    load_config,
    load_errors,
    load_policy,
    num_embeddings,
    own_memory,
    quiet,
    train_every_embedding,
)
from rlhf.models.paths import check_model_path, is_adapter, single_model
from rlhf.models.saving import save_model
from rlhf.models.seq2seq import (
    check_encoder_decoder,
    decoder_inputs,
    decoder_values,
    is_encoder_decoder,
    language_model_backbone,
)
from rlhf.ops import sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.config.model import ModelConfig


# The modules above the backbone of causal classifiers and of T5's.
HEADS = ("score.", "classification_head.")


class ScalarModel(nn.Module):
    """The backbone and head of an `AutoModelForSequenceClassification` with one label, read at every token.

    `model` is the transformers model itself; state-dict keys are its own behind `model.`. The head of causal models is
    one linear map. An encoder-decoder model's has a tanh layer below it and is applied to every state of the decoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder_decoder = is_encoder_decoder(model)
        self._head_name = "classification_head.out_proj" if self.encoder_decoder else "score"
        try:
            head = model.get_submodule(self._head_name)
        except AttributeError:
            head = None
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise ArtifactError(
                f"{type(model).__name__} has no linear head `{self._head_name}` with one output, so it cannot score "
                "single tokens"
            )
        self.model = model

    @property
    def backbone(self) -> nn.Module:
        """The transformer below the head."""
        backbone: nn.Module = getattr(self.model, self.model.base_model_prefix)
        return backbone

    @property
    def head(self) -> nn.Linear:
        """The last linear map, to one number."""
        return cast(nn.Linear, self.model.get_submodule(self._head_name))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Values (B, T) float32 of the text up to and including each token; finite, without meaning, at padding.

        input_ids (B, T) int64; attention_mask (B, T) bool, True = a real token, wherever the padding sits;
        position_ids (B, T) count real tokens when not given. An encoder-decoder model has no such order of a whole
        text and raises `ValueError`: its values are those of `response_values`.
        """
        if self.encoder_decoder:
            raise ValueError(
                "the values of an encoder-decoder model depend on where the response begins; see response_values"
            )
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask must be bool, not {attention_mask.dtype}")
        if position_ids is None:
            position_ids = sequences.position_ids(attention_mask)
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        values: Tensor = self.head(output.last_hidden_state.to(self.head.weight.dtype))
        return values.squeeze(-1).float()

    def response_values(self, input_ids: Tensor, attention_mask: Tensor, num_prompt: int) -> Tensor:
        """Values (B, R + 1) float32: entry t is that of the prompt and its first t response tokens, t = 0 … R.

        input_ids (B, T) int64 and attention_mask (B, T) bool with T = num_prompt + R: left-padded prompts, right-padded
        responses. A critic takes all but the last entry, V(s_t) before response token t; a reward is the entry at the
        response's length. Entries beyond that length are finite and mean nothing. R may be 0. Raises `ValueError` for a
        mask that is not bool and a `num_prompt` that is no width of the prompt.
        """
        if not 1 <= num_prompt <= input_ids.shape[1]:
            raise ValueError(f"num_prompt ({num_prompt}) must lie between 1 and {input_ids.shape[1]}")
        if self.encoder_decoder:
            if attention_mask.dtype != torch.bool:
                raise ValueError(f"attention_mask must be bool, not {attention_mask.dtype}")
            decoder = decoder_inputs(self.model, input_ids[:, num_prompt:], attention_mask[:, num_prompt:])
            return decoder_values(self.model, input_ids[:, :num_prompt], attention_mask[:, :num_prompt], *decoder)
        values: Tensor = self(input_ids, attention_mask)
        return values[:, num_prompt - 1 :]

    @classmethod
    def from_policy(
        cls,
        source: str | Path | PreTrainedModel,
        *,
        seed: int,
        zero_head: bool = False,
        config: ModelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        key: str = "model.path",
    ) -> Self:
        """The backbone of a language model under a new head: zeros, or normal with std 1/sqrt(d + 1).

        The standard deviation is that of Huang et al. 2024, "The N implementation details of RLHF with PPO". The head
        follows from `seed` alone and the global random state is left as it was.
        """
        if not isinstance(source, PreTrainedModel) and is_adapter(source):
            source = load_policy(source, config, dtype, key)
        with torch.random.fork_rng():
            if isinstance(source, PreTrainedModel):
                model = _from_model(source, dtype)
            else:
                model, missing = load_classifier(str(source), config, dtype, key)
                check_no_missing_weights([name for name in missing if not name.startswith(HEADS)], str(source), key)
        scalar = cls(model)
        scalar.reset_head(seed=seed, zero=zero_head)
        scalar.eval()
        return scalar

    def reset_head(self, *, seed: int, zero: bool) -> None:
        """Gives the head new weights: zeros, or normal numbers that follow from `seed` alone.

        The tanh layer of an encoder-decoder model's head is never zero, or nothing above it would learn: it gets normal
        weights with T5's own std 1/sqrt(d).
        """
        generator = torch.Generator().manual_seed(seed)
        size = self.head.in_features
        weight = torch.randn(1, size, generator=generator) / (size + 1) ** 0.5
        with torch.no_grad():
            if self.encoder_decoder:
                dense = cast(nn.Linear, self.model.get_submodule("classification_head.dense"))
                dense.weight.copy_(torch.randn(dense.weight.shape, generator=generator) / size**0.5)
                dense.bias.zero_()
            self.head.weight.copy_(torch.zeros_like(weight) if zero else weight)
            if self.head.bias is not None:
                self.head.bias.zero_()

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: ModelConfig | None = None,
        dtype: torch.dtype = torch.float32,
        key: str = "ppo.reward_model",
    ) -> Self:
        """A saved scalar model, an adapter merged into its base; of an ensemble its first member.

        Raises `ArtifactError` when the folder holds no head, or one with several labels.
        """
        check_model_path(str(path), key)
        path = single_model(str(path), key)
        if is_adapter(path):
            from rlhf.models.adapters import load_merged_scorer

            merged = cls(load_merged_scorer(path, config, dtype, key))
            merged.eval()
            return merged
        model_config = load_config(path, config, key)
        architecture = (model_config.architectures or ["unknown"])[0]
        if not architecture.endswith("ForSequenceClassification"):
            raise ArtifactError(
                f"{key}: {path} holds a {architecture}, not a reward model. Expected a …ForSequenceClassification "
                "with one label, as the reward-model stage writes it"
            )
        if model_config.num_labels != 1:
            raise ArtifactError(
                f"{key}: {path} is a classifier with {model_config.num_labels} labels; a reward model has one"
            )
        model, missing = load_classifier(path, config, dtype, key)
        check_no_missing_weights(missing, path, key)
        scalar = cls(model)
        scalar.eval()
        return scalar

    def save(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes a folder that plain `AutoModelForSequenceClassification` loads with the same scores.

        `state_dict` has the keys of `self.model` and replaces its weights where those are sharded. Raises `ValueError`
        when the pad token does not fit, because transformers finds a row's last token by it.
        """
        pad = tokenizer.pad_token_id
        if pad is None or pad == tokenizer.eos_token_id or pad != self.model.config.pad_token_id:
            raise ValueError("a scalar model needs a pad token of its own; take the tokenizer of ensure_distinct_pad")
        save_model(self.model, tokenizer, Path(folder), state_dict)


def load_classifier(
    path: str, config: ModelConfig | None, dtype: torch.dtype, key: str
) -> tuple[PreTrainedModel, set[str]]:
    """A sequence classifier with one label, and the names of weights that its files do not have."""
    model_config = load_config(path, config, key)
    check_encoder_decoder(model_config, path, key)
    arguments: dict[str, Any] = hub_arguments(path, config) | attention_arguments(config, model_config)
    with load_errors(path, key), quiet():
        result: Any = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=dtype, output_loading_info=True, **arguments
        )
    own_memory(result[0])
    train_every_embedding(result[0])
    return result[0], set(result[1]["missing_keys"])


def _from_model(policy: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        config, dtype=dtype, attn_implementation=policy.config._attn_implementation
    )
    if is_encoder_decoder(policy):
        weights = language_model_backbone(policy)
    else:
        weights = getattr(policy, policy.base_model_prefix).state_dict()
    getattr(model, model.base_model_prefix).load_state_dict(weights)
    nn.Module.to(model, policy.device)
    return model


def sequence_scores(values: Tensor, mask: Tensor) -> Tensor:
    """The value (B,) at the last True of each row of the mask. values (B, T); mask (B, T) bool.

    Raises `ValueError` when the mask is not bool, has another shape, or has a row without a True.
    """
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise ValueError(f"expected a bool mask of shape {tuple(values.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    if not bool(mask.any(dim=-1).all()):
        raise ValueError("a row of the mask has no real token, so it has no score")
    return sequences.gather_last(values, mask)


def response_scores(model: ScalarModel, input_ids: Tensor, attention_mask: Tensor, num_prompt: int | None) -> Tensor:
    """The score (B,) float32 of each response, read after its last token.

    ids (B, T) int64 and mask (B, T) bool. `num_prompt` is where the responses begin, of left-padded prompts and
    right-padded responses; a causal model may do without (None) and then takes any padding.
    """
    if model.encoder_decoder:
        if num_prompt is None:
            raise ValueError(
                "num_prompt must be given to an encoder-decoder model, which reads prompt and response apart"
            )
        values = model.response_values(input_ids, attention_mask, num_prompt)
        lengths = attention_mask[:, num_prompt:].sum(dim=1, keepdim=True)
        return values.gather(1, lengths).squeeze(1)
    return sequence_scores(model(input_ids, attention_mask), attention_mask)


class ReadsPairs(Protocol):
    """A model that tells whether it reads prompt and response apart."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether it does."""


def pad_pairs(
    model: ReadsPairs, pairs: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> tuple[Tensor, Tensor, int | None]:
    """Pairs of prompt ids and response ids as `response_scores` takes them behind `model`: ids, mask, `num_prompt`."""
    if not model.encoder_decoder:
        return (*sequences.right_pad([[*prompt, *response] for prompt, response in pairs], pad_id=pad_id), None)
    prompts, prompt_mask = sequences.left_pad([prompt for prompt, _ in pairs], pad_id=pad_id)
    responses, response_mask = sequences.right_pad([response for _, response in pairs], pad_id=pad_id)
    return torch.cat([prompts, responses], dim=1), torch.cat([prompt_mask, response_mask], dim=1), prompts.shape[1]


def ensure_distinct_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose pad token never stands in a text; the model's config then names it.

    A reserved token of the vocabulary is taken where there is one, else `<|pad|>` is added. The embeddings grow only
    when the new id does not fit; the new row is the mean of the others.
    """
    tokenizer = copy.deepcopy(tokenizer)
    eos = model.config.eos_token_id
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    used |= set(eos) if isinstance(eos, list) else {eos}
    vocabulary = tokenizer.get_vocab()
    candidates = [token for token in (tokenizer.pad_token, *PAD_TOKENS) if token is not None]
    reserved = [token for token in candidates if token in vocabulary and vocabulary[token] not in used]
    if reserved:
        tokenizer.pad_token = reserved[0]
    else:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKENS[0]})
    use_pad_token(model, tokenizer.pad_token_id)
    return tokenizer


def use_pad_token(model: PreTrainedModel, pad: int) -> None:
    """Names the pad token in the model's config; where it has no embedding yet it gets the mean of the others."""
    rows = num_embeddings(model)
    if pad >= rows:
        with torch.random.fork_rng(), quiet():
            model.resize_token_embeddings(pad + 1, mean_resizing=False)
        weight = cast(nn.Embedding, model.get_input_embeddings()).weight
        with torch.no_grad():
            weight[rows:] = weight[:rows].mean(dim=0)
    model.config.pad_token_id = pad
