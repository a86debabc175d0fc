"""mlem: train a family of diffusion networks of increasing size, and sample it fast."""
