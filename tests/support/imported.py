"""What the server of `tests.support.processes` imports, once: none of it is garbage, which is looked for afterwards."""

import gc
from importlib import import_module

gc.disable()
for name in ("pretraining.train", "reflowlens.models", "tests.support.launched", "tests.support.tiny"):
    import_module(name)
import_module("torch._dynamo")  # DistributedDataParallel does, which takes more than a second
gc.freeze()
gc.enable()
