# SPDX-License-Identifier: BSD-3-Clause
"""python examples/mcit/train.py --preset ucit --model MODEL --tasks FILE --output FOLDER ...

Tunes a LoRA adapter on one instruction-tuning set after another, with guidance and replay, and
tests it after every one. README.md says how to launch it, and what it reads and writes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import shutil
import sys

import peft
import torch
import transformers
from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

import dgg

# isort: split
import instructions
import scoring
import settings
from settings import RefusedError

ADAPTER, MEMORY, IMPORTANCE = "adapter", "memory.pt", "importance.safetensors"
TRAINED, SCORES = "trained.json", "scores.json"  # each says that its half of a task is done


def main(argv: list[str] | None = None) -> None:
    """Trains and tests the tasks that the arguments ask for."""
    args = settings.parse(argv)
    tasks = instructions.read_tasks(args.tasks, args.instructions)
    if args.task is not None and args.task >= len(tasks):
        raise RefusedError(f"--task {args.task}: --tasks {args.tasks} has 0 to {len(tasks) - 1}")
    settings.alpha_of(args, 0, len(tasks))
    settings.settle(args, [t.name for t in tasks], writes=os.environ.get("RANK", "0") == "0")
    numbers = list(range(len(tasks)) if args.task is None else [args.task])
    left = [n for n in numbers if not (folder_of(args, n) / SCORES).is_file()]
    # What is wrong with the last file is to be known before the first task is trained.
    instructions.check([tasks[n] for n in left], tasks[: max(left, default=-1) + 1], args.images)
    for number in numbers:
        run(args, tasks, number)


def run(args: argparse.Namespace, tasks: list[instructions.Task], number: int) -> None:
    """Trains and tests one task, or what is left of it."""
    folder = folder_of(args, number)
    if (folder / SCORES).is_file():
        say(f"task {number} ({tasks[number].name}) is finished, see {folder / SCORES}")
        return
    if number and not (folder_of(args, number - 1) / SCORES).is_file():
        raise RefusedError(
            f"task {number} begins where task {number - 1} ended, and "
            f"{folder_of(args, number - 1) / SCORES} is not there: run --task {number - 1} first"
        )
    trained = (folder / TRAINED).is_file()
    begun = None if trained else get_last_checkpoint(folder) if folder.is_dir() else None
    if begun and not args.resume:
        raise RefusedError(
            f"task {number} was begun and not finished ({begun}): pass --resume to go on from "
            f"there, or delete {folder} to begin anew"
        )
    arguments = trainer_arguments(args, folder)
    if not trained:
        train(args, tasks, number, arguments, begun)
    test(args, tasks, number, arguments)


def folder_of(args: argparse.Namespace, number: int) -> pathlib.Path:
    """Returns the folder of a task."""
    return args.output / f"task-{number}"


def say(text: str) -> None:
    """Prints on one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def trainer_arguments(args, folder: pathlib.Path) -> transformers.TrainingArguments:
    """Returns the arguments of the task's Trainer; making them joins the ranks."""
    engine = {}
    if args.fsdp2 is not None:
        # Every rank reads the weights itself, so that those of a test are whole as well.
        layers = {"transformer_layer_cls_to_wrap": args.fsdp2, "cpu_ram_efficient_loading": False}
        engine = {"fsdp": True, "fsdp_config": {"version": 2, **layers}}
    if args.cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        engine["ddp_backend"] = "gloo"
    if args.gradient_checkpointing:
        engine["gradient_checkpointing"] = True
        engine["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        bf16=args.dtype == "bfloat16",
        seed=args.seed,
        logging_steps=args.logging_steps,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_num_workers=args.workers,
        ddp_find_unused_parameters=False,
        report_to=args.report_to,
        use_cpu=args.cpu,
        deepspeed=None if args.deepspeed is None else str(args.deepspeed),
        **engine,
    )


def base_model(args) -> torch.nn.Module:
    """Returns the model as it was before the first task."""
    return transformers.AutoModelForImageTextToText.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation=args.attention
    )


def batches_of(args) -> instructions.Batches:
    """Returns what makes batches for the model."""
    processor = transformers.AutoProcessor.from_pretrained(args.model)
    return instructions.Batches(processor, args.images, args.max_length, not args.no_padding)


# -- training --------------------------------------------------------------------------------------


