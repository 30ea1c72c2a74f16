"""Chats: from ShareGPT and OpenAI records to tokens, and which of them are the assistant's.

Two formats write a chat as a model was trained to read it:

- `llama2`: Llama-2-chat's, as `chat_completion` of Meta's llama/generation.py encodes it. Each
  question and answer is `BOS [INST] question [/INST] answer EOS`; a system message opens the
  first question between `<<SYS>>` and `<</SYS>>`.
- `tokenizer`: the chat template of a Hugging Face tokenizer, which is the model's own.

The loss counts on an answer's tokens and on the token that ends it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_cream.data.documents import BadDocument
from megatron_cream.data.time_limit import Endless, limited_rendering

CHAT_FORMATS = ("llama2", "tokenizer")

CHAT_KEYS = ("conversations", "messages")
"""Where a record keeps its turns: ShareGPT's name and OpenAI's. The first that is there, and is not null, is read."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""ShareGPT's `from` and OpenAI's `role` -> role."""

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}, as chat templates take it."""


def take_messages(record: dict, keys: Sequence[str] = CHAT_KEYS) -> list[Message]:
    """The turns of a chat, cleaned: maybe a system message, then user and assistant by turns.

    As FastChat cleans ShareGPT, answers before the first question are left out; so are an
    empty system message and questions after the last answer, which no loss is on.

    Raises:
        BadDocument: what is left is no such chat.
        UnicodeError: a turn holds lone surrogates.
    """
    turns = next((record[key] for key in keys if record.get(key) is not None), None)
    if turns is None:
        raise BadDocument(f"no key {' or '.join(map(repr, keys))}")
    if not isinstance(turns, list):
        raise BadDocument("chat that is not a list of turns")
    messages = [_message(turn) for turn in turns]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    talk = messages[len(system) :]
    while talk and talk[0]["role"] == "assistant":
        talk = talk[1:]
    while talk and talk[-1]["role"] == "user":
        talk = talk[:-1]
    if not talk:
        raise BadDocument("chat without an answer to a question")
    if [message["role"] for message in talk] != ["user", "assistant"] * (len(talk) // 2):
        raise BadDocument("chat whose turns do not alternate")
    if not all(message["content"].strip() for message in talk):
        raise BadDocument("chat with an empty turn")
    return [message for message in system if message["content"].strip()] + talk


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise BadDocument("chat with a malformed turn")
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadDocument("chat with tool calls")
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadDocument("chat with a malformed turn")
    if role not in ROLES:
        raise BadDocument("chat with an unknown role")
    content.encode()
    return {"role": ROLES[role], "content": content}


def _joined(parts: list) -> str:
    """The text of OpenAI's content in parts, {"type": "text", "text": ...} each."""
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise BadDocument("chat with parts that are not text")
    return "".join(part["text"] for part in parts)


class Llama2Chat:
    """Encodes chats for Llama-2-chat, with its sentencepiece tokenizer or that of a folder.

    Source: `Llama.chat_completion` and its B_INST, E_INST, B_SYS, E_SYS in
    github.com/facebookresearch/llama, llama/generation.py; the space after an answer too.

    Raises:
        ValueError: the tokenizer has no BOS or no EOS.
    """

    def __init__(self, tokenizer: Any):
        if any(token is None or token < 0 for token in (tokenizer.bos, tokenizer.eod)):
            raise ValueError("the tokenizer has no BOS or no EOS token, which --chat-format llama2 writes")
        self._tokenizer = tokenizer

    def __call__(self, messages: list[Message]) -> tuple[list[int], np.ndarray]:
        """Token ids [n], and uint8 [n]: 1 where one is the assistant's."""
        ids, mask, opening = [], [], ""
        if messages[0]["role"] == "system":
            opening = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
            messages = messages[1:]
        for question, answer in zip(messages[::2], messages[1::2]):
            prompt = f"[INST] {(opening + question['content']).strip()} [/INST]"
            opening = ""
            turn = self._encode(f"{prompt} {answer['content'].strip()} ")
            asked = _common_prefix(self._encode(prompt), turn)
            ids += [self._tokenizer.bos, *turn, self._tokenizer.eod]
            mask += [0] * (1 + asked) + [1] * (len(turn) - asked + 1)
        return ids, np.array(mask, dtype=np.uint8)

    def _encode(self, text: str) -> list[int]:
        ids = list(self._tokenizer.tokenize(text))
        # Hugging Face tokenizers may add their own.
        ids = ids[1:] if ids[:1] == [self._tokenizer.bos] else ids
        return ids[:-1] if ids[-1:] == [self._tokenizer.eod] else ids


class TemplateChat:
    """Encodes chats with the chat template of a Hugging Face tokenizer.

    An answer begins where the template's prompt for it ends (`add_generation_prompt`), and ends
    with what the template puts after it, but for white space. Templates that treat earlier
    answers otherwise than the last one, as those of reasoning models do, are followed.

    Raises:
        ValueError: the tokenizer has no chat template, or is none of `tokenizers`, which tells
            where in the text a token lies.
    """

    def __init__(self, tokenizer: Any):
        if getattr(tokenizer, "library", "") != "huggingface":
            raise ValueError(
                "--chat-format tokenizer takes a chat template from a --tokenizer-type HuggingFaceTokenizer"
            )
        self._tokenizer = tokenizer._tokenizer.tokenizer  # Megatron's wrapper hides offsets and BOS handling
        if not self._tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template, which --chat-format tokenizer takes from it")
        if not self._tokenizer.is_fast:
            raise ValueError("--chat-format tokenizer needs a folder with a tokenizer.json")

    def __call__(self, messages: list[Message]) -> tuple[list[int], np.ndarray]:
        """Token ids [n], and uint8 [n]: 1 where one is the assistant's.

        Raises:
            BadDocument: the template refuses the chat, or writes an answer otherwise than it is.
        ValueError: the template does not end.
        """
        text = self._render(messages)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(begins), dtype=np.uint8)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                first, last = self._span(text, messages[: i + 1])
                mask |= (begins < last) & (ends > first)
        return encoded["input_ids"], mask

    def _span(self, text: str, messages: list[Message]) -> tuple[int, int]:
        """Where in `text` the last of `messages` stands, an answer, with its end token."""
        prompt, answer = self._render(messages[:-1], add_generation_prompt=True), messages[-1]["content"].strip()
        alone = self._render(messages)
        # The first after the prompt: the end token may hold the answer too.
        after = len(prompt) if alone.startswith(prompt) else max(alone.rfind(answer), 0)
        at, at_alone = text.find(answer, len(prompt)), alone.find(answer, after)
        if not text.startswith(prompt) or at < 0 or at_alone < 0:
            raise BadDocument("chat whose answers the chat template rewrites")
        ending = alone[at_alone + len(answer) :].rstrip()
        at += len(answer)
        if not text.startswith(ending, at):
            raise BadDocument("chat whose answers the chat template rewrites")
        return len(prompt), at + len(ending)

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            with limited_rendering():
                return self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
        except Endless as error:
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} {error}") from None
        except Exception:  # the template's own, jinja's, or what its sandbox does not allow
            raise BadDocument("chat that the chat template refuses") from None


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
