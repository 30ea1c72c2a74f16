"""Read ShareGPT and OpenAI chat records as one form, and name the parts of a record that are not used.

A chat is used up to the first turn that cannot be used: a wrong role, an empty turn, an image. The rest of such a chat
is cut; a chat without a usable answer is dropped. Both are counted with their reason.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cream.data.documents import BadDocument

CHAT_KEYS = ("conversations", "messages")
"""Keys of a record's turns: ShareGPT's and OpenAI's. The first one that has turns is read."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Values of ShareGPT's `from` and OpenAI's `role`, in lower case -> role."""

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of an answer's reasoning; transformers shows a template each under all names."""

_KEPT_FIELDS = ("name", "tool_call_id", *REASONING_FIELDS)
"""Fields of a turn that chat templates read, beside its role, content and tool calls."""

Message = dict[str, Any]
"""{"role": "system", "user", "assistant" or "tool", "content": text, ...}, the input of chat templates."""


@dataclass(frozen=True)
class Chat:
    """A chat to encode. It has a user's turn, which only a system message precedes, and ends with an answer."""

    messages: list[Message]

    tools: list[dict] | None = None
    """Descriptions of tools, for the chat template."""

    without_loss: frozenset[int] = frozenset()
    """Indices of answers without loss: those with "weight": 0, as in OpenAI's fine-tuning format."""

    cuts: tuple[str, ...] = ()
    """What was left out of the record."""


class _BadTurn(Exception):
    """A turn cannot be used. The message follows "chat with" and "all from"."""


def extract_chat(record: dict, keys: Sequence[str] = CHAT_KEYS, plain: bool = True) -> Chat:
    """Return the chat in a record.

    As FastChat does with ShareGPT, leaves out answers before the first question. Also leaves out questions after the
    last answer.

    Args:
        record: a JSON object.
        keys: possible keys of its turns.
        plain: the format has only turns of user and assistant, which must alternate, after an optional system message.
            Otherwise it is a chat template, which decides about roles, their order and tool calls.

    Raises:
        BadDocument: there is no answer to a question that could be used.
        UnicodeError: a turn contains lone surrogates.
    """
    found = [key for key in keys if record.get(key)] or [key for key in keys if record.get(key) is not None]
    if not found:
        raise BadDocument(f"no key {' or '.join(map(repr, keys))}")
    turns, cuts = record[found[0]], [f"{key!r} of a record with {found[0]!r}" for key in found[1:]]
    if not isinstance(turns, list):
        raise BadDocument("chat that is not a list of turns")
    system, talk, problem = _read_turns(turns, plain)
    own_system, tools = _read_system(record), _read_tools(record)
    if own_system and system and own_system != system:
        cuts.append("the field 'system' of a chat with a system turn")
    begin = next((i for i, message in enumerate(talk) if message["role"] == "user"), len(talk))
    end = next((i for i in range(len(talk), begin, -1) if talk[i - 1]["role"] == "assistant"), begin)
    if begin == end:
        raise BadDocument(f"chat with {problem}" if problem else "chat without an answer to a question")
    if begin:
        cuts.append("answers before the first question")
    if problem:
        cuts.append(f"all from {problem} on")
    elif end < len(talk):
        cuts.append("questions after the last answer")
    messages = [{"role": "system", "content": text} for text in (system or own_system,) if text] + talk[begin:end]
    if tools and plain:
        cuts.append("the field 'tools', for which llama2 has no place")
    # Remove the weights: a template must not see them.
    without_loss = frozenset(i for i, message in enumerate(messages) if message.pop("weight", 1) == 0)
    _check_depth([messages, tools])
    _check_unicode([messages, tools])
    return Chat(messages, None if plain else tools, without_loss, tuple(cuts))


