"""The policy of a round: the SFT model's weights, with the round's actor adapter on them."""

from __future__ import annotations

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
