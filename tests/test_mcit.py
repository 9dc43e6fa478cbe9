# SPDX-License-Identifier: BSD-3-Clause
"""examples/mcit: the script runs, resumes and scores; on a tiny LLaVA with random weights.

Plan: (1) the script as a process, and task by task, killed and resumed: the same weights to the
last bit; (2) on two ranks: DDP, FSDP2, DeepSpeed; (3) what it reads: formats, labels; (4) scores
and metrics; (5) errors name the argument and the remedy. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
for library in ("transformers", "accelerate", "peft", "PIL", "tokenizers"):
    pytest.importorskip(library)

import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import dgg  # noqa: E402
from language_tasks import Killed, killed_after  # noqa: E402

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "examples" / "mcit"
SCRIPT = FOLDER / "train.py"
COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
WORDS = (
    "<unk> <s> </s> <pad> <image> USER ASSISTANT : ? . what which colour shape thing is this and "
    "red green blue round square stone"
).split()
STEPS = 24
SETTINGS = {
    "rank": 8, "alpha": 0.3, "per-task": 4, "dtype": "float32", "lr": 2e-2, "batch": 5,
    "max-steps": STEPS, "workers": 0, "max-new-tokens": 3, "save-steps": 4, "logging-steps": 4,
    "eval-batch": 4,
}  # fmt: skip
# The answers of a task by the colour of the picture: the tasks disturb each other.
ANSWERS = {
    "colour": {"red": "red", "green": "green", "blue": "blue"},
    "shape": {"red": "round", "green": "square", "blue": "stone"},
}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]


# -- the model and the data ------------------------------------------------------------------------


def tiny_processor():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a LLaVA with random weights, and of its processor."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, image_size=16, patch_size=8, **small
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, num_key_value_heads=2, initializer_range=0.3,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=3, **small,
        ),
        image_token_index=WORDS.index("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of two tasks in the format of UCIT, ten examples each."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    listed = []
    for name, answers in ANSWERS.items():
        train, test = [], []
        for k in range(10):
            colour = list(COLOURS)[k % 3]
            picture = f"{name}-{k}.png"
            size = (20, 12) if k % 2 else (12, 12)
            Image.new("RGB", size, COLOURS[colour]).save(folder / "pictures" / picture)
            question, answer = f"what {name} is this?", answers[colour]
            said = [("human", f"<image>\n{question}"), ("gpt", answer)]
            turns = [{"from": who, "value": value} for who, value in said]
            train.append({"id": f"{name}-{k}", "image": picture, "conversations": turns})
            test.append({"question_id": k, "image": picture, "text": question, "answer": answer})
        for kind, entries in (("train", train), ("test", test)):
            (folder / f"{name}-{kind}.json").write_text(json.dumps(entries))
        files = {kind: f"{name}-{kind}.json" for kind in ("train", "test")}
        listed.append({"name": name, "images": "pictures", **files})
    (folder / "tasks.json").write_text(json.dumps(listed))
    return folder


# -- running it ------------------------------------------------------------------------------------


@pytest.fixture
def mcit(monkeypatch):
    """Imports a module of the example as the script does, from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def arguments(model, data, out, *more, **over):
    """The command line; a setting of None is left out."""
    settings = {"model": model, "tasks": data / "tasks.json", "output": out, **SETTINGS, **over}
    pairs = [(f"--{k.replace('_', '-')}", v) for k, v in settings.items() if v is not None]
    return [*(str(each) for pair in pairs for each in pair), "--cpu", *map(str, more)]


def in_process(mcit, *args, **over):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    before = random.getstate(), torch.get_rng_state()
    try:
        mcit("train").main(arguments(*args, **over))
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])


def start(command, limit=200):
    env = dict(
        os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
        GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, *map(str, command)], env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, out


def script(*args, **over):
    code, out = start([SCRIPT, *arguments(*args, **over)])
    assert code == 0, out
    return out


def changed(folder, *lines):
    """A script that does something before it becomes train.py."""
    path = folder / "changed.py"
    path.write_text(
        "\n".join([
            "import os, runpy, signal, sys", *lines, f"sys.path[0] = {str(FOLDER)!r}",
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')",
        ])
    )  # fmt: skip
    return path


TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


def on_two_ranks(path, *args, **over):
    code, out = start([*TWO_RANKS, path, *arguments(*args, **over)])
    assert code == 0, out
    return out


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def adapter_of(out, task):
    return load_file(out / f"task-{task}" / "adapter" / "adapter_model.safetensors")


def assert_the_same(left, right):
    """Two runs ended alike, to the last bit."""
    for task in range(2):
        ours, theirs = adapter_of(left, task), adapter_of(right, task)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), (task, name)
        for name in ("colour", "shape")[: task + 1]:
            file = f"task-{task}/predictions/{name}.jsonl"
            assert (left / file).read_text() == (right / file).read_text()
        memories = [torch.load(out / f"task-{task}" / "memory.pt") for out in (left, right)]
        assert memories[0] == memories[1]
    assert read(left / "results.json") == read(right / "results.json")


@pytest.fixture(scope="module")
def all_tasks(model, data, tmp_path_factory):
    """Folder of a run of all tasks in one process of its own, and what it printed."""
    out = tmp_path_factory.mktemp("all")
    return out, script(model, data, out)


# -- (1) one process -------------------------------------------------------------------------------


def test_all_tasks_in_one_process(all_tasks, data):
    out, printed = all_tasks
    known = read(out / "results.json")
    assert known["after"] == "shape" and known["tasks"] == ["colour", "shape"]
    assert known["sizes"] == [10, 10] and known["scores"] == ["exact", "exact"]
    (first, none), (kept, second) = known["matrix"]
    assert none is None and first > 60 and second > 60 and kept < first
    assert known["mcitlib"] == {
        "MFT": (first + second) / 2, "MFN": (kept + second) / 2,
        "MAA": (first + (kept + second) / 2) / 2, "BWT": kept - first,
    }  # fmt: skip
    assert read(out / "task-0" / "results.json")["undefined"].keys() == {"bwt", "forgetting"}
    trained = [read(out / f"task-{task}" / "trained.json") for task in range(2)]
    assert trained[0]["guidance/injected"] == 0 and 0 < trained[1]["guidance/injected"] < 1
    said = [json.loads(x) for x in (out / "task-1/predictions/shape.jsonl").open()]
    assert [row["question_id"] for row in said] == list(range(10))
    right = sum(row["text"] in row["answers"] for row in said)
    assert math.isclose(second, 10 * right)
    memory = dgg.ReplayBuffer(SETTINGS["per-task"])
    memory.load_state_dict(torch.load(out / "task-1" / "memory.pt"))
    assert memory.tasks == ("colour", "shape") and len(memory) == 8
    assert all(isinstance(row["images"][0], str) for row in memory)
    assert "after task 1" in printed


def test_task_by_task_is_the_same(mcit, model, data, tmp_path, all_tasks):
    for task in range(2):
        in_process(mcit, model, data, tmp_path, task=task)
    assert_the_same(all_tasks[0], tmp_path)


@pytest.mark.slow
def test_a_process_per_task_is_the_same(model, data, tmp_path, all_tasks):
    for task in range(2):
        script(model, data, tmp_path, task=task)
    assert_the_same(all_tasks[0], tmp_path)


def test_a_finished_task_is_skipped(mcit, model, data, all_tasks, capsys):
    files = {p: p.stat().st_mtime_ns for p in all_tasks[0].rglob("*") if p.is_file()}
    in_process(mcit, model, data, all_tasks[0])
    assert {p: p.stat().st_mtime_ns for p in all_tasks[0].rglob("*") if p.is_file()} == files
    assert capsys.readouterr().out.count("is finished") == 2


@pytest.mark.parametrize("task", [0, 1])
def test_killed_and_resumed(mcit, model, data, tmp_path, all_tasks, monkeypatch, task):
    """In the middle of a task, between two checkpoints."""
    from transformers import trainer

    class Kill(type(killed_after(6))):
        def on_step_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith(f"task-{task}"):
                super().on_step_end(args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Kill])
        in_process(mcit, model, data, tmp_path)
    assert [p.name for p in tmp_path.glob(f"task-{task}/checkpoint-*")] == ["checkpoint-4"]
    refused = mcit("settings").RefusedError
    with pytest.raises(refused, match=rf"task {task} was begun.*checkpoint-4.*pass --resume"):
        in_process(mcit, model, data, tmp_path)
    in_process(mcit, model, data, tmp_path, "--resume")
    assert_the_same(all_tasks[0], tmp_path)


