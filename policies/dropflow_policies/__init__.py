"""The policies Dropflow ships: one YAML file per published setting, found through the entry point of this package."""
