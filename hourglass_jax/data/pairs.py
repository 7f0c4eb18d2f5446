"""Prompts with answers, and conversations: reading, template, and training examples with loss on the answers only.

A conversation is encoded as BOS and its messages. Each message is the template's text of its role, the content and EOS:

    <BOS>user: who sits in the pond?<EOS>assistant: an old frog<EOS>

A prompt and its completion are a conversation of a user and an assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from hourglass_jax.data.haiku import without_held_out
from hourglass_jax.data.pipeline import Batch, BatchAt, LazyBatches, Rows, shuffled_order
from hourglass_jax.data.records import Record, corpus_files, kind_of, read_fields, read_records
from hourglass_jax.errors import UsageError
from hourglass_jax.tokenizers import TextTokenizer, to_utf8

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
TEMPLATE = {SYSTEM: "system: ", USER: "user: ", ASSISTANT: "assistant: "}  # characters that `clean` keeps
FIELDS = ("prompt", "completion", "messages")
SUFFIXES = (".json", ".jsonl")

Template = Mapping[str, str]  # the text before a message, by role


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages, the last one by the assistant. Conversations are equal if their messages are."""

    messages: tuple[Message, ...]
    place: str = field(default="", compare=False)  # file and record, for errors


class Example(NamedTuple):
    """Tokens int32 [L], and which of them have loss, bool [L]."""

    tokens: np.ndarray
    has_loss: np.ndarray

    @property
    def n_answer(self) -> int:
        """Tokens of the last answer, with EOS."""
        return int(self.has_loss[::-1].argmin())


def read_pairs(path: str) -> list[Conversation]:
    """Read the JSON Lines or JSON arrays at `path`, plain or compressed.

    Raises UsageError with file and record for a record that is not a prompt with a completion or a list of messages.
    """
    files = corpus_files(path)
    for file in files:
        if kind_of(file) not in SUFFIXES:
            raise UsageError(f"{file}: is not a file of pairs; give JSON Lines (.jsonl) or a JSON array (.json)")
    pairs = [read_conversation(record) for record in read_records(files, FIELDS)]
    if not pairs:
        raise UsageError(f"{path}: contains no records; give prompts with completions, or messages")
    return pairs


def read_conversation(record: Record) -> Conversation:
    prompt, completion, messages = read_fields(record, FIELDS)
    try:
        if messages is None:
            pair = text_of(prompt, "prompt"), text_of(completion, "completion")
            return Conversation((Message(USER, pair[0]), Message(ASSISTANT, pair[1])), record.place)
        if prompt is not None or completion is not None:
            raise UsageError("has messages and a prompt or completion; give one of the two forms")
        return Conversation(read_messages(messages), record.place)
    except UsageError as error:
        raise UsageError(f"{record.place}: {error}") from error


def read_messages(messages: Any) -> tuple[Message, ...]:
    """Return the messages of a JSON value. Raises UsageError unless the last one is the assistant's."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UsageError("messages is not a list of objects; give a role and a content for each message")
    found = []
    for number, message in enumerate(messages, 1):
        role = text_of(message.get("role"), f"message {number}: role")
        if role not in TEMPLATE:
            raise UsageError(f"message {number} has the role {role!r}; allowed: {', '.join(TEMPLATE)}")
        found.append(Message(role, text_of(message.get("content"), f"message {number}: content")))
    if not found or found[-1].role != ASSISTANT:
        raise UsageError("messages do not end with an answer; the last message must be the assistant's")
    return tuple(found)


def text_of(value: Any, name: str) -> str:
    """Return a text field. Raises UsageError for other values and lone surrogates."""
    if value is None:
        raise UsageError(f"{name} is missing; give prompt and completion, or messages with role and content")
    if not isinstance(value, str):
        raise UsageError(f"{name} is {type(value).__name__}, not text; give a JSON string")
    to_utf8(value)
    return value


def split_pairs(
    pairs: list[Conversation], valid_path: str, n_held_back: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the pairs for training and for validation: those at `valid_path`, or the last `n_held_back`.

    Without both, all pairs are for training and for validation. Otherwise pairs for validation are not trained on.
    """
    if not valid_path and not n_held_back:
        return pairs, pairs
    n_train = len(pairs) - n_held_back
    train, valid = (pairs, read_pairs(valid_path)) if valid_path else (pairs[:n_train], pairs[n_train:])
    return without_held_out(train, valid, "pairs"), valid


