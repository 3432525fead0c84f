"""What a figure shows, read back from matplotlib's objects after they were laid out."""

from collections.abc import Iterator
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def laid_out(figure: Any) -> Any:
    """The figure with every position final."""
    FigureCanvasAgg(figure).draw()
    return figure


def texts_of(figure: Any) -> list[Text]:
    """Every text that is drawn."""
    renderer = figure.canvas.get_renderer()
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = [tick for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks)]
    # Ticks outside their axis keep texts that are never drawn.
    of_ticks = {text for tick in ticks for text in (tick.label1, tick.label2)}
    others = [text for text in figure.findobj(Text) if text not in of_ticks]
    return [
        text
        for text in (*others, *(text for axis in axes for text in _tick_texts(axis)))
        if text.get_visible()
        and text.get_text().strip()
        and (text.axes is None or text.axes.axison)
        and text.get_window_extent(renderer).width > 0
    ]


def _tick_texts(axis: Any) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    # A panel that shares its axis with a neighbor has ticks and no labels.
    places = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=False)
    return [text for at, text in places if low <= at <= high]


def overlaps(figure: Any) -> Iterator[tuple[str, str]]:
    """Pairs of texts that share paper."""
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts_of(figure)]
    for index, (name, box) in enumerate(boxes):
        for other, other_box in boxes[index + 1 :]:
            # A pixel less on each side: letters do not fill their boxes.
            if box.padded(-1).overlaps(other_box.padded(-1)):
                yield name, other


def cut_off(figure: Any) -> list[str]:
    """Texts that reach beyond the paper."""
    paper, renderer = figure.bbox, figure.canvas.get_renderer()
    return [
        text.get_text()
        for text in texts_of(figure)
        if not (
            paper.x0 - 1 <= (box := text.get_window_extent(renderer)).x0
            and box.x1 <= paper.x1 + 1
            and paper.y0 - 1 <= box.y0
            and box.y1 <= paper.y1 + 1
        )
    ]


def words_of(figure: Any) -> set[str]:
    """All texts."""
    return {text.get_text() for text in texts_of(figure)}


def points_of(panel: Any, marker: Any) -> list[tuple[float, float]]:
    """Positions of everything drawn with one marker, by x."""
    lines = [line for line in panel.lines if line.get_marker() == marker]
    found = [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]
    return sorted(found)
