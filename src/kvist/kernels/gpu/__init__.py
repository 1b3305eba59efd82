"""The Triton kernels. Importing a file of this package imports triton; only the functions of kernels/ do that."""
