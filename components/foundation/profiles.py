"""The profiles: named sets of defaults. What a profile does not name has the default of its section."""

from __future__ import annotations

from typing import Any

PROFILES: dict[str, dict[str, Any]] = {
    "smol": {
        "lora": {"top_layers": 16},
        "sft": {"learning_rate": 2e-3, "batch_size": 8, "max_length": 96},
        "reward_model": {
            "learning_rate": 3e-3,
            "batch_size": 8,
            "start": "previous",
            "max_pairs": 256,
            "later_max_pairs": 96,
            "recent_share": 0.3,
            "max_length": 96,
        },
        "cost_model": {
            "learning_rate": 3e-3,
            "batch_size": 8,
            "start": "previous",
            "max_pairs": 560,
            "later_max_pairs": 160,
            "recent_share": 0.3,
            "unsafe_share": 0.5,
            "max_length": 96,
        },
        "collect": {"prompts_per_round": 96, "temperature": 0.7},
        "ppo": {
            "steps": 12,
            "episodes_per_step": 24,
            "epochs": 2,
            "minibatch_size": 6,
            "temperature": 0.7,
            "max_new_tokens": 32,
            "critics": "head",
            "actor_learning_rate": 3e-3,
            "actor_schedule": "cosine",
            "actor_warmup_share": 0.2,
            "kl_coefficient": 0.1,
            "ptx_coefficient": 1.0,
            "threshold_target": 0.1,
            "threshold_answers": "newest",
            "lagrangian": "pid",
            "lambda_init": 2.75,
            "lambda_start": "init",
            "lambda_max": 5.0,
            "cost_window": 48,
            "red_team_share": 0.4,
        },
        "evaluate": {"temperature": 0.7, "max_new_tokens": 32, "batch_size": 128},
        "gate": {"max_regressions": 3},
    },
    "tiny": {
        "rounds": 2,
        "base_model": "tiny",
        "dtype": "float32",
        "data": {"max_preferences": 64, "max_demonstrations": 48, "max_held_out": 16},
        "sft": {"max_length": 96},
        "reward_model": {"min_accuracy": 0.0, "max_length": 96},
        "cost_model": {
            "min_accuracy": 0.0,
            "min_auc": 0.0,
            "max_length": 96,
            "start": "previous",
            "later_max_pairs": 32,
        },
        "collect": {"prompts_per_round": 8},
        "ppo": {"steps": 2, "episodes_per_step": 8, "minibatch_size": 4, "max_new_tokens": 12},
        "evaluate": {"max_new_tokens": 12},
    },
}
