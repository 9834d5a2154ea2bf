"""Words and prompts: the lexicon, and its words as a model's tokens."""

from analyses.words.lexicon import FactualPrompt as FactualPrompt
from analyses.words.lexicon import Lexicon as Lexicon
from analyses.words.lexicon import load_lexicon as load_lexicon
