"""Hugging Face directories: config.json and safetensors, read and written.

`names` says what each tensor of a model is called in a family's files, `load` and `save` walk it.
"""

from modelspec.builders.hf.load import from_pretrained, is_hugging_face
from modelspec.builders.hf.names import HubLayout, Piece, duplicates, hub_shapes, inventory
from modelspec.builders.hf.save import save_pretrained

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
