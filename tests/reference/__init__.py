"""An implementation of the papers in plain PyTorch, fp64, that shares no line with the package."""
