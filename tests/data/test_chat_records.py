"""Tests of how chat records are read: every form, what is cut, what is dropped, and why."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.data.chat import Llama2Chat
from megatron_cream.data.chat_records import extract_chat
from megatron_cream.data.documents import BadDocument
from megatron_cream.data.preprocess import preprocess
from tests.data.chats import CALL, CLEANED, IMAGE, A, Q, openai, share
from tests.data.test_preprocess import ByteTokenizer


def short(messages) -> str:
    return " ".join(message["role"][0] + message["content"] for message in messages)


@pytest.mark.parametrize("record, expected, cuts", CLEANED)
def test_chats_are_cleaned_or_dropped(record, expected, cuts):
    if cuts is None:
        with pytest.raises(BadDocument, match=expected):
            extract_chat(record)
    else:
        chat = extract_chat(record)
        assert short(chat.messages) == expected and chat.tools is None
        assert len(chat.cuts) == len(cuts) and all(part in cut for part, cut in zip(cuts, chat.cuts)), chat.cuts


def test_a_chat_template_decides_about_roles_and_tools():
    read = lambda record: extract_chat(record, plain=False)
    assert short(read(share(Q, ("human", "r"), A, ("gpt", "b"))).messages) == "uq ur aa ab"
    assert short(read(share(Q, A, ("system", "s"), Q, A)).messages) == "uq aa ss uq aa"
    answer = {"role": "tool", "content": "", "tool_call_id": "1"}
    chat = read(openai(("user", "q"), CALL, answer, ("assistant", "a"), ("user", IMAGE), tools='[{"name": "f"}]'))
    assert chat.messages[1]["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    assert chat.messages[2] == answer and chat.tools == [{"name": "f"}]
    assert chat.cuts == ("all from parts that are not text on",)
    value = json.dumps({"name": "f", "arguments": {"x": 1}})
    chat = read(share(Q, ("function_call", value), ("observation", "o"), A))
    assert short(chat.messages) == "uq a to aa"
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    with pytest.raises(BadDocument, match="malformed tool calls"):
        read(share(Q, ("function_call", "f(x)"), A))


def test_answers_of_weight_zero_have_no_loss():
    record = openai(
        ("user", "q"), {"role": "assistant", "content": "a", "weight": 0}, ("user", "r"), ("assistant", "b"), system="s"
    )
    chat = extract_chat(record)
    assert chat.without_loss == {2} and all("weight" not in message for message in chat.messages)
    ids, mask = Llama2Chat(ByteTokenizer())(chat.messages, None, chat.without_loss)
    assert bytes(np.array(ids)[mask == 1][:-1].tolist()) == b" b "


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    max_leaves=20,
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        k: st.sampled_from(["human", "gpt", "system", "user", "assistant", "tool", "function_call"]) | st.text() | JSON
        for k in ("from", "value", "role", "content", "tool_calls", "weight")
    },
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"conversations": st.lists(TURN | JSON) | JSON}, optional={"system": st.text() | JSON, "tools": JSON}
    )
)
def test_any_record_gives_a_chat_or_a_reason(record):
    for plain in (False, True):
        try:
            chat = extract_chat(record, plain=plain)
        except (BadDocument, UnicodeError):
            continue
        roles = [message["role"] for message in chat.messages]
        assert "user" in roles and roles[-1] == "assistant"
        if plain:
            assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(roles) // 2)
            ids, mask = Llama2Chat(ByteTokenizer())(chat.messages)
            assert len(ids) == len(mask) and mask[-1] == 1 and mask[0] == 0


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_the_columns_beside_the_turns_are_read(tmp_path, form):
    import datasets

    rows = {"conversations": [share(Q, A)["conversations"]] * 2, "system": ["be brief", None], "tools": [None, "[{}]"]}
    data = datasets.Dataset.from_dict(rows)
    data.to_parquet(tmp_path / "a.parquet") if form == "parquet" else data.save_to_disk(tmp_path / "a")
    path = tmp_path / ("a.parquet" if form == "parquet" else "a")
    report = preprocess([path], tmp_path / "x", ByteTokenizer(), chat_format="llama2", progress=False)
    texts = [bytes(ids[1:-1].tolist()) for ids in IndexedDataset(str(tmp_path / "x"))]
    assert texts == [b"[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nq [/INST] a ", b"[INST] q [/INST] a "]
    assert list(report.cuts.values()) == [1] and list(report.first_cut.values())[0].endswith(":2")
