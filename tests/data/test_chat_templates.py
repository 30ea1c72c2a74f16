"""Tests of chats encoded by a chat template: the tokens, and the mask of the assistant's answers."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_cream.commands.preprocess import read_template
from megatron_cream.data.chat import TemplateChat
from megatron_cream.data.chat_records import extract_chat
from megatron_cream.data.documents import BadDocument
from megatron_cream.data.tokenizers import load_tokenizer
from tests.data.chats import (
    CALL,
    CHATML,
    LAST_THINKS,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    REASONING,
    THINKING,
    openai,
    save_tokenizer,
    talk,
)
from tests.data.test_preprocess import ByteTokenizer

UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(template): Megatron's tokenizer with this chat template."""
    return lambda template: load_tokenizer(
        "HuggingFaceTokenizer", save_tokenizer(tmp_path_factory.mktemp("chat"), template)
    )


def spans(tokenizer, ids, mask) -> list[str]:
    """Return the text of each run of tokens that the mask marks."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]))).reshape(-1, 2)
    return [tokenizer._tokenizer.tokenizer.decode(list(ids[a:b])) for a, b in edges]


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_template_masks_are_those_of_transformers(load, template):
    """transformers returns the mask of a template that marks its answers."""
    encode = TemplateChat(load(template))
    reference = AutoTokenizer.from_pretrained(load(CHATML)._tokenizer.tokenizer.name_or_path)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=7), st.booleans())
    @example(["0", "|"], False)  # the end token contains "|" too
    @example(["☃" * 3, "é", "🙂🙂", "a"], True)
    def check(turns, with_system):
        system = [{"role": "system", "content": "the answer"}] if with_system else []
        messages = system + talk(*turns[: len(turns) // 2 * 2])
        expected = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encode(messages)
        assert ids == expected["input_ids"]
        assert mask.tolist() == expected["assistant_masks"]

    check()


def test_marks_of_a_template_decide(load):
    """A template may mark less than its answers, such as all but the thinking."""
    template = REASONING.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}", 1)
    tokenizer = load(template)
    messages = talk("what", "the answer", "is", "none")
    reference = AutoTokenizer.from_pretrained(tokenizer._tokenizer.tokenizer.name_or_path).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = TemplateChat(tokenizer)(messages)
    assert mask.tolist() == reference["assistant_masks"]
    # The marks include the questions, so they cannot tell which answer has no loss.
    _, mask = TemplateChat(tokenizer)(messages, None, {1})
    assert spans(tokenizer, ids, mask) == ["<think>\n\n</think>\n\nnone<|im_end|>"]


@pytest.mark.parametrize(
    "template, answers",
    [
        (LLAMA2, [" the answer </s>", " none </s>"]),
        (LLAMA3, ["the answer<|im_end|>", "none<|im_end|>"]),
        (MISTRAL, ["the answer</s>", "none</s>"]),
        (REASONING, ["the answer<|im_end|>", "<think>\n\n</think>\n\nnone<|im_end|>"]),
    ],
    ids=["llama2", "llama3", "mistral", "reasoning"],
)
def test_templates_that_mark_nothing(load, template, answers):
    tokenizer = load(template)
    messages = talk("what is it", "the answer", "the answer", "none")
    ids, mask = TemplateChat(tokenizer)(messages)
    inner = tokenizer._tokenizer.tokenizer
    assert inner.decode(ids) == inner.apply_chat_template(messages, tokenize=False)
    assert spans(tokenizer, ids, mask) == answers
    _, mask = TemplateChat(tokenizer)(messages, None, {1})
    assert spans(tokenizer, ids, mask) == answers[1:]


@pytest.mark.parametrize("template", [THINKING, LAST_THINKS], ids=["thinking", "last"])
@pytest.mark.parametrize("first", ["none", "<b", "<think>hm</think>none", "is"])
def test_answers_that_lose_their_thinking(load, template, first):
    tokenizer = load(template)
    ids, mask = TemplateChat(tokenizer)(talk("what is it", first, "what", "<think>so</think>the answer"))
    last = "<think>so</think>the answer" if template is LAST_THINKS else "the answer"
    assert spans(tokenizer, ids, mask) == [first.split("</think>")[-1] + "<|im_end|>", last + "<|im_end|>"]


def test_tools_and_calls_reach_the_template(load):
    tokenizer = load(LLAMA3)
    record = openai(
        ("user", "q"),
        CALL | {"tool_calls": [{"function": {"name": "f", "arguments": '{"x": "<|im_end|>"}'}}]},
        {"role": "tool", "content": "30"},
        ("assistant", "a"),
        ("user", "r"),
        ("user", "s"),
        ("assistant", "b"),
        tools=[{"name": "f"}],
    )
    chat = extract_chat(record, plain=False)
    encode = TemplateChat(tokenizer)
    ids, mask = encode(chat.messages, chat.tools)
    assert spans(tokenizer, ids, mask) == ['f({"x": "<|im_end|>"})<|im_end|>', "a<|im_end|>", "b<|im_end|>"]
    assert 'Tools: {"name": "f"}' in tokenizer._tokenizer.tokenizer.decode(ids)
    assert ids.count(tokenizer._tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 8  # a turn's each
    assert encode.unread_fields(chat.messages, chat.tools) == []
    plain = TemplateChat(load(CHATML))
    with pytest.raises(BadDocument, match="tool calls, which the template does not show"):
        plain(chat.messages, chat.tools)
    thinking = [*talk("q"), {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    assert len(plain.unread_fields(thinking, chat.tools)) == 2


def test_templates_that_cannot_carry_a_chat(load):
    refuses = TemplateChat(load(LLAMA2))
    with pytest.raises(BadDocument, match="rejects") as raised:
        refuses([{"role": "system", "content": "s"}, *talk("q", "a")])
    assert raised.value.detail == "roles must alternate"
    rewrites = TemplateChat(load(UNMARKED.replace(".strip()", " | upper")))
    assert rewrites(talk("q", "a"))[1].any()  # found where the text changes from the prompt to the chat's end
    with pytest.raises(BadDocument, match="rewrites"):
        TemplateChat(load(MISTRAL))([{"role": "system", "content": "s"}, *talk("q", "a", "r", "b")])
    upper = TemplateChat(load(LAST_THINKS.replace("[-1].strip()", "[-1] | upper")))
    with pytest.raises(BadDocument, match="rewrites"):
        upper(talk("what", "a", "is", "a"))  # the first "a" is written "A": it must not be found in the second
    with pytest.raises(ValueError, match="no chat template"):
        TemplateChat(load(None))
    with pytest.raises(ValueError, match="HuggingFaceTokenizer"):
        TemplateChat(ByteTokenizer())


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"])
def test_a_template_is_found_where_transformers_keeps_it(tmp_path, place):
    folder = save_tokenizer(tmp_path / "hf", None)
    if place == "tokenizer_config.json":
        path = folder / place
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": UNMARKED}))
    else:
        (folder / "chat_template.jinja").write_text(UNMARKED)
    if place == "additional_chat_templates":
        (folder / place).mkdir()
        (folder / place / "brief.jinja").write_text(LLAMA2)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder)
    decode = tokenizer._tokenizer.tokenizer.decode
    assert decode(TemplateChat(tokenizer)(talk("q", "a"))[0]).startswith("<|im_start|>user\nq<|im_end|>")
    assert decode(TemplateChat(tokenizer, LLAMA2)(talk("q", "a"))[0]) == "<s>[INST] q [/INST] a </s>"
    if place == "additional_chat_templates":
        assert decode(TemplateChat(tokenizer, "brief")(talk("q", "a"))[0]) == "<s>[INST] q [/INST] a </s>"
    with pytest.raises(ValueError, match="--chat-template long: no such file"):
        TemplateChat(tokenizer, "long")
    tokenizer._tokenizer.tokenizer.chat_template = {"rag": LLAMA2, "brief": LLAMA2}
    with pytest.raises(ValueError, match="choose one with --chat-template: brief, rag"):
        TemplateChat(tokenizer)


def test_a_template_is_a_file_or_a_name(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }} é", "utf-8")
    (tmp_path / "other.jinja").write_bytes(b"\xff")
    assert read_template(str(tmp_path / "own.jinja")) == "{{ messages }} é"
    assert (read_template("brief"), read_template(None)) == ("brief", None)
    with pytest.raises(ValueError, match="--chat-template .*other.jinja: not a UTF-8 text file"):
        read_template(str(tmp_path / "other.jinja"))


def test_a_syntax_error_of_a_template_is_no_fault_of_the_chats(tmp_path):
    tokenizer = load_tokenizer("HuggingFaceTokenizer", save_tokenizer(tmp_path, None))
    with pytest.raises(ValueError, match="the chat template cannot be parsed: line 2: "):
        TemplateChat(tokenizer, "{% for m in messages %}\n{{ m.role }")(talk("q", "a"))
