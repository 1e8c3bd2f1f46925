"""The names of the language: one class per map that a spec may hold."""

from modelspec.schema.attention import GQA, MLA, Attention, GatedDeltaNet, Lightning
from modelspec.schema.base import Dtype, Strict, Tensors, TensorSpec, is_learnt
from modelspec.schema.data import (
    Data,
    FillInMiddle,
    JSONLines,
    Packing,
    PythonStdlib,
    Source,
    TextFiles,
    TokenizerFile,
    TrainedBPE,
)
from modelspec.schema.ffn import FFN, Activation, Dense, ExpertGroups, MoE, Router, SharedExperts, SwiGLU, TopK
from modelspec.schema.model import MAX_LAYERS, MTP, Init, LayerPattern, LayerRun, Model, MTPLayer
from modelspec.schema.norm import Norm, RMSNorm
from modelspec.schema.parallelism import DataParallel, Parallelism, ParallelismOverride, Pipeline
from modelspec.schema.precision import FP8, Precision, fp8_weights, in_fp8
from modelspec.schema.rope import Llama3, Rope, RopeScaling, Yarn
from modelspec.schema.schedule import BatchConstant, BatchRamp, BatchSchedule, Constant, Cosine, Ramp, Schedule
from modelspec.schema.spec import ModelSpec
from modelspec.schema.training import AdamW, Checkpoint, Evaluation, Losses, Optimizer, Stage, Training
from modelspec.schema.waiver import Waiver

__all__ = [
    "FFN",
    "FP8",
    "GQA",
    "MAX_LAYERS",
    "MLA",
    "MTP",
    "Activation",
    "AdamW",
    "Attention",
    "BatchConstant",
    "BatchRamp",
    "BatchSchedule",
    "Checkpoint",
    "Constant",
    "Cosine",
    "Data",
    "DataParallel",
    "Dense",
    "Dtype",
    "Evaluation",
    "ExpertGroups",
    "FillInMiddle",
    "GatedDeltaNet",
    "Init",
    "JSONLines",
    "LayerPattern",
    "LayerRun",
    "Lightning",
    "Llama3",
    "Losses",
    "MTPLayer",
    "MoE",
    "Model",
    "ModelSpec",
    "Norm",
    "Optimizer",
    "Packing",
    "Parallelism",
    "ParallelismOverride",
    "Pipeline",
    "Precision",
    "PythonStdlib",
    "RMSNorm",
    "Ramp",
    "Rope",
    "RopeScaling",
    "Router",
    "Schedule",
    "SharedExperts",
    "Source",
    "Stage",
    "Strict",
    "SwiGLU",
    "TensorSpec",
    "Tensors",
    "TextFiles",
    "TokenizerFile",
    "TopK",
    "TrainedBPE",
    "Training",
    "Waiver",
    "Yarn",
    "fp8_weights",
    "in_fp8",
    "is_learnt",
]
