"""Pure functions of tensors that methods share: choosing, merging, ranking, relaxing."""
