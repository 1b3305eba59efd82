"""The kernels in Triton and, where Triton cannot express them, CUDA C++ (cuda.py). Importing a Triton file imports
triton; only the functions of kernels/ import these files.
"""
