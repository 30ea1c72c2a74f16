"""Convert ShareGPT and OpenAI chat records to tokens and a mask of the assistant's tokens.

Two formats:

- `llama2`: Llama-2-chat's, as `chat_completion` of Meta's llama/generation.py encodes it. Each
  question and answer is `BOS [INST] question [/INST] answer EOS`; a system message opens the
  first question between `<<SYS>>` and `<</SYS>>`.
- `tokenizer`: the chat template of the model's Hugging Face tokenizer.

Special tokens of the template are control tokens; those that a message spells are text, see `special_tokens`.

The loss includes an answer's tokens and the token that ends it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_cream.data.documents import BadDocument
from megatron_cream.data.special_tokens import ChatTokenizer, is_kept_as_text
from megatron_cream.data.time_limit import TemplateTimeout, limit_rendering_time

CHAT_FORMATS = ("llama2", "tokenizer")

CHAT_KEYS = ("conversations", "messages")
"""Keys of a record's turns: ShareGPT's and OpenAI's. The first key present and not null is read."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Values of ShareGPT's `from` and OpenAI's `role` -> role."""

Message = dict[str, str]
"""{"role": "system", "user" or "assistant", "content": text}, the input of chat templates."""


def extract_messages(record: dict, keys: Sequence[str] = CHAT_KEYS) -> list[Message]:
    """Return a chat's messages: an optional system message, then user and assistant in turn.

    As FastChat does with ShareGPT, drops answers before the first question. Also drops an empty
    system message and questions after the last answer, which have no loss.

    Raises:
        BadDocument: the remaining turns are not such a chat.
        UnicodeError: a turn contains lone surrogates.
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
        content = _join_parts(content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadDocument("chat with a malformed turn")
    if role not in ROLES:
        raise BadDocument("chat with an unknown role")
    content.encode()
    return {"role": ROLES[role], "content": content}


def _join_parts(parts: list) -> str:
    """Join OpenAI's content parts, each {"type": "text", "text": ...}, to one text."""
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise BadDocument("chat with parts that are not text")
    return "".join(part["text"] for part in parts)


class Llama2Chat:
    """Encoder of chats for Llama-2-chat, with a sentencepiece or a Hugging Face tokenizer.

    Source: `Llama.chat_completion` and its B_INST, E_INST, B_SYS, E_SYS in
    github.com/facebookresearch/llama, llama/generation.py, with its space after an answer.

    Raises:
        ValueError: the tokenizer has no BOS or no EOS.
    """

    def __init__(self, tokenizer: Any):
        if any(token is None or token < 0 for token in (tokenizer.bos, tokenizer.eod)):
            raise ValueError("the tokenizer has no BOS or no EOS token, which --chat-format llama2 needs")
        self._tokenizer = tokenizer
        # sentencepiece parses no special tokens.
        self._chat_tokenizer = (
            ChatTokenizer(tokenizer._tokenizer.tokenizer)
            if is_kept_as_text(tokenizer) and tokenizer._tokenizer.tokenizer.is_fast
            else None
        )

    def __call__(self, messages: list[Message]) -> tuple[list[int], np.ndarray]:
        """Return token ids [n] and a uint8 mask [n]: 1 for the assistant's tokens."""
        ids, mask, opening = [], [], ""
        masked = False
        if self._chat_tokenizer is not None:
            messages, masked = self._chat_tokenizer.mask(messages)
        if messages[0]["role"] == "system":
            opening = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
            messages = messages[1:]
        for question, answer in zip(messages[::2], messages[1::2]):
            prompt = f"[INST] {(opening + question['content']).strip()} [/INST]"
            opening = ""
            turn = self._encode(f"{prompt} {answer['content'].strip()} ", masked)
            prompt_length = _common_prefix(self._encode(prompt, masked), turn)
            ids += [self._tokenizer.bos, *turn, self._tokenizer.eod]
            mask += [0] * (1 + prompt_length) + [1] * (len(turn) - prompt_length + 1)
        return ids, np.array(mask, dtype=np.uint8)

    def _encode(self, text: str, masked: bool) -> list[int]:
        if self._chat_tokenizer is not None:
            return self._chat_tokenizer.encode(text, masked)[0]
        ids = list(self._tokenizer.tokenize(text))
        # Hugging Face tokenizers may add BOS and EOS.
        ids = ids[1:] if ids[:1] == [self._tokenizer.bos] else ids
        return ids[:-1] if ids[-1:] == [self._tokenizer.eod] else ids


class TemplateChat:
    """Encoder of chats with the chat template of a Hugging Face tokenizer.

    An answer begins where the template's prompt for it ends (`add_generation_prompt`). It ends
    with the text that the template puts after it, without white space. Works with templates that
    render earlier answers differently from the last one, such as those of reasoning models.

    Raises:
        ValueError: the tokenizer has no chat template, or is not a fast tokenizer: only those
            report token offsets.
    """

    def __init__(self, tokenizer: Any):
        if getattr(tokenizer, "library", "") != "huggingface":
            raise ValueError(
                "--chat-format tokenizer takes a chat template from a --tokenizer-type HuggingFaceTokenizer"
            )
        self._tokenizer = tokenizer._tokenizer.tokenizer  # Megatron's wrapper hides offsets and BOS handling
        if not self._tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template, which --chat-format tokenizer needs")
        if not self._tokenizer.is_fast:
            raise ValueError("--chat-format tokenizer needs a folder with a tokenizer.json")
        self._chat_tokenizer = ChatTokenizer(self._tokenizer, parse_messages=not is_kept_as_text(tokenizer))

    def __call__(self, messages: list[Message]) -> tuple[list[int], np.ndarray]:
        """Return token ids [n] and a uint8 mask [n]: 1 for the assistant's tokens.

        Raises:
            BadDocument: the template rejects the chat, or changes an answer's text.
            ValueError: the template does not finish in time.
        """
        messages, masked = self._chat_tokenizer.mask(messages)
        text = self._render(messages)
        ids, offsets = self._chat_tokenizer.encode(text, masked)
        begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(begins), dtype=np.uint8)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                first, last = self._span(text, messages[: i + 1])
                mask |= (begins < last) & (ends > first)
        return ids, mask

    def _span(self, text: str, messages: list[Message]) -> tuple[int, int]:
        """Return (start, end) in `text` of the last of `messages`, an answer, with its end token."""
        prompt, answer = self._render(messages[:-1], add_generation_prompt=True), messages[-1]["content"].strip()
        as_last = self._render(messages)
        # The first match after the prompt: the end token may contain the answer's text too.
        after = len(prompt) if as_last.startswith(prompt) else max(as_last.rfind(answer), 0)
        at, at_last = text.find(answer, len(prompt)), as_last.find(answer, after)
        if not text.startswith(prompt) or at < 0 or at_last < 0:
            raise BadDocument("chat whose answers the chat template rewrites")
        ending = as_last[at_last + len(answer) :].rstrip()
        at += len(answer)
        if not text.startswith(ending, at):
            raise BadDocument("chat whose answers the chat template rewrites")
        return len(prompt), at + len(ending)

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            with limit_rendering_time():
                return self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
        except TemplateTimeout as error:
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} {error}") from None
        except Exception:  # from the template, from jinja or from its sandbox
            raise BadDocument("chat that the chat template rejects") from None


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
