"""capfilt: curate image-text data from the web with BLIP's CapFilt method, and train on the result."""

__version__ = "0.1.0"