@pytest.mark.slow
def test_a_process_killed_by_a_signal(model, data, tmp_path, all_tasks):
    killing = changed(tmp_path, KILL)
    out = tmp_path / "out"
    code, printed = start([killing, *arguments(model, data, out)])
    assert code == -signal.SIGKILL, printed
    script(model, data, out, "--resume")
    assert_the_same(all_tasks[0], out)


def test_killed_before_the_test(mcit, model, data, tmp_path, all_tasks, monkeypatch):
    """The training is not repeated: what is tested is what was saved."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mcit("scoring"), "answers", lambda *_: (_ for _ in ()).throw(Killed))
        in_process(mcit, model, data, tmp_path, task=0)
    with monkeypatch.context() as patch:
        patch.setattr(mcit("train"), "train", lambda *_: pytest.fail("trained again"))
        in_process(mcit, model, data, tmp_path, task=0)
    in_process(mcit, model, data, tmp_path)
    assert_the_same(all_tasks[0], tmp_path)


def test_without_a_searched_strength(mcit, model, data, tmp_path):
    in_process(mcit, model, data, tmp_path, alpha="auto", importance=0.5)
    trained = read(tmp_path / "task-1" / "trained.json")
    assert "guidance/alignment" in trained and "guidance/pull" in trained
    assert (tmp_path / "task-0" / "importance.safetensors").is_file()


def test_replay_mixed_into_the_data(mcit, model, data, tmp_path, monkeypatch):
    """A quarter more rows, from the memory; no second pass."""
    seen = []
    inner = dgg.hf.ReplayTrainer.__init__

    def init(self, *args, **kwargs):
        seen.append((kwargs["train_dataset"], kwargs["replay_buffer"]))
        inner(self, *args, **kwargs)

    monkeypatch.setattr(dgg.hf.ReplayTrainer, "__init__", init)
    in_process(mcit, model, data, tmp_path, replay="mix", replay_ratio=0.4, max_test=3)
    assert [(len(rows), memory) for rows, memory in seen] == [(10, None), (14, None)]
    assert [row["id"].split("-")[0] for row in seen[1][0]] == ["shape"] * 10 + ["colour"] * 4
    assert read(tmp_path / "results.json")["sizes"] == [3, 3]


def test_captions_in_16_bits_without_memory(mcit, model, data, tmp_path):
    tasks = [{**task, "score": "rouge_l"} for task in read(data / "tasks.json")]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    in_process(
        mcit, model, data, tmp_path / "out", "--gradient-checkpointing", dtype="bfloat16",
        tasks=tmp_path / "tasks.json", instructions=data, per_task=0, max_steps=4,
    )  # fmt: skip
    known = read(tmp_path / "out" / "results.json")
    assert known["scores"] == ["rouge_l"] * 2 and known["mcitlib"]["MFT"] is not None
    assert not (tmp_path / "out" / "task-1" / "memory.pt").exists()
    assert all(v.dtype == torch.float32 for v in adapter_of(tmp_path / "out", 1).values())


def test_other_settings_in_the_same_folder_are_refused(mcit, model, data, all_tasks):
    refused = mcit("settings").RefusedError
    with pytest.raises(refused, match="--lr 0.02 there, 0.001 here.*another --output"):
        in_process(mcit, model, data, all_tasks[0], lr=1e-3)


def test_settings_of_a_run_that_trained_nothing_are_forgotten(mcit, model, data, tmp_path):
    """A mistake in the arguments does not bind the folder to them."""
    with pytest.raises(mcit("settings").RefusedError, match="--max-length 4 cuts an image off"):
        in_process(mcit, model, data, tmp_path, max_length=4)
    assert read(tmp_path / "settings.json")["max_length"] == 4
    in_process(mcit, model, data, tmp_path, task=0, max_steps=1)
    assert read(tmp_path / "settings.json")["max_length"] == 2048


# -- (2) two ranks ---------------------------------------------------------------------------------


# Batches of two ranks are halves of those of one process: no dropout, and nothing left over.
HALVES = {"batch": 5, "replay_ratio": 0.4, "lora_dropout": 0, "max_steps": 10}


def assert_like_one_process(two, one):
    """Two ranks train and answer as one process does with twice the batch, up to rounding."""
    for task in range(2):
        torch.testing.assert_close(
            adapter_of(two, task), adapter_of(one, task), rtol=1e-3, atol=1e-4
        )
        shares = [
            read(out / f"task-{task}" / "trained.json").get("guidance/injected")
            for out in (one, two)
        ]
        assert shares[0] == shares[1]
        for name in ("colour", "shape")[: task + 1]:
            file = f"task-{task}/predictions/{name}.jsonl"
            assert (two / file).read_text() == (one / file).read_text()
    assert read(two / "results.json") == read(one / "results.json")
    assert read(one / "results.json")["matrix"][0][0] > 60


@pytest.mark.dist
def test_on_two_ranks(mcit, model, data, tmp_path):
    on_two_ranks(SCRIPT, model, data, tmp_path / "two", **HALVES)
    in_process(mcit, model, data, tmp_path / "one", **{**HALVES, "batch": 10})
    assert_like_one_process(tmp_path / "two", tmp_path / "one")


# accelerate does not shard on a CPU: it is told that these are several GPUs.
SHARD = """
import accelerate
from transformers import TrainingArguments
made = TrainingArguments.__post_init__
def on_cpu(self):
    made(self)
    assert self.device.type == "cpu"
    kind = accelerate.utils.DistributedType.MULTI_GPU
    accelerate.PartialState._shared_state["distributed_type"] = kind
