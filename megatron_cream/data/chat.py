"""Encode chats as tokens and a mask of the assistant's tokens.

Two formats:

- `llama2`: Llama-2-chat's, as `chat_completion` of Meta's llama/generation.py encodes it. Each
  question and answer is `BOS [INST] question [/INST] answer EOS`; a system message opens the
  first question between `<<SYS>>` and `<</SYS>>`.
- `tokenizer`: the chat template of the model's Hugging Face tokenizer.

Special tokens of the template are control tokens; those that a message spells are text, see `special_tokens`.

The loss includes an answer's tokens and the token that ends it.
"""

import re
from collections.abc import Set
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError

from megatron_cream.common.errors import one_line
from megatron_cream.data.chat_records import REASONING_FIELDS, Message
from megatron_cream.data.documents import BadDocument
from megatron_cream.data.special_tokens import ChatTokenizer, is_kept_as_text
from megatron_cream.data.time_limit import TemplateTimeout, limit_rendering_time

CHAT_FORMATS = ("llama2", "tokenizer")

_OPEN_THINKING = re.compile(r"<think>\s*\Z")

_REWRITTEN = "chat whose answers the chat template rewrites"


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

    def __call__(
        self, messages: list[Message], tools: None = None, without_loss: Set[int] = frozenset()
    ) -> tuple[list[int], np.ndarray]:
        """Return token ids [n] and a uint8 mask [n]: 1 for the assistant's tokens.

        Args:
            messages: see `Chat` of chat_records.
            tools: this format has none.
            without_loss: indices of answers that get 0.
        """
        ids, mask, opening = [], [], ""
        learned = [i not in without_loss for i, message in enumerate(messages) if message["role"] == "assistant"]
        masked = False
        if self._chat_tokenizer is not None:
            messages, masked = self._chat_tokenizer.mask(messages)
        if messages[0]["role"] == "system":
            opening = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
            messages = messages[1:]
        for question, answer, has_loss in zip(messages[::2], messages[1::2], learned, strict=True):
            prompt = f"[INST] {(opening + question['content']).strip()} [/INST]"
            opening = ""
            turn = self._encode(f"{prompt} {answer['content'].strip()} ", masked)
            prompt_length = _common_prefix(self._encode(prompt, masked), turn)
            ids += [self._tokenizer.bos, *turn, self._tokenizer.eod]
            mask += [0] * (1 + prompt_length) + [int(has_loss)] * (len(turn) - prompt_length + 1)
        return ids, np.array(mask, dtype=np.uint8)

    def unread_fields(self, messages: list[Message], tools: None) -> list[str]:
        """Return nothing: chat_records has left out what this format does not show."""
        return []

    def _encode(self, text: str, masked: bool) -> list[int]:
        if self._chat_tokenizer is not None:
            return self._chat_tokenizer.encode(text, masked)[0]
        ids = list(self._tokenizer.tokenize(text))
        # Hugging Face tokenizers may add BOS and EOS.
        ids = ids[1:] if ids[:1] == [self._tokenizer.bos] else ids
        return ids[:-1] if ids[-1:] == [self._tokenizer.eod] else ids


class TemplateChat:
    """Encoder of chats with a chat template of a Hugging Face tokenizer.

    If the template marks what the assistant generates, with `{% generation %}`, the marked text is the answers.
    Otherwise an answer begins where the template's prompt for it ends (`add_generation_prompt`), and ends where the
    chat up to it ends, without white space. Works with templates that render earlier answers differently from the last
    one, such as those of reasoning models, if the text of the answer stays.

    Args:
        tokenizer: Megatron's tokenizer.
        template: a template, or the name of one of the tokenizer's; None: its default.

    Raises:
        ValueError: the tokenizer has no such chat template, or is not a fast tokenizer: only those
            report token offsets.
    """

    def __init__(self, tokenizer: Any, template: str | None = None):
        if getattr(tokenizer, "library", "") != "huggingface":
            raise ValueError(
                "--chat-format tokenizer takes a chat template from a --tokenizer-type HuggingFaceTokenizer"
            )
        self._tokenizer = tokenizer._tokenizer.tokenizer  # Megatron's wrapper hides offsets and BOS handling
        if not self._tokenizer.chat_template and template is None:
            raise ValueError("the tokenizer has no chat template, which --chat-format tokenizer needs")
        _check_template(self._tokenizer.chat_template, template)
        if not self._tokenizer.is_fast:
            raise ValueError("--chat-format tokenizer needs a folder with a tokenizer.json")
        self._template = template
        self._chat_tokenizer = ChatTokenizer(self._tokenizer, parse_messages=not is_kept_as_text(tokenizer))

    def __call__(
        self, messages: list[Message], tools: list[dict] | None = None, without_loss: Set[int] = frozenset()
    ) -> tuple[list[int], np.ndarray]:
        """Return token ids [n] and a uint8 mask [n]: 1 for the assistant's tokens.

        Args:
            messages: see `Chat` of chat_records.
            tools: descriptions of tools, for the template.
            without_loss: indices of answers that get 0.

        Raises:
            BadDocument: the template rejects the chat, or changes an answer's text.
            ValueError: the template has a syntax error, or does not finish in time.
        """
        (messages, tools), masked = self._chat_tokenizer.mask([messages, tools])
        template = self._tokenizer.get_chat_template(self._template, tools=tools)
        if "tool_calls" not in template and any("tool_calls" in message for message in messages):
            raise BadDocument("chat with tool calls, which the template does not show")
        rendering = _Rendering(self._tokenizer, template, messages, tools)
        ids, offsets = self._chat_tokenizer.encode(rendering.text, masked)
        begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(begins), dtype=np.uint8)
        for first, last in rendering.find_answers(without_loss):
            mask |= (begins < last) & (ends > first)
        return ids, mask

    def unread_fields(self, messages: list[Message], tools: list[dict] | None) -> list[str]:
        """Return what the chat has and the template does not show, for the report."""
        template = self._tokenizer.get_chat_template(self._template, tools=tools)
        unread = ["the field 'tools'"] if tools and "tools" not in template else []
        if not any(name in template for name in REASONING_FIELDS):
            unread += ["an answer's reasoning"] * any(set(REASONING_FIELDS) & message.keys() for message in messages)
        return [f"{field}, which the template does not show" for field in unread]


