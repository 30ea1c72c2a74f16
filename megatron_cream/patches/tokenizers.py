"""Accept Hugging Face tokenizers without an EOS token."""

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

EOS_ID = Patch(
    "eos-id",
    "megatron.core.tokenizers.text.libraries.huggingface_tokenizer:HuggingFaceTokenizer.eos_id",
    "Megatron looks up the id of the token None in a tokenizer without EOS, a TypeError, when it builds a data set.",
    value_type="property",
)


def install() -> None:
    """Make `eos_id` None if the tokenizer has no EOS, as `bos_id` and `eod` do."""
    registry.assign(EOS_ID, property(lambda self: self.eod))
