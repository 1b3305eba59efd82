"""The kernels in Triton and, where that cannot express them, CUDA C++ (cuda.py). Importing a file of the former
imports triton; only the functions of kernels/ do that."""
