import gc
import logging
import os
import sys

# Imports create a million objects that stay. The garbage collector, which by default runs every 700 objects, takes an
# eighth of their time. `freeze_gc` sets the number for the steps.
gc.set_threshold(10_000)

from kvist.engine.process import main  # noqa: E402

status = main()
logging.shutdown()
sys.stderr.flush()
os._exit(status)  # skip the interpreter's shutdown, which would wait for a device or communicator that may be broken
