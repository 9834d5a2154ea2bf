"""What a model is made of, and the published configurations by name."""

from reflowlens.config.architectures import ARCHITECTURES as ARCHITECTURES
from reflowlens.config.checks import LARGEST as LARGEST
from reflowlens.config.model import FILE_TOKENIZER as FILE_TOKENIZER
from reflowlens.config.model import ModelConfig as ModelConfig
from reflowlens.config.presets import PRESETS as PRESETS
from reflowlens.config.presets import preset as preset
from reflowlens.decoder_options import RotaryScaling as RotaryScaling
from reflowlens.errors import nearest as nearest
