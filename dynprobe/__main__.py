"""``python -m dynprobe``."""

import sys

from dynprobe.cli import main

sys.exit(main())
