"""Launches a stage as a step of a pipeline does: `python -m tests.faults.launch_stage MODULE:FUNCTION URI...`."""

import sys

from components.foundation.launch import launch

launch(sys.argv[1], *sys.argv[2:])
