"""One stage, one adapter and one policy for Dropflow; entry points name them."""
