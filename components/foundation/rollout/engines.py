"""The rollout engine that the settings name."""

from __future__ import annotations

from pathlib import Path

from components.foundation.backbone import Backbone
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout import RolloutEngine
from components.foundation.rollout.transformers_engine import TransformersEngine


def make_engine(settings: PpoSettings, backbone: Backbone, role: str, model_folder: Path) -> RolloutEngine:
    """Engine that answers as a role of the backbone, whose weights `model_folder` holds.

    Raises:
        SettingsError: `ppo.engine=vllm`, and there is no vLLM environment.
    """
    if settings.engine == "vllm":
        from components.foundation.rollout.vllm_engine import VllmEngine

        return VllmEngine(backbone, role, model_folder, settings)
    return TransformersEngine(backbone, role)
