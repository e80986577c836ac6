"""What the fork server imports before it forks the first child: everything slow, and no device."""

from linbench import worker
from linbench.limits import die_with_parent

die_with_parent()

__all__ = ["worker"]
