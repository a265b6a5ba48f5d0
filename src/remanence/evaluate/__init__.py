"""Measuring: accuracy by length, the figures of the literature, plots and reports. Nothing here is imported until it is asked for."""
