"""Experiments on a trained family: samplers side by side from the same noise, costs at equal error, the scaling law."""
