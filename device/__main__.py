"""The daemon itself, without the command line's libraries; `edgesync agent run` becomes this process."""

import sys
from types import ModuleType

# sqlite-utils imports text recipes for its own command line, and with them dateutil: a megabyte nobody calls here.
sys.modules.setdefault("sqlite_utils.recipes", ModuleType("sqlite_utils.recipes"))

from device.agent import main  # noqa: E402

sys.exit(main())
