"""Every setting of every stage: typed, keyword-only, checked at construction. Nothing here imports torch.

A setting has a sentence, its unit and where its default comes from. The command line and the recipes fill
these classes.
"""

from capfilt.settings.albef import AlbefTrainSettings
from capfilt.settings.checks import DECODINGS, DEVICES, DTYPES, EMBEDDED
from capfilt.settings.curation import CaptionSettings, DownloadSettings, FilterSettings, RankSettings
from capfilt.settings.engines import ENGINES, RaySettings
from capfilt.settings.export import ExportSettings
from capfilt.settings.fine_tuning import Blip2CaptionsSettings, Blip2TuningSettings, Blip2VqaSettings
from capfilt.settings.generation import GenerationSettings
from capfilt.settings.training import (
    BlipTrainSettings,
    CaptionerTrainSettings,
    ClipTrainSettings,
    FilterTrainSettings,
    FrozenEncoderSettings,
    LlmTrainSettings,
    QFormerSettings,
    Stage1Settings,
    Stage2Settings,
    TrainSettings,
)

__all__ = [
    "DECODINGS",
    "DEVICES",
    "DTYPES",
    "EMBEDDED",
    "ENGINES",
    "AlbefTrainSettings",
    "Blip2CaptionsSettings",
    "Blip2TuningSettings",
    "Blip2VqaSettings",
    "BlipTrainSettings",
    "CaptionerTrainSettings",
    "FilterTrainSettings",
    "CaptionSettings",
    "ClipTrainSettings",
    "DownloadSettings",
    "ExportSettings",
    "FilterSettings",
    "FrozenEncoderSettings",
    "GenerationSettings",
    "LlmTrainSettings",
    "QFormerSettings",
    "RankSettings",
    "RaySettings",
    "Stage1Settings",
    "Stage2Settings",
    "TrainSettings",
]
