"""From a new process to its first result: importing, and the first call with a warm and with a cold disk cache.

asv runs the returned code as the first statements of a new process. Python's own start, which no commit changes, does
not count.
"""

import subprocess
import sys

# Large enough for the parallel kernels and their threads.
DATA = "x = np.arange(401408, dtype='float32').reshape(SHAPE) % 251"
CALLS = {
    "train forward NCHW": (
        DATA.replace("SHAPE", "8, 64, 28, 28"),
        "y, saved = fastbn.batch_norm_train(x)",
    ),
    "inference NHWC": (
        DATA.replace("SHAPE", "8, 28, 28, 64"),
        "y = fastbn.batch_norm(x, np.full(64, 125.0), np.full(64, 5250.0), axis=-1)",
    ),
}
COLD = "import os, tempfile; folder = tempfile.TemporaryDirectory(); os.environ['NUMBA_CACHE_DIR'] = folder.name"


def code(call):
    return "\n".join(("import numpy as np, fastbn", *CALLS[call]))


class Import:
    number = 1
    repeat = (3, 20, 4.0)

    def timeraw_import_numpy(self):
        return "import numpy"  # to subtract

    def timeraw_import_fastbn(self):
        return "import fastbn"


class FirstResult:
    params = (("warm", "cold"), tuple(CALLS))
    param_names = ("cache", "call")
    number = 1
    repeat = (3, 20, 4.0)

    def setup(self, cache, call):
        if cache == "warm":
            subprocess.run([sys.executable, "-c", code(call)], check=True)

    def timeraw_first_result(self, cache, call):
        return code(call), COLD if cache == "cold" else ""
