"""What vLLM calls in every one of its processes: it makes the architectures of this package known."""

ARCHITECTURES = {
    "DropflowLlavaForConditionalGeneration": "dropflow_vllm.llava:DropflowLlavaForConditionalGeneration",
    "DropflowQwen2_5_VLForConditionalGeneration": "dropflow_vllm.qwen:DropflowQwen2_5_VLForConditionalGeneration",
}
"""Architecture, as `hf_overrides` names it -> its class."""


def register() -> None:
    """Register the architectures and the checks of their configs; what is registered already stays.

    vLLM's own architectures stay as they are, so that a server which names no policy is not touched.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform

    from dropflow_vllm.configured import Configured

    known = ModelRegistry.get_supported_archs()
    for architecture, place in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, place)
        MODELS_CONFIG_MAP.setdefault(architecture, Configured)
    if current_platform.is_cpu():
        from dropflow_vllm.cpu_runner import ask_for_positions

        ask_for_positions()