def all_text(pairs: Sequence[Conversation], template: Template = TEMPLATE) -> str:
    """Return the text of all messages and of the template, to compare with a vocabulary."""
    return "".join([*template.values(), *(message.content for pair in pairs for message in pair.messages)])


def encode_message(message: Message, tokenizer: TextTokenizer, template: Template) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the template, and those of the content with EOS."""
    content = tokenizer.encode(message.content)
    return tokenizer.encode(template[message.role]), np.append(content, np.int32(tokenizer.eos_id))


def encode_conversation(pair: Conversation, tokenizer: TextTokenizer, template: Template = TEMPLATE) -> Example:
    """Encode a conversation. The contents of the assistant's messages and their EOS have loss.

    Raises UsageError, with the place of the conversation, for an answer without tokens.
    """
    parts = [(np.array([tokenizer.bos_id], np.int32), False)]
    for message in pair.messages:
        prefix, content = encode_message(message, tokenizer, template)
        is_answer = message.role == ASSISTANT
        if is_answer and len(content) == 1:
            cleaned = " after cleaning" if message.content else ""
            raise UsageError(f"{pair.place}: the answer is empty{cleaned}; give text, or leave out the record")
        parts += [(prefix, False), (content, is_answer)]
    tokens, has_loss = zip(*((part, np.full(len(part), loss)) for part, loss in parts), strict=True)
    return Example(np.concatenate(tokens), np.concatenate(has_loss))


def encode_prompt(messages: Sequence[Message], tokenizer: TextTokenizer, template: Template = TEMPLATE) -> np.ndarray:
    """Return int32 [n], after which a model writes the assistant's next message and EOS."""
    parts = [part for message in messages for part in encode_message(message, tokenizer, template)]
    return np.concatenate([[tokenizer.bos_id], *parts, tokenizer.encode(template[ASSISTANT])]).astype(np.int32)


def last_tokens(tokens: np.ndarray, n: int) -> np.ndarray:
    """Return at most `n` tokens: the first one, BOS, and the last ones."""
    return tokens if len(tokens) <= n else np.concatenate([tokens[:1], tokens[len(tokens) - n + 1 :]])


class PairExamples:
    """Encoded conversations, padded to equal lengths a batch at a time.

    A conversation longer than block_size + 1 tokens is cut at its beginning, after BOS. `n_cut` counts these.

    Raises UsageError, with file and record, if the last answer does not fit.
    """

    def __init__(
        self,
        pairs: Sequence[Conversation],
        tokenizer: TextTokenizer,
        block_size: int,
        template: Template = TEMPLATE,
    ):
        self.pad_id, self.n_cut = tokenizer.eos_id, 0
        self.examples: list[Example] = []
        n_role = len(tokenizer.encode(template[ASSISTANT]))
        for pair in pairs:
            example = encode_conversation(pair, tokenizer, template)
            if example.n_answer + n_role > block_size:
                raise UsageError(
                    f"{pair.place}: the answer has {example.n_answer} tokens, but block_size={block_size} has space "
                    f"for {max(block_size - n_role, 0)}; give a larger block_size, or leave out the record"
                )
            self.n_cut += len(example.tokens) > block_size + 1
            self.examples.append(Example(*(last_tokens(part, block_size + 1) for part in example)))
        self.length = max((len(example.tokens) for example in self.examples), default=1)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of all examples, int32 [N]."""
        return np.concatenate([example.tokens for example in self.examples])

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return examples as one batch, padded on the right to the longest of all examples."""
        tokens = np.full((len(indices), self.length), self.pad_id, np.int32)
        weights = np.zeros((len(indices), self.length - 1), np.float32)
        for row, index in enumerate(indices):
            found, has_loss = self.examples[index]
            tokens[row, : len(found)] = found
            weights[row, : len(found) - 1] = has_loss[1:]
        return tokens, weights

    def shuffled(self, batch_size: int, seed: int) -> BatchAt:
        """Return batches of examples, reshuffled each epoch."""
        order = shuffled_order(len(self), seed)

        def batch_at(step: int, rows: Rows = slice(None)) -> Batch:
            return self.batch(order(step * batch_size + np.arange(batch_size)[rows]))

        return batch_at

    def in_order(self, batch_size: int) -> LazyBatches:
        """Return all examples once; the last batch may be smaller."""
        starts = range(0, len(self), batch_size)
        return LazyBatches(lambda start: self.batch(range(start, min(start + batch_size, len(self)))), starts)
