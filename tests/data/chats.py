"""Chats of many kinds, chat templates, and a tokenizer to save them with; shared by the tests of chats."""

import functools

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'].strip() }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}" + PROMPT
)
# Like Llama-2-chat's template: no generation prompt, BOS in the text, turns that must alternate.
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Like Llama 3's: a system turn that is always there, and tool calls as JSON.
LLAMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "<|im_start|>system\n\n{% if tools %}Tools: {% for t in tools %}{{ t | tojson }}{% endfor %}\n{% endif %}"
    "{{ first }}<|im_end|>{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>ipython\n\n{{ m.content }}<|im_end|>"
    "{% elif m.tool_calls %}<|im_start|>assistant\n\n"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|im_end|>"
    "{% else %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Like Mistral's: the system message is in the last question, so earlier text changes as the chat grows.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.last or loop.index0 == messages | length - 2 %}{{ system }}{% endif %}"
    "{{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Like the templates of reasoning models: only the last answer has a thinking block.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Like DeepSeek-R1's: the prompt opens a thinking block, and answers lose theirs.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1].strip() if m['role'] == 'assistant' else m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Like Qwen3's: earlier answers lose their thinking, the last one keeps it.
LAST_THINKS = REASONING.replace(
    "{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split('</think>')[-1].strip() }}"
).replace("<think>\n\n</think>\n\n", "")


@functools.cache
def _byte_level_bpe():
    """A byte-level BPE tokenizer, like Llama 3's or Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["what is the answer to this question", "the answer is that there is none"], trainer)
    return inner


def save_tokenizer(path, template: str | None):
    """Save a tokenizer with this chat template to the folder; return the folder."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(), bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(path)
    return path


def talk(*turns: str) -> list[dict]:
    """Return messages of alternating questions and answers."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def share(*turns, **fields) -> dict:
    """Return a record in ShareGPT's form, of (from, value)."""
    return {"conversations": [{"from": role, "value": text} for role, text in turns]} | fields


def openai(*turns, **fields) -> dict:
    """Return a record in OpenAI's form, of (role, content) or whole messages."""
    return {
        "messages": [turn if isinstance(turn, dict) else dict(zip(("role", "content"), turn)) for turn in turns]
    } | fields


IMAGE = [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "x"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
Q, A = ("human", "q"), ("gpt", "a")

CLEANED = [
    # (record, its turns or why it is dropped, what is cut)
    (share(Q, A), "uq aa", []),
    (share(("gpt", "x"), ("gpt", "y"), Q, A, ("human", "z")), "uq aa", ["answers before", "questions after"]),
    (share(("system", "s"), Q, A), "ss uq aa", []),
    (share(("system", "s"), ("system", "t"), Q, A), "ss\n\nt uq aa", []),
    (share(Q, A, system="s"), "ss uq aa", []),
    (share(("system", "s"), Q, A, system="other"), "ss uq aa", ["'system' of a chat with a system turn"]),
    (share(("system", " "), ("gpt", "x"), ("user", "q"), ("chatgpt", "a")), "uq aa", ["answers before"]),
    (openai(("user", "q"), ("assistant", "a")), "uq aa", []),
    (openai(("developer", "s"), ("User", "q"), ("assistant", "a")), "ss uq aa", []),
    (share(Q, A) | openai(("user", "other")), "uq aa", ["'messages' of a record with 'conversations'"]),
    ({"conversations": None} | openai(("user", "q"), ("gpt", "a")), "uq aa", []),
    ({"conversations": []} | openai(("user", "q"), ("gpt", "a")), "uq aa", []),
    (openai({"from": None, "value": None, "role": "user", "content": "q"}, ("assistant", "a")), "uq aa", []),
    (share(Q, A, ("system", "s"), Q, A), "uq aa", ["all from a system turn between others"]),
    (share(Q, A, Q, ("gpt", " ")), "uq aa", ["all from an empty turn"]),
    (share(Q, A, Q, A, ("gpt", "b")), "uq aa uq aa", ["all from turns that do not alternate"]),
    (
        openai(("user", "q"), ("assistant", "a"), ("user", IMAGE), ("assistant", "b")),
        "uq aa",
        ["parts that are not text"],
    ),
    (openai(("user", "q"), ("assistant", "a"), ("user", "q"), CALL), "uq aa", ["all from tool calls"]),
    (share(Q, A, tools=[{"name": "f"}]), "uq aa", ["'tools', for which llama2"]),
    (share(Q, A, tools="[]"), "uq aa", []),
    (openai(("user", [{"type": "text", "text": "q"}]), ("assistant", [{"text": "a"}])), "uq aa", []),
    ({"id": 1, "conversations": []}, "without an answer", None),
    (share(A), "without an answer", None),
    (share(Q), "without an answer", None),
    (share(("system", "s")), "without an answer", None),
    (share(Q, ("human", "r"), A), "do not alternate", None),
    (share(Q, ("bing", "a")), "an unknown role", None),
    (share(Q, ("gpt", "\n")), "an empty turn", None),
    (share(Q, ("gpt", None)), "an empty turn", None),
    (share(Q, ("gpt", 3)), "malformed turn", None),
    (openai(("user", IMAGE)), "parts that are not text", None),
    (openai(("user", "q"), CALL), "tool calls", None),
    (share(Q, A, system=3), "'system' is not text", None),
    (share(Q, A, tools="{"), "'tools' is not a list", None),
    ({"conversations": ["q", "a"]}, "malformed turn", None),
    ({"conversations": "q"}, "not a list of turns", None),
    (share(Q, A, tools=[functools.reduce(lambda inner, _: {"a": inner}, range(70), {})]), "nested too deeply", None),
    ({"text": "q"}, "no key 'conversations' or 'messages'", None),
]
