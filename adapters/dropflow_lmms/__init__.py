"""Models under a policy for lmms-eval: `--model dropflow --model_args pretrained=DIR,policy=NAME`."""
