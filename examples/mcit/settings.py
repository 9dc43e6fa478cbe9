# SPDX-License-Identifier: BSD-3-Clause
"""The arguments of train.py: presets, defaults, and what does not go together."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any


class RefusedError(Exception):
    """The run cannot begin or go on; the text names the argument or the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings of the paper for one benchmark.

    Attributes:
        rank: Rank of the LoRA adapter.
        alpha: Share of guided steps: one number, or one for each task.
        per_task: How many examples are remembered of each task.
    """

    rank: int
    alpha: str
    per_task: int


PRESETS = {
    "vqav2": Preset(rank=128, alpha="0.2", per_task=500),
    # In the order of ucit.json; that of the first task is not used.
    "ucit": Preset(rank=48, alpha="0.1,0.1,0.1,0.05,0.05,0.1", per_task=2000),
}
# What may differ between the processes of one run: it is about the machine, or has no effect.
FREE = {
    "accumulate", "attention", "batch", "cpu", "deepspeed", "eval_batch", "fsdp2",
    "gradient_checkpointing", "images", "instructions", "logging_steps", "output", "preset",
    "report_to", "resume", "save_steps", "task", "tasks", "workers",
}  # fmt: skip
LLAMA_LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments, with the preset filled in; raises what `check` raises."""
    args = parser().parse_args(argv)
    fill_in(args)
    check(args)
    return args


