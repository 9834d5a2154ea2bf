"""Text to tokens: four byte-level tokenizers, built from ranks that are packaged with the library.

`gpt2`      GPT-2's byte-pair encoding, 50,257 tokens with `<|endoftext|>` (Radford et al. 2019).
`gpt2_16k`  its first 16,640 ranks and `<|endoftext|>`: a valid encoding of its own, in which every id below 16,640
            means what it means in GPT-2.
`gpt2_1k`   its first 1,023 ranks and `<|endoftext|>`: 1,024 tokens.
`bytes`     one token a byte of UTF-8; no special token.

An imported model brings its own, a `tokenizer.json`: `reflowlens.tokenizers.file`.
"""

from reflowlens.tokenizers.base import END_OF_TEXT as END_OF_TEXT
from reflowlens.tokenizers.base import Tokenizer as Tokenizer
from reflowlens.tokenizers.by_name import check_tokenizer_fits as check_tokenizer_fits
from reflowlens.tokenizers.by_name import get_tokenizer as get_tokenizer
from reflowlens.tokenizers.ranks import TOKENIZER_NAMES as TOKENIZER_NAMES
