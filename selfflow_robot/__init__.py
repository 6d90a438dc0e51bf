"""Self-Flow video world models that act: the method. Tensors only; knows no simulator."""