def train(args, tasks, number: int, arguments, begun: str | None) -> None:
    """Trains one task and writes adapter, memory and importance into its folder."""
    folder = folder_of(args, number)
    rows = instructions.read_training(tasks[number])
    say(f"task {number} ({tasks[number].name}): {len(rows)} examples, {begun or 'from its begin'}")
    transformers.set_seed(args.seed)
    model = adapted(args, number)
    memory = memory_before(args, number)
    replays = memory is not None and args.replay == "pass"
    data = rows
    if memory is not None and args.replay == "mix" and len(memory):
        data = rows + memory.sample(round(args.replay_ratio * len(rows)))
    guidance = {
        "alpha": settings.alpha_of(args, number, len(tasks)), "importance": args.importance,
        "seed": args.seed + number,
    }  # fmt: skip
    former = folder_of(args, number - 1) / IMPORTANCE if args.importance and number else None
    trainer = dgg.hf.ReplayTrainer(
        model,
        arguments,
        train_dataset=data,
        data_collator=batches_of(args),
        optimizer_cls_and_kwargs=(dgg.AdamW, {"lr": args.lr, **guidance}),
        callbacks=[dgg.hf.GuidanceCallback(task=number, importance=former)],
        replay_buffer=memory if replays else None,
        replay_ratio=args.replay_ratio,
    )
    trainer.train(resume_from_checkpoint=begun)
    if memory is not None:
        memory.add_task(rows, tasks[number].name)
    save(trainer, memory, folder)
    del trainer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def adapted(args, number: int) -> peft.PeftModel:
    """Returns the model with the adapter of the former task, or with a new one for the first."""
    model = base_model(args)
    if number:
        former = folder_of(args, number - 1) / ADAPTER
        return peft.PeftModel.from_pretrained(model, former, is_trainable=True)
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise RefusedError(
            f"--lora-targets {args.lora_targets} names no layer of {args.model} that LoRA can "
            f"adapt ({error})"
        ) from error


def memory_before(args, number: int) -> dgg.ReplayBuffer | None:
    """Returns the memory of the former tasks, which every rank reads for itself."""
    if not args.per_task:
        return None
    memory = dgg.ReplayBuffer(args.per_task, seed=args.seed)
    if number:
        path = folder_of(args, number - 1) / MEMORY
        memory.load_state_dict(torch.load(path, weights_only=True))
    return memory


def save(trainer, memory: dgg.ReplayBuffer | None, folder: pathlib.Path) -> None:
    """Writes what the next task and the test need; the last file says that all are there."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            # Every rank takes part in the gathering of a weight that is sharded.
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            weights[name] = whole.detach().cpu()
    if trainer.is_world_process_zero():
        part = folder / f".{ADAPTER}.part"
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=weights, save_embedding_layers=False)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        os.replace(part, folder / ADAPTER)
        if memory is not None:
            torch.save(memory.state_dict(), folder / f".{MEMORY}.part")
            os.replace(folder / f".{MEMORY}.part", folder / MEMORY)
        history = trainer.state.log_history
        settings.write_json(folder / TRAINED, history[-1] if history else {})
    PartialState().wait_for_everyone()


# -- testing ---------------------------------------------------------------------------------------


def test(args, tasks, number: int, arguments) -> None:
    """Tests the saved adapter on all tasks so far and writes what it said and its scores.

    Every rank holds the whole model, whatever engine trained it, and answers a part.
    """
    folder = folder_of(args, number)
    batches = batches_of(args)
    model = peft.PeftModel.from_pretrained(base_model(args), folder / ADAPTER)
    model = model.to(arguments.device)
    rank, world = arguments.process_index, arguments.world_size
    found = []
    for task in tasks[: number + 1]:
        rows = instructions.read_test(task)[: args.max_test]
        said = scoring.answers(
            model, batches, rows, args.eval_batch, args.max_new_tokens, rank, world
        )
        scores = scoring.scores_of(task.score, said, rows)
        found.append({"task": task.name, "questions": len(rows), "score": task.score, **scores})
        say(f"after task {number}: {found[-1]}")
        if rank == 0:
            lines = [
                json.dumps({"question_id": row["id"], "text": text, "answers": row["answers"]})
                for row, text in zip(rows, said, strict=True)
            ]
            path = folder / "predictions" / f"{task.name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if rank == 0:
        settings.write_json(folder / SCORES, found)
        gather(args, number)
    PartialState().wait_for_everyone()


def gather(args, number: int) -> None:
    """Writes the results after a task, from the scores of all tasks so far."""
    read = [
        json.loads((folder_of(args, k) / SCORES).read_text(encoding="utf-8"))
        for k in range(number + 1)
    ]
    names, sizes, kinds = (
        [each[key] for each in read[-1]] for key in ("task", "questions", "score")
    )
    rows = [[each[each["score"]] for each in row] for row in read]
    known = scoring.results(names, sizes, kinds, rows)
    settings.write_json(folder_of(args, number) / "results.json", known)
    settings.write_json(args.output / "results.json", known)
    say(f"after task {number}: {known['mcitlib']}, FAA weighted {known['metrics']['faa_weighted']}")


if __name__ == "__main__":
    try:
        main()
    except RefusedError as error:
        sys.exit(f"train.py: error: {error}")
