"""Building what is released; `make dist`."""
