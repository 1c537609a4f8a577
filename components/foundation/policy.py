"""The policy of a round: the SFT model's weights, with the round's actor adapter on them."""

from __future__ import annotations

from pathlib import Path

from components.foundation import distributed
from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.checkpoint_store import CheckpointStore

ACTOR = "actor"


def load_policy(store: CheckpointStore, sft_uri: str, policy_uri: str, dtype: str, seed: int) -> tuple[Backbone, str]:
    """(backbone, role that answers); the SFT model itself answers where `policy_uri` is `sft_uri`."""
    backbone = Backbone.load(store.fetch(sft_uri), dtype, seed)
    if policy_uri == sft_uri:
        return backbone, REFERENCE
    backbone.load_role(ACTOR, store.fetch(policy_uri) / "actor")
    return backbone, ACTOR


def export_merged(backbone: Backbone, role: str, base: Path, saved_role: Path, folder: Path) -> None:
    """Write the model that answers as `role` as a plain Hugging Face folder. All ranks call, rank 0 writes.

    Args:
        backbone: is done with: its other roles are dropped.
        base: folder that it was loaded from.
        saved_role: folder that the role was saved in.
    """
    if not distributed.world().is_main:
        return
    if distributed.world().zero_stage == 3:  # no rank holds the whole model, so it is put together anew
        backbone = Backbone.load(base, str(backbone.dtype).removeprefix("torch."), seed=0)
        backbone.load_role(role, saved_role)
    backbone.merge_role(role)
    backbone.export(folder)
