"""The compiler: a spec becomes a runnable PyTorch model."""
