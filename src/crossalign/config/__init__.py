"""Every setting of every verb, as plain dataclasses: the text under a field is its help on the command line."""

from crossalign.config.bounds import validate
from crossalign.config.common import BaseLoopConfig, OptimConfig, TrackingConfig, flatten, to_dict, update
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
from crossalign.config.studies import EvaluateConfig, MeasureConfig, SearchConfig
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
