"""Pure tensor functions: second moments, damping, damped inverses, eigenbases and Kronecker products."""
