import sys

from kvist.worker.process import main

sys.exit(main())
