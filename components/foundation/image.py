"""Container images of the components; the local runner ignores them, a cluster pulls them."""

from __future__ import annotations

import os

TRAINER_IMAGE = os.environ.get("SAFERLHF_TRAINER_IMAGE", "saferlhf/python-trainer:0.1.0")
"""Image of steps that run a model."""

SERVICE_IMAGE = os.environ.get("SAFERLHF_SERVICE_IMAGE", "saferlhf/python-service:0.1.0")
"""Image of steps that need no model."""
