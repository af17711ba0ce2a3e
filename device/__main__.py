"""The daemon itself, without the command line's libraries; `edgesync agent run` becomes this process."""

import sys

from device.agent import main

sys.exit(main())
