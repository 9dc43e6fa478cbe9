# SPDX-License-Identifier: BSD-3-Clause
"""A tiny language model, the tasks that it learns one after the other, and Trainers for it."""

from __future__ import annotations

import torch

import dgg

VOCABULARY, LENGTH = 24, 8
WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def llama(*, layers: int = 2, tied: bool = False) -> torch.nn.Module:
    """Returns a Llama with the same weights every time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def counting(stride: int, examples: int = 64) -> list[dict[str, torch.Tensor]]:
    """Returns sequences that count in steps of ``stride``: every stride is another task."""
    rows = (torch.arange(examples)[:, None] + stride * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def tokenizer():
    """Returns a tokenizer of `WORDS`, made here."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def word_llama() -> torch.nn.Module:
    """Returns a Llama for the tokenizer's words, with the same weights every time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def counted_words(start: int, stride: int, length: int = LENGTH) -> list[str]:
    """Returns words that count in steps of ``stride``: every stride is another task."""
    return [WORDS[(start + stride * place) % len(WORDS)] for place in range(length)]


def arguments_of(out: str, **settings):
    """Returns the arguments of a Trainer on the CPU that reports to nobody."""
    import transformers

    usual = {
        "max_grad_norm": 0.5, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(out), **{**usual, **settings})


def trainer_of(model, arguments, data, options: dict, *callbacks, **replay):
    """Returns a Trainer with dgg.AdamW; ``model`` may be a function that makes it.

    With arguments of a replay it is a ReplayTrainer.
    """
    import transformers

    return (dgg.hf.ReplayTrainer if replay else transformers.Trainer)(
        model if isinstance(model, torch.nn.Module) else model(),
        arguments,
        train_dataset=data,
        optimizer_cls_and_kwargs=(dgg.AdamW, options),
        callbacks=list(callbacks),
        **replay,
    )


class Killed(BaseException):
    """Ends a training in its middle."""


def killed_after(step: int):
    """Returns a callback that ends the training after a step."""
    import transformers

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Killed

    return Kill()
