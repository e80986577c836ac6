"""The parts of scripts/acceptance, one file each: a question, what was measured, and whether the answer holds."""
