"""Every setting of every verb, as plain dataclasses: the text under a field is its help on the command line."""

from crossalign.config.bounds import validate
from crossalign.config.common import BaseLoopConfig, OptimConfig, TrackingConfig, flatten, to_dict, update
from crossalign.config.evaluation import EvaluateConfig
from crossalign.config.images import (
    AdaptConfig,
    AlignConfig,
    AugmentConfig,
    BackboneConfig,
    DataConfig,
    EmbedderConfig,
    HeadConfig,
    LoopConfig,
    Method,
    TuneConfig,
)
from crossalign.config.measure import MeasureConfig
from crossalign.config.search import SearchConfig
from crossalign.config.text import (
    CorpusConfig,
    FinetuneConfig,
    GPTConfig,
    InstructConfig,
    PairsConfig,
    PretrainConfig,
    RegularizeConfig,
    TeacherConfig,
    TextLoopConfig,
)

__all__ = [
    "AdaptConfig",
    "AlignConfig",
    "AugmentConfig",
    "BackboneConfig",
    "BaseLoopConfig",
    "CorpusConfig",
    "DataConfig",
    "EmbedderConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GPTConfig",
    "HeadConfig",
    "InstructConfig",
    "LoopConfig",
    "MeasureConfig",
    "Method",
    "OptimConfig",
    "PairsConfig",
    "PretrainConfig",
    "RegularizeConfig",
    "SearchConfig",
    "TeacherConfig",
    "TextLoopConfig",
    "TrackingConfig",
    "TuneConfig",
    "flatten",
    "to_dict",
    "update",
    "validate",
]
