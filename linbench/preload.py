"""What the fork server imports before it forks the first child: everything slow, and no device."""

import gc

from linbench import worker
from linbench.limits import die_with_parent

die_with_parent()
gc.collect()
gc.freeze()  # else a child's first collection touches, and so copies, every object that the imports made

__all__ = ["worker"]
