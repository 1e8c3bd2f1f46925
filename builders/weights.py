"""The weights of a model in files, ours or Hugging Face's, and what can be made of them without holding them.

`Weights` says where the values of each tensor of a spec stand: in one piece or in many, plain or as block-scaled FP8.
From it a model is filled, a folder of ours written, or a Hugging Face directory; in each case piece by piece, so that
memory does not grow with the model.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.build import DTYPES, build
from modelspec.builders.checkpoint import TOKENIZER, Checkpoint, save_weights
from modelspec.builders.errors import Misuse, Refused
from modelspec.builders.fp8 import uncomputable
from modelspec.builders.model import Transformer
from modelspec.builders.run import marked
from modelspec.builders.tensor_files import FILE_DTYPES, TORCH_DTYPES, Stored
from modelspec.builders.tensor_writer import Bytes, Planned, Progress, buffers_of, unseen
from modelspec.kernels.block_scale import Block, dequantize, quantize, scales_shape

SCALES = "_scale_inv"  # The factor that a block's values are multiplied by, whatever the name suggests.
FP8 = "F8_E4M3"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Bytes of FP32 that a conversion holds at a time.
_HELD = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive elements of a tensor, in a file and not read yet.

    `view` is set where the file keeps them in another order: it gives the part, from the whole tensor of the file.
    `scales` is set on FP8 [rows, columns]: one factor for each block.
    """

    stored: Stored
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] | None = None
    scales: Stored | None = None
    block: Block = (128, 128)

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def place(self) -> str:
        """File and tensor, for messages."""
        return f"{self.stored.file}: {self.stored.name}"

    def bytes(self, dtype: torch.dtype) -> Iterator[Bytes]:
        """Its elements in a dtype, in order; as they are in the file where that is their dtype."""
        if self.view is None and TORCH_DTYPES[self.dtype] == dtype:
            yield from self.stored.buffers()
            return
        for values in self.values(dtype):
            yield from buffers_of(values)

    def values(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Its elements in a dtype, in order, as tensors of some of them each. FP8 is multiplied by its scales."""
        return self.between(dtype, 0, prod(self.shape))

    def between(self, dtype: torch.dtype, first: int, last: int) -> Iterator[Tensor]:
        """The same of its elements from `first` up to `last`. Plain ones are read alone."""
        if self.view is None and self.scales is None:
            flat = self.stored.part(0, (prod(self.shape),))
            for at in range(first, last, _HELD // 4):
                yield flat.rows(at, min(_HELD // 4, last - at)).read().to(dtype)
            return
        at = 0
        for values in self._converted(dtype):
            if at < last and first < at + len(values):
                yield values[max(first - at, 0) : last - at]
            at += len(values)

    def _converted(self, dtype: torch.dtype) -> Iterator[Tensor]:
        if self.view is not None:
            yield self.view(self.stored.mapped()).to(dtype).flatten()
        elif self.scales is not None:
            for rows, scales in self._blocks(self.stored, self.scales):
                yield dequantize(rows.read(), scales.read(), self.block, dtype).flatten()

    def quantized(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A matrix in FP8 and its scales, some rows of blocks at a time."""
        step = self._step(self.shape[1])
        whole = self.view(self.stored.mapped()) if self.view else None
        for first in range(0, self.shape[0], step):
            rows = whole[first : first + step] if whole is not None else self.stored.rows(first, step).read()
            yield quantize(rows, self.block)

    def _blocks(self, weight: Stored, scales: Stored) -> Iterator[tuple[Stored, Stored]]:
        step = self._step(weight.shape[1])
        for first in range(0, weight.shape[0], step):
            yield weight.rows(first, step), scales.rows(first // self.block[0], step // self.block[0])

    def _step(self, columns: int) -> int:
        """Rows of whole blocks that a conversion may hold."""
        return max(_HELD // (4 * columns) // self.block[0], 1) * self.block[0]


@dataclass(frozen=True, slots=True)
class Weights:
    """A model in files: its spec, and for each tensor of the spec's table the parts that it consists of, in order.

    `notices` are for the user: what was passed over or is not as the files say. The tokenizer may be missing.
    """

    place: Path
    spec: schema.ModelSpec
    parts: Mapping[str, tuple[Part, ...]]
    tokenizer: Path | None = None
    notices: tuple[str, ...] = ()

    @property
    def is_fp8(self) -> bool:
        """Whether some matrices are kept in FP8."""
        return any(part.scales is not None for parts in self.parts.values() for part in parts)

    def kept_in(self, name: str, tensor: schema.TensorSpec, dtype: torch.dtype | None) -> torch.dtype:
        """What a tensor is to be kept in when the user asks for `dtype`: None keeps that of the files.

        Selection biases are FP32 at least. Raises Refused for dtypes that models are not built in.
        """
        first, *others = self.parts[name]
        for part in (first, *others):
            if part.dtype not in _FLOATS and part.scales is None:
                raise Refused(f"{part.place} is {part.dtype}, which is not supported")
            if dtype is None and part.dtype == "F16":
                raise Refused(f"{part.place} is F16; pass a dtype to convert it to, like bfloat16")
            if dtype is None and part.dtype != first.dtype:
                raise Refused(
                    f"{part.place} is {part.dtype} and {first.stored.name} is {first.dtype}, but here they are one "
                    f"tensor, {name}; pass a dtype to convert both to, like bfloat16"
                )
        found = dtype or TORCH_DTYPES[first.dtype]
        return torch.promote_types(found, torch.float32) if tensor.kind == "buffer" else found


def open_checkpoint(checkpoint: Checkpoint, spec: schema.ModelSpec) -> Weights:
    """The weights in a checkpoint or weights folder of ours.

    Raises Refused unless the files hold exactly the tensors of the spec, in their shapes.
    """
    found = checkpoint.tensors()
    table = spec.tensors()
    scales = {name: found.pop(name + SCALES) for name in list(found) if name + SCALES in found}
    wrong = sorted(
        name for name in found.keys() | table if name not in found or name not in table or not _fits(found, table, name)
    )
    if wrong:
        has = f"{found[wrong[0]].dtype}{list(found[wrong[0]].shape)}" if wrong[0] in found else "absent"
        wants = str(list(table[wrong[0]].shape)) if wrong[0] in table else "absent"
        raise Refused(
            f"{checkpoint.path} does not fit its spec: {wrong[0]} is {has} in the files and {wants} in the spec "
            f"({len(wrong)} of {len(table)} tensors differ)"
        )
    fp8 = spec.precision.fp8
    block = fp8.weight_block if fp8 else (128, 128)
    parts = {name: tuple(_cut(stored, scales.get(name), block)) for name, stored in found.items()}
    tokenizer = checkpoint.path / TOKENIZER
    return Weights(checkpoint.path, spec, parts, tokenizer if tokenizer.exists() else None)


def _fits(found: Mapping[str, Stored], table: schema.Tensors, name: str) -> bool:
    return found[name].shape == table[name].shape


def _cut(stored: Stored, scales: Stored | None, block: Block) -> Iterator[Part]:
    """A tensor of ours as parts: whole, but FP8 as the matrices that blocks were cut from."""
    if scales is None:
        yield Part(stored, stored.shape)
        return
    count, shape = matrices(stored.name, stored.shape)
    small = scales_shape(shape, block)
    if scales.dtype != "F32" or scales.bytes != 4 * count * prod(small):
        raise Refused(f"{scales.file}: {scales.name} does not hold one F32 for each block of {stored.name}")
    for index in range(count):
        yield Part(stored.part(index, shape), shape, scales=scales.part(index, small), block=block)


def matrices(name: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """How many matrices a tensor of ours consists of, and their shape: experts are stacked, gate rows over up rows."""
    *experts, rows, columns = shape
    halves = 2 if name.endswith("experts.gate_up_proj") else 1
    return prod(experts) * halves, (rows // halves, columns)


def stacked_scales(name: str, shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales of a tensor of ours: those of its matrices, row blocks over row blocks."""
    count, matrix = matrices(name, shape)
    rows, columns = scales_shape(matrix, block)
    return (*shape[:-2], count // prod(shape[:-2]) * rows, columns)


def load(weights: Weights, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model, filled part by part; without `dtype` every tensor keeps that of the files.

    A model whose spec has FP8 computes in it. Raises Refused, without `dtype`, for matrices that are in FP8 in the
    files, and where `device` cannot compute as the spec says.
    """
    remedy = "pass a dtype to convert them to, like dtype=torch.bfloat16 (--dtype bfloat16)"
    if dtype is None and weights.is_fp8:
        raise Refused(f"{weights.place}: this version does not compute with matrices that are stored in FP8; {remedy}")
    if dtype is None and (found := list(uncomputable(weights.spec, torch.device(device)))):
        path, message, _ = found[0]
        raise Refused(f"{weights.place}: {path}: {message}; {remedy}")
    model = build(weights.spec, device="meta", dtype=dtype)
    for name, spec in weights.spec.tensors().items():
        kept = weights.kept_in(name, spec, dtype)
        tensor = torch.empty(spec.shape, dtype=kept, device=device)
        fill(tensor, weights.parts[name])
        owner, _, leaf = name.rpartition(".")
        if spec.kind == "buffer":
            model.get_submodule(owner).register_buffer(leaf, tensor)
        else:
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))
    return model


def fill(tensor: Tensor, parts: tuple[Part, ...], first: int = 0) -> None:
    """Copies the values of all parts, from the element `first` of all on, into a contiguous tensor until it is full."""
    flat, begin = tensor.view(-1), -first
    for part in parts:
        end = begin + prod(part.shape)
        low, high = max(begin, 0), min(end, len(flat))
        if low < high:
            for values in part.between(tensor.dtype, low - begin, high - begin):
                flat[low : low + len(values)].copy_(values)
                low += len(values)
        begin = end


def planned(weights: Weights, dtype: torch.dtype | None = None) -> Iterator[Planned]:
    """Every tensor under our names, to be written; without `dtype` as in the files, FP8 with its scales.

    Raises Refused as `Weights.kept_in` does.
    """
    for name, spec in weights.spec.tensors().items():
        parts = weights.parts[name]
        kept = weights.kept_in(name, spec, dtype)
        yield Planned(name, FILE_DTYPES[kept], spec.shape, partial(joined, parts, kept))
        if FILE_DTYPES[kept] == FP8:
            scales = tuple(part.scales for part in parts if part.scales is not None)
            shape = stacked_scales(name, spec.shape, parts[0].block)
            yield Planned(name + SCALES, "F32", shape, partial(_raw, scales))


def save(weights: Weights, path: Path, dtype: torch.dtype | None = None, progress: Progress = unseen) -> Checkpoint:
    """Writes a weights folder of ours, spec and tokenizer included, which appears whole or not at all.

    Without `dtype` as in the files, FP8 with its scales. Raises as `planned` and `checkpoint.save_weights` do.
    """
    spec = weights.spec if dtype is None else weights.spec.model_copy(update={"precision": precision(dtype)})
    texts = {} if weights.tokenizer is None else {TOKENIZER: _text(weights.tokenizer)}
    return save_weights(path, list(planned(weights, dtype)), marked(spec), texts, progress)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise Misuse(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Misuse(f"{path}: not UTF-8 text") from None


def joined(parts: tuple[Part, ...], dtype: torch.dtype) -> Iterator[Bytes]:
    """The bytes of all parts in a dtype, in order."""
    for part in parts:
        yield from part.bytes(dtype)


def _raw(each: tuple[Stored, ...]) -> Iterator[Bytes]:
    for stored in each:
        yield from stored.buffers()


def precision(dtype: torch.dtype, fp8: schema.FP8 | None = None) -> schema.Precision:
    """Everything in one dtype, the router in FP32 at least. Raises Misuse for one that models are not built in."""
    for name in get_args(schema.Dtype):
        if DTYPES[name] == dtype:
            router: schema.Dtype = "float64" if name == "float64" else "float32"
            return schema.Precision(compute=name, master_weights=name, router=router, fp8=fp8)
    raise Misuse(f"{dtype} is not supported; supported: {', '.join(DTYPES)}")
