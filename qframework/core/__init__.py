"""Modules that compute one thing each: a statistic, a scale, a zero point, a width, a rounding."""
