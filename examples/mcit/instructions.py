# SPDX-License-Identifier: BSD-3-Clause
"""Reads instruction-tuning sets in the format of LLaVA, CoIN and UCIT, and makes batches of them.

A training example is {"id", "images": [path], "turns": [[question, answer]]}: text alone, so a
memory of thousands is small. Images are opened when a batch is made.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

# isort: split
from settings import RefusedError

IMAGE = "<image>"
SCORES = ("exact", "contained", "rouge_l")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of the list in --tasks.

    Attributes:
        name: Its name in the results.
        train: File with the training examples.
        test: File with the questions and answers.
        images: Folder of its images within --images.
        score: Which score goes into the matrix; see scoring.py.
        references: File with captions in COCO's format, in place of the answers of ``test``.
    """

    name: str
    train: pathlib.Path
    test: pathlib.Path
    images: str = ""
    score: str = "exact"
    references: pathlib.Path | None = None


def read_tasks(path: pathlib.Path, folder: pathlib.Path) -> list[Task]:
    """Returns the tasks that a file lists; their files are in a folder, and they exist."""
    entries = _json(path, "--tasks")
    if not isinstance(entries, list) or not entries:
        raise RefusedError(f"--tasks {path} must be a list of tasks, as ucit.json is")
    known = {field.name for field in dataclasses.fields(Task)}
    tasks: list[Task] = []
    for number, entry in enumerate(entries):
        where = f"--tasks {path}, entry {number}"
        if not isinstance(entry, dict) or not {"name", "train", "test"} <= entry.keys():
            raise RefusedError(f'{where}: a task needs "name", "train" and "test"')
        if entry.keys() - known:
            raise RefusedError(
                f"{where}: {sorted(entry.keys() - known)} unknown; a task has {sorted(known)}"
            )
        name, score = entry["name"], entry.get("score", "exact")
        if not name or name != pathlib.PurePath(name).name or name in {t.name for t in tasks}:
            raise RefusedError(f"{where}: the name {name!r} is taken or cannot name a file")
        if score not in SCORES:
            raise RefusedError(f'{where}: the "score" {score!r} is none of {", ".join(SCORES)}')
        files = {k: folder / entry[k] for k in ("train", "test", "references") if k in entry}
        for key, file in files.items():
            if not file.is_file():
                raise RefusedError(
                    f'{where}: "{key}" is {file}, which does not exist; --instructions names the '
                    f"folder of these files (now {folder})"
                )
        tasks.append(Task(**{**entry, **files}))
    return tasks


