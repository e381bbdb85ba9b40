"""One small function a figure: numbers in, what draws them out."""
