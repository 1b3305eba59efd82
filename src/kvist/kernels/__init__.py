"""The small kernels around matrix products and attention: one file a kernel, each with its plain torch twin.

The public function of a file looks at the device of its tensors: on CUDA it launches the kernel of the same
name in gpu/, elsewhere it runs the twin, which is also what the tests compare the kernel with. So triton is imported
only where it is used. Kernels on Hopper and later are launched with programmatic dependent launch (gpu/launch.py).

It knows tensors only: no model, no pages beyond their strides, no requests.
"""
