"""The layer profiler: measures, sweeps, and a rule that derives a policy from them."""

from dropflow_lab.profile.profile import SCHEMA, Profile, profile
from dropflow_lab.profile.rule import Choice, Knobs
from dropflow_lab.profile.settings import Settings
from dropflow_lab.profile.write import policy_of, policy_yaml

__all__ = ["SCHEMA", "Choice", "Knobs", "Profile", "Settings", "policy_of", "policy_yaml", "profile"]
