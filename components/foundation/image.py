"""Container images of the components where no platform file names others: KFP's runner for containers takes these.

`saferlhf run` starts no containers, and `saferlhf compile` takes the images of its platform.
"""

from __future__ import annotations

import os

TRAINER_IMAGE = os.environ.get("SAFERLHF_TRAINER_IMAGE", "saferlhf/python-trainer:0.1.0")
"""Image of steps that run a model."""

SERVICE_IMAGE = os.environ.get("SAFERLHF_SERVICE_IMAGE", "saferlhf/python-service:0.1.0")
"""Image of steps that need no model."""