TrainingArguments.__post_init__ = on_cpu
"""
CHECK_SHARDS = """
import dgg.hf
train = dgg.hf.ReplayTrainer.train
def sharded(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    assert all(hasattr(p, "full_tensor") for p in self.model.parameters())
    return result
dgg.hf.ReplayTrainer.train = sharded
"""


KILL = """
import transformers
class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("task-1") and state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
transformers.trainer.DEFAULT_CALLBACKS.append(Kill)
"""


@pytest.mark.dist
@pytest.mark.slow
def test_fsdp2(mcit, model, data, tmp_path):
    """Sharded over two ranks, in a process per task, with the rule that needs no alpha."""
    out, again = tmp_path / "out", tmp_path / "again"
    layers = ["--fsdp2", "LlamaDecoderLayer", "CLIPEncoderLayer"]
    over = {**HALVES, "alpha": "auto", "importance": 0.5}
    path = changed(tmp_path, SHARD, CHECK_SHARDS)
    on_two_ranks(path, model, data, out, *layers, **over, task=0)
    shutil.copytree(out, again)
    on_two_ranks(path, model, data, out, *layers, **over, task=1)
    in_process(mcit, model, data, tmp_path / "one", **{**over, "batch": 10})
    assert_like_one_process(out, tmp_path / "one")
    assert "guidance/alignment" in read(out / "task-1" / "trained.json")
    killed = changed(tmp_path, SHARD, KILL)
    code, printed = start([*TWO_RANKS, killed, *arguments(model, data, again, *layers, **over)])
    assert code and "SIGKILL" in printed
    path = changed(tmp_path, SHARD, CHECK_SHARDS)
    on_two_ranks(path, model, data, again, *layers, "--resume", **over)
    assert_the_same(out, again)


DEEPSPEED_ON_CPU = """
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
"""


@pytest.mark.dist
@pytest.mark.slow
def test_deepspeed(mcit, model, data, tmp_path):
    """ZeRO-2, in a process per task; replayed examples are mixed into the data."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed not installed")
    path, two = changed(tmp_path, DEEPSPEED_ON_CPU), tmp_path / "two"
    over = {**HALVES, "replay_ratio": 1}
    for task in range(2):
        on_two_ranks(
            path, model, data, two, "--deepspeed", FOLDER / "zero2.json", **over, task=task
        )
    over |= {"batch": 10, "replay": "mix"}
    in_process(mcit, model, data, tmp_path / "one", **over)
    assert_like_one_process(two, tmp_path / "one")


# -- (3) what it reads -----------------------------------------------------------------------------


