"""`python -m vksteer` is the command `vksteer`."""

import sys

from .cli import main

sys.exit(main())
