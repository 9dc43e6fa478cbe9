# SPDX-License-Identifier: BSD-3-Clause
"""Every example of the README, the guides and the docstrings runs as printed.

What an example takes for granted (model, tasks, loader, ...) is handed to it. An example that
nobody runs, here or in the test named beside it, fails; so do links, commands and names of files
that lead nowhere.
"""

from __future__ import annotations

import ast
import doctest
import json
import pathlib
import re
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import dgg
import recipes

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip

# Run by another test, which needs several processes or a trained model for them: its file and the
# function that executes the page's code.
ELSEWHERE = {
    "docs/checkpoints.md 1": ("checkpoint_worker.py", "of_the_docs"),
    "docs/checkpoints.md 2": ("checkpoint_worker.py", "of_the_docs"),
    "docs/huggingface.md 2": ("test_hf.py", "test_the_guide_is_true"),
    "docs/huggingface.md 3": ("test_hf.py", "test_the_guide_is_true"),
    "docs/huggingface.md 4": ("test_hf.py", "test_the_guide_is_true"),
    "docs/huggingface.md 6": ("test_hf.py", "test_the_guide_is_true"),
    "docs/huggingface.md 7": ("test_hf.py", "test_the_guide_is_true"),
    "docs/huggingface.md 8": ("test_hf.py", "test_the_guide_is_true"),
    "docs/huggingface.md 9": ("test_hf.py", "test_the_guide_to_another_optimizer"),
    "docs/huggingface.md 10": ("test_hf.py", "test_a_trainer_that_a_configuration_makes"),
    "docs/recipes.md Lightning": ("test_lightning.py", "test_the_recipes"),
    "docs/recipes.md Fabric": ("test_lightning.py", "test_the_recipes"),
    "docs/recipes.md TRL": ("test_trl.py", "test_the_recipe"),
    "docs/recipes.md TRL: DPO, GRPO and others": ("test_trl.py", "test_the_recipe_of_preferences"),
    "docs/recipes.md LLaMA-Factory": ("engines/test_llamafactory.py", "test_the_recipe"),
    "docs/recipes.md axolotl": ("engines/test_axolotl.py", "folder"),
    "docs/recipes.md ms-swift": ("engines/test_ms_swift.py", "test_the_recipe"),
    "docs/recipes.md torchtitan": ("engines/torchtitan_worker.py", "train"),
    "docs/recipes.md torchtune": ("engines/test_torchtune.py", "train"),
    "docs/recipes.md Avalanche": ("engines/test_avalanche.py", "test_the_recipe"),
    "docs/recipes.md Mammoth": ("engines/test_mammoth.py", "watched"),
    "docs/recipes.md sentence-transformers": (
        "engines/test_sentence_transformers.py",
        "test_the_recipe",
    ),
    "docs/sharding.md 1": (
        "test_launched.py",
        "test_a_training_needs_few_variants_and_the_guide_compiles_them_before",
    ),
}


def page_name(path):
    return path.relative_to(ROOT).as_posix()


def examples_of_pages():
    """Code by name: the page and the number among its blocks of Python and its diffs.

    A recipe has the heading it stands under in place of a number.
    """
    found = {}
    for path in PAGES:
        if path == recipes.PAGE:
            by_heading = recipes.recipes(path.read_text())
            found.update({f"{page_name(path)} {name}": code for name, code in by_heading.items()})
            continue
        blocks = re.findall(r"^```(python|py|diff)\n(.*?)^```", path.read_text(), re.M | re.S)
        for number, (language, code) in enumerate(blocks, start=1):
            if language == "diff":
                lines = [line[1:] for line in code.splitlines() if line[:1] != "-"]
                code = "\n".join(lines)
            found[f"{page_name(path)} {number}"] = code
    return found


