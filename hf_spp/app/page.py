"""The page itself: where things stand on it, what happens when something is moved, and the server on this machine."""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..errors import AppError, SPPError
from ..subnetworks import SubnetworkSpec
from . import markup
from .contents import Contents, Times
from .tasks import Field

HOST = "127.0.0.1"
_MEASURING = "measuring …"
_SLICE = (
    "The slice is a view of the full model's own weights: the first heads and neurons of each layer, nothing refitted."
)
_FIRST_WIDTH = 50
_HEADER = ("", "Full model", "Slice", "Slice / full")


def import_gradio() -> ModuleType:
    """Import Gradio, told to send nothing to anybody.

    Raises:
        AppError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise AppError(
            f"The page needs Gradio, which cannot be imported here: {error}. Accepted: a recent version of it. Run "
            '`pip install "hf-spp[app]"`.'
        ) from error
    return gradio


@contextmanager
def serve(contents: Contents, *, port: int | None = None, open_browser: bool = False) -> Iterator[str]:
    """Serve the page on this machine, to nobody else, inside the block.

    Args:
        contents: What it shows.
        port: Where; None takes the first free one from 7860 up.
        open_browser: Whether to show it in the user's browser.

    Yields:
        Its address.

    Raises:
        AppError: Gradio is not installed, or the port is taken.
    """
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))
    with tempfile.TemporaryDirectory(prefix="hf-spp-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(contents)
        try:
            _, address, _ = page.launch(
                server_name=HOST,
                server_port=port,
                inbrowser=open_browser,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size="20mb",
                footer_links=[],
                ssr_mode=False,
                mcp_server=False,
                css=markup.CSS,
                theme=_theme(),
            )
        except OSError as error:
            raise AppError(
                f"The page cannot be served at {HOST}, port {port or '7860 to 7959'}: {' '.join(str(error).split())} "
                "Accepted: a free port. Give another --port, or leave it out."
            ) from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _theme() -> Any:
    """Gradio's own look in the fonts of the system: its own semi-bold lacks letters."""
    themes = import_gradio().themes
    return themes.Default(
        primary_hue="blue",
        font=[themes.Font(name) for name in ("system-ui", "sans-serif")],
        font_mono=[themes.Font(name) for name in ("ui-monospace", "monospace")],
    )


def build_page(contents: Contents) -> Any:
    """The page, not served yet.

    Args:
        contents: What it shows.

    Raises:
        AppError: Gradio is not installed.
    """
    gradio = import_gradio()
    fields = () if contents.task is None else contents.task.fields
    with gradio.Blocks(title=f"{contents.name} · hf-spp", analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(markup.block(markup.heading(contents.name, 2), markup.paragraph(contents.facts)))
        with gradio.Row():
            with gradio.Column(min_width=420):
                sliders = _Sliders(gradio, contents)
                stays = gradio.HTML(elem_id="stays")
            with gradio.Column(min_width=420, elem_classes="tight"):
                costs = gradio.HTML(elem_id="costs")
                times = gradio.HTML(elem_id="times")
        with gradio.Row():
            with gradio.Column(min_width=420):
                given, ask = _inputs(gradio, contents, fields)
            with gradio.Column(min_width=420):
                answers = gradio.HTML(elem_id="answers")
        quality = gradio.HTML(elem_id="quality")
        maps = gradio.HTML(elem_id="maps")

        handlers = _Handlers(contents, sliders.spec)
        inputs = [*sliders.all, *given]
        shown = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}

        def refresh_on(event: Callable[..., Any]) -> None:
            event(handlers.refresh, inputs, [stays, costs, times, quality, answers, maps], **shown).then(
                handlers.times, inputs, times, **shown
            )

        for event in (page.load, *(slider.input for slider in sliders.all[1:]), sliders.on_apart(), *ask):
            refresh_on(event)
    return page


class _Sliders:
    """One slider for the width, or two where heads and neurons are cut apart."""

    def __init__(self, gradio: ModuleType, contents: Contents) -> None:
        self.gradio, self.contents = gradio, contents
        both = len(contents.cuts) > 1 and "ffn" in contents.cuts

        def slider(label: str, name: str, visible: bool = True) -> Any:
            return gradio.Slider(10, 100, _FIRST_WIDTH, step=5, label=label, elem_id=name, visible=visible, buttons=[])

        what = "heads and neurons" if both else "neurons" if "ffn" in contents.cuts else "heads"
        self.width = slider(f"Width: % of the {what} of every layer", "width")
        self.apart = gradio.Checkbox(False, label="Heads and neurons apart", visible=both, container=False)
        self.heads = slider("% of the heads", "heads", visible=False)
        self.neurons = slider("% of the neurons", "neurons", visible=False)

    @property
    def all(self) -> list[Any]:
        return [self.apart, self.width, self.heads, self.neurons]

    def on_apart(self) -> Callable[..., Any]:
        """Change between one slider and two, which begin at its width; gives what to do then."""

        def change(apart: bool, width: float) -> Any:
            two = self.gradio.Slider(value=width, visible=apart)
            return self.gradio.Slider(visible=not apart), two, two

        changed = self.apart.input(
            change,
            [self.apart, self.width],
            [self.width, self.heads, self.neurons],
            show_progress="hidden",
            api_visibility="private",
        )
        return changed.then  # type: ignore[no-any-return]

    def spec(self, apart: bool, width: float, heads: float, neurons: float) -> tuple[SubnetworkSpec, float | None]:
        """The slice that the sliders say, and its one width."""
        if apart:
            return self.contents.spec(heads / 100, neurons / 100), None
        return self.contents.spec(width / 100, width / 100), width / 100


