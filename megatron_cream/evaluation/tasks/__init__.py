"""Long-context tests: the prompts, and the grading of what a model answers.

Each module has `examples(tokenizer, ...)`, a pure function of its arguments: an example is the
same whatever other lengths or numbers of examples are asked for. `score(example, output)` is from
0 to 1. No tokenizer adds special tokens here; prompt and answer together are of `length` tokens at
most, and a BOS before them still fits, as the last token of an answer is never read.
"""