class _Rendering:
    """A chat as text, and the places of its answers.

    Raises:
        BadDocument: the template rejects the chat.
    """

    def __init__(self, tokenizer: Any, template: str, messages: list[Message], tools: list[dict] | None):
        self._tokenizer, self._template, self._messages, self._tools = tokenizer, template, messages, tools
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self.text, marked = self._render(messages, marks=self._has_marks)
        self._marked = [(first, last) for first, last in marked if first < last]

    def find_answers(self, without_loss: Set[int]) -> list[tuple[int, int]]:
        """Return (start, end) in the text of each answer with its end token, but of those `without_loss`.

        Raises:
            BadDocument: an answer cannot be found.
        """
        answers = [i for i, message in enumerate(self._messages) if message["role"] == "assistant"]
        if self._marked and not without_loss:
            return self._marked
        if len(self._marked) == len(answers):
            return [span for i, span in zip(answers, self._marked) if i not in without_loss]
        return [self._find_answer(i) for i in answers if i not in without_loss]

    def _find_answer(self, i: int) -> tuple[int, int]:
        start = self._find_start(i)
        as_last, _ = self._render(self._messages[: i + 1])
        if self.text.startswith(as_last) and len(as_last.rstrip()) > start:
            return start, len(as_last.rstrip())
        # The template renders the last answer differently from earlier ones: look for the answer's text.
        content = self._messages[i]["content"]
        following = "".join(message["content"].strip() for message in self._messages[i + 1 : i + 2])
        for answer in (content.strip(), content.rpartition("</think>")[2].strip()):
            # The first match after the prompt: the end token may contain the answer's text too.
            after = start if as_last[:start] == self.text[:start] else max(as_last.rfind(answer), 0)
            at, at_last = self.text.find(answer, start), as_last.find(answer, after)
            if not answer or at < 0 or at_last < 0 or (following and following in self.text[start:at]):
                continue
            ending = as_last[at_last + len(answer) :].rstrip()
            if self.text.startswith(ending, at + len(answer)):
                return start, at + len(answer) + len(ending)
        raise BadDocument(_REWRITTEN)

    def _find_start(self, i: int) -> int:
        """Return where the prompt for message i ends in the text."""
        prompt, _ = self._render(self._messages[:i], add_generation_prompt=True)
        # Prompts of reasoning models may open a thinking block, which an answer does not have.
        for start in (prompt, _OPEN_THINKING.sub("", prompt)):
            if self.text.startswith(start):
                return len(start)
        raise BadDocument(_REWRITTEN)

    def _render(
        self, messages: list[Message], add_generation_prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and with `marks` the (start, end) of what the template marks as generated."""
        # `apply_chat_template` does not return the marks' places in the text.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with limit_rendering_time():
                rendered: Any = render_jinja_template(
                    [messages],
                    tools=self._tools,  # pyright: ignore[reportArgumentType]
                    chat_template=self._template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=add_generation_prompt,
                    **self._tokenizer.special_tokens_map,
                )
        except TemplateTimeout as error:
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path} {error}") from None
        except TemplateSyntaxError as error:  # the same for every chat
            reason = one_line(error, 120)
            raise ValueError(f"the chat template cannot be parsed: line {error.lineno}: {reason}") from None
        except Exception as error:  # from the template, from jinja or from its sandbox
            raise BadDocument("chat that the chat template rejects", one_line(error, 120)) from None
        (text,), places = rendered
        return text, places[0] if marks else []


def _check_template(own: str | dict[str, str] | None, chosen: str | None) -> None:
    """Raise ValueError if the tokenizer has no template of that name, or several and none is chosen."""
    names = sorted(own) if isinstance(own, dict) else []
    if chosen is None and names and "default" not in names:
        raise ValueError(
            f"the tokenizer has several chat templates; choose one with --chat-template: {', '.join(names)}"
        )
    if chosen is not None and "{" not in chosen and chosen not in names:
        has = f"the tokenizer's templates are {', '.join(names)}" if names else "the tokenizer has no named templates"
        raise ValueError(f"--chat-template {chosen}: no such file, and {has}")


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
