"""A chat model in memory: greedy replies, sampling keyed by the request, log-probs of choices against a slow oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.chat.asking import make_chat
from rlhf.chat.local import LocalChat
from rlhf.chat.protocol import ChatReply, ChatRequest
from rlhf.config.chat import ChatModelConfig
from rlhf.config.model import ScratchConfig
from rlhf.data.tokenization import encode_prompt
from rlhf.errors import ConfigError
from rlhf.models.scratch import build_from_scratch
from rlhf.records import Message

TEXTS = ["user: which is better, A or B or C? rate it 1 2 3", "assistant: A", "the film is good", "the film is bad"]


def save_model(folder: Path, *, chat_template: bool = True, max_positions: int = 256) -> Path:
    """A tiny model with random weights, large enough that its replies differ."""
    config = ScratchConfig(
        architecture="llama", hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, max_positions=max_positions
    )
    model, tokenizer = build_from_scratch(config, TEXTS, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)
    if not chat_template:
        tokenizer.chat_template = None
    path = folder / ("chat" if chat_template else "plain")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def chat(folder: Path) -> LocalChat:
    return LocalChat.load(config_for(folder), "judge")


def config_for(folder: Path, **fields: Any) -> ChatModelConfig:
    return ChatModelConfig(**({"model": str(folder), "cache": None, "batch_size": 2} | fields))


def question(text: str, **fields: Any) -> ChatRequest:
    return ChatRequest((Message("user", text),), **fields)


def ask(chat: LocalChat, *requests: ChatRequest) -> list[ChatReply]:
    told: dict[int, ChatReply] = {}
    replies = chat.ask(requests, told.__setitem__)
    assert [told[index] for index in range(len(requests))] == replies
    return replies


def next_logits(chat: LocalChat, ids: list[int]) -> torch.Tensor:
    """The logits behind one sequence, without padding or a cache: the oracle."""
    with torch.no_grad():
        output: Any = chat.model(input_ids=torch.tensor([ids]))
    logits: torch.Tensor = output.logits[0, -1]
    return logits


def test_a_greedy_reply_takes_the_likeliest_token_every_time(chat: LocalChat) -> None:
    texts = ["the film", "rate it", "which is better, A or B? the film is good or bad"]
    replies = ask(chat, *(question(text, max_tokens=6) for text in texts))
    assert len({reply.text for reply in replies}) == 3
    for text, reply in zip(texts, replies, strict=True):
        ids = encode_prompt(chat.tokenizer, (Message("user", text),))
        assert reply.prompt_tokens == len(ids) == chat.count_tokens(question(text))
        written: list[int] = []
        while len(written) < 6 and chat.tokenizer.eos_token_id not in written:
            written.append(int(next_logits(chat, [*ids, *written]).argmax()))
        assert reply.response_tokens == len(written)
        assert reply.text == chat.tokenizer.decode(written, skip_special_tokens=True)


def test_sampled_replies_depend_on_the_request_alone(chat: LocalChat) -> None:
    wanted = question("the film", max_tokens=8, temperature=1.0)
    (alone,) = ask(chat, wanted)
    among = ask(chat, question("rate it", max_tokens=8, temperature=1.0), wanted, question("x", max_tokens=8))
    assert among[1] == alone
    others = ask(chat, *(question("the film", max_tokens=8, temperature=1.0, seed=seed) for seed in range(1, 5)))
    assert len({reply.text for reply in others}) > 1


def test_log_probs_of_choices_equal_those_of_single_sequences(chat: LocalChat) -> None:
    """Choices of one and of several tokens; questions of unequal length in one batch."""
    choices = ("A", "B", "film is", "film good")
    requests = [question("which is better?", choices=choices), question("the film is good or bad? A", choices=choices)]
    for request, reply in zip(requests, ask(chat, *requests), strict=True):
        ids = encode_prompt(chat.tokenizer, request.messages)
        scores = []
        for choice in choices:
            tokens = chat.tokenizer.encode(choice, add_special_tokens=False)
            total, before = 0.0, list(ids)
            for token in tokens:
                total += float(next_logits(chat, before).log_softmax(-1)[token])
                before.append(token)
            scores.append(total)
        assert len(chat.tokenizer.encode("film is", add_special_tokens=False)) > 1
        normalizer = math.log(sum(math.exp(score) for score in scores))
        assert reply.choice_logprobs == pytest.approx([score - normalizer for score in scores], abs=2e-4)
        assert reply.text == choices[max(range(4), key=scores.__getitem__)]


def test_requests_of_every_kind_may_stand_together(chat: LocalChat) -> None:
    requests = [
        question("a", max_tokens=3),
        question("b", choices=("A", "B")),
        question("c", max_tokens=2),
        question("a", max_tokens=3),
    ]
    replies = ask(chat, *requests)
    assert [reply.choice_logprobs is None for reply in replies] == [True, False, True, True]
    assert replies[0] == replies[3]
    assert replies[2].response_tokens <= 2


def test_without_a_chat_template_the_texts_are_read(tmp_path: Path) -> None:
    chat = LocalChat.load(config_for(save_model(tmp_path, chat_template=False)), "judge")
    request = ChatRequest((Message("system", "be brief"), Message("user", "the film")))
    assert chat.count_tokens(request) == len(encode_prompt(chat.tokenizer, "be brief\n\nthe film"))


def test_the_cache_knows_the_folder_it_is_of(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, cache=str(tmp_path))
    chat = make_chat(config, "judge")
    reply = chat.ask([question("q", choices=("A", "B"))])[0]
    again = make_chat(config, "judge")
    assert again.ask([question("q", choices=("A", "B"))])[0] == reply
    assert again.num_cached == 1
    # Weights of another time are another model.
    path = folder / "config.json"
    status = path.stat()
    path.touch()
    assert path.stat().st_mtime_ns != status.st_mtime_ns
    assert make_chat(config, "judge").model.identity != chat.model.identity


def test_a_question_that_is_too_long_is_refused(chat: LocalChat) -> None:
    with pytest.raises(
        ConfigError, match=r"judge: a question has \d+ tokens .* the model has 256 positions; lower judge\.max_tokens"
    ):
        ask(chat, question("film " * 300, choices=("A",)))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.model"):
        LocalChat.load(config_for(tmp_path / "none"), "judge")