def _read_turns(turns: list, plain: bool) -> tuple[str, list[Message], str]:
    """Return the text of the system turns at the start, the turns after them, and the problem that ends them, or ""."""
    system: list[str] = []
    talk: list[Message] = []
    try:
        for turn in turns:
            message = _read_turn(turn, plain)
            if message["role"] == "system" and not talk:
                system += [message["content"]] if message["content"].strip() else []
                continue
            if plain and message["role"] == "system":
                raise _BadTurn("a system turn between others")
            if plain and message["role"] == "user" and talk and talk[-1]["role"] == "user":
                raise _BadTurn("turns that do not alternate")
            answers_twice = message["role"] == "assistant" and talk and talk[-1]["role"] == "assistant"
            if plain and answers_twice and any(other["role"] == "user" for other in talk):
                raise _BadTurn("turns that do not alternate")
            if not message["content"].strip() and not message.get("tool_calls") and message["role"] != "tool":
                raise _BadTurn("an empty turn")
            talk.append(message)
    except _BadTurn as error:
        return "\n\n".join(system), talk, str(error)
    return "\n\n".join(system), talk, ""


def _read_turn(turn: Any, plain: bool) -> Message:
    if not isinstance(turn, dict):
        raise _BadTurn("a malformed turn")
    role, content = _first(turn, "from", "role"), _first(turn, "value", "content")
    if not isinstance(role, str):
        raise _BadTurn("a malformed turn")
    if role.lower() not in ROLES:
        raise _BadTurn("an unknown role")
    calls = _read_tool_calls(
        content if role.lower() == "function_call" else _first(turn, "tool_calls", "function_call")
    )
    message: Message = {"role": ROLES[role.lower()], "content": "" if role.lower() == "function_call" else content}
    if plain and (calls or message["role"] == "tool"):
        raise _BadTurn("tool calls")
    if isinstance(message["content"], list):
        message["content"] = _join_parts(message["content"])
    if message["content"] is None:  # as in turns that only call tools
        message["content"] = ""
    if not isinstance(message["content"], str):
        raise _BadTurn("a malformed turn")
    if calls:
        message["tool_calls"] = calls
    message |= {key: turn[key] for key in _KEPT_FIELDS if isinstance(turn.get(key), str) and not plain}
    return message | ({"weight": 0} if turn.get("weight") == 0 else {})


def _first(turn: dict, *keys: str) -> Any:
    """Return the first value that is not null: rows of a table have null for the keys of the other form."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _join_parts(parts: list) -> str:
    """Join OpenAI's content parts, each {"type": "text", "text": ...}, to one text."""
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise _BadTurn("parts that are not text")
    return "".join(part["text"] for part in parts)


def _read_tool_calls(calls: Any) -> list[dict]:
    """Return tool calls as chat templates expect them: arguments are an object, not its JSON."""
    if not calls:
        return []
    calls = _parse_json(calls) if isinstance(calls, str) else calls
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _BadTurn("malformed tool calls")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and isinstance(parsed := _parse_json(arguments), dict):
            arguments = parsed
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        arguments = {} if arguments is None else arguments
        read.append(identity | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return read


def _read_system(record: dict) -> str:
    text = record.get("system")
    if text is not None and not isinstance(text, str):
        raise BadDocument("chat whose field 'system' is not text")
    return text if text and text.strip() else ""


def _read_tools(record: dict) -> list[dict] | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parse_json(tools) if tools.strip() else None
        tools = "malformed" if tools is None and record["tools"].strip() not in ("", "null") else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadDocument("chat whose field 'tools' is not a list of objects")
    return tools


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check_depth(value: Any, left: int = 64) -> None:
    """Raise BadDocument at lists and objects that are nested more than `left` deep, as recursion is limited."""
    if left == 0:
        raise BadDocument("chat that is nested too deeply")
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, left - 1)


def _check_unicode(value: Any) -> None:
    """Raise UnicodeError at a lone surrogate, which JSON can encode but no tokenizer accepts."""
    json.dumps(value, ensure_ascii=False).encode()
