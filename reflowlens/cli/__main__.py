"""``python -m reflowlens.cli`` is ``reflowlens``."""

import sys

from reflowlens.cli import main

if __name__ == "__main__":
    sys.exit(main())
