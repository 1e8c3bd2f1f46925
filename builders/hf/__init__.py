"""Hugging Face directories: config.json and safetensors, read and written.

`names` says what each tensor of a model is called in a family's files, `convert` and `pretrained` walk it.
"""

from modelspec.builders.hf.convert import is_hugging_face
from modelspec.builders.hf.names import HubLayout, Piece, duplicates, hub_shapes, inventory
from modelspec.builders.hf.pretrained import from_pretrained, save_pretrained

__all__ = [
    "HubLayout",
    "Piece",
    "duplicates",
    "from_pretrained",
    "hub_shapes",
    "inventory",
    "is_hugging_face",
    "save_pretrained",
]
