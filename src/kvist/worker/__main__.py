import logging
import os
import sys

from kvist.worker.process import main

status = main()
logging.shutdown()
sys.stderr.flush()
os._exit(status)  # the interpreter's own end would wait for a device or a communicator that may be broken
