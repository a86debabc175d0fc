"""Shards: writing, verifying and reading a folder of WebDataset tar files and its manifest; the training order."""
