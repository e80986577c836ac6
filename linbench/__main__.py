"""``python -m linbench`` is the ``linbench`` command."""

import sys

from linbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
