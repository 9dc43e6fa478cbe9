# SPDX-License-Identifier: BSD-3-Clause
"""python examples/peft_lora.py

A LoRA adapter of peft on a tiny Llama with random weights learns a task and then another one with
transformers' Trainer: a call of `train` is a task. Nothing is downloaded.
"""

import peft
import torch
import transformers

import dgg


def make_task(seed):  # four classes of sentences; every task has its own words and its own rule
    rng = torch.Generator().manual_seed(seed)
    words = 1 + torch.randperm(32, generator=rng)[:16]
    sentences = words[torch.randint(16, (2000, 3), generator=rng)]
    labels = torch.randn(33, 4, generator=rng)[sentences].sum(dim=1).argmax(dim=1)
    return [{"input_ids": s, "labels": c} for s, c in zip(sentences, labels, strict=True)]


def make_model():
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=33, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_labels=4, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    return peft.get_peft_model(model, lora)


@torch.no_grad()
def right(model, task):
    """Returns per cent right."""
    model.eval()
    sentences = torch.stack([example["input_ids"] for example in task])
    labels = torch.stack([example["labels"] for example in task])
    return 100 * (model(input_ids=sentences).logits.argmax(1) == labels).float().mean().item()


tasks, table = [make_task(0), make_task(1)], []
for name, alpha in (("plain", 0.0), ("guided", 0.2)):  # alpha: the share of guided steps
    model, score = make_model(), []
    for number, task in enumerate(tasks):
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                f"build/peft_lora/{number}", max_steps=200, per_device_train_batch_size=32,
                use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=task,
            optimizer_cls_and_kwargs=(dgg.AdamW, {"lr": 1e-2, "alpha": alpha, "seed": number}),
            callbacks=[dgg.hf.GuidanceCallback()],  # sets the anchor; logs what guidance does
        )  # fmt: skip
        trainer.train()
        score.append([right(model, task) for task in tasks])
    (learnt, _), (kept, new) = score
    table += [f"{name:8}{learnt:12.0f} %{kept:13.0f} %{new:15.0f} %{learnt - kept:9.0f} points"]
print("        task 0: learnt   after task 1   task 1: learnt   forgot", *table, sep="\n")
