"""Training with Lightning: modules, callbacks, checkpoints that resume exactly, loggers."""
