"""Property-based tests draw the same examples in every run of continuous integration, and new ones elsewhere.

Nowhere do they have a deadline: how long an example takes says more about what else the machine does. And a shell that
starts the tests in the background has them, and all processes that they start, ignore interrupts: here they count.
"""

import os
import signal

from hypothesis import settings

settings.register_profile("continuous-integration", deadline=None, derandomize=True)
settings.register_profile("elsewhere", deadline=None)
settings.load_profile("continuous-integration" if os.environ.get("CI") else "elsewhere")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
