"""Long-context tests: the prompts, and the scores of a model's answers.

Each module has `examples(tokenizer, ...)`, a pure function of its arguments: an example does not depend on the
other requested lengths or the number of examples. `score(example, output)` is from 0 to 1. Tokenizers add no
special tokens here. Prompt and answer together have at most `length` tokens; a BOS before them still fits,
because the last token of an answer is never read.
"""