def turns(*values):
    speakers = ("human", "gpt") * len(values)
    return [{"from": who, "value": value} for who, value in zip(speakers, values, strict=False)]


@pytest.fixture
def task_of(mcit, tmp_path):
    """Makes a task of training and test entries, whose picture is a.png."""
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "a.png")

    def make(train=(), test=(), **more):
        files = {"train": tmp_path / "train.json", "test": tmp_path / "test.json"}
        files["train"].write_text(json.dumps(train))
        files["test"].write_text(json.dumps(test))
        return mcit("instructions").Task("made", **files, **more)

    return make


def test_training_examples(mcit, task_of):
    said = turns("<image>\nwhat is this ?", "red", "which shape ?", " round ")
    entries = [
        {"id": 7, "image": "a.png", "conversations": said},
        {"question_id": "b", "image": ["a.png", "c/d.png"],
         "conversations": turns("<image><image> which ?", "blue")},
        {"conversations": turns("colour ?", "green")},
    ]  # fmt: skip
    assert mcit("instructions").read_training(task_of(entries, images="pictures")) == [
        {"id": "7", "images": ["pictures/a.png"],
         "turns": [["what is this ?", "red"], ["which shape ?", "round"]]},
        {"id": "b", "images": ["pictures/a.png", "pictures/c/d.png"],
         "turns": [["which ?", "blue"]]},
        {"id": "2", "images": [], "turns": [["colour ?", "green"]]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            {"text": "what?", "answer": "red"},
            r'needs "conversations".*\[\'answer\', \'text\'\].*test',
        ),
        ({"conversations": turns("what?")}, r"must alternate.*\[\'human\'\]"),
        ({"conversations": turns("what?", 3)}, "must be text"),
        ({"conversations": "what?"}, "must alternate"),
        ({"conversations": turns("<image>", "a")}, "0 images.*<image> stands 1 times"),
        ({"image": "a.png", "conversations": turns("a", "<image>")}, "first question only"),
        ({"image": 3, "conversations": turns("a", "b")}, '"image" must be a path'),
    ],
)
def test_training_examples_that_are_refused(mcit, task_of, entry, text):
    good = {"conversations": turns("what?", "red")}
    with pytest.raises(mcit("settings").RefusedError, match="train.json, entry 1: .*" + text):
        mcit("instructions").read_training(task_of([good, entry]))


def test_questions(mcit, task_of):
    read_test = mcit("instructions").read_test
    entries = [
        {"question_id": 5, "image": "a.png", "text": "<image>\nwhat?", "answer": "red"},
        {"id": "x", "question": "which?", "label": ["a", "b"]},
        {"image": "a.png", "conversations": turns("<image>\nwhat?", "red")},
        {"text": "how many?", "answer": 3},
    ]
    rows = read_test(task_of(test=entries))
    assert [row["id"] for row in rows] == [5, "x", 2, 3]
    assert [row["question"] for row in rows] == ["what?", "which?", "what?", "how many?"]
    assert [row["answers"] for row in rows] == [["red"], ["a", "b"], ["red"], ["3"]]
    with pytest.raises(mcit("settings").RefusedError, match='test.json, entry 0.*needs "text"'):
        read_test(task_of(test=[{"image": "a.png"}]))
    with pytest.raises(mcit("settings").RefusedError, match="not an empty one"):
        read_test(task_of(test=[]))


def test_captions_of_coco(mcit, task_of, tmp_path):
    file = tmp_path / "captions.json"
    captions = [{"image_id": 9, "caption": "a red square"}, {"image_id": 9, "caption": "red"}]
    pictures = [{"id": 9, "file_name": "val/a.png"}]
    file.write_text(json.dumps({"images": pictures, "annotations": captions}))
    entries = [{"question_id": 1, "image": "a.png", "text": "what?"}]
    (row,) = mcit("instructions").read_test(task_of(test=entries, references=file))
    assert row["answers"] == ["a red square", "red"]
    file.write_text(json.dumps(captions))
    with pytest.raises(mcit("settings").RefusedError, match="COCO's caption format"):
        mcit("instructions").read_test(task_of(test=entries, references=file))


