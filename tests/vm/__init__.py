"""Run the suite on other kernels; see docs/kernels.md."""
