"""The tuner: a search for the policies that change a model's answers least at a given cost."""