def _json(path: pathlib.Path, argument: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedError(f"{argument} {path} cannot be read: {error}") from None
    except ValueError as error:
        raise RefusedError(f"{argument} {path} is not JSON: {error}") from None


def _entries(path: pathlib.Path, argument: str) -> list[dict[str, Any]]:
    entries = _json(path, argument)
    if isinstance(entries, list) and entries and all(isinstance(each, dict) for each in entries):
        return entries
    raise RefusedError(f"{path} must be a JSON list of examples, and not an empty one")


def _images(entry: dict[str, Any], task: Task, where: str) -> list[str]:
    found = entry.get("image") or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise RefusedError(f'{where}: "image" must be a path or a list of paths')
    return [str(pathlib.PurePosixPath(task.images, each)) for each in found]


def _turns(conversation: Any, images: list[str], where: str) -> list[list[str]]:
    """Returns the pairs of question and answer; images belong to the first question."""
    shape = '"conversations" must alternate {"from": "human", "value"} and {"from": "gpt", "value"}'
    if not isinstance(conversation, list) or not all(isinstance(t, dict) for t in conversation):
        raise RefusedError(f"{where}: {shape}")
    if conversation and conversation[0].get("from") == "gpt":
        conversation = conversation[1:]  # LLaVA leaves it out, too
    speakers = [turn.get("from") for turn in conversation]
    values = [turn.get("value") for turn in conversation]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise RefusedError(f"{where}: {shape}, and not {speakers}")
    if not all(isinstance(value, str) for value in values):
        raise RefusedError(f'{where}: every "value" must be text')
    marks = [value.count(IMAGE) for value in values]
    if any(marks[1:]) or marks[0] not in (0, len(images)):
        raise RefusedError(
            f'{where}: {len(images)} images in "image", and {IMAGE} stands {sum(marks)} times; it '
            "may stand in the first question only, once for every image"
        )
    values = [value.replace(IMAGE, "").strip() for value in values]
    return [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]


def read_training(task: Task) -> list[dict[str, Any]]:
    """Returns the training examples of a task; raises a RefusedError for other formats."""
    rows = []
    for number, entry in enumerate(_entries(task.train, "train")):
        where = f"{task.train}, entry {number}"
        if "conversations" not in entry:
            raise RefusedError(
                f'{where}: a training example needs "conversations", and this has only '
                f"{sorted(entry)}; is it a test set?"
            )
        images = _images(entry, task, where)
        name = str(entry.get("id", entry.get("question_id", number)))
        turns = _turns(entry["conversations"], images, where)
        rows.append({"id": name, "images": images, "turns": turns})
    return rows


def read_test(task: Task) -> list[dict[str, Any]]:
    """Returns the questions of a task: {"id", "images", "question", "answers"}."""
    captions = None if task.references is None else _captions(task.references)
    rows = []
    for number, entry in enumerate(_entries(task.test, "test")):
        where = f"{task.test}, entry {number}"
        images = _images(entry, task, where)
        question = entry.get("text", entry.get("question"))
        answers = entry.get("answer", entry.get("label", entry.get("answers")))
        if "conversations" in entry and (question is None or answers is None):
            asked, said = _turns(entry["conversations"], images, where)[0]
            question = asked if question is None else question
            answers = said if answers is None else answers
        if captions is not None:
            answers = captions.get(pathlib.PurePosixPath(images[0]).name) if images else None
        answers = [answers] if isinstance(answers, (str, int, float)) else answers
        if not isinstance(question, str) or not isinstance(answers, list) or not answers:
            raise RefusedError(
                f'{where}: a question needs "text" or "question", and "answer" or "label" (or '
                f'"conversations", or captions in "references"), and this has {sorted(entry)}'
            )
        rows.append({
            "id": entry.get("question_id", entry.get("id", number)), "images": images,
            "question": question.replace(IMAGE, "").strip(), "answers": [str(a) for a in answers],
        })  # fmt: skip
    return rows


def _captions(path: pathlib.Path) -> dict[str, list[str]]:
    """Returns the captions of every image by its file's name, from a file in COCO's format."""
    data = _json(path, "references")
    try:
        names = {
            each["id"]: pathlib.PurePosixPath(each["file_name"]).name for each in data["images"]
        }
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for each in data["annotations"]:
            found[names[each["image_id"]]].append(each["caption"])
    except (KeyError, TypeError) as error:
        raise RefusedError(
            f'{path} is not in COCO\'s caption format: "images" with "id" and "file_name", '
            f'"annotations" with "image_id" and "caption" ({type(error).__name__}: {error})'
        ) from None
    return found


def check(trained: Sequence[Task], tested: Sequence[Task], images: pathlib.Path) -> None:
    """Reads all files of these tasks and looks for the first image of each.

    Raises:
        RefusedError: Something is missing or in another format.
    """
    read = [(task.train, read_training(task)) for task in trained]
    read += [(task.test, read_test(task)) for task in tested]
    for file, rows in read:
        for path in next((row["images"] for row in rows if row["images"]), []):
            if not (images / path).is_file():
                raise RefusedError(
                    f"{file} has the image {path}, and {images / path} does not exist: --images "
                    'names the folder of the images, and "images" of a task one within it'
                )


class Batches:
    """Makes batches of examples: for training with labels, for testing with prompts alone.

    Args:
        processor: That of the model.
        images: Folder of the images.
        max_length: Tokens of a training example; what is longer is cut off at its end.
        padding: Pad images to squares with the mean colour, as LLaVA-1.5 was trained.
    """

    def __init__(self, processor, images: pathlib.Path, max_length: int, padding: bool) -> None:
        if not getattr(processor.tokenizer, "is_fast", False):
            raise RefusedError("--model has a slow tokenizer, which does not say where tokens lie")
        self.processor, self.images = processor, images
        self.max_length, self.padding = max_length, padding
        self.eos = processor.tokenizer.eos_token or ""
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = self.eos

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates training examples; labels are the answers, each with its end token."""
        texts, spans = zip(*(self.conversation(row) for row in rows), strict=True)
        batch = self._processed(rows, texts, "right", return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")
        inside = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for number, (text, places) in enumerate(zip(texts, spans, strict=True)):
            begins, ends = offsets[number].unbind(dim=1)
            # The processor has put many tokens for an image, all of them before the answers: so
            # places are counted from the end of the text, where its last token ends.
            shift = int(ends.max()) - len(text)
            for begin, end in places:
                inside[number] |= (ends > begin + shift) & (begins < end + shift) & (ends > begins)
        inside &= batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~inside, -100)
        return self._cut(batch)

    def prompts(self, rows: Sequence[dict[str, Any]]):
        """Returns the batch that asks these questions."""
        texts = [self._rendered([[row["question"], None]], len(row["images"])) for row in rows]
        return self._processed(rows, texts, "left")

    def conversation(self, row: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of an example and where its answers stand in it, end tokens included."""
        turns, count = row["turns"], len(row["images"])
        text, spans, before = "", [], ""
        for number, (question, answer) in enumerate(turns):
            prompt = self._rendered([*turns[:number], [question, None]], count)
            if number:
                # What the template puts behind the former answer, without an end token of its own.
                said = turns[number - 1][1]
                place = prompt.find(said, len(before))
                if place < 0:
                    raise RefusedError(
                        f"the chat template of --model changes the answer {said!r}, so that it "
                        "cannot be found: split conversations into single questions"
                    )
                text += prompt[place + len(said) :].removeprefix(self.eos)
            else:
                text = prompt
            before, begin = prompt, len(text)
            text += ("" if text[-1:].isspace() else " ") + answer + self.eos
            spans.append((begin, len(text)))
        return text, spans

    def _rendered(self, turns: Sequence[Sequence[str | None]], images: int) -> str:
        """Returns the prompt for the last answer, by the chat template or as Vicuna writes it."""
        if not getattr(self.processor, "chat_template", None):
            mark = f"{getattr(self.processor, 'image_token', IMAGE)}\n" * images
            said = [
                f"USER: {q} ASSISTANT:" + ("" if a is None else f" {a}{self.eos}") for q, a in turns
            ]
            return "".join(said).replace("USER: ", f"USER: {mark}", 1)
        messages = []
        for number, (question, answer) in enumerate(turns):
            shown = [{"type": "image"}] * (images if not number else 0)
            messages.append(
                {"role": "user", "content": [*shown, {"type": "text", "text": question}]}
            )
            if answer is not None:
                said = [{"type": "text", "text": answer}]
                messages.append({"role": "assistant", "content": said})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _processed(self, rows, texts, side: str, **more):
        images = [self._image(path) for row in rows for path in row["images"]]
        bos = self.processor.tokenizer.bos_token
        begun = bool(bos) and texts[0].startswith(bos)  # by the chat template
        return self.processor(
            text=list(texts), images=images or None, return_tensors="pt", padding=True,
            padding_side=side, add_special_tokens=not begun, **more,
        )  # fmt: skip

    def _image(self, path: str) -> Image.Image:
        try:
            with Image.open(self.images / path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise RefusedError(
                f"the image {self.images / path} cannot be read ({error}): --images names the "
                'folder of the images, and "images" of a task one within it'
            ) from None
        if not self.padding or image.width == image.height:
            return image
        mean = getattr(self.processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * part) for part in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _cut(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shape, limit = batch["input_ids"].shape, self.max_length
        if shape[1] > limit:
            token = getattr(self.processor, "image_token_id", None)
            if token is not None and (batch["input_ids"][:, limit:] == token).any():
                raise RefusedError(f"--max-length {limit} cuts an image off: give more tokens")
            for key, value in batch.items():
                if value.shape == shape:
                    batch[key] = value[:, :limit]
        return dict(batch)
