"""Students: models trained with a teacher, on its distribution, its readout signals, or with its signal basis.

    reflowlens distill TEACHER CONFIG [--resume]
    torchrun --nproc_per_node=N -m pretraining.distillation TEACHER CONFIG [--resume]

The loop is that of :mod:`pretraining.train`; what is minimised is :mod:`pretraining.distillation.objective`.
"""
