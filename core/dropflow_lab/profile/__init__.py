"""The layer profiler: measures, sweeps, and a rule that makes a policy of them."""

from .profile import SCHEMA, Profile, Settings, profile
from .rule import Choice, Knobs
from .write import policy_of, policy_yaml

__all__ = ["SCHEMA", "Choice", "Knobs", "Profile", "Settings", "policy_of", "policy_yaml", "profile"]
