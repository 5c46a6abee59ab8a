"""Adept's original checkpoints (Megatron, `model_optim_rng.pt`): read without executing them, written back.

source.py     the files, in a release tar or a folder; MD5
pickles.py    what a model file says and where its tensors lie
names.py      Adept's names of tensors and ours; who holds what of a split model
arguments.py  the training run's arguments and our config
rows.py       tensors as rows of bytes, stacked and cut lazily
merge.py      ranks merged and split
write.py      streaming writers: safetensors, torch's zip
work.py       the folder that is being written, and can be resumed
convert.py    the two directions
"""

from persimmon_fast.adept.convert import Conversion, to_adept, to_hugging_face

__all__ = ["Conversion", "to_adept", "to_hugging_face"]
