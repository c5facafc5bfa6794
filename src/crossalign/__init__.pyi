# What `import crossalign` gives: the one list of its public names, from which they are loaded when they are first used.
from .alignment import (
    cca as cca,
)
from .alignment import (
    cka as cka,
)
from .alignment import (
    coral as coral,
)
from .alignment import (
    cosine as cosine,
)
from .alignment import (
    dot_product as dot_product,
)
from .alignment import (
    get_divergence as get_divergence,
)
from .alignment import (
    get_penalty as get_penalty,
)
from .alignment import (
    get_similarity as get_similarity,
)
from .alignment import (
    kernel_alignment as kernel_alignment,
)
from .alignment import (
    koleo as koleo,
)
from .alignment import (
    l1 as l1,
)
from .alignment import (
    l2 as l2,
)
from .alignment import (
    linear_regression as linear_regression,
)
from .alignment import (
    mmd as mmd,
)
from .alignment import (
    mse as mse,
)
from .alignment import (
    mutual_knn as mutual_knn,
)
from .alignment import (
    otdd as otdd,
)
from .alignment import (
    pwcca as pwcca,
)
from .alignment import (
    register_divergence as register_divergence,
)
from .alignment import (
    register_penalty as register_penalty,
)
from .alignment import (
    register_similarity as register_similarity,
)
from .alignment import (
    sinkhorn as sinkhorn,
)
from .alignment import (
    soft_mutual_knn as soft_mutual_knn,
)
from .alignment import (
    svcca as svcca,
)
from .config import (
    AdaptConfig as AdaptConfig,
)
from .config import (
    AlignConfig as AlignConfig,
)
from .config import (
    AugmentConfig as AugmentConfig,
)
from .config import (
    BackboneConfig as BackboneConfig,
)
from .config import (
    CorpusConfig as CorpusConfig,
)
from .config import (
    DataConfig as DataConfig,
)
from .config import (
    EmbedderConfig as EmbedderConfig,
)
from .config import (
    EvaluateConfig as EvaluateConfig,
)
from .config import (
    FinetuneConfig as FinetuneConfig,
)
from .config import (
    GPTConfig as GPTConfig,
)
from .config import (
    HeadConfig as HeadConfig,
)
from .config import (
    InstructConfig as InstructConfig,
)
from .config import (
    LoopConfig as LoopConfig,
)
from .config import (
    MeasureConfig as MeasureConfig,
)
from .config import (
    OptimConfig as OptimConfig,
)
from .config import (
    PairsConfig as PairsConfig,
)
from .config import (
    PretrainConfig as PretrainConfig,
)
from .config import (
    RegularizeConfig as RegularizeConfig,
)
from .config import (
    SearchConfig as SearchConfig,
)
from .config import (
    TeacherConfig as TeacherConfig,
)
from .config import (
    TextLoopConfig as TextLoopConfig,
)
from .config import (
    TrackingConfig as TrackingConfig,
)
from .config import (
    TuneConfig as TuneConfig,
)
from .core.errors import UserError as UserError
from .data.images.load import open_images as open_images
from .data.images.sources import register_images as register_images
from .data.pairs.batches import PairBatches as PairBatches
from .data.pairs.load import open_pairs as open_pairs
from .data.pairs.sources import (
    PairListing as PairListing,
)
from .data.pairs.sources import (
    register_pairs as register_pairs,
)
from .data.sources import ImageListing as ImageListing
from .features.regularizer import AlignmentRegularizer as AlignmentRegularizer
from .features.sources import live_features as live_features
from .features.sources import teacher_features as teacher_features
from .integrations.hf_trainer import AlignedTrainerMixin as AlignedTrainerMixin
from .integrations.hf_trainer import AlignmentCallback as AlignmentCallback
from .integrations.lightning import LightningAlignmentCallback as LightningAlignmentCallback
from .models.classifier.embedding import register_embedder as register_embedder
from .models.classifier.model import ImageClassifier as ImageClassifier
from .models.language.families import register_backbone as register_backbone
from .models.language.model import open_language_model as open_language_model
from .models.vision.body import VisionBody as VisionBody
from .models.vision.sources import register_teacher as register_teacher
from .models.vision.teacher import open_teacher as open_teacher
from .recipes import (
    get_recipe as get_recipe,
)
from .recipes import (
    register_recipe as register_recipe,
)
from .report import report as report
from .studies.tune import tune as tune
from .verbs.adapt.job import adapt as adapt
from .verbs.compare.job import compare as compare
from .verbs.evaluate.job import evaluate as evaluate
from .verbs.language_model.job import finetune as finetune
from .verbs.language_model.job import pretrain as pretrain
from .verbs.measure.job import measure as measure
from .verbs.plan import plan as plan

__version__: str
