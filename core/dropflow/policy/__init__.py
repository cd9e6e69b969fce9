"""What a policy file becomes: validated options, then a plan for one backbone."""
