"""What a model is. Knows no method, imports no other room but `pallas_kernels`."""
