"""Programs that use a model: each is a module to run (`python -m infer.NAME`). Nothing imports them."""

import glob
import os

# Where libtpu is installed for compiling, jax would look for a TPU, and complain at length that there is none.
if not any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
