"""Read the help texts of Megatron's flags once per process."""


def read_once() -> None:
    """Cache the help texts that Megatron reads from its sources for each parser; the tests build hundreds of parsers."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, texts = ArgumentGroupFactory._get_field_docstrings, {}

    def read_cached(self, kind):
        if kind not in texts:
            texts[kind] = read(self, kind)
        return dict(texts[kind])

    ArgumentGroupFactory._get_field_docstrings = read_cached
