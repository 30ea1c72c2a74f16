"""Faults of Megatron's tokenizers."""

from pathlib import Path

from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.upstream import upstream_fault
from tests.upstream.unpatched import unpatched


@upstream_fault(
    "eos-id",
    "eos_id looks up the token None, where bos_id, sep_id and eod are None",
    raises=TypeError,
)
def test_a_tokenizer_without_eos_has_no_id_of_one(tmp_path):
    words = Tokenizer(WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert unpatched(_ids, tmp_path) == (None, None, None)


def _ids(folder: Path) -> tuple:
    tokenizer = HuggingFaceTokenizer(str(folder))
    return tokenizer.bos_id, tokenizer.eod, tokenizer.eos_id
