import logging
import os
import sys

from kvist.engine.process import main

status = main()
logging.shutdown()
sys.stderr.flush()
os._exit(status)  # skip the interpreter's shutdown, which would wait for a device or communicator that may be broken
