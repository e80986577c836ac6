"""The conformance kit: what every mechanism has to hold, ours or a third party's. ``linbench check NAME`` runs it."""
