"""The small kernels around matrix products and attention: one file per kernel, each with its plain torch twin.

The public function of a file checks the device of its tensors: on CUDA it launches the kernel of the same name in gpu/,
elsewhere it runs the twin, which is also the reference of the tests. Triton is thus imported only where it is used.
Kernels on Hopper and later are launched with programmatic dependent launch (gpu/launch.py).

The kernels work on tensors only; they know no models and no requests, and nothing of pages but their strides.
"""
