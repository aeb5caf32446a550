"""Where the C++ functions used to be, for programs that import them from here; they are in ``qframework.kernels.native``."""