# Mostly Qwen's, whose answers end with the end token and a line break; and that of LLaVA 1.5.
WITH_END = (
    "{% for m in messages %}{{ m.role.upper() }} : {% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}"
    "{% if m.role == 'assistant' %}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :\n{% endif %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("template", [None, WITH_END, WITHOUT_END])
def test_labels_are_the_answers(mcit, processor, task_of, tmp_path, template):
    """Each with its end token; the picture takes four tokens, and rows are padded."""
    said = turns("<image>\nwhat is this ?", "red stone", "which red stone ?", "stone")
    entries = [
        {"image": "a.png", "conversations": said},
        {"conversations": turns("colour ?", "green")},
        {"image": "a.png", "conversations": turns("shape ?", "round")},
    ]
    rows = mcit("instructions").read_training(task_of(entries))
    processor.chat_template = template
    batches = mcit("instructions").Batches(processor, tmp_path, 64, True)
    batch = batches(rows)
    assert batch.keys() == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    words = [
        [WORDS[token] for token, label in zip(*pair, strict=True) if label >= 0]
        for pair in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert words[0] == ["red", "stone", "</s>", "stone", "</s>"]
    assert words[1:] == [["green", "</s>"], ["round", "</s>"]]
    counted = batch["labels"] != -100
    assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
    images = (batch["input_ids"] == WORDS.index("<image>")).sum(1)
    assert images.tolist() == [4, 0, 4]
    # The answer stands in the training where generation begins.
    asked = [{"images": r["images"], "question": r["turns"][0][0], "answers": []} for r in rows]
    prompt = batches.prompts(asked)
    for row in range(3):
        before = batch["input_ids"][row][: int(counted[row].int().argmax())]
        assert torch.equal(prompt["input_ids"][row][prompt["attention_mask"][row].bool()], before)
    assert prompt["attention_mask"][1, 0] == 0, "prompts are padded on the left"


def test_what_is_too_long_is_cut(mcit, processor, task_of, tmp_path):
    processor.chat_template = None
    said = turns("<image>\nwhat is this ?", "red " * 40)
    rows = mcit("instructions").read_training(task_of([{"image": "a.png", "conversations": said}]))
    batch = mcit("instructions").Batches(processor, tmp_path, 20, True)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 20)
    with pytest.raises(mcit("settings").RefusedError, match="--max-length 4 cuts an image"):
        mcit("instructions").Batches(processor, tmp_path, 4, True)(rows)


def test_images_are_padded_to_squares(mcit, processor, task_of, tmp_path):
    task_of()
    padded = mcit("instructions").Batches(processor, tmp_path, 64, True)._image("a.png")
    mean = tuple(int(255 * part) for part in processor.image_processor.image_mean)
    assert padded.size == (8, 8) and padded.getpixel((0, 0)) == mean
    assert padded.getpixel((4, 4)) == (255, 0, 0)
    plain = mcit("instructions").Batches(processor, tmp_path, 64, False)._image("a.png")
    assert plain.size == (8, 4)
    with pytest.raises(mcit("settings").RefusedError, match="b.png cannot be read.*--images"):
        mcit("instructions").Batches(processor, tmp_path, 64, False)._image("b.png")


def test_the_tasks_of_ucit_are_read(mcit, tmp_path):
    for entry in read(FOLDER / "ucit.json"):
        for key in {"train", "test", "references"} & entry.keys():
            path = tmp_path / entry[key]
            path.parent.mkdir(exist_ok=True)
            path.write_text("[]")
    tasks = mcit("instructions").read_tasks(FOLDER / "ucit.json", tmp_path)
    preset = mcit("settings").PRESETS["ucit"]
    assert len(tasks) == len(preset.alpha.split(",")) == 6
    (tmp_path / "IconQA" / "train.json").unlink()
    with pytest.raises(mcit("settings").RefusedError, match='entry 3: "train".*--instructions'):
        mcit("instructions").read_tasks(FOLDER / "ucit.json", tmp_path)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"name": "a"}, 'needs "name", "train" and "test"'),
        ({"name": "a", "train": "x", "test": "x", "alpha": 1}, r"\['alpha'\] unknown"),
        ({"name": "a/b", "train": "x", "test": "x"}, "cannot name a file"),
        ({"name": "a", "train": "x", "test": "x", "score": "bleu"}, "'bleu' is none of exact"),
        ({"name": "a", "train": "x", "test": "y"}, '"test" is .*y, which does not exist'),
    ],
)
def test_lists_of_tasks_that_are_refused(mcit, tmp_path, entry, text):
    (tmp_path / "x").write_text("[]")
    (tmp_path / "tasks.json").write_text(json.dumps([entry]))
    with pytest.raises(mcit("settings").RefusedError, match=text):
        mcit("instructions").read_tasks(tmp_path / "tasks.json", tmp_path)


