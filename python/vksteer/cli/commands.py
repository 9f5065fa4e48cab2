"""The command `vksteer`: what a newcomer needs without writing Python. Every command is a thin layer over the package's functions.

Nothing heavy is imported until a command runs, so that --help is instant and works without a driver.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  vksteer devices
  vksteer verify
  vksteer generate --model tiny-llama-chat --prompt "How do I repair the bridge?"
  vksteer generate --model ./Llama-3.2-3B-Instruct --vector refusal.gguf --coefficient -1 --prompt "..."
  vksteer freeze --model tiny-llama-chat --out table1
  vksteer freeze --model ./Llama-3.2-3B-Instruct --harmful harmful.csv:goal --harmless alpaca.jsonl:instruction --out table1
  vksteer circuit --model tiny-llama-chat --out circuit
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their line breaks; defaults are named in the help texts themselves."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=110)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def _model_arguments(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="a folder (config.json, *.safetensors, tokenizer.json), a .gguf file, a name on the Hugging Face hub, "
                                                      "or a bundled model: tiny-llama-chat, tiny-gemma-chat")
    group.add_argument("--device", help="which Vulkan device: index, part of its name, or UUID, as `vksteer devices` lists them (default: the best one)")
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="how weights are held on the device (default: auto, as stored)")


def _build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vksteer", formatter_class=_Help, epilog=EXAMPLES,
        description="Steer language models by adding a vector to their residual stream, and find out through which parts of the model it acts.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands (each has its own --help)")

    devices = commands.add_parser("devices", formatter_class=_Help, help="list the Vulkan devices of this machine",
                                  description="List the Vulkan devices that vksteer can run on, with what --device takes.")
    devices.add_argument("--json", action="store_true", help="print JSON instead of text")
    devices.set_defaults(run=_devices)

    verify = commands.add_parser("verify", formatter_class=_Help, help="check that a device computes what it should",
                                 description="Run every operation of the engine on small awkward problems, compare it with its float64 twin on the CPU, and print the worst\n"
                                             "error beside the bound. Worth doing once on a new device or driver. Exit status 1 if anything is out of bounds.")
    verify.add_argument("--device", help="which Vulkan device: index, part of its name, or UUID, as `vksteer devices` lists them (default: the best one)")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=_verify)

    generate = commands.add_parser(
        "generate", formatter_class=_Help, help="answer prompts, steered or not",
        description="Answer one or more prompts. With --vector, the vector times --coefficient is added to the residual stream at its layer, at every token\n"
                    "of prompt and answer. --freeze and --ablate then keep one part of the model as in the unsteered run (method.md section 6).")
    _model_arguments(generate)
    group = generate.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="an instruction; goes through the model's chat template; may be repeated (default: read from standard input)")
    group.add_argument("--prompts", metavar="FILE[:COLUMN]", help="a .csv, .json, .jsonl, .parquet or .txt file of prompts")
    group = generate.add_argument_group("steering")
    group.add_argument("--vector", metavar="FILE", help="a steering vector: .safetensors, .npz or .gguf")
    group.add_argument("--layer", type=int, help="which layer's vector, where a .gguf file holds several")
    group.add_argument("--coefficient", type=float, default=None, metavar="A", help="factor on the vector; negative steers the other way (default: 1)")
    group.add_argument("--freeze", choices=("qk", "ov", "mlp"), help="keep attention patterns (qk), values (ov) or MLP outputs (mlp) of the unsteered run, from the vector's layer on")
    group.add_argument("--ablate", choices=("svv", "mlp_direct"), help="take the steering vector out of the values' input (svv) or of the MLPs' input (mlp_direct)")
    group = generate.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="at most so many tokens per answer (default: 128)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most probable token, more samples (default: 0)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="sample from the K most probable tokens (default: 0, all)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the most probable tokens that hold P of the probability (default: 1, all)")
    group.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end an answer at this text; may be repeated")
    generate.add_argument("--json", action="store_true", help="print one JSON object per answer instead of text")
    generate.set_defaults(run=_generate)

    freeze = commands.add_parser(
        "freeze", formatter_class=_Help, help="Table 1: does a vector act through attention patterns, values or MLPs?",
        description="Steer harmless prompts by +A (towards refusal) and harmful prompts by -A (away from it), each time with one part of the model frozen or\n"
                    "ablated, and print how often the model still refuses or complies: Table 1 of arXiv 2604.08524, with random directions as control.\n\n"
                    "Without --vector one is found first: difference in means on the training prompts, chosen on the validation prompts by the paper's rule.\n"
                    "The bundled tiny models bring their own prompts. For other models give two prompt files; the first half of each trains the vector, the\n"
                    "next quarter chooses it, the last quarter (with --vector: all of it) is the test.")
    _model_arguments(freeze)
    group = freeze.add_argument_group("prompts")
    group.add_argument("--harmful", metavar="FILE[:COLUMN]", help="prompts that the model should refuse")
    group.add_argument("--harmless", metavar="FILE[:COLUMN]", help="prompts that it should answer")
    group.add_argument("--limit", type=_positive, metavar="N", help="test on at most N prompts of each kind (default: 100)", default=100)
    group = freeze.add_argument_group("vector and strength")
    group.add_argument("--vector", metavar="FILE", help="a steering vector: .safetensors, .npz or .gguf (default: find one)")
    group.add_argument("--layer", type=int, help="which layer's vector, where a .gguf file holds several")
    group.add_argument("--criterion", choices=("paper", "arditi"), default="paper", help="the rule that chooses among candidates (default: paper)")
    group.add_argument("--coefficient", type=float, nargs="+", default=[1.0], metavar="A", help="strength; two numbers: for harmless and for harmful prompts (default: 1)")
    group = freeze.add_argument_group("table")
    group.add_argument("--layers", metavar="each|L,L,...", help="freeze one layer at a time instead of all from the vector's on")
    group.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="length of an answer (default: 128)")
    group.add_argument("--random", type=int, default=3, metavar="N", help="rows with random directions of the same norm (default: 3)")
    group.add_argument("--seed", type=int, default=0, help="seed of the random directions (default: 0)")
    group.add_argument("--judge", metavar="MODEL", help="a Llama Guard 2 model that judges answers to harmful prompts (default: the substring judge)")
    freeze.add_argument("--out", metavar="DIR", help="write table, picture, answers and vector here; a second run with the same arguments resumes")
    freeze.set_defaults(run=_freeze)

    from .circuit import add_parser as add_circuit

    add_circuit(commands, _Help, _model_arguments, _positive)
    return parser


def main(argv=None) -> int:
    """Run the command line; returns the exit status: 0, 1 for a device that fails `verify`, 2 for bad arguments or input, 130 after Ctrl-C."""
    parser = _build()
    arguments = parser.parse_args(argv)
    if arguments.version:
        import vksteer

        print(getattr(vksteer, "__version__", "unknown"))
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    from ..errors import VksteerError

    try:
        return arguments.run(arguments)
    except (VksteerError, ValueError, KeyError, OSError) as error:
        # KeyError's own text is quoted; its first argument is the message.
        print(f"vksteer {arguments.command}: {error.args[0] if isinstance(error, KeyError) and error.args else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vksteer {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _open(arguments, source=None):
    import vksteer

    return vksteer.Model.from_pretrained(source or arguments.model, device=arguments.device, dtype=arguments.dtype)


def _prompts(text: str) -> list[str]:
    """FILE or FILE:COLUMN; a colon that belongs to an existing file's or a hub data set's name is left alone."""
    from ..data.prompt_files import load

    name, colon, column = text.rpartition(":")
    if colon and not Path(text).exists() and Path(name).exists():
        return load(name, column)
    return load(text)


# -- vksteer devices -------------------------------------------------------------------------------------------------------------------------------


def _devices(arguments) -> int:
    import vksteer

    found = vksteer.devices()
    if arguments.json:
        print(json.dumps([{name: getattr(d, name) for name in ("index", "name", "vendor", "type", "driver", "memory_bytes", "features")} for d in found],
                         indent=2, default=str))
        return 0
    if not found:
        print("No Vulkan device. Install a driver: your GPU vendor's, or Mesa's software driver (Debian, Ubuntu: apt install mesa-vulkan-drivers).")
        return 0
    for d in found:
        print(f"{d.index}: {d.name}\n   {d.type}, {d.memory_bytes / 2**30:.1f} GiB, vendor {d.vendor}, driver {d.driver}")
    return 0


# -- vksteer verify --------------------------------------------------------------------------------------------------------------------------------


def _verify(arguments) -> int:
    from ..verify.checking import table, verify

    rows, device = verify(arguments.device)
    if arguments.json:
        print(json.dumps({"device": str(device), "ok": all(row.ok for row in rows), "ops": [row.to_dict() for row in rows]}, indent=2))
    else:
        print(f"{device}\n{table(rows)}")
    return 0 if all(row.ok for row in rows) else 1


# -- vksteer generate ------------------------------------------------------------------------------------------------------------------------------


def _generate(arguments) -> int:
    prompts = list(arguments.prompt or [])
    if arguments.prompts:
        prompts += _prompts(arguments.prompts)
    if not prompts:
        if sys.stdin.isatty():
            print("Type a prompt, then Ctrl-D:", file=sys.stderr)
        text = sys.stdin.read().strip()
        if not text:
            raise ValueError("no prompt: give --prompt TEXT, --prompts FILE, or a text on standard input")
        prompts = [text]
    if arguments.vector is None and (arguments.freeze or arguments.ablate or arguments.coefficient is not None or arguments.layer is not None):
        raise ValueError("--coefficient, --layer, --freeze and --ablate say what is done with a vector: give one with --vector FILE")

    edits = []
    if arguments.vector is not None:
        from ..runtime.edits import Steer
        from ..inputs.vectors import SteeringVector

        # Read before the model, which takes longer: a wrong name shows at once.
        vector = SteeringVector.load(arguments.vector, arguments.layer)
        edits = [Steer(vector, 1.0 if arguments.coefficient is None else arguments.coefficient)]
    with _open(arguments) as model:
        if edits:
            vector.check(model)
        answers = model.generate(
            prompts, max_new_tokens=arguments.max_new_tokens, edits=edits, freeze=arguments.freeze, ablate=arguments.ablate, temperature=arguments.temperature,
            top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed, stop=arguments.stop, progress=sys.stderr.isatty())
    for prompt, answer in zip(prompts, answers):
        if arguments.json:
            print(json.dumps({"prompt": prompt, "text": answer.text, "finish_reason": answer.finish_reason, "n_tokens": len(answer.tokens)}, ensure_ascii=False))
        else:
            print((f"> {prompt}\n" if len(prompts) > 1 else "") + answer.text + ("\n" if len(prompts) > 1 else ""))
    return 0


# -- vksteer freeze --------------------------------------------------------------------------------------------------------------------------------


def _split(prompts: list[str], name: str) -> tuple[list[str], list[str], list[str]]:
    """First half, next quarter, last quarter."""
    if len(prompts) < 8:
        raise ValueError(f"--{name}: {len(prompts)} prompts are too few to train (half), choose (a quarter) and test (a quarter); give at least 8, or --vector")
    a, b = len(prompts) // 2, 3 * len(prompts) // 4
    return prompts[:a], prompts[a:b], prompts[b:]


def _freeze_prompts(arguments):
    """Three pairs (harmful, harmless) of prompts: train, validation, test; the first two None with --vector."""
    from ..data.prompt_files import tiny_pair

    if (arguments.harmful is None) != (arguments.harmless is None):
        raise ValueError("--harmful and --harmless belong together: give both")
    if arguments.harmful is None:
        if not arguments.model.startswith("tiny-"):
            raise ValueError("give prompts with --harmful FILE and --harmless FILE (only the bundled tiny models bring their own)")
        need = ("test",) if arguments.vector else ("train", "validation", "test")
        pairs = [tiny_pair(split) for split in need]
    else:
        harmful, harmless = _prompts(arguments.harmful), _prompts(arguments.harmless)
        pairs = [(harmful, harmless)] if arguments.vector else list(zip(_split(harmful, "harmful"), _split(harmless, "harmless")))
    test = tuple(side[:arguments.limit] for side in pairs[-1])
    return (*([None, None] if len(pairs) == 1 else pairs[:2]), test)


def _layers(text):
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers takes 'each' or numbers with commas, not {text!r}") from None


def _freeze(arguments) -> int:
    from .. import steering
    from ..freezing import ablation_table
    from ..judge import LlamaGuard
    from ..inputs.vectors import SteeringVector

    if len(arguments.coefficient) > 2:
        raise ValueError(f"--coefficient takes one or two numbers, not {len(arguments.coefficient)}")
    layers, show = _layers(arguments.layers), sys.stderr.isatty()
    train, validation, test = _freeze_prompts(arguments)
    vector = SteeringVector.load(arguments.vector, arguments.layer) if arguments.vector else None
    out = Path(arguments.out) if arguments.out else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as opened:
        model = opened.enter_context(_open(arguments))
        if vector is None:
            candidates = steering.difference_in_means(model, *train, progress=show)
            print(f"Candidates: {len(candidates.positions)} positions "
                  f"({', '.join(f'{p} {t!r}' for p, t in zip(candidates.positions, candidates.position_texts))}) x {model.config.n_layers} layers")
            try:
                vector = candidates.select(*validation, criterion=arguments.criterion, progress=show)
            finally:
                if out is not None and candidates.table is not None:
                    removed = "\n".join(f"- {r}" for r in candidates.rejected)
                    (out / "candidates.md").write_text(f"{candidates.table.to_markdown()}\n\nRemoved by a filter:\n\n{removed}\n", encoding="utf-8")
            chosen = vector.meta["selection"]
            score = "bypass_ablation" if arguments.criterion == "arditi" else "bypass"
            print(f"Refusal tokens: {candidates.table.refusal_tokens}")
            print(f"Chosen: layer {vector.layer}, position {vector.position} ({score} {chosen[score]:.2f}, induce {chosen['induce']:.2f}, KL {chosen['kl']:.3f}; "
                  f"{len(candidates.rejected)} of {candidates.vectors.shape[0] * candidates.vectors.shape[1]} candidates removed by filters)\n")
        judge = LlamaGuard(opened.enter_context(_open(arguments, arguments.judge))) if arguments.judge else None
        coefficient = arguments.coefficient[0] if len(arguments.coefficient) == 1 else tuple(arguments.coefficient)
        table = ablation_table(model, vector, *test, coefficient, max_new_tokens=arguments.max_new_tokens, judge=judge, layers=layers,
                               random_control=arguments.random, seed=arguments.seed, out=None if out is None else out / "answers.json", progress=show)
    print(table.to_markdown())
    if out is not None:
        _write(table, vector, out)
    return 0


def _write(table, vector, out: Path):
    (out / "table.md").write_text(table.to_markdown() + "\n", encoding="utf-8")
    (out / "table.json").write_text(json.dumps(table.to_dict(), indent=2), encoding="utf-8")
    vector.save(out / "vector.safetensors")
    if vector.layer >= 2:
        vector.save(out / "vector.gguf")
    try:
        table.plot(out / "table.png")
    except ImportError as error:
        print(f"No picture: {error}", file=sys.stderr)
    print(f"\nWritten to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