class _Handlers:
    """What happens when something on the page is moved."""

    def __init__(self, contents: Contents, spec: Callable[..., tuple[SubnetworkSpec, float | None]]) -> None:
        self.contents, self.spec = contents, spec

    def refresh(self, apart: bool, width: float, heads: float, neurons: float, *given: Any) -> tuple[str, ...]:
        """Everything but the times."""
        contents = self.contents
        spec, share = self.spec(apart, width, heads, neurons)
        widths = contents.widths(spec)
        metric = str(contents.reordering.config.metric_name)
        return (
            markup.block(markup.paragraph(contents.what_stays(spec))),
            markup.block(markup.table(_HEADER, contents.costs(spec, given), kind="fixed")),
            _times(None),
            self._quality(widths, share),
            self._answers(spec, given),
            markup.maps(contents.maps, widths, metric),
        )

    def times(self, apart: bool, width: float, heads: float, neurons: float, *given: Any) -> str:
        """The times, which take a moment."""
        spec, _ = self.spec(apart, width, heads, neurons)
        return _times(self.contents.times(spec, given))

    def _answers(self, spec: SubnetworkSpec, given: tuple[Any, ...]) -> str:
        try:
            found = markup.comparison(self.contents.predict(spec, given))
            return found + markup.block(markup.paragraph(_SLICE, "small"))
        except SPPError as error:
            return markup.block(markup.paragraph(str(error)))

    def _quality(self, widths: dict[str, int], share: float | None) -> str:
        measured = self.contents.measured
        known = measured is not None and measured.line_of(widths) is not None
        parts = [markup.block(markup.heading("Measured quality"))]
        if measured is not None:
            parts.append(markup.measured(measured, widths))
        if not known:
            name = (measured and measured.dataset) or "NAME"
            at = "" if share is None else f" --widths {share:g}"
            which = (
                "" if share is not None else " for the same share of both (in Python, width_report measures any spec)"
            )
            command = f"hf-spp curve {self.contents.name} --dataset {name}{at}"
            text = "This width was not measured." if measured else "No width of this checkpoint was measured yet."
            parts.append(markup.block(markup.paragraph(f"{text} The command that does it{which}:", command=command)))
        return "".join(parts)


def _times(found: Times | None) -> str:
    line: tuple[str, ...] = ("Milliseconds", _MEASURING, _MEASURING, "")
    note = "Forward passes on this machine."
    if found is not None:
        pair = (found.full, found.small)
        line = ("Milliseconds", *(f"{statistics.median(one):.3g}" for one in pair), f"{found.gain:.2f} × as fast")
        full, small = (f"{min(one):.3g}–{max(one):.3g}" for one in pair)
        note = (
            f"Medians of {len(found.full)} forward passes in turns ({full}, {small}) on this machine: {found.device}, "
            f"{found.threads} thread{'s' * (found.threads != 1)}. The slice is timed as a model of its own."
        )
    return markup.block(markup.table(_HEADER, [line], kind="fixed headless"), markup.paragraph(note, "small"))


def _inputs(gradio: ModuleType, contents: Contents, fields: tuple[Field, ...]) -> tuple[list[Any], list[Any]]:
    """The components that the user fills in, and the events on which the model is asked."""
    first = contents.examples[0] if contents.examples else [None] * len(fields)
    given, events = [], []
    for field, value in zip(fields, first, strict=True):
        if field.kind == "image":
            one = gradio.Image(
                value,
                type="pil",
                label=field.label,
                sources=["upload", "clipboard"],
                height=200,
                buttons=[],
                elem_classes="picture",
            )
            events.append(one.change)
        else:
            one = gradio.Textbox(value or field.default, label=field.label, lines=2, max_lines=6)
            events.append(one.submit)
        given.append(one)
    if any(field.kind == "text" for field in fields):
        events.append(gradio.Button("Predict", variant="primary", size="sm").click)
    if contents.examples:
        chosen = gradio.Examples([list(one) for one in contents.examples], given, label="Examples of held-out data")
        events.append(chosen.load_input_event.then)
    return given, events