def parser() -> argparse.ArgumentParser:
    """Returns the parser of train.py."""
    made = argparse.ArgumentParser(
        prog="train.py", description="Tunes a vision-language model on one task after another.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    data = made.add_argument_group("data and folders").add_argument
    data("--model", required=True, help="folder or name of an AutoModelForImageTextToText")
    data("--tasks", required=True, type=pathlib.Path, help="JSON list of tasks, as ucit.json")
    data("--instructions", type=pathlib.Path, help="folder of the files that --tasks names")
    data("--images", type=pathlib.Path, help="folder of the images; None: that of --instructions")
    data("--output", required=True, type=pathlib.Path, help="folder of the run, seen by all ranks")
    data("--task", type=int, help="train and test only this task, from 0; None: all of them")
    data("--resume", action="store_true", help="go on with a task that was begun")
    data("--max-test", type=int, help="test only the first questions of every task")

    paper = made.add_argument_group("the paper's settings").add_argument
    paper("--preset", help=f"fills in the next three: {', '.join(PRESETS)}")
    paper("--rank", type=int, help="rank of the LoRA adapter")
    paper(
        "--alpha", help='share of guided steps: a number, one for each task (0,0.1,...) or "auto"'
    )
    paper("--per-task", type=int, help="examples remembered of each task; 0: no replay")
    paper("--importance", type=float, default=0.0, help="how far the pull follows importance")
    paper("--replay", choices=["pass", "mix"], help="replayed examples in a second backward pass "
          "or mixed into the data set; None: pass, and mix with --deepspeed")  # fmt: skip
    paper("--replay-ratio", type=float, default=0.25, help="replayed examples for every new one")

    train = made.add_argument_group("training").add_argument
    train("--lr", type=float, default=2e-4)
    train("--epochs", type=float, default=1.0)
    train("--max-steps", type=int, default=-1, help="steps of every task, in place of --epochs")
    train("--batch", type=int, default=8, help="examples of one pass on one rank")
    train("--accumulate", type=int, default=1, help="passes of one step")
    train("--warmup", type=float, default=0.03, help="share of the steps, or their number")
    train("--weight-decay", type=float, default=0.0)
    train("--max-grad-norm", type=float, default=1.0)
    train("--seed", type=int, default=0)
    train("--lora-alpha", type=int, help="None: twice the rank")
    train("--lora-dropout", type=float, default=0.05)
    train("--lora-targets", default=LLAMA_LAYERS, help="names of the adapted layers, a pattern")
    train("--max-length", type=int, default=2048, help="tokens of one example; the rest is cut off")
    train("--no-padding", action="store_true", help="do not pad images to squares")
    train("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    train("--attention", help="attn_implementation of transformers, as flash_attention_2")
    train("--gradient-checkpointing", action="store_true")
    train("--workers", type=int, default=4, help="processes that read images")
    train("--save-steps", type=int, default=200, help="steps between two checkpoints")
    train("--logging-steps", type=int, default=10)
    train("--report-to", nargs="*", default=[], help="loggers of the Trainer, as tensorboard")

    test = made.add_argument_group("testing").add_argument
    test("--eval-batch", type=int, default=16, help="questions answered at once on one rank")
    test("--max-new-tokens", type=int, default=128)

    engine = made.add_argument_group("engines").add_argument
    engine("--fsdp2", nargs="+", metavar="LAYER", help="shard the model; classes of its layers, as "
           "LlamaDecoderLayer CLIPEncoderLayer")  # fmt: skip
    engine("--deepspeed", type=pathlib.Path, help="ZeRO 1 or 2: a file such as zero2.json")
    engine("--cpu", action="store_true", help="train on the CPU")
    return made


def fill_in(args: argparse.Namespace) -> None:
    """Puts in what the preset says and what follows from other arguments."""
    if args.preset is not None and args.preset not in PRESETS:
        raise RefusedError(
            f"--preset {args.preset} is not known: it is one of {', '.join(PRESETS)}; or leave it "
            "out and give --rank, --alpha and --per-task"
        )
    if args.preset is not None:
        for name, value in dataclasses.asdict(PRESETS[args.preset]).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    missing = [f"--{n}" for n in ("rank", "alpha", "per-task") if not _given(args, n)]
    if missing:
        raise RefusedError(
            f"{' and '.join(missing)} missing: give a --preset ({', '.join(PRESETS)}) or all of "
            "--rank, --alpha and --per-task"
        )
    if args.lora_alpha is None:
        args.lora_alpha = 2 * args.rank
    if args.instructions is None:
        args.instructions = args.tasks.parent
    if args.images is None:
        args.images = args.instructions
    args.alpha = _alpha(args.alpha)
    if args.replay is None:
        args.replay = "mix" if args.deepspeed else "pass"


def _given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name.replace("-", "_")) is not None


def _alpha(text: str) -> str | list[float]:
    """Returns "auto", or a list of one number for all tasks or one for each."""
    if text == "auto":
        return text
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise RefusedError(
            f'--alpha {text} is neither "auto" nor a number from 0 to 1, nor several with commas '
            "between them, one for each task"
        )
    return values


def check(args: argparse.Namespace) -> None:
    """Raises a RefusedError for arguments that do not go together or are out of range."""
    for name, least in {
        "rank": 1, "batch": 1, "accumulate": 1, "eval_batch": 1, "max_new_tokens": 1,
        "save_steps": 1, "logging_steps": 1, "max_length": 1, "lora_alpha": 1, "per_task": 0,
        "workers": 0, "max_test": 1, "task": 0,
    }.items():  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise RefusedError(f"--{name.replace('_', '-')} {value} must be {least} or more")
    if not 0 < args.replay_ratio <= 1:
        raise RefusedError(
            f"--replay-ratio {args.replay_ratio} must be above 0 and at most 1; --per-task 0 "
            "trains without replay"
        )
    if not 0 <= args.importance <= 1:
        raise RefusedError(f"--importance {args.importance} must be from 0 to 1")
    if args.deepspeed is not None:
        _check_deepspeed(args)
    elif os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise RefusedError(
            "accelerate's DeepSpeed is not used: launch without it and pass --deepspeed FILE"
        )
    if args.alpha == "auto" and not args.per_task:
        raise RefusedError(
            "--alpha auto reads its strength off the gradients of remembered examples, and "
            "--per-task 0 remembers none: give --per-task (the paper: 500 or 2000), or a number "
            "as --alpha"
        )
    if args.alpha == "auto" and args.replay == "mix":
        raise RefusedError(
            "--alpha auto needs the gradients of remembered examples apart from the new ones, "
            "and --replay mix has one gradient of both: use --replay pass, or a number as --alpha"
        )


def _check_deepspeed(args: argparse.Namespace) -> None:
    if args.fsdp2 is not None:
        raise RefusedError("--deepspeed and --fsdp2 are two engines: leave one out")
    try:
        config = json.loads(args.deepspeed.read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedError(f"--deepspeed {args.deepspeed} cannot be read: {error}") from None
    except ValueError as error:
        raise RefusedError(f"--deepspeed {args.deepspeed} is not JSON: {error}") from None
    if config.get("zero_optimization", {}).get("stage") == 3:
        raise RefusedError(
            f"--deepspeed {args.deepspeed} is ZeRO-3, whose adapter this script cannot save: use "
            'zero2.json ("stage": 2), or --fsdp2 to shard the weights'
        )
    if "optimizer" in config:
        raise RefusedError(
            f'--deepspeed {args.deepspeed} has an "optimizer" block, which would replace '
            "dgg.AdamW: remove it"
        )
    if args.alpha == "auto":
        raise RefusedError(
            "--alpha auto needs replay gradients of their own, which DeepSpeed's ZeRO cannot keep: "
            "give a number as --alpha, or use --fsdp2 in place of --deepspeed"
        )
    if args.replay == "pass":
        raise RefusedError(
            "--replay pass is a second backward pass, which DeepSpeed's ZeRO reduces into the "
            "first: leave --replay out (it is mix then), or use --fsdp2 in place of --deepspeed"
        )
    if args.importance:
        raise RefusedError(
            "--importance is not carried from task to task under DeepSpeed's ZeRO: leave it out, "
            "or use --fsdp2 in place of --deepspeed"
        )


def alpha_of(args: argparse.Namespace, task: int, tasks: int) -> float | str:
    """Returns alpha of a task; raises a RefusedError if there are not as many as tasks."""
    if args.alpha == "auto" or len(args.alpha) == 1:
        return args.alpha if args.alpha == "auto" else args.alpha[0]
    if len(args.alpha) != tasks:
        raise RefusedError(
            f"--alpha has {len(args.alpha)} numbers and --tasks {args.tasks} has {tasks} tasks: "
            "give one number, or one for each task (the first one is not used)"
        )
    return args.alpha[task]


def settle(args: argparse.Namespace, names: list[str], *, writes: bool) -> None:
    """Writes the settings into the output folder, or compares them with those that are there.

    Raises:
        RefusedError: The folder has a run with other settings, and something is trained in it.
    """
    ours = {n: value for n, value in vars(args).items() if n not in FREE} | {"names": names}
    path = args.output / "settings.json"
    begun = [*args.output.glob("task-*/checkpoint-*"), *args.output.glob("task-*/trained.json")]
    if begun and path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        other = [
            f"--{n.replace('_', '-')} {theirs.get(n)} there, {ours.get(n)} here"
            for n in sorted(ours.keys() | theirs.keys())
            if ours.get(n) != theirs.get(n)
        ]
        if other:
            raise RefusedError(
                f"--output {args.output} has a run with other settings ({'; '.join(other)}): "
                "give the same ones, or another --output"
            )
    elif writes:
        write_json(path, ours)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
