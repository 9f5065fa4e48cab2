"""Products on matrix units (the kernel family `matrix`), on the newer Mesa, in child processes. Its
parity with the oracle is in test_drivers.py, which runs every kernel family of every driver.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from child import child, quiet, tool

#: The largest error of a product whose rows are split, as a share of sum |x| |W|. Met: 1.9e-7
#: (float32 itself: 1.5e-7 with the other kernels).
SPLIT = 1e-6
#: In fast products x (and float32 weights) are rounded to float16, by 2^-11 each. Met: 4.6e-4.
FAST = 1e-3

#: Of attention, as a share of sum |q| |k| and sum pattern |v|, and with the softmax between both
#: products of the largest output. Met: 2.7e-7, 4.2e-7 and 3.4e-7 (plain kernels: 2.7e-7).
ATTENTION = 1.5e-6
#: Both sides of each product are rounded. Met: 7.9e-4.
ATTENTION_FAST = 2e-3

#: Of a model's values on matrix units against the broadcast kernels, as a share of the largest;
#: split and fast. Met: 1.6e-6 and 1.7e-3.
MODEL, MODEL_FAST = 2e-5, 2e-2


def on_newer_mesa(code, *arguments, width=256, **environment):
    icd = tool("newer_lavapipe_icd")
    return child(
        code,
        *arguments,
        timeout=280,
        executable=tool("newer_mesa_python"),
        VK_DRIVER_FILES=icd,
        VK_ICD_FILENAMES=icd,
        LP_NATIVE_VECTOR_WIDTH=width,
        **{"VKSTEER_KERNELS": None} | environment,
    )


def case(name, *folders, **environment) -> dict:
    code = "import sys; sys.path.insert(0, 'tests'); import matrix_cases;"
    done = on_newer_mesa(
        code + " matrix_cases.main(*sys.argv[1:])", name, *folders, preamble="", **environment
    )
    found = json.loads(quiet(done))
    print(json.dumps(found, indent=1))
    return found


def assert_below(found, bound):
    for weights, ops in found.items():
        for op, (error, where) in ops.items():
            assert error <= bound, f"{op}, {weights}: {error:.2e} at {where}"
    assert len(found) > 1


def test_split_products_have_the_accuracy_of_float32():
    """Forward, backward and the products of attribution; every weight type, ragged edges, slices,
    segments; rows alone and in any batch have the same bits; rows and weights of very different
    magnitudes.
    """
    found = case("split")
    assert found.pop("bits") == 36
    assert max(found.pop("magnitudes").values()) <= SPLIT
    assert_below(found, SPLIT)


def test_fast_products_are_rounded_to_float16():
    found = case("fast")
    assert_below(found, FAST)
    assert found["bfloat16"]["linear"][0] > 10 * SPLIT  # so they are not split


def test_attention_has_the_accuracy_of_float32():
    """Scores and outputs of prefill over ragged batches, head sizes and groups, windows, soft caps,
    frozen rows; and with the softmax between them, against attention in NumPy in float64. Queries
    have the same bits in any tiles, alone and in a batch.
    """
    found = case("attention")
    for op, (error, where) in found["products"].items():
        assert error <= ATTENTION, f"{op}: {error:.2e} at {where}"
    assert max(found["whole"]) <= ATTENTION and len(found["whole"]) == 3
    assert max(found["magnitudes"].values()) <= ATTENTION
    assert found["bits"] == 28
    # decoding and heads whose size is no multiple of 4 keep the plain kernels
    units = {name for name, same in found["plain"].items() if not same}
    assert units == {"attn_scores, prefill", "attn_output, prefill"} and len(found["plain"]) == 6


def test_fast_attention_is_rounded_to_float16():
    found = case("fast attention")
    for op, (error, where) in found["products"].items():
        assert 10 * ATTENTION < error <= ATTENTION_FAST, f"{op}: {error:.2e} at {where}"
    assert found["bits"] == 28


@pytest.mark.parametrize("family, units", [("llama2", ""), ("qwen3", "_matrix")])
def test_a_model_and_its_precision(zoo, family, units):
    """Logits, gradients and scores of edges on matrix units; precision="fast" is said once, and
    written into results. Heads of Llama have 10 values here, those of Qwen 3 have 8.
    """
    folder = zoo.folder(family)
    found = case("model", folder, VKSTEER_KERNELS="matrix", VKSTEER_DEVICE="llvmpipe")
    products = [f"attn_output{units}", f"attn_scores{units}", "attn_softmax"]
    assert found["attention"] == products
    assert found["kernels"] == ["matrix"]
    assert found["precision"] == ["fast", "fast", "float32"]
    assert len(found["said"]) == 1 and "rounded to float16" in found["said"][0]
    assert found["provenance"] == "fast"
    assert found["measured"]["matrix_split"] > found["measured"]["matrix_range"] == 1
    assert max(found["split"].values()) <= MODEL
    assert 10 * MODEL < max(found["fast"].values()) <= MODEL_FAST


def test_the_range_of_an_encoder_is_measured_once(llama):
    """Whatever the tiles are, on which the bits of features do not depend either."""
    found = case("encoder", llama, VKSTEER_KERNELS="matrix", VKSTEER_DEVICE="llvmpipe")
    assert found["kernels"] == ["matrix"] and found["same"]
    assert found["ranges"] == [1, 1, 1] and found["tiles"][2] > found["tiles"][0] > 1
    assert found["error"] <= SPLIT


def test_fast_without_matrix_units_changes_nothing_and_says_so(llama):
    import vksteer as vs

    with (
        pytest.warns(UserWarning, match="'fast': it changes nothing"),
        vs.Model.from_pretrained(str(llama), precision="fast", progress=False) as model,
    ):
        assert model.precision == "float32"
    with pytest.raises(ValueError, match="precision='half': use one of float32, fast"):
        vs.Model.from_pretrained(str(llama), precision="half")


@pytest.mark.parametrize("fast", [False, True])
def test_the_precision_in_use_is_the_one_that_is_tested(monkeypatch, fast):
    from vksteer.runtime import device, kernels

    class Bench:
        fast = None

        def __init__(self, _):
            pass

        def families(self):
            return [(0, "broadcast"), (3, "matrix")]

        def use(self, number, fast):
            assert number == 0
            self.fast = fast

        def self_test(self, number, weight_type):
            assert self.fast is fast
            raise ValueError(f"family {number}, type {weight_type}")

    monkeypatch.setattr(device, "_engine", lambda: SimpleNamespace(Bench=Bench))
    gpu = SimpleNamespace(type="discrete", name="a GPU", driver="1")
    with pytest.warns(UserWarning, match="failed their self-test .*family 3, type 1"):
        assert kernels._trusted(None, gpu, "bfloat16", fast) == ["broadcast"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_large_tiles_and_the_self_test():
    assert_below(case("large"), SPLIT)


def test_only_subgroups_of_eight_are_trusted_on_software_devices():
    """With 16 the driver offers matrix units too, and crashes when it compiles for them."""
    code = """
import vksteer as vs
(device,) = vs.devices()
print(device.features["subgroup_size"], device.features["matrix_units"])
"""
    for width, size, units in ((256, 8, (8, 8, 8)), (512, 16, None)):
        assert quiet(on_newer_mesa(code, width=width, preamble="")).strip() == f"{size} {units}"


def test_a_device_without_matrix_units_refuses_their_name(llama, monkeypatch):
    import vksteer as vs

    monkeypatch.setenv("VKSTEER_KERNELS", "matrix")
    with pytest.raises(ValueError, match="'matrix': this device offers broadcast, texels, tiled"):
        vs.Model.from_pretrained(str(llama), progress=False)