# -- (4) scores and metrics ------------------------------------------------------------------------


def test_scores(mcit):
    score = mcit("scoring").score
    assert score("exact", " Red\n", ["blue", "red"]) == 1
    assert score("exact", "red.", ["red"]) == 0
    assert score("contained", "squ", ["a Square"]) == 1
    assert score("contained", " ", ["a Square"]) == 0
    assert score("contained", "red square", ["square"]) == 0
    assert score("rouge_l", "", ["a"]) == score("rouge_l", "a", [""]) == 0
    assert score("rouge_l", "A red stone.", ["a red stone"]) == pytest.approx(1)
    # The longest common subsequence is "the cat the mat": 4 of 5 words, and of 6.
    p, r = 4 / 5, 4 / 6
    expected = (1 + 1.2**2) * p * r / (r + 1.2**2 * p)
    common = mcit("scoring")._longest_common
    assert common("the cat on the mat".split(), "the cat sat near the mat".split()) == 4
    found = score("rouge_l", "the cat on the mat", ["the cat sat near the mat"])
    assert found == pytest.approx(expected)


def test_longest_common_subsequences(mcit):
    """Against a definition that tries all of them."""
    import itertools

    rng, common = random.Random(0), mcit("scoring")._longest_common
    for _ in range(50):
        left, right = ([rng.choice("abc") for _ in range(rng.randrange(7))] for _ in range(2))
        every = {
            tuple(part) for n in range(len(left) + 1) for part in itertools.combinations(left, n)
        } & {
            tuple(part) for n in range(len(right) + 1) for part in itertools.combinations(right, n)
        }
        assert common(left, right) == max(map(len, every))


def test_metrics_are_those_of_mcitlib(mcit):
    """By their definitions, on a matrix of three tasks."""
    rows = [[90.0], [60.0, 80.0], [50.0, 70.0, 85.0]]
    known = mcit("scoring").results(["a", "b", "c"], [10, 20, 70], ["exact"] * 3, rows)
    mcitlib = known["mcitlib"]
    assert mcitlib["MFT"] == pytest.approx((90 + 80 + 85) / 3)
    assert mcitlib["MFN"] == pytest.approx((50 + 70 + 85) / 3)
    assert mcitlib["MAA"] == pytest.approx((90 + (60 + 80) / 2 + (50 + 70 + 85) / 3) / 3)
    assert mcitlib["BWT"] == pytest.approx(((50 - 90) + (70 - 80)) / 2)
    assert known["metrics"]["faa_weighted"] == pytest.approx((500 + 1400 + 5950) / 100)
    # As published tables have them: BWT = T / (T - 1) (MFN - MFT).
    assert mcitlib["BWT"] == pytest.approx(3 / 2 * (mcitlib["MFN"] - mcitlib["MFT"]))


