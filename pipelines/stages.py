"""The stages by name: how each is called on the screen, and what it needs of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImageName = Literal["trainer", "rollout", "service"]


@dataclass(frozen=True)
class Stage:
    """What a platform has to know of a stage.

    Attributes:
        title: its name in the Kubeflow UI.
        image: which of the three images it runs in, unless the platform file says otherwise.
        trains: it updates weights, so it wants an accelerator and can spread over nodes.
        judges: it may ask the judge model, so it gets the judge's key.
    """

    title: str
    image: ImageName
    trains: bool = False
    judges: bool = False


STAGES = {
    "start_run": Stage("check settings, start run", "service"),
    "prepare_data": Stage("prepare data", "service"),
    "sft": Stage("supervised fine-tuning", "trainer", trains=True),
    "collect": Stage("collect answers", "rollout"),
    "annotate": Stage("annotate", "service", judges=True),
    "reward_model": Stage("reward model", "trainer", trains=True),
    "cost_model": Stage("cost model", "trainer", trains=True),
    "ppo_lagrangian": Stage("PPO-Lagrangian", "trainer", trains=True, judges=True),
    "evaluate": Stage("evaluate", "trainer", judges=True),
    "register": Stage("register models", "service"),
    "gate": Stage("gate", "service"),
    "set_alias": Stage("set alias", "service"),
    "report": Stage("report", "service"),
}
"""In the order of a run. Keys are the names of the components' functions."""
