"""The instruments of Dropflow: command line, measurement and the embedded demo model."""
