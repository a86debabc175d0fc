"""Training with Lightning: the modules, the callbacks, checkpoints that resume exactly, the loggers."""
