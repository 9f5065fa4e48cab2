"""Writes .tools/env.json: where the drivers, layers and compilers that the tests use lie (null: not
here). Run by setup.sh at its end.
"""

import json
import shutil
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / ".tools"
ICD, LAYERS = Path("/usr/share/vulkan/icd.d"), Path("/usr/share/vulkan/explicit_layer.d")


def first(*candidates) -> str | None:
    return next((str(c) for c in candidates if c and Path(c).exists()), None)


def tool(name: str) -> str | None:
    return first(TOOLS / "bin" / name, shutil.which(name))


def layer_folder() -> str | None:
    mine = next((TOOLS / "validation").rglob("VkLayer_khronos_validation.json"), None)
    system = LAYERS / "VkLayer_khronos_validation.json"
    return str((mine or system).parent) if mine or system.exists() else None


env = {
    "lavapipe_icd": first(
        TOOLS / "mesa/vksteer_lvp.json", ICD / "lvp_icd.json", ICD / "lvp_icd.x86_64.json"
    ),
    # with RADV_FORCE_FAMILY
    "radeon_icd": first(
        TOOLS / "mesa/vksteer_radeon.json", ICD / "radeon_icd.json", ICD / "radeon_icd.x86_64.json"
    ),
    # Mesa 26.1 or newer, and the Python that runs on its C library (tools/with_newer_mesa.sh)
    "newer_lavapipe_icd": first(TOOLS / "mesa-next/vksteer_lvp.json"),
    "newer_mesa_python": first(TOOLS / "mesa-next/python/bin/python"),
    "swiftshader_icd": first(TOOLS / "swiftshader/vk_swiftshader_icd.json"),
    # for VK_LAYER_PATH, with VK_INSTANCE_LAYERS=VK_LAYER_KHRONOS_validation
    "validation_layers": layer_folder(),
    "glslc": tool("glslc"),
    "glslc_next": first(TOOLS / "bin/glslc-next"),  # newer, for optional kernels
    "spirv_val": tool("spirv-val"),
    "spirv_dis": tool("spirv-dis"),
}
text = json.dumps(env, indent=1) + "\n"
path = TOOLS / "env.json"
if not path.exists() or path.read_text() != text:
    path.write_text(text)
