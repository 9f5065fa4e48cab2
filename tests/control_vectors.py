"""Control vectors as other programs write them."""

from __future__ import annotations

import numpy as np


def write_control_vector(path, directions, dtype=np.float32, hint="llama"):
    """As llama.cpp's own tools do it, with the gguf package: {N: direction added to
    the output of block N}.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    writer.add_array("some.list", ["a", "b"])
    for n, direction in directions.items():
        writer.add_tensor(f"direction.{n}", np.asarray(direction, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