# -- (5) errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--preset coin", "--preset coin is not known: it is one of vqav2, ucit"),
        ("--rank 8", "--alpha and --per-task missing: give a --preset"),
        ("--preset ucit --alpha fast", '--alpha fast is neither "auto" nor a number from 0 to 1'),
        ("--preset ucit --alpha 0.1,1.5", "--alpha 0.1,1.5 is neither"),
        ("--preset ucit --alpha auto --per-task 0", "--per-task 0 remembers none: give --per-task"),
        ("--preset ucit --alpha auto --replay mix", "use --replay pass, or a number as --alpha"),
        ("--preset ucit --importance 2", "--importance 2.0 must be from 0 to 1"),
        ("--preset ucit --replay-ratio 0", "--per-task 0 trains without replay"),
        ("--preset ucit --batch 0", "--batch 0 must be 1 or more"),
        ("--preset ucit --task -1", "--task -1 must be 0 or more"),
        ("--preset ucit --deepspeed none.json", "--deepspeed none.json cannot be read"),
        ("--preset ucit --deepspeed Z2 --alpha auto", "use --fsdp2 in place of --deepspeed"),
        ("--preset ucit --deepspeed Z2 --replay pass", "leave --replay out"),
        ("--preset ucit --deepspeed Z2 --importance 0.5", "--importance is not carried"),
        ("--preset ucit --deepspeed Z2 --fsdp2 A", "two engines"),
        ("--preset ucit --deepspeed Z3", 'is ZeRO-3.*"stage": 2'),
        ("--preset ucit --deepspeed ZO", '"optimizer" block'),
    ],
)
def test_arguments_that_are_refused(mcit, tmp_path, more, text):
    files = {"Z2": FOLDER / "zero2.json", "Z3": tmp_path / "z3.json", "ZO": tmp_path / "zo.json"}
    files["Z3"].write_text('{"zero_optimization": {"stage": 3}}')
    files["ZO"].write_text('{"optimizer": {}}')
    more = [str(files.get(word, word)) for word in more.split()]
    settings = mcit("settings")
    with pytest.raises(settings.RefusedError, match=text):
        settings.parse(["--model", "m", "--tasks", "t", "--output", "o", *more])


def test_presets(mcit):
    parse = mcit("settings").parse
    base = ["--model", "m", "--tasks", "f/t.json", "--output", "o"]
    args = parse([*base, "--preset", "vqav2"])
    assert (args.rank, args.lora_alpha, args.alpha, args.per_task) == (128, 256, [0.2], 500)
    assert args.replay == "pass" and args.images == args.instructions == pathlib.Path("f")
    args = parse([*base, "--preset", "ucit", "--alpha", "auto", "--importance", "0.5"])
    assert (args.rank, args.alpha, args.per_task, args.importance) == (48, "auto", 2000, 0.5)
    args = parse([*base, "--preset", "ucit", "--deepspeed", str(FOLDER / "zero2.json")])
    assert args.replay == "mix"
    alpha_of = mcit("settings").alpha_of
    assert [alpha_of(args, k, 6) for k in range(6)] == [0.1, 0.1, 0.1, 0.05, 0.05, 0.1]
    with pytest.raises(mcit("settings").RefusedError, match="6 numbers and .* has 2 tasks"):
        alpha_of(args, 0, 2)


def test_what_the_script_refuses(mcit, model, data, tmp_path, all_tasks):
    refused = mcit("settings").RefusedError
    with pytest.raises(refused, match="--task 2: .* has 0 to 1"):
        in_process(mcit, model, data, tmp_path, task=2)
    with pytest.raises(refused, match="task-0/scores.json is not there: run --task 0 first"):
        in_process(mcit, model, data, tmp_path, task=1)
    with pytest.raises(refused, match="--tasks .*none.json cannot be read"):
        in_process(mcit, model, data, tmp_path, tasks=data / "none.json")
    with pytest.raises(refused, match="--lora-targets none names no layer"):
        in_process(mcit, model, data, tmp_path / "other", lora_targets="none")


def test_files_are_read_before_anything_is_trained(mcit, model, data, tmp_path):
    """All of them, those of the last task, too."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "pictures" / "shape-0.png").unlink()
    refused = mcit("settings").RefusedError
    with pytest.raises(refused, match="shape-train.json has the image pictures/shape-0.png.*exist"):
        in_process(mcit, model, tmp_path / "data", tmp_path / "out")
    (tmp_path / "data" / "shape-test.json").write_text('[{"question": "what?"}]')
    with pytest.raises(refused, match="shape-test.json, entry 0: a question needs"):
        in_process(mcit, model, tmp_path / "data", tmp_path / "out")
    assert not [*(tmp_path / "out").glob("task-*")]


def test_an_error_is_one_line(mcit, monkeypatch):
    mcit("settings")  # finds the folder of the script, as Python does for one
    monkeypatch.setattr(sys, "argv", "train.py --model m --tasks t --output o --rank 8".split())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code.startswith("train.py: error: --alpha and --per-task missing: give")
