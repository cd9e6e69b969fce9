"""Inputs of measurements: questions, pictures, models and prompts."""
