"""What torch does slowly on a CPU in fp32: matrix products by its other library, C++ of our own."""
