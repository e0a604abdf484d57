"""What the page predicts for the task of a model: how inputs are read, what is answered, how two answers compare."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoTokenizer

from ..cards.model_card import task_of_class
from ..curves.quality import mean_state
from ..errors import AppError
from ..forward import accepted_arguments, run_model

Inputs = dict[str, Any]

# The most that a page answers at once.
NEW_TOKENS = 24
_MOST_TOKENS = 512
_MOST_CLASSES = 5
_BLANK = 64


@dataclass(frozen=True)
class Field:
    """One thing that the user gives.

    Attributes:
        kind: `image` or `text`.
        label: What it is called.
        default: The text that stands there first.
        optional: Whether it may stay empty.
    """

    kind: Literal["image", "text"]
    label: str
    default: str = ""
    optional: bool = False

    @property
    def sample(self) -> Any:
        """What stands for the input until there is one."""
        return Image.new("RGB", (_BLANK, _BLANK), "gray") if self.kind == "image" else self.default


@dataclass(frozen=True)
class Answer:
    """One line of a comparison.

    Attributes:
        name: What is answered.
        texts: The answers of the full model and of the slice.
        shares: Both as fractions of 1, where they are some.
    """

    name: str
    texts: tuple[str, ...]
    shares: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """What the full model and a slice answer: in one sentence, and line by line."""

    summary: str
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Task:
    """How a model is asked.

    Attributes:
        name: The Hub's name of the task.
        fields: What the user gives.
        encode: Makes forward arguments of it, one set for each run of the model.
        answer: Asks the model as it stands.
        compare: Compares the answers of the full model and of a slice.
    """

    name: str
    fields: tuple[Field, ...]
    encode: Callable[..., tuple[Inputs, ...]]
    answer: Callable[[Any, tuple[Inputs, ...]], Any]
    compare: Callable[[Any, Any], Comparison]

    @property
    def sample(self) -> tuple[Inputs, ...]:
        """Forward arguments before the user has given anything."""
        return self.encode(*(field.sample for field in self.fields))


def find_task(model: Any, folder: Path, image_size: int | None = None) -> Task:
    """How to ask a model, by its class and the processor beside it.

    Args:
        model: The model.
        folder: The checkpoint's folder, with its tokenizer or image processor.
        image_size: Side of images in pixels; None takes the processor's.

    Raises:
        AppError: The page has nothing for such a task, or the processor is missing.
    """
    name = task_of_class(type(model).__name__)
    if name == "image-classification":
        return _image_classification(model, folder, image_size)
    if name == "text-classification":
        return _text_classification(model, folder)
    if name == "fill-mask":
        return _fill_mask(model, folder)
    if name in ("text-generation", "text2text-generation"):
        return _generation(name, model, folder)
    if name == "feature-extraction" and model.main_input_name in ("pixel_values", "input_ids"):
        return _similarity(model, folder, image_size)
    raise AppError(
        f"The page asks no model for {name}, the task of {type(model).__name__}. Accepted: classification of images "
        "and texts, masked and generated text, and models without a head. The rest of the page is about this model."
    )


def _image_classification(model: Any, folder: Path, image_size: int | None) -> Task:
    encode = _image_encoder(model, folder, image_size)
    fields = (Field("image", "Image"),)
    return Task(
        "image-classification", fields, lambda image: (encode(image),), _scores(model), _by_class(_labels(model))
    )


def _text_classification(model: Any, folder: Path) -> Task:
    encode = _text_encoder(model, _tokenizer(folder))
    fields = (
        Field("text", "Text", "This is better than I had hoped."),
        Field("text", "Second text, for models of pairs", optional=True),
    )
    return Task(
        "text-classification",
        fields,
        lambda first, second="": (encode(first, second),),
        _scores(model),
        _by_class(_labels(model)),
    )


def _fill_mask(model: Any, folder: Path) -> Task:
    tokenizer = _tokenizer(folder)
    mask = tokenizer.mask_token
    if mask is None:
        raise AppError(f"The tokenizer in '{folder}' has no mask token. Accepted: that of the model. Save it there.")
    read = _text_encoder(model, tokenizer)

    def encode(text: str) -> tuple[Inputs, ...]:
        inputs = read(text)
        if not bool((inputs["input_ids"] == tokenizer.mask_token_id).any()):
            raise AppError(f"The text has no {mask} to fill in. Accepted: at least one. Write it where a word is due.")
        return (inputs,)

    def answer(model: Any, runs: tuple[Inputs, ...]) -> Tensor:
        place = int((runs[0]["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
        logits: Tensor = run_model(model, runs[0]).logits[0, place]
        return logits.float().softmax(-1).cpu()

    fields = (Field("text", f"Text with {mask}", f"Paris is the {mask} of France."),)
    return Task("fill-mask", fields, encode, answer, _by_class(lambda index: str(tokenizer.decode([index])).strip()))


def _generation(name: str, model: Any, folder: Path) -> Task:
    tokenizer = _tokenizer(folder)
    encode = _text_encoder(model, tokenizer, room=NEW_TOKENS)

    def answer(model: Any, runs: tuple[Inputs, ...]) -> list[int]:
        inputs = {key: value for key, value in runs[0].items() if key in ("input_ids", "attention_mask")}
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        ends = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=ends)[0]
        given = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return [int(token) for token in found[given:]]

    def compare(full: list[int], small: list[int]) -> Comparison:
        same = next(
            (place for place, pair in enumerate(zip(full, small, strict=False)) if pair[0] != pair[1]),
            min(len(full), len(small)),
        )
        summary = f"The first {same} of {len(full)} tokens are the same."
        if full == small:
            summary = f"Both go on alike for all {len(full)} tokens."
        elif not same:
            summary = "They go on differently from the first token on."
        texts = (tokenizer.decode(one, skip_special_tokens=True) for one in (full, small))
        lines = ((line for line in text.splitlines() if line.strip()) for text in texts)
        return Comparison(summary, (Answer("", tuple(" ↵ ".join(each).strip() for each in lines)),))

    fields = (Field("text", "Text to go on from", "The capital of France is"),)
    return Task(name, fields, lambda text: (encode(text),), answer, compare)


def _similarity(model: Any, folder: Path, image_size: int | None) -> Task:
    if model.main_input_name == "pixel_values":
        encode, kind = _image_encoder(model, folder, image_size), "image"
        fields = (Field("image", "First image"), Field("image", "Second image"))
    else:
        encode, kind = _text_encoder(model, _tokenizer(folder)), "text"
        fields = (
            Field("text", "First text", "A man is playing a guitar."),
            Field("text", "Second text", "Somebody makes music."),
        )

    def answer(model: Any, runs: tuple[Inputs, ...]) -> list[Tensor]:
        return [mean_state(model, inputs).cpu() for inputs in runs]

    def compare(full: list[Tensor], small: list[Tensor]) -> Comparison:
        def cosine(one: Tensor, other: Tensor) -> float:
            return float(cosine_similarity(one, other))

        near = [f"{cosine(*pair):.3f}" for pair in zip(full, small, strict=True)]
        rows = [Answer(f"First {kind} against second", tuple(f"{cosine(*states):.3f}" for states in (full, small)))]
        for place, one in zip(("First", "Second"), near, strict=True):
            rows.append(Answer(f"{place} {kind}, slice against full", ("", one)))
        return Comparison("Cosines of mean hidden states.", tuple(rows))

    return Task("feature-extraction", fields, lambda *given: tuple(map(encode, given)), answer, compare)


def _labels(model: Any) -> Callable[[int], str]:
    names = getattr(model.config, "id2label", None) or {}
    return lambda index: str(names.get(index, index))


def _scores(model: Any) -> Callable[[Any, tuple[Inputs, ...]], Tensor]:
    """Asks for one value per class: shares of 1, or the plain value of a regression."""
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"

    def answer(model: Any, runs: tuple[Inputs, ...]) -> Tensor:
        logits = run_model(model, runs[0]).logits[0].float().cpu()
        if len(logits) == 1:
            return Tensor(logits)
        return Tensor(logits.sigmoid() if several else logits.softmax(-1))

    return answer


def _by_class(name: Callable[[int], str]) -> Callable[[Tensor, Tensor], Comparison]:
    """Compares values of classes: those of the largest, and what each says."""

    def compare(full: Tensor, small: Tensor) -> Comparison:
        if len(full) == 1:
            return Comparison("", (Answer(name(0), tuple(f"{float(one):.4g}" for one in (full, small))),))
        count = min(_MOST_CLASSES, len(full))
        shown = dict.fromkeys([*full.topk(count).indices.tolist(), int(small.argmax())])
        answers = tuple(
            Answer(
                name(index),
                tuple(f"{100 * float(one[index]):.1f} %" for one in (full, small)),
                (float(full[index]), float(small[index])),
            )
            for index in shown
        )
        first, second = (name(int(one.argmax())) for one in (full, small))
        alike = int(full.argmax()) == int(small.argmax())
        return Comparison(f"Both say {first}." if alike else f"Full model: {first}. Slice: {second}.", answers)

    return compare


def _image_encoder(model: Any, folder: Path, image_size: int | None) -> Callable[[Any], Inputs]:
    processor = _processor(AutoImageProcessor, folder, "image processor", ("*processor_config.json",))
    options: dict[str, Any] = {}
    if image_size is not None:
        options = {"size": {"height": image_size, "width": image_size}, "do_center_crop": False}
    own_size = getattr(model.config, "image_size", None)
    # ViT and its kin refuse another size than they were made for unless told to interpolate.
    flexible = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters

    def encode(image: Any) -> Inputs:
        if image is None:
            raise AppError("There is no image yet. Upload one, or choose an example.")
        found = processor(images=image.convert("RGB"), return_tensors="pt", **options)
        inputs = _taken(model, found)
        if flexible and inputs["pixel_values"].shape[-1] != own_size:
            inputs["interpolate_pos_encoding"] = True
        return inputs

    return encode


def _text_encoder(model: Any, tokenizer: Any, room: int = 0) -> Callable[..., Inputs]:
    """Makes tokens of one text, or of a pair, as many as the model takes with room for more."""
    positions = getattr(model.config, "max_position_embeddings", None) or _MOST_TOKENS
    limit = max(1, min(_MOST_TOKENS, tokenizer.model_max_length, positions) - room)

    def encode(*texts: str) -> Inputs:
        given = [text for text in texts if text and text.strip()]
        if not given:
            raise AppError("There is no text yet. Write one, or choose an example.")
        inputs = _taken(model, tokenizer(*given, truncation=True, max_length=limit, return_tensors="pt"))
        if not inputs["input_ids"].numel():
            raise AppError("The tokenizer makes no token of this text. Write another one.")
        return inputs

    return encode


def _taken(model: Any, found: Any) -> Inputs:
    accepted = accepted_arguments(model)
    return {name: value for name, value in found.items() if name in accepted}


def _tokenizer(folder: Path) -> Any:
    return _processor(AutoTokenizer, folder, "tokenizer", ("tokenizer*", "vocab.*", "*.model", "tekken.json"))


def _processor(loader: Any, folder: Path, what: str, files: tuple[str, ...]) -> Any:
    try:
        # Without a file transformers makes a tokenizer that knows no word.
        if not any(path for pattern in files for path in folder.glob(pattern)):
            raise FileNotFoundError(f"There is no {' or '.join(files)}.")
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # files from outside are read by other libraries, which fail in any way
        reason = " ".join(str(error).split())[:200]
        raise AppError(
            f"'{folder}' has no {what} that can be read, so the model cannot be asked: {reason} "
            "Accepted: what save_pretrained of the processor wrote. Save it into the same folder."
        ) from error
