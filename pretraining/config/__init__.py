"""A training run as a TOML file: four tables, or five of a student's, each a frozen dataclass, every field checked.

Shipped with the package, and known by their bare names, are the published family and its small relatives
(``pretraining/configs``).
"""

from pretraining.config.reading import CONFIGS as CONFIGS
from pretraining.config.reading import find_config as find_config
from pretraining.config.reading import list_configs as list_configs
from pretraining.config.reading import load_config as load_config
from pretraining.config.tables import AUTO as AUTO
from pretraining.config.tables import DataConfig as DataConfig
from pretraining.config.tables import OptimizerConfig as OptimizerConfig
from pretraining.config.tables import RunConfig as RunConfig
from pretraining.config.toml import read_toml as read_toml
from pretraining.config.toml import section as section
from pretraining.config.train_config import TrainConfig as TrainConfig
