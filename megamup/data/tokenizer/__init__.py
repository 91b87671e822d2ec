"""Text to token ids and back."""

from megamup.data.tokenizer.base import FileTokenizer, Ids, Lengths, Tokenizer
from megamup.data.tokenizer.byte import ByteTokenizer
from megamup.data.tokenizer.fast import CheckedTokenizer, fastest_exact, spot_check
from megamup.data.tokenizer.sentencepiece import SentencePieceTokenizer
from megamup.data.tokenizer.spec import ACCEPTED, load_tokenizer, store_tokenizer

__all__ = [
    "ACCEPTED",
    "ByteTokenizer",
    "CheckedTokenizer",
    "FileTokenizer",
    "Ids",
    "Lengths",
    "SentencePieceTokenizer",
    "Tokenizer",
    "fastest_exact",
    "load_tokenizer",
    "spot_check",
    "store_tokenizer",
]
