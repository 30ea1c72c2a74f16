"""Accept Hugging Face tokenizers without EOS."""

from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

EOS_ID = Patch(
    "eos-id",
    "megatron.core.tokenizers.text.libraries.huggingface_tokenizer:HuggingFaceTokenizer.eos_id",
    "Megatron asks a tokenizer without EOS for the id of the token None, a TypeError, whenever it builds a data set.",
    value_type="property",
)


def install() -> None:
    """Make `eos_id` None where the tokenizer has no EOS, as `bos_id` and `eod` are."""
    registry.assign(EOS_ID, property(lambda self: self.eod))