def examples_of_docstrings():
    """Code by name: the file and the class or function."""
    found = {}
    for path in sorted((ROOT / "dgg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
            if examples:
                name = getattr(node, "name", "")
                found[f"{page_name(path)} {name}"] = "".join(e.source for e in examples)
    return found


EXAMPLES = {**examples_of_pages(), **examples_of_docstrings()}
RUN = {}


def stand_in(name):
    """Registers what an example is given and how what it did is checked."""

    def register(function):
        RUN[name] = function
        return function

    return register


def model_and_batches(batches=3):
    model = torch.nn.Linear(4, 2)
    generator = torch.Generator().manual_seed(0)
    tasks = [[torch.randn(5, 4, generator=generator) for _ in range(batches)] for _ in range(3)]
    return model, tasks


@stand_in("README.md 1")
def two_tasks(run, monkeypatch, tmp_path, capsys):
    run()
    forgot, learnt = [], []
    for line in capsys.readouterr().out.splitlines():
        _, lost, right = re.fullmatch(
            r"alpha=(.*): forgot (.*) points, learnt (.*) %", line
        ).groups()
        forgot.append(int(lost))
        learnt.append(int(right))
    # Guidance keeps more of the first task and costs a little of the second.
    assert forgot[1] < forgot[0] - 5 and min(learnt) > 70, (forgot, learnt)


@stand_in("docs/replay.md 1")
def plain_loop(run, monkeypatch, tmp_path, capsys):
    model, tasks = model_and_batches()
    names = run(
        model=model,
        tasks=tasks,
        loader=list,
        loss=lambda model, batch: model(batch).square().mean(),
        collate=torch.cat,
    )
    opt = names["opt"]
    assert opt.param_groups[0]["task_index"] == 2
    assert opt.param_groups[0]["draw_index"] == 9
    assert len(names["memory"]) == 9
    assert all(s.keys() == {"step", "exp_avg", "exp_avg_sq", "anchor"} for s in opt.state.values())


@stand_in("docs/replay.md 4")
@stand_in("docs/replay.md 5")
@stand_in("docs/recipes.md Weights & Biases, TensorBoard")
@stand_in("dgg/optim/summary.py summary")
@stand_in("dgg/optim/summary.py guidance_log")
def what_guidance_did(run, monkeypatch, tmp_path, capsys):
    model, opt, _, batches = _with_memory()
    for batch in batches:
        opt.zero_grad()
        model(batch).square().mean().backward()
        opt.step()
    seen = {}
    writer = types.SimpleNamespace(
        add_scalar=lambda name, value, step: seen.update({name: value}),
        log=lambda values, step: seen.update(values),
    )
    run(opt=opt, writer=writer, wandb=writer, step=3, number=0)
    printed = capsys.readouterr().out
    assert (
        seen.get("guidance/injected") == 1
        or "guidance/injected 1.0" in printed
        or ("3 steps since the anchor was set" in printed)
    )


@stand_in("docs/recipes.md How much was forgotten")
def how_much_was_forgotten(run, monkeypatch, tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    model, tasks = model_and_batches()
    opt = dgg.AdamW(model.parameters(), lr=0.01, alpha=1.0)

    def train(model, opt, task):
        for batch in task:
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()

    accuracy = lambda model, task: float((model(task[0]) > 0).float().mean())  # noqa: E731
    matrix = run(model=model, opt=opt, tasks=tasks, train=train, accuracy=accuracy)["matrix"]
    assert type(matrix).from_json("matrix.json") == matrix and matrix.bwt() is not None
    assert (tmp_path / "matrix.png").stat().st_size > 1000
    assert "'bwt':" in capsys.readouterr().out


@stand_in("dgg/hf/every_trainer.py install")
def framework(run, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    seen = []
    tuner = types.SimpleNamespace(run_exp=seen.append)
    made = types.SimpleNamespace(train=types.SimpleNamespace(tuner=tuner))
    installed = []
    monkeypatch.setattr(
        dgg.hf,
        "install",
        lambda *args, real=dgg.hf.install, **more: installed.append(real(*args, **more)),
    )
    run(llamafactory=made, config="config")
    assert seen == ["config"] and installed[0].callback.first_task == 3
    installed[0].remove()


def _with_memory():
    model, tasks = model_and_batches()
    opt = dgg.AdamW(model.parameters(), lr=0.01, alpha=1.0)
    memory = dgg.ReplayBuffer(per_task=3, seed=0)
    memory.add_task(tasks[0])
    opt.set_anchor()
    return model, opt, memory, tasks[1]


@stand_in("docs/guidance.md 1")
def loop_without_a_search(run, monkeypatch, tmp_path, capsys):
    model, tasks = model_and_batches()
    names = run(
        model=model,
        tasks=tasks,
        loader=list,
        loss=lambda model, batch: model(batch).square().mean(),
        collate=torch.cat,
    )
    stats = names["opt"].guidance_stats()
    assert -1 <= stats["alignment"] <= 1 and stats["pull"] >= 0


@stand_in("docs/guidance.md 2")
def importance_of_the_former_process(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    model, tasks = model_and_batches()

    def train(model, opt):
        for batch in tasks[0]:
            model(batch).square().mean().backward()
            opt.step()

    opt = run(model=model, train=train, dgg=dgg)["opt"]
    entry = opt.state[model.weight]
    assert entry["importance"].mean() > 0 and "anchor" in entry


@stand_in("docs/guidance.md 3")
def any_optimizer(run, monkeypatch, tmp_path, capsys):
    model, tasks = model_and_batches()

    def train(model, opt, task):
        for batch in task:
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()

    guidance = run(model=model, tasks=tasks, train=train)["guidance"]
    assert guidance.param_groups[0]["task_index"] == 2 and guidance._count_anchors() == 2
    assert "dgg.Guidance(Adafactor)" in guidance.summary()


@stand_in("docs/guidance.md 4")
def merging(run, monkeypatch, tmp_path, capsys):
    model, tasks = model_and_batches()

    def train(model, opt):
        batches = tasks[opt.param_groups[0]["task_index"]]
        for batch in batches:
            model(batch).square().mean().backward()
            opt.step()

    opt = run(model=model, tasks=tasks, train=train, dgg=dgg)["opt"]
    assert opt.param_groups[0]["task_index"] == 3
    # The weights are the merged ones, and so is the anchor.
    assert torch.equal(opt.state[model.weight]["anchor"], model.weight)


@stand_in("docs/replay.md 2")
@stand_in("docs/replay.md 3")
def replay_in_a_loop(run, monkeypatch, tmp_path, capsys):
    model, opt, memory, loader = _with_memory()
    steps = []
    opt.register_step_pre_hook(lambda *_: steps.append(bool(opt._replay)))
    run(
        model=model,
        opt=opt,
        memory=memory,
        loader=loader,
        loss=lambda model, batch: model(batch).square().mean(),
        collate=torch.cat,
    )
    assert steps == [True, True, True] and not opt._replay


@stand_in("docs/replay.md 6")
def statistics(run, monkeypatch, tmp_path, capsys):
    model, opt, _, _ = _with_memory()
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    run(opt=opt)


@stand_in("README.md 2")
@stand_in("docs/huggingface.md 1")
def trainer(run, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    given = []
    run(
        Trainer=lambda *args, **kwargs: given.append((args, kwargs)),
        model="model",
        args="args",
        task="task",
    )
    [(args, kwargs)] = given
    assert args == ("model", "args")
    cls, options = kwargs.pop("optimizer_cls_and_kwargs")
    opt = cls(torch.nn.Linear(4, 2).parameters(), **options)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["alpha"]) == (2e-4, 0.2)
    [callback] = kwargs.pop("callbacks")
    assert isinstance(callback, dgg.hf.GuidanceCallback)
    assert kwargs == {"train_dataset": "task"}


@stand_in("docs/huggingface.md 5")
@stand_in("dgg/optim/guided.py set_anchor")
def own_loop(run, monkeypatch, tmp_path, capsys):
    model, _ = model_and_batches()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = {"weights_of_the_former_task": weights, "weights_after_former_task": weights}
    names = run(model=model, resumed=None, K=1, **before)
    opt = names["opt"]
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    resumed = {"model": model.state_dict(), "optimizer": opt.state_dict()}
    other = torch.nn.Linear(4, 2)
    opt = run(model=other, resumed=resumed, K=1, **before)["opt"]
    assert opt.param_groups[0]["task_index"] == 1
    assert torch.equal(opt.state[other.weight]["anchor"], weights["weight"])
    assert torch.equal(other.weight, model.weight)


@stand_in("docs/checkpoints.md 3")
def resumed_loop(run, monkeypatch, tmp_path, capsys):
    for start, boundaries, trained in ((0, [0, 1], range(6)), (4, [1], range(4, 6))):
        set_anchors, steps, saves = [], [], []
        run(
            root="root",
            model="model",
            opt=types.SimpleNamespace(set_anchor=lambda task, to=set_anchors: to.append(task)),
            resume=lambda root, model, opt, start=start: start,
            steps_per_task=3,
            tasks=2,
            save_every=2,
            train_one_step=steps.append,
            save=lambda root, step, model, opt, to=saves: to.append(step),
        )
        assert set_anchors == boundaries
        assert steps == list(trained)
        assert saves == [s for s in (2, 4, 6) if s > start]


@stand_in("docs/checkpoints.md 4")
@stand_in("dgg/checkpoint/convert.py convert_state_dict")
def converted(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    model, _ = model_and_batches()
    state = {
        number: {"step": 7, "state1": torch.ones_like(p), "state2": torch.full_like(p, 2.0)}
        for number, p in enumerate(model.parameters())
    }
    group = {
        "params": [0, 1], "lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1,
        "alpha": 0.0, "t_alpha": None, "t_beta3": None,
    }  # fmt: skip
    saved = {"state": state, "param_groups": [group]}
    torch.save(saved, "optimizer.pt")
    opt = run(model=model, saved_by_bitsandbytes=saved)["opt"]
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["alpha"]) == (0.5, 0.2)
    assert all(s["step"] == 7 and s["exp_avg"].eq(1).all() for s in opt.state.values())
    assert opt.param_groups[0]["anchored"] == 2


@stand_in("docs/deepspeed.md 1")
def engine(run, monkeypatch, tmp_path, capsys):
    model, tasks = model_and_batches()

    class Engine:
        def __init__(self, model, optimizer, config):
            assert json.loads((ROOT / "docs" / config).read_text())["zero_optimization"]
            self.model, self.optimizer = model, optimizer

        def __call__(self, batch):
            return self.model(batch).square().mean()

        def backward(self, loss):
            loss.backward()

        def step(self):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def initialize(**kwargs):
        return Engine(**kwargs), kwargs["optimizer"], None, None

    deepspeed = types.SimpleNamespace(initialize=initialize)
    names = run(model=model, tasks=tasks, deepspeed=deepspeed)
    assert dgg.unwrap(names["engine"]) is names["opt"]
    assert names["opt"].param_groups[0]["task_index"] == 3


@stand_in("docs/deepspeed.md 2")
def universal(run, monkeypatch, tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.torch").save_file
    monkeypatch.chdir(tmp_path)
    pathlib.Path("path/of/the/former/task").mkdir(parents=True)
    model, _ = model_and_batches()
    save_file(model.state_dict(), "path/of/the/former/task/model.safetensors")
    loaded = []
    opt = dgg.AdamW(model.named_parameters())
    run(
        engine=types.SimpleNamespace(load_checkpoint=lambda *a, **k: loaded.append((a, k))),
        folder="folder",
        opt=opt,
        k=1,
    )
    assert loaded == [(("folder",), {"tag": "universal"})]
    assert opt.param_groups[0]["anchored"] == 2


@stand_in("dgg/optim/adam.py AdamW")
def adamw(run, monkeypatch, tmp_path, capsys):
    model, tasks = model_and_batches()
    forward = model.forward
    model.forward = lambda batch: forward(batch).square().mean()
    opt = run(model=model, tasks=tasks)["opt"]
    assert opt.param_groups[0]["task_index"] == 3


@stand_in("dgg/optim/guidance.py Guidance")
def guidance(run, monkeypatch, tmp_path, capsys):
    model = torch.nn.Linear(4, 4, bias=False)  # Muon takes matrices only
    _, (first_task, second_task, _) = model_and_batches()

    def train(model, opt, task):
        for batch in task:
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()

    names = run(model=model, train=train, first_task=first_task, second_task=second_task)
    assert names["guidance"].param_groups[0]["task_index"] == 1
    assert names["guidance"].param_groups[0]["draw_index"] == 6


@stand_in("dgg/optim/guided.py prepare_for_load")
def distributed(run, monkeypatch, tmp_path, capsys):
    model, _ = model_and_batches()
    opt = dgg.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    opt.set_anchor()
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    other = torch.nn.Linear(4, 2)
    names = run(
        model=other,
        path=tmp_path,
        dcp=dcp,
        get_state_dict=get_state_dict,
        set_state_dict=set_state_dict,
    )
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(opt.state[p]["anchor"], names["opt"].state[q]["anchor"])


@pytest.mark.parametrize(
    "name",
    # Slow for the import of transformers; test_hf.py trains with the same lines.
    [pytest.param(n, marks=pytest.mark.slow if RUN[n] is trainer else ()) for n in sorted(RUN)],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_example(name, monkeypatch, tmp_path, capsys, one_thread):
    code = compile(EXAMPLES[name], name, "exec")

    def run(**given):
        names = {"dgg": dgg, "torch": torch, **given}
        exec(code, names)
        return names

    RUN[name](run, monkeypatch, tmp_path, capsys)


def test_every_example_is_run():
    assert sorted(EXAMPLES) == sorted([*RUN, *ELSEWHERE])
    for name, (file, function) in ELSEWHERE.items():
        source = (ROOT / "tests" / file).read_text()
        (body,) = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        page, _, heading = name.partition(" ")
        if f"recipe({heading!r}" not in body:
            assert "exec(" in body and "read_text()" in body, f"{file}: {function} runs no example"
            assert pathlib.Path(page).name in source
        compile(EXAMPLES[name], name, "exec")


def test_recipes_are_short():
    for heading, code in recipes.recipes(recipes.PAGE.read_text()).items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 10, heading


def test_commands_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {}
    for path in PAGES:
        text = path.read_text()
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        spans = re.findall(r"`(make [^`]*)`", text)
        for line in "\n".join([*blocks, *spans]).splitlines():
            for target in re.findall(r"^make ([a-z-]+(?: [a-z-]+)*)", line):
                named.update(dict.fromkeys(target.split(), page_name(path)))
            for script in re.findall(r"^\S*python\S* (?:-\w )*(\S+\.py)", line):
                assert (ROOT / script).is_file(), f"{page_name(path)}: {script}"
    assert named.keys() >= {"demo", "test", "bench", "table"}
    assert not named.keys() - targets, named


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere():
    links = 0
    for path in PAGES:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            links += 1
            file, _, part = target.partition("#")
            goal = path.parent / file if file else path
            assert goal.exists(), f"{page_name(path)}: {target}"
            if part:
                headings = re.findall(r"^#+ (.*)$", goal.read_text(), re.M)
                assert part in map(slug, headings), f"{page_name(path)}: {target}"
    assert links > 10


def test_files_that_are_named_exist():
    named = set()
    for path in PAGES:
        text = path.read_text()
        for name in re.findall(r"`(test_\w+\.py)`", text):
            assert (ROOT / "tests" / name).is_file(), f"{page_name(path)}: {name}"
            named.add(name)
        for name in re.findall(r"`((?:dgg|kernels|csrc|tests|bench|docs)/[\w./-]+\.\w+)`", text):
            assert (ROOT / name).is_file(), f"{page_name(path)}: {name}"
            named.add(name)
    assert len(named) > 20
